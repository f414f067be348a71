"""A few of the kills of tests/chaos in every run of the suite: whoever dies when, the losses stay the same to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.forks import run_forked
from tests.train.conftest import STEPS

KEPT = 3
KILLS = [  # ZeRO stage, where a worker dies: a rank after so many steps, or the writer at its second checkpoint
    (2, f"step_rank1:{STEPS // 2}"),
    (2, "before_checkpoint:1"),
    (3, f"step_rank1:{STEPS - 1}"),
    (0, "step_rank0:0"),
]


@pytest.fixture(scope="module")
def undisturbed(run_config, tmp_path_factory) -> Callable[[int], Path]:
    """The home of a run of two workers at a ZeRO stage that nobody disturbs."""
    known: dict[int, Path] = {}

    def of(stage: int) -> Path:
        if stage not in known:
            known[stage] = tmp_path_factory.mktemp(f"undisturbed-{stage}")
            assert run_forked(run_config("r", {"engine": {"zero_stage": stage}}), known[stage], 2) == [0, 0]
        return known[stage]

    return of


@pytest.mark.parametrize(("stage", "point"), KILLS)
def test_a_kill_leaves_no_trace_in_the_losses(stage, point, run_config, undisturbed, losses, tmp_path):
    config = run_config("r", {"engine": {"zero_stage": stage}, "checkpoint": {"every_steps": KEPT, "asynchronous": True}})
    assert -9 in run_forked(config, tmp_path, 2, {"FAULT_AT": point})
    assert run_forked(config, tmp_path, 2) == [0, 0], (tmp_path / "rank-0.log").read_text()[-2000:]
    assert losses(tmp_path, "r") == losses(undisturbed(stage), "r")


def test_a_run_may_shrink_and_grow_and_change_its_stage(run_config, undisturbed, losses, tmp_path):
    """Two workers, one, two again; ZeRO 2, 3, 2: the micro-batches are the same, so the losses are to rounding."""
    config = run_config("r", {"engine": {"zero_stage": 2}})
    assert -9 in run_forked(config, tmp_path, 2, {"FAULT_AT": "step_rank1:3"})
    assert -9 in run_forked(run_config("r", {"engine": {"zero_stage": 3}}), tmp_path, 1, {"FAULT_AT": "step_rank0:3"})
    assert run_forked(config, tmp_path, 2) == [0, 0]
    assert losses(tmp_path, "r") == pytest.approx(losses(undisturbed(2), "r"), rel=1e-6)
