"""Any rank may die at any moment: what the run learns afterwards is, to the last bit, what it would have learned.

Without Ray every combination of ZeRO stage, rank and moment once; through Ray what the launcher adds: that it starts a
new group by itself, in time, and loses no more than the work since the last checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from cellplane.tracking.journal import Journal
from cellplane.train.launch import pretrain
from cellplane.train.run_folder import RunFolder
from tests.chaos.forks import run_forked
from tests.train.conftest import STEPS

pytestmark = pytest.mark.chaos

KEPT = 3  # steps between checkpoints, of 8
MOMENTS = {"first": 0, "second": 1, "boundary": KEPT - 1, "middle": STEPS // 2, "last": STEPS - 1}  # the step after which a rank dies
RESTART_S = 60.0
STAGES, RANKS = (0, 1, 2, 3), (0, 1)


@pytest.fixture(scope="module")
def undisturbed(run_config, tmp_path_factory, losses_of) -> Callable[[int], list[float]]:
    """The losses of a run of two workers at a ZeRO stage that nobody disturbs."""
    known: dict[int, list[float]] = {}

    def of(stage: int) -> list[float]:
        if stage not in known:
            home = tmp_path_factory.mktemp(f"undisturbed-{stage}")
            assert run_forked(configured(run_config, stage), home, 2) == [0, 0], logs(home)
            known[stage] = losses_of(home)
        return known[stage]

    return of


@pytest.fixture(scope="module")
def losses_of() -> Callable[[Path], list[float]]:
    """The loss of every step of run "r" under a home, each step once and in order."""

    def read(home: Path) -> list[float]:
        rows = Journal(home / "runs" / "r" / "journal.jsonl").rows()
        assert [row.step for row in rows] == list(range(1, len(rows) + 1))
        return [row.metrics["train/loss"] for row in rows]

    return read


def configured(run_config: Callable[..., Any], stage: int) -> Any:
    workers = {"count": 2, "max_failures": 1, "collective_timeout_s": 60}
    return run_config("r", {"engine": {"name": "deepspeed", "zero_stage": stage}, "checkpoint": {"every_steps": KEPT}, "workers": workers})


def logs(home: Path) -> str:
    return "\n".join(path.read_text()[-2000:] for path in sorted(home.glob("rank-*.log")))


def in_the_short_suite(stage: int, rank: int, moment: str) -> bool:
    """ZeRO 2 at every moment, the other stages where they differ: rank 1, in the middle and at the boundary."""
    return stage == 2 or (rank == 1 and moment in ("middle", "boundary"))


KILLS = [pytest.param(*one, marks=() if in_the_short_suite(*one) else pytest.mark.full) for one in product(STAGES, RANKS, MOMENTS)]


@pytest.mark.parametrize(("stage", "rank", "moment"), KILLS)
def test_a_rank_that_dies_leaves_no_trace_in_the_losses(stage, rank, moment, run_config, undisturbed, losses_of, tmp_path):
    config = configured(run_config, stage)
    codes = run_forked(config, tmp_path, 2, {"FAULT_AT": f"step_rank{rank}:{MOMENTS[moment]}"})
    assert codes[rank] == -9, logs(tmp_path)
    assert run_forked(config, tmp_path, 2) == [0, 0], logs(tmp_path)
    assert losses_of(tmp_path) == undisturbed(stage)


THROUGH_RAY = [*product((2,), RANKS, MOMENTS), *product((0, 1, 3), (1,), ("middle", "boundary"))]
EVERY_TIME = [(2, 0, "boundary"), (2, 1, "first"), (2, 1, "middle"), (2, 0, "last"), (3, 1, "middle")]


@pytest.mark.parametrize(
    ("stage", "rank", "moment"), [pytest.param(*one, marks=() if one in EVERY_TIME else pytest.mark.full) for one in THROUGH_RAY]
)
def test_ray_starts_a_new_group_that_goes_on_from_the_last_checkpoint(
    stage, rank, moment, ray_cluster, run_config, undisturbed, losses_of, cellplane_home, monkeypatch
):
    flag = cellplane_home / "killed"
    monkeypatch.setenv("FAULT_AT", f"step_rank{rank}:{MOMENTS[moment]}:{flag}")
    assert pretrain(configured(run_config, stage)).steps == STEPS
    assert losses_of(cellplane_home) == undisturbed(stage)
    folder = RunFolder.of("r")
    _, second = folder.starts()
    done = MOMENTS[moment] + 1
    assert done - KEPT <= second.step <= done  # at most one interval is done again
    rows = {row.step: row.time_ms for row in Journal(folder.journal).rows()}
    restart_s = rows[second.step + 1] / 1000 - os.stat(flag).st_mtime if second.step < STEPS else 0.0
    print(json.dumps({"stage": stage, "rank": rank, "moment": moment, "restart_s": round(restart_s, 1), "again": done - second.step}))
    assert restart_s <= RESTART_S


def test_a_stopped_rank_is_ended_and_replaced_and_everyone_says_where_it_stood(
    ray_cluster, run_config, undisturbed, losses_of, cellplane_home, monkeypatch
):
    flag = cellplane_home / "stopped"
    monkeypatch.setenv("FAULT_AT", f"step_rank1:4:{flag}")
    monkeypatch.setenv("FAULT_SIGNAL", "SIGSTOP")
    config = configured(run_config, 2)
    config = config.model_copy(update={"workers": config.workers.model_copy(update={"collective_timeout_s": 10})})
    assert pretrain(config).steps == STEPS
    assert losses_of(cellplane_home) == undisturbed(2)
    folder = RunFolder.of("r")
    assert "a step did not end within 10 s" in folder.starts()[1].because
    assert str(folder.stacks) in folder.starts()[1].because
    texts = {path.name.split("-pid")[0]: path.read_text() for path in folder.stacks.glob("rank-*.txt")}
    assert set(texts) == {"rank-0", "rank-1"}
    assert all("most recent call first" in text and "worker.py" in text for text in texts.values())
