"""Which implementation of the three large operations a device gets. Each pair gives the same numbers (tests/model, tests/gpu).

On a CPU: pieces that fit its cache. On a GPU: dense products, fused kernels and no loop that makes the host wait; what
needs Triton falls back to the plain pieces where Triton is missing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cellplane.model.attention import ATTENTION
from cellplane.model.kernels import chunked_reconstruction, gene_sum


def gene_sum_of(device: torch.device) -> Callable[..., Tensor]:
    """`kernels.gene_sum` or `gpu.dense_gene_sum`."""
    if device.type != "cuda":
        return gene_sum
    from cellplane.model import gpu

    return gpu.dense_gene_sum


def reconstruction_of(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    """`kernels.chunked_reconstruction` or `gpu.fused_reconstruction`."""
    if device.type != "cuda":
        return chunked_reconstruction
    from cellplane.model import gpu

    return gpu.fused_reconstruction if gpu.available(device) else chunked_reconstruction


def attention_of(name: str, device: torch.device) -> Callable[..., Tensor]:
    """The attention kernel of this name; flowformer has one without a loop over sentences for a GPU."""
    if name != "flowformer" or device.type != "cuda":
        return ATTENTION[name]
    from cellplane.model.segments import flowformer_segments

    return flowformer_segments
