"""All randomness inside the network, keyed by the micro-batch and the place that asks.

No global state and no rank enters: the same micro-batch gives the same numbers on any worker, in any order, and again
when a block is recomputed. The network is deterministic when it is given no Noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellplane.seeds import keyed_seed

LEVELS = 256  # dropout is decided by one random byte a value, so its rate is a multiple of 1 / 256


class Noise:
    """Random tensors that depend on ``key`` and the name of the place that asks for them.

    ``step`` is the optimizer step that is being taken: what warms up in training reads it here, so that nothing counts in hiding.
    """

    def __init__(self, key: int, step: int = 0) -> None:
        self.key, self.step = key, step

    def _generator(self, site: str, device: torch.device) -> torch.Generator:
        generator = torch.Generator(device=device)
        generator.manual_seed(keyed_seed(self.key, site))
        return generator

    def uniform(self, like: Tensor, site: str) -> Tensor:
        """Uniform in [0, 1), shaped like ``like``."""
        return torch.empty_like(like).uniform_(generator=self._generator(site, like.device))

    def normal(self, like: Tensor, site: str) -> Tensor:
        """Standard normal, shaped like ``like``."""
        return torch.empty_like(like).normal_(generator=self._generator(site, like.device))


@dataclass(frozen=True)
class Drop:
    """Inverted dropout of one place: a random byte for every value, and what lies below the threshold is dropped.

    The bytes are drawn again in the backward pass: that is cheaper than keeping them.
    """

    shape: tuple[int, ...]
    threshold: int
    seed: int

    def drawn(self, device: torch.device) -> Drawn:
        """The bytes themselves."""
        if self.threshold == 0:
            return Drawn(None, 0)
        return Drawn(_random_bytes(self.shape, device, self.seed), self.threshold)


@dataclass(frozen=True)
class Drawn:
    """A dropout's bytes while they are needed; None where nothing is dropped."""

    random: Tensor | None
    threshold: int

    def __call__(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """``x``, values of these rows, dropped out and scaled in place."""
        if self.random is None:
            return x
        keep = torch.ge(self.random[rows], self.threshold, out=torch.empty_like(x))
        return x.mul_(keep.mul_(LEVELS / (LEVELS - self.threshold)))


def drop_of(shape: Sequence[int], rate: float, noise: Noise | None, site: str) -> Drop:
    """The dropout of values of this shape at this place; none without noise or at rate 0.

    The rate is rounded to 1 / 256, at least one of them, and what is kept is scaled by what is really kept.
    """
    if noise is None or rate == 0.0:
        return Drop(tuple(shape), 0, 0)
    return Drop(tuple(shape), min(max(round(rate * LEVELS), 1), LEVELS - 1), keyed_seed(noise.key, site))


def _random_bytes(shape: tuple[int, ...], device: torch.device, seed: int) -> Tensor:
    if device.type != "cpu":
        generator = torch.Generator(device=device).manual_seed(seed)
        return torch.empty(shape, dtype=torch.uint8, device=device).random_(0, LEVELS, generator=generator)
    count = math.prod(shape)
    words = np.random.SFC64(seed).random_raw(-(-count // 8) or 1)
    return torch.from_numpy(np.atleast_1d(words).view(np.uint8))[:count].view(shape)


class _Dropout(torch.autograd.Function):
    """Inverted dropout that keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, drop: Drop) -> Tensor:
        """The values; keeps what the derivatives need."""
        ctx.drop = drop
        return drop.drawn(x.device)(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The derivatives."""
        return ctx.drop.drawn(grad.device)(grad.clone()), None


def dropout(x: Tensor, rate: float, noise: Noise | None, site: str) -> Tensor:
    """Inverted dropout of ``x``; the identity without noise or at rate 0."""
    drop = drop_of(x.shape, rate, noise, site)
    if drop.threshold == 0:
        return x
    out: Tensor = _Dropout.apply(x, drop)  # type: ignore[no-untyped-call]
    return out
