"""Engines: what turns the losses of a step's micro-batches into one optimizer step.

Both engines see the same plan and give the same numbers to rounding, whatever the world size: each sentence's loss is
weighted by its share of the whole step, gradients are summed over micro-batches and workers, clipped, applied by AdamW.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cellplane.errors import TrainingError
from cellplane.model.noise import Noise
from cellplane.train.checkpoint import TrainingState
from cellplane.train.config import EngineConfig, OptimizerConfig
from cellplane.train.objective import Work

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state beside its step counter


@dataclass(frozen=True)
class StepResult:
    """Weighted means over the whole step, equal on every rank: ``loss`` and its ``parts``; the norm before clipping."""

    loss: float
    parts: Mapping[str, float]
    grad_norm: float
    lr: float


class Engine(Protocol):
    """One worker's side of a training run."""

    rank: int
    world_size: int

    def step(self, works: Sequence[Work], total: float, step: int) -> StepResult:
        """Runs this rank's micro-batches of a step whose sentences weigh ``total`` together, and updates the weights."""

    def state(self, step: int, identity: str) -> TrainingState:
        """The consolidated state after ``step`` steps; every rank must call it."""


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Trainable parameters, the embedder apart when it has its own learning rate; `scale` multiplies the schedule."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    embedder = [parameter for name, parameter in named if name.startswith("embedder.")]
    rest = [parameter for name, parameter in named if not name.startswith("embedder.")]
    if config.embedder_lr_scale == 1.0:
        return [{"params": rest + embedder, "scale": 1.0}]
    groups = [{"params": rest, "scale": 1.0}, {"params": embedder, "scale": config.embedder_lr_scale}]
    return [group for group in groups if group["params"]]


def new_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW: nine times faster than the loop at 72 M parameters, and accepted by ZeRO (STACK.md 9)."""
    return torch.optim.AdamW(parameter_groups(model, config), lr=config.lr, weight_decay=config.weight_decay, fused=True)


def _set_lr(groups: Sequence[dict[str, Any]], lr: float) -> None:
    for group in groups:
        group["lr"] = lr * group.get("scale", 1.0)


def _forward(model: nn.Module, work: Work, step: int) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Weighted loss sum with gradient, weighted [1 + n_parts] sums without, and the names of the parts."""
    loss = model(work.batch, work.mask, Noise(work.key, step)).loss
    if loss is None:
        raise TrainingError("the network has nothing to learn from this batch: no mask, decoder or labels")
    weighted = (loss.total * work.weights).sum()
    sums = torch.cat([loss.total.detach()[None], loss.parts]).double() @ work.weights.double()
    return weighted, sums, loss.names


def _finite_norm(norm: float) -> float:
    """The gradients' norm; TrainingError when it is not finite, because the weights would not be either."""
    if not math.isfinite(norm):
        raise TrainingError("the gradients are not finite; lower the learning rate or check the counts. The last checkpoint is intact")
    return norm


def _means(sums: Tensor, total: float, world_size: int) -> Tensor:
    """Weighted means over all ranks; raises TrainingError when one is not finite."""
    if world_size > 1:
        dist.all_reduce(sums)
    means = sums / total
    if not bool(means.isfinite().all()):
        raise TrainingError("the loss is not finite; lower the learning rate or check the counts. The last checkpoint is intact")
    return means


