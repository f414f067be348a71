"""What an engine is asked for and answers: one optimizer step from the losses of a step's micro-batches.

Each sentence's loss is weighted by its share of the whole step, so that gradients and losses summed over micro-batches and
workers are the same for any number of either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cellplane.errors import TrainingError
from cellplane.model.noise import Noise
from cellplane.train.checkpoint import TrainingState
from cellplane.train.objective import Work
from cellplane.train.sharded import Group

GUARD = "guard"  # what a state's `extra` holds of the guard


@dataclass(frozen=True)
class StepResult:
    """Weighted means over the whole step, equal on every rank: ``loss`` and its ``parts``; the norm before clipping.

    ``skipped``: the guard did not let the step change anything; ``skips`` counts those of the run so far.
    """

    loss: float
    parts: Mapping[str, float]
    grad_norm: float
    lr: float
    skipped: bool = False
    skips: int = 0


class Engine(Protocol):
    """One worker's side of a training run."""

    rank: int
    world_size: int

    def step(self, works: Sequence[Work], total: float, step: int) -> StepResult:
        """Runs this rank's micro-batches of a step whose sentences weigh ``total`` together, and updates the weights.

        Raises TrainingError when the guard gives up.
        """

    def state(self, step: int, identity: str) -> TrainingState:
        """The consolidated state after ``step`` steps; every rank must call it, rank 0's holds the tensors.

        They may be the live ones: copy what must outlast the next step.
        """


@runtime_checkable
class ShardingEngine(Protocol):
    """An engine whose ranks can write their own parts of the state; ``group`` is what these fit."""

    @property
    def group(self) -> Group:
        """What a sharded checkpoint fits."""

    def head(self, step: int, identity: str) -> TrainingState:
        """The state after ``step`` steps without its tensors; every rank must call it. TrainingError when it is not finite."""

    def write_shards(self, folder: Path) -> None:
        """This rank's files."""


def ranks() -> tuple[int, int]:
    """This rank and how many there are; (0, 1) without a process group."""
    distributed = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)


@dataclass
class Sums:
    """Weighted loss sums of the micro-batches so far: the loss, then its parts named ``names``; float64, on their device."""

    values: Tensor | None = None
    names: tuple[str, ...] = ()

    def forward(self, model: nn.Module, work: Work, step: int) -> Tensor:
        """The weighted loss of a micro-batch, with gradient; added to the sums."""
        loss = model(work.batch, work.mask, Noise(work.key, step)).loss
        if loss is None:
            raise TrainingError("the network has nothing to learn from this batch: no mask, decoder or labels")
        weighted: Tensor = (loss.total * work.weights).sum()
        part = torch.cat([loss.total.detach()[None], loss.parts]).double() @ work.weights.double()
        self.values, self.names = part if self.values is None else self.values + part, loss.names
        return weighted

    def means(self, total: float, world_size: int) -> Tensor:
        """Weighted means over all ranks, [1 + n_parts]; every rank must call it."""
        if self.values is None:
            raise TrainingError("a step needs at least one micro-batch")
        if world_size > 1:
            dist.all_reduce(self.values)
        return self.values / total
