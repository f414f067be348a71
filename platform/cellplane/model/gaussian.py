"""The Gaussian alternative to the count likelihood: log counts per 10,000, one learned variance a gene, in pieces.

What is compared is y = log1p(10,000 x / total), the total over a cell's measured genes: scanpy's usual normalisation,
which the denoising and perturbation scores use too, and which leaves sequencing depth out. Nothing of size C x G is
kept: the backward pass computes each piece again and applies the derivatives written out below.
"""

# C cells, G genes, K bottleneck width; c the cells of one piece

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellplane.cells import CellBatch
from cellplane.model.masking import Mask

SCALE = 1e4  # scanpy's normalize_total of most tutorials
LOG_VARIANCE_RANGE = (-6.0, 6.0)  # a gene that never varies must not make the loss unbounded
PIECE_VALUES = 1 << 20  # values of a piece: 4 MB in float32, about what a core's cache holds


class LogLayer(nn.Linear):
    """The decoder's last layer: mean log expression [C, G], or its likelihoods without ever holding C x G."""

    def forward(self, u_CK: Tensor, log_variance_G: Tensor | None = None, truth: tuple[CellBatch, Mask] | None = None) -> Any:
        """The mean; with log variances and the truth the two negative log likelihoods [C], over all measured and over hidden genes.

        One module call, so that ZeRO 3 gathers its weights.
        """
        if log_variance_G is None or truth is None:
            return super().forward(u_CK)
        return _Likelihoods.apply(u_CK, self.weight, self.bias, log_variance_G, truth)  # type: ignore[no-untyped-call]


def log_scaled(batch: CellBatch) -> Tensor:
    """log1p of the stored counts scaled to a total of 10,000 in each cell, [nnz]."""
    total = batch.totals().clamp(min=torch.finfo(batch.value.dtype).tiny)
    return torch.log1p(batch.value * (SCALE / total)[batch.cell_of_entry()])


@dataclass(frozen=True)
class _Piece:
    """A few cells: distance of the truth from the mean, and which genes count for each likelihood (None = all)."""

    cells: slice
    distance_cG: Tensor
    measured_cG: Tensor | None
    hidden_cG: Tensor


def _pieces(u_CK: Tensor, weight_GK: Tensor, bias_G: Tensor, batch: CellBatch, mask: Mask) -> Iterator[_Piece]:
    y, all_measured = log_scaled(batch).float(), bool(batch.panels.all())
    edges = batch.crow.tolist()
    step = max(1, PIECE_VALUES // len(bias_G))
    for start in range(0, len(u_CK), step):
        end = min(start + step, len(u_CK))
        first, last = edges[start], edges[end]
        cell = torch.repeat_interleave(torch.arange(end - start, device=y.device), batch.crow[start : end + 1].diff())
        distance_cG = F.linear(u_CK[start:end], weight_GK, bias_G).float().neg_()
        distance_cG.index_put_((cell, batch.gene[first:last]), y[first:last], accumulate=True)
        measured_cG = None if all_measured else batch.panels[batch.panel_index[start:end]]
        yield _Piece(slice(start, end), distance_cG, measured_cG, mask.rows(start, end))


class _Likelihoods(torch.autograd.Function):
    """u [C, K] -> Gaussian negative log likelihoods over all measured and over hidden genes, each [C]; see the module."""

    @staticmethod
    def forward(
        ctx: Any, u_CK: Tensor, weight_GK: Tensor, bias_G: Tensor, log_variance_G: Tensor, truth: tuple[CellBatch, Mask]
    ) -> tuple[Tensor, Tensor]:
        """Both likelihoods; of every gene log variance / 2 + log(2 pi) / 2 + distance^2 / (2 variance)."""
        ctx.save_for_backward(u_CK, weight_GK, bias_G, log_variance_G)
        ctx.truth = truth
        weight_GK, bias_G = weight_GK.to(u_CK.dtype), bias_G.to(u_CK.dtype)
        log_variance_G = log_variance_G.float().clamp(*LOG_VARIANCE_RANGE)
        constant_G, precision_G = 0.5 * (log_variance_G + math.log(2 * math.pi)), torch.exp(-log_variance_G)
        full_C, hidden_C = (torch.zeros(len(u_CK), dtype=torch.float32, device=u_CK.device) for _ in range(2))
        for piece in _pieces(u_CK, weight_GK, bias_G, *truth):
            cost_cG = piece.distance_cG.square().mul_(0.5 * precision_G).add_(constant_G)
            full_C[piece.cells] = cost_cG.sum(1) if piece.measured_cG is None else (cost_cG * piece.measured_cG).sum(1)
            hidden_C[piece.cells] = (cost_cG * piece.hidden_cG).sum(1)
        return full_C, hidden_C

    @staticmethod
    def backward(ctx: Any, grad_full_C: Tensor, grad_hidden_C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        """Derivatives by everything but the truth."""
        u_CK, weight_GK, bias_G, log_variance_G = ctx.saved_tensors
        dtypes = weight_GK.dtype, bias_G.dtype, log_variance_G.dtype
        weight_GK, bias_G = weight_GK.to(u_CK.dtype), bias_G.to(u_CK.dtype)
        inside_G = (log_variance_G > LOG_VARIANCE_RANGE[0]) & (log_variance_G < LOG_VARIANCE_RANGE[1])
        precision_G = torch.exp(-log_variance_G.float().clamp(*LOG_VARIANCE_RANGE))
        by_u = torch.empty_like(u_CK)
        by_weight, by_bias, by_variance = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (weight_GK, bias_G, bias_G))
        for piece in _pieces(u_CK, weight_GK, bias_G, *ctx.truth):
            full_c1, hidden_c1 = grad_full_C[piece.cells, None].float(), grad_hidden_C[piece.cells, None].float()
            share_cG = hidden_c1 * piece.hidden_cG + (full_c1 if piece.measured_cG is None else full_c1 * piece.measured_cG)
            pull_cG = share_cG * piece.distance_cG * precision_G  # minus d/dmean
            by_variance += 0.5 * (share_cG - pull_cG * piece.distance_cG).sum(0)
            by_bias -= pull_cG.sum(0)
            pull_cG = pull_cG.to(u_CK.dtype)
            by_u[piece.cells] = -(pull_cG @ weight_GK)
            by_weight -= pull_cG.T @ u_CK[piece.cells]
        return by_u, by_weight.to(dtypes[0]), by_bias.to(dtypes[1]), (by_variance * inside_G).to(dtypes[2]), None
