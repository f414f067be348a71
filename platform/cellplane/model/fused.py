"""The halves of an encoder block as single operations that keep little for the backward pass.

Automatic differentiation would keep every intermediate of a block: about 20 rows of the model's width a cell. These
keep what a product needs as input and compute the cheap rest (norms, activations, dropout) again: about 9. They work in
autocast's dtype for products and in the dtype of the residual stream for everything that is summed.
"""

# C cells, D width, H heads, K head width, F width inside the feed-forward

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cellplane.model.linear import affine, compute_dtype, weight_gradients
from cellplane.model.memory import give_back
from cellplane.model.noise import Drop

ROWS = 1024  # cells of a feed-forward piece: its inner values stay in the processor's cache
T = TypeVar("T")


def _normed(h_CD: Tensor, norm: Sequence[Tensor], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.native_layer_norm(h_CD, h_CD.shape[1:], norm[0].to(h_CD.dtype), norm[1].to(h_CD.dtype), eps)


def _norm_gradients(grad_CD: Tensor, h_CD: Tensor, stats: tuple[Tensor, Tensor], norm: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    gain, shift = (tensor.to(h_CD.dtype) for tensor in norm[:2])
    return torch.ops.aten.native_layer_norm_backward(  # type: ignore[no-any-return]
        grad_CD.to(h_CD.dtype), h_CD, h_CD.shape[1:], *stats, gain, shift, [True, True, True]
    )


@dataclass(frozen=True)
class _Settings:
    """What an operation needs beside tensors with gradients."""

    dtype: torch.dtype
    eps: float = 0.0
    drops: tuple[Drop, ...] = ()


class _NormProject(torch.autograd.Function):
    """LayerNorm, then several linear layers of its output; keeps the input alone."""

    @staticmethod
    def forward(ctx: Any, settings: _Settings, h_CD: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """The values; keeps what the derivatives need."""
        norm, layers = parameters[:2], parameters[2:]
        a_CD = _normed(h_CD, norm, settings.eps)[0].to(settings.dtype)
        ctx.settings = settings
        ctx.save_for_backward(h_CD, *parameters)
        return tuple(affine(a_CD, layers[at], layers[at + 1]) for at in range(0, len(layers), 2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """The derivatives."""
        h_CD, *parameters = ctx.saved_tensors
        norm, layers = parameters[:2], parameters[2:]
        normed, *stats = _normed(h_CD, norm, ctx.settings.eps)
        a_CD = normed.to(ctx.settings.dtype)
        del normed
        by_a: Tensor | None = None
        by_layers: list[Tensor] = []
        for grad, at in zip(grads, range(0, len(layers), 2), strict=True):
            part = affine(grad, layers[at].t()).to(h_CD.dtype)
            by_a = part if by_a is None else by_a.add_(part)
            by_layers += [found.to(layers[at].dtype) for found in weight_gradients(grad, a_CD)]
        assert by_a is not None
        by_h, by_gain, by_shift = _norm_gradients(by_a, h_CD, (stats[0], stats[1]), norm)
        give_back()
        return None, by_h, by_gain.to(norm[0].dtype), by_shift.to(norm[1].dtype), *by_layers


def norm_project(h_CD: Tensor, norm: nn.LayerNorm, layers: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """Each layer applied to the normalised cells, [C, D] each, in the dtype products are computed in."""
    weights = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
    settings = _Settings(compute_dtype(h_CD), norm.eps)
    found: tuple[Tensor, ...] = _NormProject.apply(settings, h_CD, norm.weight, norm.bias, *weights)  # type: ignore[no-untyped-call]
    return found


class _AddProjection(torch.autograd.Function):
    """The residual stream plus a dropped-out linear layer."""

    @staticmethod
    def forward(ctx: Any, settings: _Settings, h_CD: Tensor, x_CD: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The values; keeps what the derivatives need."""
        ctx.settings = settings
        ctx.save_for_backward(x_CD, weight)
        return h_CD + settings.drops[0].drawn(h_CD.device)(affine(x_CD.to(settings.dtype), weight, bias))

    @staticmethod
    def backward(ctx: Any, grad_CD: Tensor) -> tuple[Any, ...]:
        """The derivatives."""
        x_CD, weight = ctx.saved_tensors
        settings: _Settings = ctx.settings
        by_y = settings.drops[0].drawn(grad_CD.device)(grad_CD.to(settings.dtype, copy=True))
        by_weight, by_bias = weight_gradients(by_y, x_CD.to(settings.dtype))
        return None, grad_CD, affine(by_y, weight.t()).to(x_CD.dtype), by_weight.to(weight.dtype), by_bias.to(weight.dtype)


def add_projection(h_CD: Tensor, x_CD: Tensor, layer: nn.Linear, drop: Drop) -> Tensor:
    """h + dropout(layer(x)), [C, D]."""
    settings = _Settings(compute_dtype(h_CD), drops=(drop,))
    out: Tensor = _AddProjection.apply(settings, h_CD, x_CD, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return out


def _pieces(n_cells: int) -> Iterator[slice]:
    for start in range(0, n_cells, ROWS):
        yield slice(start, min(start + ROWS, n_cells))


class _FeedForward(torch.autograd.Function):
    """h + dropout(down(dropout(gelu(up(norm(h)))))) a piece of cells at a time; keeps h and the values before the GELU."""

    @staticmethod
    def forward(ctx: Any, settings: _Settings, h_CD: Tensor, *parameters: Tensor) -> Tensor:
        """The values; keeps what the derivatives need."""
        up, up_bias, down, down_bias = (tensor.to(settings.dtype) for tensor in parameters[2:])
        inner_drop, outer_drop = (drop.drawn(h_CD.device) for drop in settings.drops)
        out_CD, before = torch.empty_like(h_CD), []
        for rows in _pieces(len(h_CD)):
            h = h_CD[rows]
            before_CF = affine(_normed(h, parameters, settings.eps)[0].to(settings.dtype), up, up_bias)
            if any(ctx.needs_input_grad):
                before.append(before_CF)
            y = affine(inner_drop(F.gelu(before_CF), rows), down, down_bias)
            torch.add(h, outer_drop(y, rows), out=out_CD[rows])
        ctx.settings = settings
        ctx.save_for_backward(h_CD, *parameters, *before)
        return out_CD

    @staticmethod
    def backward(ctx: Any, grad_CD: Tensor) -> tuple[Any, ...]:
        """The derivatives."""
        h_CD, *rest = ctx.saved_tensors
        parameters, before = rest[:6], rest[6:]
        settings: _Settings = ctx.settings
        up, down = parameters[2].to(settings.dtype), parameters[4].to(settings.dtype)
        inner_drop, outer_drop = (drop.drawn(h_CD.device) for drop in settings.drops)
        by_h = torch.empty_like(grad_CD)
        by_parameters: list[Tensor] = []
        for rows, before_CF in zip(_pieces(len(h_CD)), before, strict=True):
            by_y = outer_drop(grad_CD[rows].to(settings.dtype, copy=True), rows)
            by_down = weight_gradients(by_y, inner_drop(F.gelu(before_CF), rows))
            by_before = torch.ops.aten.gelu_backward(inner_drop(affine(by_y, down.t()), rows), before_CF)
            normed, *stats = _normed(h_CD[rows], parameters, settings.eps)
            by_up = weight_gradients(by_before, normed.to(settings.dtype))
            by_a = affine(by_before, up.t())
            by_norm = _norm_gradients(by_a, h_CD[rows], (stats[0], stats[1]), parameters)
            torch.add(grad_CD[rows], by_norm[0], out=by_h[rows])
            _accumulate(by_parameters, (*by_norm[1:], *by_up, *by_down), parameters)
        give_back()
        return None, by_h, *(by_parameters or (None,) * 6)


def _accumulate(sums: list[Tensor], parts: Sequence[Tensor], like: Sequence[Tensor]) -> None:
    """Adds a piece's derivatives to those before, in the parameters' dtype."""
    if not sums:
        sums.extend(part.to(parameter.dtype) for part, parameter in zip(parts, like, strict=True))
        return
    for total, part in zip(sums, parts, strict=True):
        total.add_(part)


def add_feed_forward(h_CD: Tensor, norm: nn.LayerNorm, up: nn.Linear, down: nn.Linear, drops: tuple[Drop, Drop]) -> Tensor:
    """h + the feed-forward half of a block, [C, D]; ``drops`` act inside [C, F] and on its output [C, D]."""
    settings = _Settings(compute_dtype(h_CD), norm.eps, drops)
    parameters = (norm.weight, norm.bias, up.weight, up.bias, down.weight, down.bias)
    out: Tensor = _FeedForward.apply(settings, h_CD, *parameters)  # type: ignore[no-untyped-call]
    return out


def spared(function: Callable[..., T], *inputs: Any) -> T:
    """function(*inputs); keeps the inputs alone and computes it again in the backward pass: for what is cheap."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    give_back()
    out: T = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return out


def remade(wanted: bool, function: Callable[..., Tensor], h_CD: Tensor, *inputs: Any) -> Tensor:
    """function(h_CD, *inputs), a block of the network; where ``wanted`` only its inputs are kept for the backward pass.

    A module does this inside its call, never around it: ZeRO 3 gathers the parameters of a call, and knows of one call alone.
    """
    if not wanted or not h_CD.requires_grad:
        return function(h_CD, *inputs)
    again: Tensor = checkpoint(function, h_CD, *inputs, use_reentrant=False, preserve_rng_state=False)
    return again


class _Recomputed(torch.autograd.Function):
    """Attention that keeps queries, keys and values alone and is computed again for its derivatives."""

    @staticmethod
    def forward(ctx: Any, attend: Callable[..., Tensor], cu_seqlens: Tensor, *qkv: Tensor) -> Tensor:
        """The values; keeps what the derivatives need."""
        ctx.attend, ctx.cu_seqlens = attend, cu_seqlens
        ctx.save_for_backward(*qkv)
        return attend(*qkv, cu_seqlens)

    @staticmethod
    def backward(ctx: Any, grad_CHK: Tensor) -> tuple[Any, ...]:
        """The derivatives."""
        qkv = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            out = ctx.attend(*qkv, ctx.cu_seqlens)
        return None, None, *torch.autograd.grad(out, qkv, grad_CHK, allow_unused=True)


def recomputed(attend: Callable[..., Tensor], qkv: tuple[Tensor, ...], cu_seqlens: Tensor) -> Tensor:
    """attend(q, k, v, cu_seqlens), [C, H, K], with as little kept as possible."""
    out: Tensor = _Recomputed.apply(attend, cu_seqlens, *qkv)  # type: ignore[no-untyped-call]
    return out
