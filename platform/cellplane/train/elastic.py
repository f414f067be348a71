"""How many workers a run has: as many as the cluster holds between a least and a most, changed only at checkpoints.

A group of workers is fixed while it lives. A lost node ends it, and the next one is as large as what is left. While there
are fewer than wanted, rank 0 looks for room whenever a checkpoint is due; when it finds some, all ranks stop there, and
the next group begins at that very step: growing costs a restart, but no work. The losses do not depend on any of this,
because the world size only deals out the micro-batches of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cellplane.train.config import WorkersConfig

Resources = Mapping[str, float]
Room = Callable[[], bool]  # whether a larger group than the present one would fit


@dataclass(frozen=True)
class Nodes:
    """What the cluster has: ``totals`` of each node that lives, and what nobody uses, over all nodes."""

    totals: tuple[Resources, ...]
    free: Resources

    def holds(self, each: Resources) -> int:
        """How many workers would fit if nobody else used anything; a worker never spans nodes."""
        return sum(_times(total, each) for total in self.totals)

    def holds_now(self, each: Resources) -> int:
        """How many workers fit into what is free."""
        return min(self.holds(each), _times(self.free, each))


def _times(there: Resources, each: Resources) -> int:
    wanted: Iterable[tuple[str, float]] = ((name, amount) for name, amount in each.items() if amount > 0)
    return int(min(there.get(name, 0.0) // amount for name, amount in wanted))


def resources_of(workers: WorkersConfig) -> dict[str, float]:
    """What one worker takes."""
    return {"CPU": float(workers.cpus), **({"GPU": 1.0} if workers.use_gpu else {})}


def has_room(workers: WorkersConfig, nodes: Nodes, present: int) -> bool:
    """Whether a group larger than the ``present`` one, which goes on holding its share, would fit."""
    each = resources_of(workers)
    return present < workers.most and min(nodes.holds(each), present + nodes.holds_now(each)) > present


def agreed(opinion: bool, device: torch.device) -> bool:
    """What rank 0 thinks, on every rank."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return opinion
    flag = torch.tensor([int(opinion)], device=device)
    dist.broadcast(flag, src=0)
    return bool(flag.item())
