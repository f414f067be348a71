"""The loop reads and masks the next step while the present one is computed, and is the same function of the step all the same."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cellplane.cells import CellBatch, single_panel_batch
from cellplane.config import to_plain
from cellplane.data.sentences import MicroBatch, PlanConfig, StepPlan
from cellplane.data.shards import read_manifest
from cellplane.errors import ConfigError, DataError, TrainingError
from cellplane.model.config import identifying
from cellplane.tracking.journal import Journal, JournalRow
from cellplane.train.checkpoint import Checkpoints, TrainingState
from cellplane.train.config import CheckpointConfig
from cellplane.train.identity import SECTIONS, run_identity
from cellplane.train.loop import Keeping, Looking, train
from cellplane.train.objective import Work
from cellplane.train.step import StepResult

PLAN = StepPlan(np.full(6, 10), PlanConfig(cells_per_micro_batch=20, micro_batches_per_step=1))


class Recorded:
    """An objective and an engine at once, that write down who did what."""

    rank, world_size = 0, 1

    def __init__(self, during: Callable[[int], None] = lambda step: None, fails_at: int = -1) -> None:
        self.during, self.fails_at = during, fails_at
        self.prepared: list[int] = []
        self.seen: list[tuple[int, int, float]] = []

    def weights(self) -> NDArray[np.float64]:
        return np.ones(6)

    def prepare(self, micro_batch: MicroBatch) -> tuple[CellBatch, None]:
        if len(self.prepared) == self.fails_at:
            raise DataError("a shard is damaged")
        self.prepared.append(micro_batch.key)
        empty = torch.zeros(0)
        return single_panel_batch(torch.zeros(1), empty, empty, torch.ones(3)), None

    def step(self, works: Sequence[Work], total: float, step: int) -> StepResult:
        self.during(step)
        self.seen.append((step, works[0].key, total))
        return StepResult(1.0, {}, 1.0, 0.1)

    def state(self, step: int, identity: str) -> TrainingState:
        return TrainingState(step, {"w": torch.full((2,), float(step))}, {}, identity)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "cellplane-prefetch"]


def test_the_next_step_is_prepared_while_this_one_is_computed():
    def during(step: int) -> None:
        deadline = threading.Event()
        while len(both.prepared) < min(step + 2, 6) and not deadline.wait(0.01):
            pass  # it would hang here if the loop prepared a step only when it is asked for

    both = Recorded(during)
    assert train(both, both, PLAN, range(6)) == 6
    assert len(both.prepared) == 6
    assert not threads()


def test_every_step_gets_its_own_work_in_order_wherever_the_run_begins():
    whole, resumed = Recorded(), Recorded()
    train(whole, whole, PLAN, range(9))
    train(resumed, resumed, PLAN, range(5, 9))
    assert whole.seen == [(step, PLAN.at(step)[0].key, 2.0) for step in range(9)]
    assert resumed.seen == whole.seen[5:]


def test_an_error_while_preparing_ends_the_run_at_its_step():
    both = Recorded(fails_at=3)
    with pytest.raises(DataError, match="a shard is damaged"):
        train(both, both, PLAN, range(9))
    assert [step for step, _, _ in both.seen] == [0, 1, 2]
    assert not threads()


def test_an_error_of_a_step_or_an_early_end_leaves_no_thread_behind():
    def fail(step: int) -> None:
        if step == 2:
            raise TrainingError("the loss is not finite")

    both = Recorded(fail)
    with pytest.raises(TrainingError, match="not finite"):
        train(both, both, PLAN, range(100))
    assert not threads()
    both = Recorded()
    assert train(both, both, PLAN, range(100), after_step=lambda done, result: done == 4) == 4
    assert not threads()
    assert len(both.prepared) <= 4 + 2


def test_weights_of_sentences_change_a_run_and_their_absence_leaves_an_earlier_one_as_it_was(run_config):
    config = run_config("w")
    earlier = {name: identifying(to_plain(config)[name]) for name in SECTIONS}
    del earlier["plan"]["weights"]
    earlier["data"] = read_manifest(Path(config.shards)).fingerprint
    assert run_identity(config) == sha256(json.dumps(earlier, sort_keys=True).encode()).hexdigest()
    weighted = run_config("w", {"plan": {"weights": {"column": "batch", "values": {"cells/B1": 3}}}})
    assert run_identity(weighted) != run_identity(config)


# What is written beside the steps


class Metered:
    """Says what it was asked."""

    def metrics(self, cells: int, seconds: float) -> dict[str, float]:
        assert seconds > 0
        return {"train/cells_per_s": 7.0, "train/cells": float(cells)}


def kept(tmp_path: Path, looking: Looking | None = None, every_steps: int = 4) -> Keeping:
    config = CheckpointConfig(every_steps=every_steps)
    journal = Journal(tmp_path / "journal.jsonl")
    return Keeping(Checkpoints(tmp_path / "checkpoints", keep=9), config, "id", journal, looking, Metered())


def rows(keeping: Keeping) -> list[JournalRow]:
    assert keeping.journal is not None
    return keeping.journal.rows()


def test_a_look_stands_in_the_row_of_its_step_every_so_often_and_at_the_last(tmp_path):
    looked: list[int] = []

    def look(done: int) -> dict[str, float]:
        looked.append(done)
        assert not rows(keeping) or rows(keeping)[-1].step == done - 1  # before the row is written, and before the checkpoint
        assert (tmp_path / "checkpoints" / f"step-{done:08d}").exists() is False
        return {"val/loss": 10.0 - done, "val/nb": 1.0}

    keeping = kept(tmp_path, Looking(3, look))
    both = Recorded()
    train(both, both, PLAN, range(8), keeping)
    assert looked == [3, 6, 8]
    assert [(row.step, row.metrics["val/loss"]) for row in rows(keeping) if "val/loss" in row.metrics] == [(3, 7.0), (6, 4.0), (8, 2.0)]
    assert len(rows(keeping)) == 8


def test_the_best_checkpoint_is_the_one_whose_step_was_looked_at_with_the_lowest_loss(tmp_path):
    losses = {4: 3.0, 8: 1.0, 10: 2.0}
    keeping = kept(tmp_path, Looking(4, lambda done: {"val/loss": losses[done]}), every_steps=2)
    both = Recorded()
    train(both, both, PLAN, range(10), keeping)
    best, newest = keeping.checkpoints.best_valid("id"), keeping.checkpoints.newest_valid("id")
    assert best is not None
    assert newest is not None
    assert (best.step, newest.step) == (8, 10)


def test_every_rank_looks_though_one_alone_writes(tmp_path):
    looked: list[int] = []
    looking = Looking(2, lambda done: {"val/loss": float(looked.append(done) or 0)})
    both = Recorded()
    train(both, both, PLAN, range(4), Keeping(Checkpoints(tmp_path), CheckpointConfig(every_steps=100), "id", None, looking))
    assert looked == [2, 4]


def test_the_meter_hears_of_all_planned_cells_and_has_the_word_about_speed(tmp_path):
    keeping = kept(tmp_path)
    both = Recorded()
    train(both, both, PLAN, range(3), keeping)
    assert [row.metrics["train/cells"] for row in rows(keeping)] == [20.0] * 3
    assert {row.metrics["train/cells_per_s"] for row in rows(keeping)} == {7.0}
    assert {"train/loss", "train/grad_norm", "train/lr", "train/nan_skips", "train/data_wait_s"} <= rows(keeping)[0].metrics.keys()


def test_an_engine_that_cannot_shard_is_not_asked_to(tmp_path):
    keeping = Keeping(Checkpoints(tmp_path), CheckpointConfig(every_steps=1, format="sharded"), "id")
    both = Recorded()
    with pytest.raises(ConfigError, match=r"take engine\.name deepspeed, or format consolidated"):
        train(both, both, PLAN, range(2), keeping)
