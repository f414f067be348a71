"""The two operations whose memory and time would grow with cells x genes, done in pieces with exact gradients.

`gene_sum`: counts times gene vectors. The gene table is read a few hundred columns at a time, which fit into a
processor's cache where whole rows do not; the table's gradient is the same operation over the counts ordered by gene.

`chunked_reconstruction`: the decoder's last layer and both negative binomials, a few cells at a time. Nothing of size
C x G is kept: each piece gives its likelihoods and its share of the gradient while it lies in the cache.
"""

# C cells, G genes, K bottleneck width, D width; c the cells of one piece

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cellplane.model.linear import affine, compute_dtype

NB_EPSILON = 1e-10  # as released
MEAN_RANGE, DISPERSION_RANGE = (1e-5, 1e6), (1e-4, 1e4)  # clamps of the released decoder
PIECE_VALUES = 5 << 18  # values of a piece: 5 MB in float32; with 64 rows the products are still quick
TABLE_BYTES = 10 << 20  # a slice of the gene table that stays in a processor's last cache
ENTRIES_PER_GENE = 32  # with fewer entries than this a gene, slicing the table costs more than it saves
EQUAL = 1e-6  # cells whose weights differ by less (relative) weigh the same: what dividing by counts in float32 leaves
LARGEST_LISTED = 15  # counts up to this take their terms from a table, larger ones (and fractions) from lgamma


