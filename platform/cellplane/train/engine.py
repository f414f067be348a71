"""Engines: what turns the losses of a step's micro-batches into one optimizer step.

Both see the same plan and give the same numbers to rounding, whatever the world size: gradients are summed over
micro-batches and workers, looked at by the guard, clipped, applied by AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cellplane.errors import CheckpointError
from cellplane.train.checkpoint import TrainingState
from cellplane.train.config import EngineConfig, GuardConfig, OptimizerConfig
from cellplane.train.guard import Guard
from cellplane.train.objective import Work
from cellplane.train.optimizer import MOMENTS, AskingAdamW, begin_moments, set_lr, trainable
from cellplane.train.step import GUARD, Engine, StepResult, Sums, ranks

__all__ = ["Engine", "StepResult", "TorchEngine", "new_engine"]


class TorchEngine:
    """Plain PyTorch: gradients summed over the workers with one all-reduce per tensor."""

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, state: TrainingState | None = None, guard: GuardConfig | None = None
    ) -> None:
        self.rank, self.world_size = ranks()
        self.model, self.config = model, config
        self.device = next(model.parameters()).device
        self.guard = Guard(guard, None if state is None else state.extra.get(GUARD))
        if state is not None:
            model.load_state_dict(dict(state.weights), strict=True)
        self.optimizer = AskingAdamW(model, config)
        if state is not None:
            self._restore(state)

    def step(self, works: Sequence[Work], total: float, step: int) -> StepResult:
        """See Engine."""
        self.optimizer.zero_grad(set_to_none=True)
        sums = Sums()
        for work in works:
            weighted = sums.forward(self.model, work.to(self.device), step)
            (weighted / total).backward()  # type: ignore[no-untyped-call]
        means = sums.means(total, self.world_size)
        self._sum_gradients()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        *losses, grad_norm = torch.cat([means, norm.double()[None]]).tolist()  # the one moment that waits for the device
        objection = self.guard.objection(losses, grad_norm)
        lr = self.config.lr_at(step)
        if objection is None:
            set_lr(self.optimizer.param_groups, lr)
            self.optimizer.step()
        self.guard.settle(step, objection, grad_norm)
        parts = dict(zip(sums.names, losses[1:], strict=True))
        return StepResult(losses[0], parts, grad_norm, lr, objection is not None, self.guard.skips)

    def _sum_gradients(self) -> None:
        for parameter in self.model.parameters():
            if self.world_size > 1 and parameter.grad is not None:
                dist.all_reduce(parameter.grad)

    def state(self, step: int, identity: str) -> TrainingState:
        """See Engine."""
        extra = {GUARD: self.guard.remember()}
        if self.rank:
            return TrainingState(step, {}, {}, identity, extra)
        weights = {name: tensor.detach() for name, tensor in self.model.state_dict().items()}
        moments: dict[str, Tensor] = {}
        for name, parameter in trainable(self.model):
            if parameter not in self.optimizer.state:  # no step was taken yet
                begin_moments(self.optimizer, [parameter], 0)
            moments |= {f"{moment}:{name}": self.optimizer.state[parameter][moment].detach() for moment in MOMENTS}
        return TrainingState(step, weights, moments, identity, extra)

    def _restore(self, state: TrainingState) -> None:
        named = trainable(self.model)
        begin_moments(self.optimizer, (parameter for _, parameter in named), state.step - self.guard.skips)
        for name, parameter in named:
            for moment in MOMENTS:
                self.optimizer.state[parameter][moment].copy_(state.optimizer[f"{moment}:{name}"])


def new_engine(
    model: nn.Module,
    optimizer: OptimizerConfig,
    engine: EngineConfig,
    rounds: int,
    state: TrainingState | None,
    guard: GuardConfig | None = None,
) -> Engine:
    """The configured engine; ``rounds`` is the largest number of micro-batches one worker runs in a step."""
    if engine.name == "torch" and state is not None and state.shards is not None:
        raise CheckpointError(f"{state.shards} holds DeepSpeed's own files: go on with engine.name=deepspeed, as the run began")
    if engine.name == "torch":
        return TorchEngine(model, optimizer, state, guard)
    from cellplane.train.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, optimizer, engine, rounds, state, guard)
