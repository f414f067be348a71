"""Training on a real GPU: staged micro-batches, every engine, several GPUs where there are several. `make gpu` runs them.

Noise is drawn by the device's own generator, so that losses are compared with the CPU's only where nothing is random.
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
from cellplane.train.objective import MaskedObjective
from cellplane.train.staging import StagedObjective, objective_for
from tests.train.conftest import run_config, shards  # noqa: F401  (fixtures of the training room)
from tests.train.scenario import GRADIENT_BAD, KEPT, LOSS_BAD, SPIKE
from tests.train.test_guard import tell

CUDA = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CERTAIN = {"latent": "ae", "dropout": 0.0}  # nothing random in the network
MODES = ["torch:0:none:float32", *(f"deepspeed:{stage}:none:float32" for stage in range(4)), "deepspeed:2:optimizer:float32"]
HALF = ["torch:0:none:bfloat16", *(f"deepspeed:{stage}:none:bfloat16" for stage in (1, 2, 3)), "deepspeed:3:parameters:bfloat16"]


@pytest.fixture
def losses_on(run_config) -> Callable[[torch.device], list[float]]:  # noqa: F811
    """The losses of a run of the plain engine on a device, its micro-batches prepared the way of that device."""
    config = run_config("g", {"engine": {"name": "torch"}, "model": CERTAIN, "optimizer": {"steps": 30}})
    store = ShardStore(Path(config.shards))

    def run(device: torch.device) -> list[float]:
        losses: list[float] = []
        engine = TorchEngine(new_model(full_model_config(config), 0).to(device), config.optimizer)
        objective = objective_for(store, config.masking, device)
        train(
            engine, objective, StepPlan(store.sizes, config.plan), range(30), after_step=lambda _, result: bool(losses.append(result.loss))
        )
        return losses

    return run


def test_micro_batches_prepared_on_the_device_are_the_ordinary_ones(run_config):  # noqa: F811
    config = run_config("g")
    store = ShardStore(Path(config.shards))
    staged, ordinary = StagedObjective(store, config.masking, CUDA), MaskedObjective(store, config.masking)
    for step in range(20):
        for micro_batch in StepPlan(store.sizes, config.plan).at(step):
            (batch, mask), (expected, hidden) = staged.prepare(micro_batch), ordinary.prepare(micro_batch)
            assert batch.gene.device.type == "cuda"
            assert torch.equal(mask.bits.cpu(), hidden.bits)
            for column in fields(CellBatch):
                if (theirs := getattr(expected, column.name)) is not None:
                    torch.testing.assert_close(getattr(batch, column.name).cpu(), theirs, rtol=0, atol=0, equal_nan=True, msg=column.name)


def test_a_network_without_noise_learns_as_on_a_processor(losses_on):
    assert losses_on(CUDA) == pytest.approx(losses_on(torch.device("cpu")), rel=1e-3)


def workers() -> list[object]:
    several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device alone")
    return [1, pytest.param(2, marks=several)]


@pytest.mark.parametrize("world_size", workers())
def test_every_engine_skips_what_is_poisoned_and_goes_on_from_a_checkpoint(world_size, tmp_path):
    for mode, found in tell(tmp_path, [*MODES, *HALF], world_size, "cuda").items():
        assert found["skipped"] == [LOSS_BAD, GRADIENT_BAD, SPIKE], mode
        assert found["untouched"] == [True] * 3, mode
        assert found["resumed_losses"] == pytest.approx(found["losses"][KEPT:], rel=1e-2 if mode.endswith("bfloat16") else 1e-4), mode
        assert found["dtypes"] == ["torch.float32"], mode
