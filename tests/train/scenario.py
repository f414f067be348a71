"""One rank of a story told to an engine: steps of which some are poisoned, then the same again from a checkpoint in the middle.

`RANK=0 WORLD_SIZE=1 ... python scenario.py OUT.json MODE...`, a MODE being NAME:STAGE:OFFLOAD:PRECISION[:recompute]. Two
workers share three micro-batches unevenly. The network is wide enough that ZeRO 3 really shards it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cellplane.cells import CellBatch
from cellplane.model.cellplm import CellPLM, CellPLMOutput, new_model
from cellplane.model.config import MaskingConfig, ModelConfig
from cellplane.model.masking import Mask, mask_genes
from cellplane.model.noise import Noise
from cellplane.train.checkpoint import TrainingState
from cellplane.train.config import EngineConfig, GuardConfig, OptimizerConfig
from cellplane.train.engine import new_engine
from cellplane.train.objective import Work
from tests.tiny import TINY, random_batch

NETWORK = replace(TINY, n_blocks=1, width=320, n_heads=4, local_blocks=1, gene_init_sd=0.1, kl_weight=0.1, cluster_weight=0.1)
STEPS, LOSS_BAD, GRADIENT_BAD, SPIKE, KEPT = 16, 2, 3, 13, 4
OPTIMIZER = OptimizerConfig(steps=STEPS, lr=1e-4, warmup_steps=3)
GUARD = GuardConfig(max_skips=2, spike_factor=20.0)
DEVICE = torch.device(os.environ.get("SCENARIO_DEVICE", "cpu"))
BAD_KEY = 1  # the micro-batch that is poisoned: with two workers only rank 1 sees it
TOTAL = 6.0


class Poison(torch.autograd.Function):
    """The values as they are, their derivatives multiplied."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.factor, None


class Poisoned(CellPLM):
    """A network whose loss, or gradients alone, go wrong in certain steps."""

    def forward(self, batch: CellBatch, mask: Mask | None = None, noise: Noise | None = None) -> CellPLMOutput:
        out = super().forward(batch, mask, noise)
        if noise is None or out.loss is None or noise.key != BAD_KEY:
            return out
        total = out.loss.total
        if noise.step == LOSS_BAD:
            total = total * float("nan")
        if noise.step in (GRADIENT_BAD, SPIKE):
            total = Poison.apply(total, float("inf") if noise.step == GRADIENT_BAD else 1e6)
        return replace(out, loss=replace(out.loss, total=total))


def network(config: ModelConfig) -> Poisoned:
    poisoned = Poisoned(config)
    poisoned.load_state_dict(new_model(config, 0).state_dict())
    return poisoned


def works(step: int, rank: int, world_size: int) -> list[Work]:
    """This rank's of three micro-batches; what it lacks is filled up at weight 0."""
    made = []
    for index in range(rank, 3 + (-3) % world_size, world_size):
        key = index if index < 3 else 0
        batch = random_batch([12, 9], seed=100 * step + key)
        mask = mask_genes(batch, np.array([12, 9]), MaskingConfig())
        made.append(Work(batch, mask, torch.ones(2) * (index < 3), key))
    return made


def engine_of(mode: Sequence[str], world_size: int, state: TrainingState | None) -> Any:
    name, stage, offload, precision, *more = mode
    config = replace(NETWORK, recompute="recompute" in more, precision=precision)
    engine = EngineConfig(name=name, zero_stage=int(stage), offload=offload, bf16=precision == "bfloat16" and name == "deepspeed")
    return new_engine(network(config).to(DEVICE), OPTIMIZER, engine, -(-3 // world_size), state, GUARD)


def same(one: TrainingState, other: TrainingState) -> bool:
    """Bit for bit."""
    pairs = ((one.weights, other.weights), (one.optimizer, other.optimizer))
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


def copied(state: TrainingState) -> TrainingState:
    tensors = [{name: tensor.clone() for name, tensor in part.items()} for part in (state.weights, state.optimizer)]
    return replace(state, weights=tensors[0], optimizer=tensors[1], extra=json.loads(json.dumps(state.extra)))


def told(mode: Sequence[str], rank: int, world_size: int) -> dict[str, Any]:
    """What happened, as rank 0 saw it."""
    engine = engine_of(mode, world_size, None)
    first = copied(engine.state(0, "id"))
    results, untouched, kept = [], [], None
    for step in range(STEPS):
        before = copied(engine.state(step, "id")) if step in (LOSS_BAD, GRADIENT_BAD, SPIKE) else None
        results.append(engine.step(works(step, rank, world_size), TOTAL, step))
        if before is not None:
            untouched.append(same(before, engine.state(step, "id")))
        if step + 1 == KEPT:
            kept = copied(engine.state(KEPT, "id"))
    last = copied(engine.state(STEPS, "id"))
    held: list[TrainingState | None] = [None]
    if world_size > 1:
        held = [kept]
        dist.broadcast_object_list(held)
        kept = held[0]
    again = engine_of(mode, world_size, kept)
    resumed = [again.step(works(step, rank, world_size), TOTAL, step) for step in range(KEPT, STEPS)]
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "skipped": [step for step, result in enumerate(results) if result.skipped],
        "skips": results[-1].skips,
        "untouched": untouched,
        "moved": not same(first, last),
        "dtypes": sorted({str(tensor.dtype) for tensor in (*last.weights.values(), *last.optimizer.values())}),
        "resumed_losses": [result.loss for result in resumed],
        "resumed_skips": resumed[-1].skips,
        "resumed_same": same(last, again.state(STEPS, "id")),
        "weights_sum": float(sum(tensor.double().abs().sum() for tensor in last.weights.values())),
    }


def main() -> None:
    torch.set_num_threads(1)
    if DEVICE.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo", timeout=timedelta(seconds=120))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found = {mode: told(mode.split(":"), rank, world_size) for mode in sys.argv[2:]}
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    os._exit(0)  # DeepSpeed's exit handlers take seconds


if __name__ == "__main__":
    main()
