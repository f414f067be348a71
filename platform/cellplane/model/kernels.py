"""The two operations whose memory and time would grow with cells x genes, done in pieces with exact gradients.

`gene_sum`: counts times gene vectors. Forward gathers rows (`embedding_bag`); backward makes the counts dense for a few
thousand genes at a time and multiplies, which is several times faster than scattering four million rows.

`chunked_reconstruction`: the decoder's last layer and both negative binomials, a few cells at a time. Nothing of size
C x G is kept: the backward pass computes each piece again and applies the derivatives written out below.
"""

# C cells, G genes, K bottleneck width, D width; c the cells of one piece

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NB_EPSILON = 1e-10  # as released
MEAN_RANGE, DISPERSION_RANGE = (1e-5, 1e6), (1e-4, 1e4)  # clamps of the released decoder
PIECE_VALUES = 1 << 20  # values of a piece: 4 MB in float32, about what a core's cache holds
GENES_AT_ONCE = 2048  # columns made dense at a time in the gene table's gradient


class _GeneSum(torch.autograd.Function):
    """Sum over a cell's entries of weight times the gene's vector; the gene table's gradient by dense products."""

    @staticmethod
    def forward(ctx: Any, table_GD: Tensor, gene: Tensor, crow: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gene, crow, weight)
        ctx.shape, ctx.dtype = table_GD.shape, table_GD.dtype
        return F.embedding_bag(gene, table_GD, crow[:-1], mode="sum", per_sample_weights=weight.to(table_GD.dtype))

    @staticmethod
    def backward(ctx: Any, grad_CD: Tensor) -> tuple[Tensor, None, None, None]:
        gene, crow, weight = ctx.saved_tensors
        cells = len(crow) - 1
        cell = torch.repeat_interleave(torch.arange(cells, device=gene.device), crow.diff())
        order = torch.argsort(gene)
        gene, cell, weight = gene[order], cell[order], weight[order].to(grad_CD.dtype)
        out_GD = torch.empty(ctx.shape, dtype=ctx.dtype, device=grad_CD.device)
        edges = torch.searchsorted(gene, torch.arange(0, ctx.shape[0] + GENES_AT_ONCE, GENES_AT_ONCE, device=gene.device)).tolist()
        for index, first in enumerate(range(0, ctx.shape[0], GENES_AT_ONCE)):
            span, last = slice(edges[index], edges[index + 1]), min(first + GENES_AT_ONCE, ctx.shape[0])
            dense = torch.zeros(last - first, cells, dtype=grad_CD.dtype, device=grad_CD.device)
            dense.index_put_((gene[span] - first, cell[span]), weight[span], accumulate=True)
            out_GD[first:last] = dense @ grad_CD
        return out_GD, None, None, None


def gene_sum(table_GD: Tensor, gene: Tensor, crow: Tensor, weight: Tensor) -> Tensor:
    """[C, D]: for each cell the weighted sum of its genes' rows of the table; ``weight`` [nnz] takes no gradient."""
    out: Tensor = _GeneSum.apply(table_GD, gene, crow, weight)  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True)
class Counts:
    """What the reconstruction compares with: CSR counts, panels, and hidden bits (see `CellBatch` and `Mask`)."""

    crow: Tensor
    gene: Tensor
    value: Tensor
    entry_hidden: Tensor
    panels: Tensor
    panel_index: Tensor
    hidden_rows: Any  # (start, end) -> [c, G] bool
    everything_measured: bool

    def measured(self, start: int, end: int) -> Tensor | None:
        """[c, G] bool, None when all is measured."""
        return None if self.everything_measured else self.panels[self.panel_index[start:end]]


@dataclass(frozen=True)
class _Piece:
    """A few cells: their unscaled mean, and what both likelihoods need of their stored entries."""

    mean_cG: Tensor
    hidden_cG: Tensor
    cell: Tensor
    gene: Tensor
    x: Tensor
    x_hidden: Tensor


