"""Dense layers at the speed the processor has.

PyTorch multiplies float32 matrices on a CPU through MKL, which takes half-width vectors on processors that are not
Intel's: 220 GFLOP/s on two Zen 5 cores where oneDNN, which PyTorch carries as well, gives 480. Everything else (bfloat16,
GPUs) already goes the fast way. The choice depends on device and dtype alone, so answers do not change between calls.
"""

# M rows, K inputs, N outputs

from __future__ import annotations

import math
import platform
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _onednn() -> Any:
    """oneDNN's float32 product as PyTorch exposes it to its own compiler; None where it is missing."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


ONEDNN = _onednn()


def affine(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, [M, N], in the dtype of ``x``; records no gradient. The weight may be a transposed view."""
    weight_NK = weight_NK.to(x_MK.dtype)
    bias_N = None if bias_N is None else bias_N.to(x_MK.dtype)
    if ONEDNN is not None and x_MK.dtype == torch.float32 and x_MK.device.type == "cpu" and x_MK.numel() and weight_NK.numel():
        out: Tensor = ONEDNN(x_MK, weight_NK, bias_N, "none", [], "")
        return out
    with torch.autocast(x_MK.device.type, enabled=False):
        return F.linear(x_MK, weight_NK, bias_N)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What products with ``x`` are computed in: autocast's dtype inside autocast, else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def in_precision(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Where products are computed in this precision; float32 leaves an autocast of the caller's as it is."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


class _Affine(torch.autograd.Function):
    """`affine` with its derivatives, which take the same way; keeps its input in the dtype it computes in."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The values; keeps what the derivatives need."""
        x = x_MK.to(dtype)
        ctx.save_for_backward(x, weight_NK)
        ctx.dtypes = x_MK.dtype, weight_NK.dtype, None if bias_N is None else bias_N.dtype
        return affine(x, weight_NK, bias_N)

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
        """The derivatives."""
        x, weight_NK = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        by_x = affine(grad_MN, weight_NK.t()).to(x_dtype) if ctx.needs_input_grad[0] else None
        by_weight, by_bias = weight_gradients(grad_MN, x)
        return by_x, by_weight.to(weight_dtype), None if bias_dtype is None else by_bias.to(bias_dtype), None


def weight_gradients(grad_MN: Tensor, x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives by weight [N, K] and bias [N] of an affine layer with these inputs."""
    return affine(grad_MN.t(), x_MK.t()), grad_MN.sum(0)


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`torch.nn.functional.linear` for inputs [..., K], computed in this dtype by the fast way."""
    flat: Tensor = _Affine.apply(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), weight_NK, bias_N, dtype)  # type: ignore[no-untyped-call]
    return flat.view(*x.shape[:-1], len(weight_NK))


class Linear(nn.Linear):
    """`torch.nn.Linear`, the same parameters and initialisation, computed by `linear`.

    An ``exact`` one computes in the dtype of its input whatever the precision: for small layers that decide something.
    """

    def __init__(self, inputs: int, outputs: int, exact: bool = False) -> None:
        super().__init__(inputs, outputs)
        self.exact = exact

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return linear(x, self.weight, self.bias, x.dtype if self.exact else compute_dtype(x))