def _bag(table: Tensor, rows: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of table rows, [len(offsets), D]; slices of the table's columns where that pays."""
    width = table.shape[1]
    columns = max(64, TABLE_BYTES // max(table.element_size() * table.shape[0], 1))
    if columns >= width or len(rows) < ENTRIES_PER_GENE * table.shape[0] or table.device.type != "cpu":
        return F.embedding_bag(rows, table.contiguous(), offsets, mode="sum", per_sample_weights=weight)
    out = torch.empty(len(offsets), width, dtype=table.dtype)
    for first in range(0, width, columns):
        part = table[:, first : first + columns].contiguous()
        out[:, first : first + columns] = F.embedding_bag(rows, part, offsets, mode="sum", per_sample_weights=weight)
    return out


class _GeneSum(torch.autograd.Function):
    """Sum over a cell's entries of weight times the gene's vector, and the gene table's gradient."""

    @staticmethod
    def forward(ctx: Any, table_GD: Tensor, gene: Tensor, crow: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The values; keeps what the derivatives need."""
        ctx.save_for_backward(gene, crow, weight)
        ctx.shape, ctx.dtype = table_GD.shape, table_GD.dtype
        return _bag(table_GD.to(dtype), gene, crow[:-1], weight.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad_CD: Tensor) -> tuple[Tensor, None, None, None, None]:
        """The derivatives."""
        gene, crow, weight = ctx.saved_tensors
        genes, cells = ctx.shape[0], len(crow) - 1
        order = torch.argsort(gene.to(torch.int16 if genes <= 1 << 15 else torch.int32), stable=True)
        weight = weight[order].to(grad_CD.dtype)
        cell = torch.repeat_interleave(torch.arange(cells, dtype=torch.int32, device=crow.device), crow.diff())[order]
        del order
        ends = torch.bincount(gene, minlength=genes).cumsum(0)
        offsets = torch.cat([ends.new_zeros(1), ends[:-1]]).to(torch.int32)
        return _bag(grad_CD, cell, offsets, weight).to(ctx.dtype), None, None, None, None


def gene_sum(table_GD: Tensor, gene: Tensor, crow: Tensor, weight: Tensor) -> Tensor:
    """[C, D]: for each cell the weighted sum of its genes' rows of the table; ``weight`` [nnz] takes no gradient."""
    out: Tensor = _GeneSum.apply(table_GD, gene, crow, weight, compute_dtype(table_GD))  # type: ignore[no-untyped-call]
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
    hidden_bits: Tensor
    hidden_C: Tensor
    everything_measured: bool

    def scored(self) -> Tensor:
        """Cells that hide something, [n] positions: nobody else is asked to be recovered."""
        return self.hidden_C.nonzero()[:, 0]

    def measured(self, cells: Tensor) -> Tensor | None:
        """[c, G] bool, None when all is measured."""
        return None if self.everything_measured else self.panels[self.panel_index[cells]]

    def hidden(self, cells: Tensor) -> Tensor:
        """[c, G] uint8: 1 where the value is hidden."""
        genes, bits = self.panels.shape[1], self.hidden_bits[cells]
        if bits.device.type == "cpu":
            return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=genes))
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
        return ((bits[:, :, None] >> shifts) & 1).flatten(1)[:, :genes]

    def entries(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Which stored entries are these cells', [nnz of them], and where each cell's begin among them, [c+1]."""
        lengths = self.crow.diff()[cells]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        shift = torch.repeat_interleave(self.crow[cells] - offsets[:-1], lengths)
        return shift + torch.arange(len(shift), device=shift.device), offsets


@dataclass(frozen=True)
class Entries:
    """Stored counts of a few cells: ``at`` their places in [c, G], and what their likelihood adds that no mean enters."""

    offsets: Tensor
    at: Tensor
    gene: Tensor
    x: Tensor
    theta: Tensor
    constant: Tensor
    by_theta: Tensor


class CountTerms:
    """Terms of a count's likelihood that depend on (count, theta) alone, listed for small counts.

    constant = lgamma(x + 1) - sum_{i=1}^{x-1} log1p(i / theta), which is lgamma(theta) + lgamma(x + 1) - lgamma(x + theta)
    + x log(theta); its derivative by theta is sum_{i=1}^{x-1} i / (theta (theta + i)). Both are 0 at x = 1.
    """

    def __init__(self, theta_G: Tensor) -> None:
        steps_x = torch.arange(1.0, LARGEST_LISTED, device=theta_G.device)[:, None]
        zero = theta_G.new_zeros(2, len(theta_G))  # counts 0 and 1
        factorial = torch.lgamma(torch.arange(2.0, LARGEST_LISTED + 1, device=theta_G.device) + 1)[:, None]
        self.genes, self.theta_G = len(theta_G), theta_G
        self.constant = torch.cat([zero, factorial - torch.log1p(steps_x / theta_G).cumsum(0)]).flatten()
        self.by_theta = torch.cat([zero, (steps_x / (theta_G * (theta_G + steps_x))).cumsum(0)]).flatten()

    def of(self, gene: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(constant, by_theta) of every entry, [nnz] each; a count of 0 has none."""
        row = x.clamp(0, LARGEST_LISTED).to(torch.int64)
        place = row * self.genes + gene
        constant, by_theta = self.constant[place], self.by_theta[place]
        rest = (row != x).nonzero()[:, 0]
        if len(rest):
            theta, y = self.theta_G[gene[rest]], x[rest]
            constant[rest] = torch.lgamma(theta) + torch.lgamma(y + 1) - torch.lgamma(y + theta) + y * theta.log()
            by_theta[rest] = torch.digamma(theta) - torch.digamma(y + theta) + y / theta
        return constant, by_theta


def _entries(counts: Counts, cells: Tensor, terms: CountTerms) -> tuple[Entries, Entries]:
    """All stored counts of these cells, and the hidden ones alone."""
    stored, offsets = counts.entries(cells)
    gene, x = counts.gene[stored], counts.value[stored]
    cell = torch.repeat_interleave(torch.arange(len(cells), device=gene.device), offsets.diff())
    constant, by_theta = terms.of(gene, x)
    every = Entries(offsets, cell * terms.genes + gene, gene, x, terms.theta_G[gene], constant, by_theta)
    kept = counts.entry_hidden[stored].nonzero()[:, 0]
    hidden_offsets = torch.cat([offsets.new_zeros(1), torch.bincount(cell[kept], minlength=len(cells)).cumsum(0)])
    rest = (column[kept] for column in (every.at, every.gene, every.x, every.theta, every.constant, every.by_theta))
    return every, Entries(hidden_offsets, *rest)


def _cell_sums(values: Tensor, offsets: Tensor) -> Tensor:
    return torch.segment_reduce(values, "sum", offsets=offsets)


@dataclass
class Gradients:
    """By the last layer's input, weight and bias, and by theta: sums over the pieces so far."""

    by_u_CK: Tensor
    by_weight_GK: Tensor
    by_bias_G: Tensor
    by_theta_G: Tensor

    @staticmethod
    def zeros(u_CK: Tensor, weight_GK: Tensor) -> Gradients:
        """Nothing yet."""
        sums = (torch.zeros(shape, dtype=torch.float32, device=u_CK.device) for shape in (weight_GK.shape, len(weight_GK), len(weight_GK)))
        return Gradients(torch.zeros_like(u_CK), *sums)

    def tensors(self) -> tuple[Tensor, ...]:
        """All four, in order."""
        return self.by_u_CK, self.by_weight_GK, self.by_bias_G, self.by_theta_G

    def add(self, slope_cG: Tensor, u_CK: Tensor, weight_GK: Tensor, cells: Tensor) -> None:
        """What ``cells`` add, from the derivative by their logits."""
        self.by_bias_G += slope_cG.sum(0)
        slope_cG, u_cK = slope_cG.to(u_CK.dtype), u_CK[cells]
        self.by_u_CK[cells] = affine(slope_cG, weight_GK.t())
        self.by_weight_GK += affine(u_cK.t(), slope_cG.t()).t()


class _Scaled:
    """Means scaled to the counts' totals, and one likelihood of them with its derivatives.

    With t = scaled mean, n = total, r = theta / (theta + t): the likelihood is theta log1p(t / theta) over all genes plus,
    at a count x, constant + x log1p(t / theta) - x log t. Its derivative by the decoder's logits is v - t sum(v) / n with
    v = t r, less x r at a count x; by theta it is log1p(t / theta) + r - 1, plus by_theta + (r - 1) x / theta at a count.
    """

    def __init__(self, mean_cG: Tensor, entries: Entries, theta_G: Tensor, memory: Sequence[Tensor]) -> None:
        self.total_c = _cell_sums(entries.x, entries.offsets)
        scale_c = self.total_c / mean_cG.sum(1).clamp(min=NB_EPSILON)
        self.t_cG = torch.mul(mean_cG, scale_c[:, None], out=memory[0])
        self.entries, self.theta_G = entries, theta_G
        self.m = self.t_cG.view(-1).index_select(0, entries.at)
        self.log_cG = torch.mul(self.t_cG, 1 / theta_G, out=memory[1]).log1p_()

    def likelihood(self) -> Tensor:
        """[c]."""
        e = self.entries
        extra = e.constant + e.x * (torch.log1p(self.m / e.theta) - torch.log(self.m + NB_EPSILON))
        return self.log_cG.mv(self.theta_G) + _cell_sums(extra, e.offsets)

    def slopes(self, weight_c: Tensor, by_theta_G: Tensor) -> Tensor:
        """weight_c times the derivative by the logits, [c, G]; adds that by theta to ``by_theta_G``. Spends what it holds."""
        e = self.entries
        by_theta_G += weight_c @ self.log_cG
        sum_cG = torch.add(self.t_cG, self.theta_G, out=self.log_cG)
        ratio_cG = torch.div(self.theta_G, sum_cG, out=sum_cG)
        by_theta_G += weight_c @ ratio_cG - weight_c.sum()
        ratio = e.theta / (e.theta + self.m)
        cell_weight = torch.repeat_interleave(weight_c, e.offsets.diff())
        by_theta_G.index_add_(0, e.gene, cell_weight * (e.by_theta + (ratio - 1) * e.x / e.theta))
        v_cG = ratio_cG.mul_(self.t_cG)
        v_cG.view(-1).scatter_add_(0, e.at, -e.x * ratio * self.m / (self.m + NB_EPSILON))
        centre_c = v_cG.sum(1) / self.total_c.clamp(min=NB_EPSILON)
        return v_cG.addcmul_(self.t_cG, centre_c[:, None], value=-1).mul_(weight_c[:, None])


def _pieces(n_cells: int, n_genes: int) -> list[slice]:
    step = max(1, PIECE_VALUES // n_genes)
    return [slice(start, min(start + step, n_cells)) for start in range(0, n_cells, step)]


def _means(u_cK: Tensor, layer: _Layer) -> tuple[Tensor, Tensor | None]:
    """Unscaled means [c, G] within their range, and where they lie inside it (None: everywhere)."""
    logits = affine(u_cK, layer.weight_GK, layer.bias_G).float()
    low, high = torch.aminmax(logits)
    mean = logits.exp_()
    if math.log(MEAN_RANGE[0]) < low and high < math.log(MEAN_RANGE[1]):
        return mean, None
    inside = (mean > MEAN_RANGE[0]) & (mean < MEAN_RANGE[1])
    return mean.clamp_(*MEAN_RANGE), inside


@dataclass(frozen=True)
class _Layer:
    """The decoder's last layer in the dtype it is computed in, and the dispersions."""

    weight_GK: Tensor
    bias_G: Tensor
    theta_G: Tensor


Weights = tuple[Tensor, Tensor]  # of each cell's two likelihoods in what is differentiated, [C] each


def _reconstruct(u_CK: Tensor, layer: _Layer, counts: Counts, cells: Tensor, weights: Weights | None) -> tuple[Tensor, Gradients]:
    """Both likelihoods of ``cells``, [2, n], and, where ``weights`` [n] are given, the gradient of their weighted sum."""
    terms, found = CountTerms(layer.theta_G), Gradients.zeros(u_CK, layer.weight_GK)
    likelihoods = torch.zeros(2, len(cells), device=u_CK.device)
    pieces = _pieces(len(cells), len(layer.bias_G))
    memory = torch.empty(4, pieces[0].stop if pieces else 0, len(layer.bias_G), device=u_CK.device)
    for piece in pieces:
        some = cells[piece]
        mean, inside = _means(u_CK[some], layer)
        if (measured := counts.measured(some)) is not None:
            mean.mul_(measured)
        slopes: list[Tensor] = []
        for which, entries in enumerate(_entries(counts, some, terms)):
            t_cG, log_cG = memory[which * 2 : which * 2 + 2, : len(some)]
            unscaled = mean if which == 0 else t_cG.copy_(counts.hidden(some)).mul_(mean)
            part = _Scaled(unscaled, entries, terms.theta_G, (t_cG, log_cG))
            likelihoods[which, piece] = part.likelihood()
            if weights is not None:
                slopes.append(part.slopes(weights[which][piece], found.by_theta_G))
        if slopes:
            slope = slopes[0].add_(slopes[1])
            found.add(slope if inside is None else slope.mul_(inside), u_CK, layer.weight_GK, some)
    return likelihoods, found


class _Reconstruction(torch.autograd.Function):
    """u [C, K] -> NB over all measured genes and NB over hidden genes, each [C]; see the module.

    Where all scored cells weigh the same, as a planned step makes them, the gradient found together with the likelihoods
    is only scaled in the backward pass; unequal weights cost a second computation.
    """

    @staticmethod
    def forward(
        ctx: Any, u_CK: Tensor, weight_GK: Tensor, bias_G: Tensor, log_dispersion_G: Tensor, counts: Counts
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(u_CK.device.type, enabled=False):
            cells, ctx.counts = counts.scored(), counts
            ones = torch.ones(len(cells), device=u_CK.device)
            weights = (ones, ones) if any(ctx.needs_input_grad) else None
            layer = _layer(u_CK, weight_GK, bias_G, log_dispersion_G)
            likelihoods, found = _reconstruct(u_CK, layer, counts, cells, weights)
            ctx.save_for_backward(u_CK, weight_GK, bias_G, log_dispersion_G, cells, *found.tensors())
            full, hidden = torch.zeros(2, len(u_CK), device=u_CK.device).index_copy_(1, cells, likelihoods)
            return full, hidden

    @staticmethod
    def backward(ctx: Any, grad_full_C: Tensor, grad_hidden_C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        """The derivatives."""
        u_CK, weight_GK, bias_G, log_dispersion_G, cells, *tensors = ctx.saved_tensors
        weights = grad_full_C[cells].float(), grad_hidden_C[cells].float()
        if _all_equal(*weights):
            scale = weights[0][:1].sum()  # 0 where nobody is scored
            found = Gradients(*(tensor * scale for tensor in tensors))
        else:
            layer = _layer(u_CK, weight_GK, bias_G, log_dispersion_G)
            found = _reconstruct(u_CK, layer, ctx.counts, cells, weights)[1]
        theta_G = log_dispersion_G.float().exp()
        by_dispersion = found.by_theta_G * theta_G * (theta_G > DISPERSION_RANGE[0]) * (theta_G < DISPERSION_RANGE[1])
        by_weight, by_bias = found.by_weight_GK.to(weight_GK.dtype), found.by_bias_G.to(bias_G.dtype)
        return found.by_u_CK, by_weight, by_bias, by_dispersion.to(log_dispersion_G.dtype), None


def _layer(u_CK: Tensor, weight_GK: Tensor, bias_G: Tensor, log_dispersion_G: Tensor) -> _Layer:
    theta_G = log_dispersion_G.float().exp().clamp(*DISPERSION_RANGE) + NB_EPSILON
    return _Layer(weight_GK.to(u_CK.dtype), bias_G.to(u_CK.dtype), theta_G)


def _all_equal(full: Tensor, hidden: Tensor) -> bool:
    """Whether every cell and both likelihoods weigh the same, to rounding."""
    if len(full) == 0:
        return True
    low, high = torch.aminmax(torch.cat([full, hidden]))
    return bool(high - low <= EQUAL * torch.maximum(high.abs(), low.abs()))


def chunked_reconstruction(
    u_CK: Tensor, weight_GK: Tensor, bias_G: Tensor, log_dispersion_G: Tensor, counts: Counts
) -> tuple[Tensor, Tensor]:
    """Negative log likelihoods [C] float32: over all measured genes, and over hidden genes with totals of their own.

    ``u_CK`` is the decoder's bottleneck. A cell that hides nothing is not scored: both are 0. Memory does not grow with C x G.
    """
    full, hidden = _Reconstruction.apply(u_CK, weight_GK, bias_G, log_dispersion_G, counts)  # type: ignore[no-untyped-call]
    return full, hidden