def _pieces(n_cells: int, n_genes: int) -> list[tuple[int, int]]:
    step = max(1, PIECE_VALUES // n_genes)
    return [(start, min(start + step, n_cells)) for start in range(0, n_cells, step)]


def _piece(counts: Counts, u_CK: Tensor, weight_GK: Tensor, bias_G: Tensor, span: tuple[int, int]) -> _Piece:
    start, end = span
    logits = F.linear(u_CK[start:end], weight_GK, bias_G).float()
    mean = logits.exp_().clamp_(*MEAN_RANGE)
    measured = counts.measured(start, end)
    if measured is not None:
        mean = mean * measured
    first, last = int(counts.crow[start]), int(counts.crow[end])
    lengths = counts.crow[start : end + 1].diff()
    cell = torch.repeat_interleave(torch.arange(end - start, device=lengths.device), lengths)
    x = counts.value[first:last]
    return _Piece(mean, counts.hidden_rows(start, end), cell, counts.gene[first:last], x, x * counts.entry_hidden[first:last])


def _scale(piece: _Piece, where_cG: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean scaled to each cell's total, and that total [c]."""
    mean = piece.mean_cG if where_cG is None else piece.mean_cG * where_cG
    total = mean.new_zeros(len(mean)).index_add_(0, piece.cell, x)
    return mean * (total / mean.sum(1).clamp(min=NB_EPSILON))[:, None], total


def _likelihood(piece: _Piece, t_cG: Tensor, x: Tensor, theta_G: Tensor, inverse_G: Tensor) -> Tensor:
    """Negative log likelihood [c] of scaled means: the zero term for every gene, the rest at stored entries."""
    zero = torch.log1p(t_cG * inverse_G).mv(theta_G)
    theta, m = theta_G[piece.gene] + NB_EPSILON, t_cG[piece.cell, piece.gene]
    log_terms = torch.log1p(m / theta) + torch.log(theta) - torch.log(m + NB_EPSILON)
    extra = torch.lgamma(theta) + torch.lgamma(x + 1) - torch.lgamma(x + theta) + x * log_terms
    return zero.index_add_(0, piece.cell, torch.where(x > 0, extra, torch.zeros_like(extra)))


def _slope(piece: _Piece, scaled: tuple[Tensor, Tensor], x: Tensor, theta_G: Tensor, weight_c: Tensor) -> tuple[Tensor, Tensor]:
    """d(weighted likelihood) by the decoder's logits [c, G] and by theta [G].

    With t = scaled mean, n = total: d/dt is theta / (theta + t) at a zero and has x / (theta + t) - x / t added at a count
    x; as t = n mean / sum(mean), d/dlogit = t (d/dt - sum(t d/dt) / n).
    """
    t_cG, total_c = scaled
    theta = theta_G + NB_EPSILON
    sum_cG = t_cG + theta
    share_cG = t_cG / sum_cG
    by_theta_G = weight_c @ (torch.log1p(t_cG / theta) - share_cG)
    u_cG = share_cG * theta_G
    m, at = t_cG[piece.cell, piece.gene], (piece.cell, piece.gene)
    th = theta[piece.gene]
    u_cG.index_put_(at, x * (m / (th + m) - m / (m + NB_EPSILON)), accumulate=True)
    extra = torch.digamma(th) - torch.digamma(x + th) + x / (th + m)
    by_theta_G.index_add_(0, piece.gene, torch.where(x > 0, extra * weight_c[piece.cell], torch.zeros_like(extra)))
    centre_c = u_cG.sum(1) / total_c.clamp(min=NB_EPSILON)
    return u_cG.sub_(t_cG * centre_c[:, None]).mul_(weight_c[:, None]), by_theta_G


class _Reconstruction(torch.autograd.Function):
    """u [C, K] -> NB over all measured genes and NB over hidden genes, each [C]; see the module."""

    @staticmethod
    def forward(
        ctx: Any, u_CK: Tensor, weight_GK: Tensor, bias_G: Tensor, log_dispersion_G: Tensor, counts: Counts
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(u_CK, weight_GK, bias_G, log_dispersion_G)
        ctx.counts = counts
        theta_G = log_dispersion_G.float().exp().clamp(*DISPERSION_RANGE)
        inverse_G = 1 / (theta_G + NB_EPSILON)
        weight_GK, bias_G = weight_GK.to(u_CK.dtype), bias_G.to(u_CK.dtype)
        full, hidden = [], []
        for span in _pieces(len(u_CK), len(bias_G)):
            piece = _piece(counts, u_CK, weight_GK, bias_G, span)
            full.append(_likelihood(piece, _scale(piece, None, piece.x)[0], piece.x, theta_G, inverse_G))
            part = _scale(piece, piece.hidden_cG, piece.x_hidden)[0]
            hidden.append(_likelihood(piece, part, piece.x_hidden, theta_G, inverse_G))
        empty = u_CK.new_zeros(0, dtype=torch.float32)
        return torch.cat([empty, *full]), torch.cat([empty, *hidden])

    @staticmethod
    def backward(ctx: Any, grad_full_C: Tensor, grad_hidden_C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        u_CK, weight_GK, bias_G, log_dispersion_G = ctx.saved_tensors
        dtypes = weight_GK.dtype, bias_G.dtype, log_dispersion_G.dtype
        weight_GK, bias_G = weight_GK.to(u_CK.dtype), bias_G.to(u_CK.dtype)
        raw_G = log_dispersion_G.float().exp()
        theta_G = raw_G.clamp(*DISPERSION_RANGE)
        by_u = torch.empty_like(u_CK)
        by_weight, by_bias, by_theta = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (weight_GK, bias_G, theta_G))
        for span in _pieces(len(u_CK), len(bias_G)):
            piece, (start, end) = _piece(ctx.counts, u_CK, weight_GK, bias_G, span), span
            mean = piece.mean_cG
            slope, theta_part = _slope(piece, _scale(piece, None, piece.x), piece.x, theta_G, grad_full_C[start:end].float())
            by_theta += theta_part
            scaled = _scale(piece, piece.hidden_cG, piece.x_hidden)
            other, theta_part = _slope(piece, scaled, piece.x_hidden, theta_G, grad_hidden_C[start:end].float())
            by_theta += theta_part
            slope = slope.add_(other).mul_((mean > MEAN_RANGE[0]) & (mean < MEAN_RANGE[1])).to(u_CK.dtype)
            by_u[start:end] = slope @ weight_GK
            by_weight += slope.T @ u_CK[start:end]
            by_bias += slope.float().sum(0)
        inside = (raw_G > DISPERSION_RANGE[0]) & (raw_G < DISPERSION_RANGE[1])
        by_dispersion = by_theta * theta_G * inside
        return by_u, by_weight.to(dtypes[0]), by_bias.to(dtypes[1]), by_dispersion.to(dtypes[2]), None


def chunked_reconstruction(
    u_CK: Tensor, weight_GK: Tensor, bias_G: Tensor, log_dispersion_G: Tensor, counts: Counts
) -> tuple[Tensor, Tensor]:
    """Negative log likelihoods [C] float32: over all measured genes, and over hidden genes with totals of their own.

    ``u_CK`` is the decoder's bottleneck; memory does not grow with C x G.
    """
    full, hidden = _Reconstruction.apply(u_CK, weight_GK, bias_G, log_dispersion_G, counts)  # type: ignore[no-untyped-call]
    return full, hidden
