"""Micro-batches decoded, dropped and masked on the device are those of the ordinary way, value for value; so are the losses.

There is no GPU here: the same code runs on the CPU, without streams. tests/gpu repeats it on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from cellplane.cells import CellBatch
from cellplane.data.loader import ShardStore
from cellplane.data.sentences import StepPlan
from cellplane.model.cellplm import new_model
from cellplane.train.engine import TorchEngine
from cellplane.train.identity import full_model_config
from cellplane.train.loop import train
from cellplane.train.objective import MaskedObjective, Objective
from cellplane.train.staging import StagedObjective, objective_for

CPU = torch.device("cpu")
NARROW = {"panel_rate": 0.5, "panel_min_genes": 5, "targeted_genes": 12, "targeted_mask_scale": 0.4}


@pytest.fixture
def prepared(run_config) -> Callable[[str], tuple[list[float], list[CellBatch]]]:
    """Losses and cells of a short run whose objective is made by this name."""
    config = run_config("s", {"engine": {"name": "torch"}, "masking": NARROW})
    store = ShardStore(Path(config.shards))
    ways: dict[str, Callable[[], Objective]] = {
        "staged": lambda: StagedObjective(store, config.masking, CPU),
        "ordinary": lambda: MaskedObjective(store, config.masking),
    }

    def run(way: str) -> tuple[list[float], list[CellBatch]]:
        plan, objective, losses = StepPlan(store.sizes, config.plan), ways[way](), []
        engine = TorchEngine(new_model(full_model_config(config), 0), config.optimizer)
        train(engine, objective, plan, range(6), after_step=lambda done, result: bool(losses.append(result.loss)))
        return losses, [objective.prepare(micro_batch)[0] for micro_batch in plan.at(1)]

    return run


def test_losses_are_equal_to_the_last_bit(prepared):
    (staged, batches), (ordinary, expected) = prepared("staged"), prepared("ordinary")
    assert len(staged) == 6
    assert staged == ordinary
    for batch, other in zip(batches, expected, strict=True):
        for column in fields(CellBatch):
            if (theirs := getattr(other, column.name)) is not None:
                torch.testing.assert_close(getattr(batch, column.name), theirs, rtol=0, atol=0, equal_nan=True, msg=column.name)


def test_a_processor_reads_the_ordinary_way(run_config):
    config = run_config("s")
    store = ShardStore(Path(config.shards))
    assert isinstance(objective_for(store, config.masking, CPU), MaskedObjective)
