"""Steps whose numbers cannot be trusted are skipped, counted, and given up on when they do not end.

A batch that makes the loss or its gradients infinite must not reach the weights, because nothing brings them back. What
is decided depends on the numbers of the step and on what the guard remembers, and what it remembers is part of every
checkpoint: a resumed run decides alike, and so does every worker, since all see the same sums.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cellplane.errors import TrainingError
from cellplane.train.checkpoint import TrainingState
from cellplane.train.config import GuardConfig

log = logging.getLogger(__name__)

REMEMBERED = 50  # gradient norms of the last steps taken, whose median is the usual one
ENOUGH = 10  # fewer of them say nothing about what is usual

WAY_OUT = "lower the learning rate or check the counts. The last checkpoint is intact"


class Guard:
    """``skips`` of the run so far, those in a row at the moment, and the norms of the last steps taken.

    ``remembered`` is what a checkpoint holds of it (see `remember`); nothing where it was made by an earlier version.
    """

    def __init__(self, config: GuardConfig | None = None, remembered: Mapping[str, Any] | None = None) -> None:
        self.config = GuardConfig() if config is None else config
        known = remembered or {}
        self.skips, self.in_a_row = int(known.get("skips", 0)), int(known.get("in_a_row", 0))
        self.norms: deque[float] = deque(map(float, known.get("norms", ())), maxlen=REMEMBERED)

    def remember(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-ready."""
        return {"skips": self.skips, "in_a_row": self.in_a_row, "norms": list(self.norms)}

    def objection(self, losses: Sequence[float], norm: float) -> str | None:
        """Why this step must not be taken, or None. Changes nothing: it may be asked any number of times."""
        if not all(map(math.isfinite, losses)):
            return "the loss is not finite"
        if not math.isfinite(norm):
            return "the gradients are not finite"
        if self.config.spike_factor and len(self.norms) >= ENOUGH:
            usual = statistics.median(self.norms)
            if norm > self.config.spike_factor * usual:
                return f"the gradients' norm {norm:.3g} is more than {self.config.spike_factor:g} times the usual {usual:.3g}"
        return None

    def settle(self, step: int, objection: str | None, norm: float) -> None:
        """Counts this step, 0, 1, ..., as taken or skipped. TrainingError when too many in a row were skipped."""
        if objection is None:
            self.in_a_row = 0
            self.norms.append(norm)
            return
        self.skips, self.in_a_row = self.skips + 1, self.in_a_row + 1
        if self.in_a_row > self.config.max_skips:
            often = f", as in all of the last {self.in_a_row} steps" if self.in_a_row > 1 else ""
            raise TrainingError(f"step {step + 1}: {objection}{often}; {WAY_OUT}")
        log.warning("step %d is skipped: %s; %d in a row, %d in all", step + 1, objection, self.in_a_row, self.skips)


def check_finite(state: TrainingState) -> None:
    """TrainingError when a tensor of the state holds a value that is not finite: such a state is never written."""
    for name, tensor in (*state.weights.items(), *state.optimizer.items()):
        if not all_finite([tensor]):
            raise TrainingError(f"after step {state.step} {name} is not finite, so no checkpoint is written; {WAY_OUT}")


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every value is finite. The extremes say it, in one pass and without memory: NaN is both of them."""
    return all(bool(end.isfinite()) for tensor in tensors if tensor.numel() for end in torch.aminmax(tensor.detach()))