class TorchEngine:
    """Plain PyTorch: gradients summed over the workers with one all-reduce per tensor."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, state: TrainingState | None = None) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        self.model, self.config = model, config
        self.device = next(model.parameters()).device
        if state is not None:
            model.load_state_dict(dict(state.weights), strict=True)
        self.optimizer = new_optimizer(model, config)
        if state is not None:
            self._restore(state)

    def step(self, works: Sequence[Work], total: float, step: int) -> StepResult:
        """See Engine."""
        self.optimizer.zero_grad(set_to_none=True)
        sums: Tensor | None = None
        names: tuple[str, ...] = ()
        for work in works:
            weighted, part, names = _forward(self.model, work.to(self.device), step)
            (weighted / total).backward()  # type: ignore[no-untyped-call]
            sums = part if sums is None else sums + part
        if sums is None:
            raise TrainingError("a step needs at least one micro-batch")
        means = _means(sums, total, self.world_size)
        for parameter in self.model.parameters():
            if self.world_size > 1 and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
        norm = _finite_norm(float(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)))
        lr = self.config.lr_at(step)
        _set_lr(self.optimizer.param_groups, lr)
        self.optimizer.step()
        loss, *parts = means.tolist()
        return StepResult(loss, dict(zip(names, parts, strict=True)), norm, lr)

    def state(self, step: int, identity: str) -> TrainingState:
        """See Engine."""
        weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        moments = {
            f"{moment}:{name}": self.optimizer.state[parameter][moment].detach().clone()
            for name, parameter in self.model.named_parameters()
            for moment in MOMENTS
            if parameter in self.optimizer.state
        }
        return TrainingState(step, weights, moments, identity)

    def _restore(self, state: TrainingState) -> None:
        for name, parameter in self.model.named_parameters():
            moments: dict[str, Tensor] = {m: state.optimizer[f"{m}:{name}"].to(self.device).clone() for m in MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(state.step), device=self.device), **moments}


class DeepSpeedEngine:
    """DeepSpeed with ZeRO 0-3; state is consolidated, so that any other engine, stage or world size can go on from it."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, engine: EngineConfig, rounds: int, state: TrainingState | None) -> None:
        import deepspeed
        import deepspeed.ops

        # On a CPU DeepSpeed compiles an op at start that only its inference uses, and fails without a compiler (STACK.md 1).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.model, self.config, self.rounds = model, config, rounds
        if state is not None:
            model.load_state_dict(dict(state.weights), strict=True)  # before initialize, or the sharded copies keep the old ones
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": rounds,
            "gradient_clipping": config.clip,
            "zero_optimization": {"stage": engine.zero_stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
            "wall_clock_breakdown": False,
        }
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=new_optimizer(model, config), config=settings)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._restored = state
        self._sharded = engine.zero_stage > 0  # at stage 0 there is a plain optimizer, which DeepSpeed's own access functions do not see

    def step(self, works: Sequence[Work], total: float, step: int) -> StepResult:
        """See Engine. Short steps are filled up to the planned accumulation with work of weight 0."""
        if self._restored is not None:
            self._restore(self._restored, works[0])
            self._restored = None
        lr = self.config.lr_at(step)
        means, names = self._accumulate(works, total, step, lr)
        loss, *parts = means.tolist()
        return StepResult(loss, dict(zip(names, parts, strict=True)), self._grad_norm(), lr)

    def _accumulate(self, works: Sequence[Work], total: float, step: int, lr: float) -> tuple[Tensor, tuple[str, ...]]:
        _set_lr(self.engine.optimizer.param_groups, lr)
        idle = [Work(works[0].batch, works[0].mask, torch.zeros_like(works[0].weights), works[0].key)] * (self.rounds - len(works))
        sums: Tensor | None = None
        names: tuple[str, ...] = ()
        for work in (*works, *idle):
            weighted, part, names = _forward(self.engine, work.to(self.engine.device), step)
            # DeepSpeed divides by the accumulation and averages over the workers; our weights already sum to the whole step.
            self.engine.backward(weighted * (self.rounds * self.world_size / total))
            self.engine.step()
            sums = part if sums is None else sums + part
        assert sums is not None
        return _means(sums, total, self.world_size), names

    def _grad_norm(self) -> float:
        norm = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else _finite_norm(float(norm))

    def state(self, step: int, identity: str) -> TrainingState:
        """See Engine; gathers what ZeRO sharded."""
        from deepspeed.utils import safe_get_full_fp32_param

        weights: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            weights[name] = _gathered(safe_get_full_fp32_param(parameter) if self._sharded else parameter, name)
            for moment in MOMENTS:
                moments[f"{moment}:{name}"] = _gathered(self._moment(parameter, moment), name)
        return TrainingState(step, weights, moments, identity)

    def _moment(self, parameter: nn.Parameter, moment: str) -> Tensor | None:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self._sharded:
            found: Tensor | None = safe_get_full_optimizer_state(parameter, moment)
            return found
        plain: Mapping[str, Tensor] = _inner_optimizer(self.engine).state.get(parameter, {})
        return plain.get(moment)

    def _set_moment(self, parameter: nn.Parameter, moment: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if hasattr(parameter, "ds_tensor"):  # ZeRO 3: its full setter fails where a tensor's size is no multiple of the workers
            size = parameter.ds_tensor.numel()
            padded = nn.functional.pad(value.flatten(), (0, size * self.world_size - value.numel()))
            safe_set_local_optimizer_state(parameter, padded[size * self.rank : size * (self.rank + 1)], moment)
        elif self._sharded:
            safe_set_full_optimizer_state(parameter, value, moment)
        else:
            _inner_optimizer(self.engine).state[parameter][moment].copy_(value)

    def _restore(self, state: TrainingState, work: Work) -> None:
        """Puts the moments back after one step at learning rate 0 and loss 0 has made DeepSpeed create them (STACK.md 9)."""
        nothing = Work(work.batch, work.mask, torch.zeros_like(work.weights), work.key)
        self._accumulate([nothing], 1.0, state.step, 0.0)
        for name, parameter in self.model.named_parameters():
            for moment in MOMENTS:
                self._set_moment(parameter, moment, state.optimizer[f"{moment}:{name}"])
        for slot in _inner_optimizer(self.engine).state.values():
            if "step" in slot:
                slot["step"] = torch.full_like(torch.as_tensor(slot["step"], dtype=torch.float32), float(state.step))


def _inner_optimizer(engine: Any) -> Any:
    """AdamW inside DeepSpeed's ZeRO wrapper, or the plain one at stage 0."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _gathered(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise TrainingError(f"DeepSpeed holds no state for {name}; a checkpoint needs at least one step")
    return tensor.detach().float().cpu().clone()


def new_engine(model: nn.Module, optimizer: OptimizerConfig, engine: EngineConfig, rounds: int, state: TrainingState | None) -> Engine:
    """The configured engine; ``rounds`` is the largest number of micro-batches one worker runs in a step."""
    if engine.name == "torch":
        return TorchEngine(model, optimizer, state)
    return DeepSpeedEngine(model, optimizer, engine, rounds, state)
