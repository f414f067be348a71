"""All randomness inside the network, keyed by the micro-batch and the place that asks.

No global state and no rank enters: the same micro-batch gives the same numbers on any worker, in any order, and again
when a block is recomputed. The network is deterministic when it is given no Noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cellplane.cells import keyed_seed


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


def dropout(x: Tensor, rate: float, noise: Noise | None, site: str) -> Tensor:
    """Inverted dropout; the identity without noise or at rate 0."""
    if noise is None or rate == 0.0:
        return x
    keep = torch.empty_like(x).bernoulli_(1 - rate, generator=noise._generator(site, x.device))
    return x * keep.div_(1 - rate)
