"""Fifty steps are the same fifty steps on any number of workers, at any ZeRO stage, and across changes of both on the way.

Float32, dropout on, the released learning rate. The network is wide enough for ZeRO 3 to share its matrices out. Runs are
changed by killing them: what goes on is the newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from cellplane.train.config import PretrainConfig
from tests.train.conftest import MakeConfig, RunWorkers

pytestmark = pytest.mark.chaos

STEPS, SAME = 50, 1e-6
MODEL = {"width": 320, "n_heads": 4, "local_blocks": 1, "recompute": True}
FIRST, SECOND = 17, 12  # steps that the first and the second group do before they are killed; checkpoints are ten apart

EVERY_TIME = ((0, 2), (1, 2), (2, 1), (2, 3), (3, 3))  # (ZeRO stage, workers) of the short suite

Losses = Callable[[Path, str], list[float]]
Settings = Mapping[str, Any]


def stage(number: int, **more: Any) -> Settings:
    return {"name": "deepspeed", "zero_stage": number, **more}


PLAIN: Settings = {"name": "torch"}


@pytest.fixture(scope="module")
def of(run_config: MakeConfig) -> Callable[[Settings], PretrainConfig]:
    def make(engine: Settings) -> PretrainConfig:
        changes = {"engine": engine, "model": MODEL, "optimizer": {"steps": STEPS, "lr": 2e-4}, "checkpoint": {"every_steps": 10}}
        return run_config("w", changes)

    return make


@pytest.fixture(scope="module")
def reference(of, run_workers: RunWorkers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of an uninterrupted run of one worker of plain PyTorch."""
    home = tmp_path_factory.mktemp("reference")
    assert run_workers(of(PLAIN), home, 1) == [0], log_of(home)
    return home


def log_of(home: Path) -> str:
    return "\n".join(path.read_text()[-2000:] for path in sorted(home.glob("rank-*.log")))


def assert_the_same(found: Sequence[float], expected: Sequence[float]) -> None:
    assert len(found) == len(expected) == STEPS
    assert found == pytest.approx(expected, rel=SAME)


@pytest.mark.parametrize(
    ("engine", "workers"),
    [
        (PLAIN, 2),
        (PLAIN, 3),
        (PLAIN, 4),  # one more than there are micro-batches
        *(
            pytest.param(stage(number), workers, marks=() if (number, workers) in EVERY_TIME else pytest.mark.full)
            for number in range(4)
            for workers in (1, 2, 3)
        ),
        (stage(2, offload="optimizer"), 2),
        pytest.param(stage(3, offload="parameters"), 2, marks=pytest.mark.full),
    ],
    ids=lambda value: value if isinstance(value, int) else "-".join(map(str, value.values())),
)
def test_fifty_steps_are_the_same(engine, workers, of, reference, run_workers, tmp_path, losses: Losses):
    assert run_workers(of(engine), tmp_path, workers) == [0] * workers, log_of(tmp_path)
    assert_the_same(losses(tmp_path, "w"), losses(reference, "w"))


@pytest.mark.parametrize(
    "path",
    [
        [(stage(2), 2), (stage(2), 1), (stage(2), 2)],
        [(stage(2), 1), (stage(2), 3), (stage(2), 1)],
        [(stage(2), 2), (stage(3), 2), (stage(2), 2)],
        pytest.param([(stage(3), 2), (stage(0), 2), (PLAIN, 1)], marks=pytest.mark.full),
        pytest.param([(stage(1, offload="optimizer"), 2), (PLAIN, 2), (stage(3, offload="parameters"), 1)], marks=pytest.mark.full),
    ],
    ids=["2 to 1 to 2 workers", "1 to 3 to 1 workers", "ZeRO 2 to 3 to 2", "ZeRO 3 to 0 to none", "offloaded, plain, offloaded"],
)
def test_a_run_that_changes_on_the_way_takes_the_same_steps(path, of, reference, run_workers, tmp_path, losses: Losses):
    for (engine, workers), (killed_after, newest) in zip(path, ((FIRST, 10), (SECOND, 20), (None, STEPS)), strict=True):
        fault = "" if killed_after is None else f"step_rank{workers - 1}:{killed_after}"
        codes = run_workers(of(engine), tmp_path, workers, fault)
        assert codes == [0] * workers if killed_after is None else -9 in codes, log_of(tmp_path)
        assert max((tmp_path / "runs" / "w" / "checkpoints").glob("step-*")).name == f"step-{newest:08d}"
    assert_the_same(losses(tmp_path, "w"), losses(reference, "w"))
