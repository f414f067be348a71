"""DeepSpeed with ZeRO 0-3, offload and bfloat16 behind the one Engine protocol.

Its state is consolidated, so that any other engine, stage or world size can go on from it. Nothing is ever compiled:
AdamW is PyTorch's own at every stage, offloaded or not. DeepSpeed finds the norm, clips and steps in one call; whether
a step may be taken is asked by the optimizer in the middle of it (see `AskingAdamW`), and where DeepSpeed itself finds
gradients that are not finite it drops them before it asks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cellplane.errors import TrainingError
from cellplane.model.decoder import DECODERS
from cellplane.model.encoder import Block
from cellplane.model.latent import LATENTS
from cellplane.model.linear import in_precision
from cellplane.model.local import LocalBlock
from cellplane.train.checkpoint import TrainingState
from cellplane.train.config import EngineConfig, GuardConfig, OptimizerConfig
from cellplane.train.guard import WAY_OUT, Guard, all_finite
from cellplane.train.objective import Work
from cellplane.train.optimizer import MOMENTS, AskingAdamW, begin_moments, set_lr, trainable
from cellplane.train.sharded import Group, load_shards, save_shards
from cellplane.train.step import GUARD, StepResult, Sums, ranks

# What ZeRO 3 gathers whole: modules that read their parts' parameters themselves, or compute them again in the backward pass.
GATHERED_WHOLE: tuple[Any, ...] = (Block, LocalBlock, *LATENTS.values(), *DECODERS.values())


def settings(config: OptimizerConfig, engine: EngineConfig, rounds: int) -> dict[str, Any]:
    """The run as DeepSpeed wants to be told; the learning rate is ours."""
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if engine.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": rounds,
        "gradient_clipping": config.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own offloaded AdamW would be compiled at the start
        "bf16": {"enabled": engine.bf16, "check_grad_overflow": True},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


class DeepSpeedEngine:
    """See Engine. Takes the network as it is on every rank, or what ``state`` holds."""

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        engine: EngineConfig,
        rounds: int,
        state: TrainingState | None = None,
        guard: GuardConfig | None = None,
    ) -> None:
        self.model, self.config, self.rounds, self.stage = model, config, rounds, engine.zero_stage
        self.precision = "bfloat16" if engine.bf16 else "float32"
        self.guard = Guard(guard, None if state is None else state.extra.get(GUARD))
        if state is not None and state.shards is None:
            model.load_state_dict(dict(state.weights), strict=True)  # before initialize, or the sharded copies keep the old ones
        self.optimizer = AskingAdamW(model, config, self._may_step)
        self.engine = _initialized(model, self.optimizer, settings(config, engine, rounds), self.stage)
        self.rank, self.world_size = ranks()
        self._losses: list[float] = []  # of the step that is being taken
        self._norm: float | None = None
        self._begin_moments(0 if state is None else state.step - self.guard.skips)
        if state is not None:
            self._restore(state, engine.bf16)

    def step(self, works: Sequence[Work], total: float, step: int) -> StepResult:
        """See Engine. Short steps are filled up to the planned accumulation with work of weight 0."""
        lr, sums = self.config.lr_at(step), Sums()
        set_lr(self.engine.optimizer.param_groups, lr)
        idle = [Work(works[0].batch, works[0].mask, torch.zeros_like(works[0].weights), works[0].key)] * (self.rounds - len(works))
        for left, work in zip(reversed(range(self.rounds)), (*works, *idle), strict=True):
            with in_precision(self.precision, self.engine.device):
                weighted = sums.forward(self.engine, work.to(self.engine.device), step)
            # DeepSpeed divides by the accumulation and averages over the workers; our weights already sum to the whole step.
            self.engine.backward(weighted * (self.rounds * self.world_size / total))
            if left == 0:
                self._losses = sums.means(total, self.world_size).tolist()
                self._norm = self._norm_of_gradients() if self.stage == 0 else None
            self.engine.step()
        norm = self._found_norm()
        objection = self.guard.objection(self._losses, norm)
        self.guard.settle(step, objection, norm)
        parts = dict(zip(sums.names, self._losses[1:], strict=True))
        return StepResult(self._losses[0], parts, norm, lr, objection is not None, self.guard.skips)

    def _may_step(self) -> bool:
        return self.guard.objection(self._losses, self._found_norm()) is None

    def _found_norm(self) -> float:
        """The norm of this step's gradients; at stages 1 to 3 DeepSpeed's own, which is there once it begins to step."""
        if self._norm is not None:
            return self._norm
        norm = float(self.engine.optimizer._global_grad_norm)
        return norm if norm >= 0 else math.inf

    def _norm_of_gradients(self) -> float:
        """At stage 0 DeepSpeed clips without telling the norm; every rank holds the summed gradients already."""
        gradients = [parameter.grad for _, parameter in trainable(self.model) if parameter.grad is not None]
        return float(nn.utils.get_total_norm(gradients))

    def state(self, step: int, identity: str) -> TrainingState:
        """See Engine; gathers what ZeRO sharded."""
        weights: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            found = {name: self._weight(parameter)}
            if parameter.requires_grad:
                found |= {f"{moment}:{name}": self._moment(parameter, moment, name) for moment in MOMENTS}
            if self.rank == 0:  # the others only take part in gathering
                host = {key: tensor.detach().float().cpu() for key, tensor in found.items()}
                weights[name] = host.pop(name)
                moments |= host
        return TrainingState(step, weights, moments, identity, {GUARD: self.guard.remember()})

    def head(self, step: int, identity: str) -> TrainingState:
        """See ShardingEngine; every rank raises when one of them holds a value that is not finite."""
        parts = [tensor for parameter, slot in self.optimizer.state.items() for tensor in (parameter, *(slot[name] for name in MOMENTS))]
        bad = torch.tensor([float(not all_finite(parts))], device=self.engine.device)
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        if bad.item():
            raise TrainingError(f"after step {step} the state is not finite, so no checkpoint is written; {WAY_OUT}")
        return TrainingState(step, {}, {}, identity, {GUARD: self.guard.remember()})

    @property
    def group(self) -> Group:
        """What a sharded checkpoint fits."""
        return Group(self.rank, self.world_size, self.stage)

    def write_shards(self, folder: Path) -> None:
        """DeepSpeed's own files of this rank."""
        save_shards(self.engine, folder)

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        if self.stage == 0:
            return parameter
        if parameter.requires_grad:
            master: Tensor = safe_get_full_fp32_param(parameter)
            return master
        if self.stage < 3:
            return parameter
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _moment(self, parameter: nn.Parameter, moment: str, name: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.stage == 0:
            plain: Tensor = self.optimizer.state[parameter][moment]
            return plain
        found: Tensor | None = safe_get_full_optimizer_state(parameter, moment)
        if found is None:
            raise TrainingError(f"DeepSpeed holds no {moment} for {name}; its version is not one that cellplane knows")
        return found

    def _begin_moments(self, updates: int) -> None:
        """Moments of 0 where DeepSpeed would have made them at its first step, so that a run can be restored before one."""
        zero = self.engine.optimizer
        if self.stage == 0:
            begin_moments(self.optimizer, (parameter for _, parameter in trainable(self.model)), updates)
        elif self.stage == 3:
            begin_moments(self.optimizer, zero.fp32_partitioned_groups_flat, updates)
        else:
            begin_moments(self.optimizer, zero.single_partition_of_fp32_groups, updates)
            zero._lazy_init_hp_params_optimizer_state()

    def _restore(self, state: TrainingState, bf16: bool) -> None:
        if state.shards is not None:
            load_shards(self.engine, state, self.group)
            if self.stage in (1, 2):  # loading gives the parameters new links into the partitions, but none to the moments
                self.engine.optimizer._hp_optimizer_states_linked = False
                self.engine.optimizer._lazy_init_hp_params_optimizer_state()
            return
        for name, parameter in trainable(self.model):
            if bf16:  # what was loaded before was rounded on its way into the masters
                self._set_master(parameter, state.weights[name])
            for moment in MOMENTS:
                self._set_moment(parameter, moment, state.optimizer[f"{moment}:{name}"])

    def _set_master(self, parameter: nn.Parameter, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if self.stage == 3:
            safe_set_local_fp32_param(parameter, self._own_part(parameter, value))
        else:
            safe_set_full_fp32_param(parameter, value)

    def _set_moment(self, parameter: nn.Parameter, moment: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage == 0:
            self.optimizer.state[parameter][moment].copy_(value)
        elif self.stage == 3:
            safe_set_local_optimizer_state(parameter, self._own_part(parameter, value), moment)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)

    def _own_part(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's part of a tensor as ZeRO 3 cuts it; its full setter fails where the size is no multiple of the workers."""
        sharded: Any = parameter
        size = sharded.ds_tensor.numel()
        padded = nn.functional.pad(value.flatten(), (0, size * self.world_size - value.numel()))
        return padded[size * self.rank : size * (self.rank + 1)]


def _initialized(model: nn.Module, optimizer: AskingAdamW, config: Mapping[str, Any], stage: int) -> Any:
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import set_z3_leaf_modules

    # On a CPU DeepSpeed compiles an op at start that only its inference uses, and fails without a compiler (STACK.md 1).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if stage == 3:
        set_z3_leaf_modules(model, list(GATHERED_WHOLE), raise_if_not_found=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(config))
    return engine
