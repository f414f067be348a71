"""AdamW as every engine uses it: which parameters learn at which rate, and a step that can be called off.

DeepSpeed clips and steps in one call of its own, so what must be decided between the two, whether the step may be taken
at all, is asked by the optimizer itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cellplane.train.config import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state beside its step counter


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that learn; frozen ones have no moments."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate, the embedder's last; `scale` multiplies the schedule.

    A parameter's own `lr_scale`, where fine-tuning gave it one (finetune.py), and the embedder's multiply.
    """
    named = trainable(model)
    embedder = [parameter for name, parameter in named if name.startswith("embedder.")]
    rest = [parameter for name, parameter in named if not name.startswith("embedder.")]
    groups: dict[float, list[nn.Parameter]] = {}
    for parameters, scale in ((rest, 1.0), (embedder, config.embedder_lr_scale)):
        for parameter in parameters:
            groups.setdefault(scale * getattr(parameter, "lr_scale", 1.0), []).append(parameter)
    return [{"params": parameters, "scale": scale} for scale, parameters in groups.items()]


class AskingAdamW(torch.optim.AdamW):
    """Fused AdamW that asks ``may_step`` before it changes anything.

    Fused: nine times faster than the loop at 72 M parameters, and accepted by ZeRO (STACK.md 9).
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, may_step: Callable[[], bool] = lambda: True) -> None:
        super().__init__(parameter_groups(model, config), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self.may_step = may_step

    def step(self, closure: Any = None) -> Any:
        """One step, or nothing."""
        return super().step(closure) if self.may_step() else None


def begin_moments(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], updates: int) -> None:
    """State as after ``updates`` steps without gradients: AdamW makes its own at the first step, but a restored run fills it before."""
    for parameter in parameters:
        moments = {moment: torch.zeros_like(parameter, memory_format=torch.preserve_format) for moment in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(updates), device=parameter.device), **moments}


def set_lr(groups: Sequence[dict[str, Any]], lr: float) -> None:
    """The schedule's rate for every group, times its own scale."""
    for group in groups:
        group["lr"] = lr * group.get("scale", 1.0)
