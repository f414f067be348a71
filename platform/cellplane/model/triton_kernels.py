"""The reconstruction loss on a GPU: both negative binomials, forward and backward, without ever storing C x G.

A tile's logits are one small matrix product, computed again wherever they are needed; only sums over a cell's genes, or
over a gene's cells, leave the chip. Zeros are handled by dense tiles, stored counts by one program per cell (CSR) and
per gene (CSC). Nothing is added atomically, so the same input gives the same bits. Cells without hidden genes are never
scored: they cost nothing, and their likelihoods are 0. The mathematics is that of `kernels.chunked_reconstruction`.
"""

# C cells, G genes, K bottleneck width; F full (all measured genes), H hidden genes; e stored entries

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from cellplane.model.kernels import MEAN_RANGE, NB_EPSILON

try:
    import triton
    import triton.language as tl
except ImportError:  # where there is no GPU there need be no triton; `gpu.available` says so
    triton = tl = None

VERSION: str | None = None if triton is None else triton.__version__
kernel: Callable[[Any], Any] = (lambda function: function) if triton is None else triton.jit


def _constant(value: float) -> Any:
    return value if tl is None else tl.constexpr(value)


EPSILON, LOW, HIGH = (_constant(value) for value in (NB_EPSILON, *MEAN_RANGE))
FARTHEST_LOGIT = _constant(30.0)  # beyond the clamps of the mean, and exp stays finite
SHIFT_BELOW = _constant(8.0)  # Stirling's series from here on: its first dropped term is 3e-10 (lgamma), 2.5e-10 (digamma)


class Problem(NamedTuple):
    """What every kernel reads. ``order`` lists the ``scored`` cells first; ``measured`` is None when all is measured."""

    u: Any  # [C, K]
    weight: Any  # [G, K]
    bias: Any  # [G] float32
    theta: Any  # [G] float32
    hidden: Any  # [C, B] uint8, one bit a gene
    measured: Any  # [P, B] uint8
    panel: Any  # [C]
    order: Any  # [C] int32
    scored: Any  # [1] int32
    crow: Any  # [C+1]
    gene: Any  # [nnz]
    value: Any  # [nnz] float32
    entry_hidden: Any  # [nnz] uint8
    n_cells: Any
    n_genes: Any
    n_bytes: Any  # B
    width: Any  # K


class Scaled(NamedTuple):
    """Per cell and likelihood (F, H), [2, C]: factor of the mean, centre of its slope, gradient of its likelihood."""

    scale: Any
    centre: Any
    weight: Any


class Stored(NamedTuple):
    """Per stored entry [nnz]: the mean kept from the forward pass, and slopes by logit and by theta for the backward pass."""

    mean: Any
    slope: Any
    by_theta: Any


class ByGene(NamedTuple):
    """Stored entries in the order of their genes: where each gene's begin [G+1], which they are, and whose cells [nnz]."""

    start: Any
    entry: Any
    cell: Any


@kernel
def _log1p_share(r: tl.tensor) -> tl.tensor:
    """log(1 + r) and r / (1 + r), r >= 0; what 1 + r loses in rounding is added again to first order."""
    u = 1.0 + r
    inverse = 1.0 / u
    return tl.log(u) + (r - (u - 1.0)) * inverse, r * inverse


@kernel
def _log1p(r: tl.tensor) -> tl.tensor:
    value, _ = _log1p_share(r)
    return value


@kernel
def _series(z: tl.tensor) -> tl.tensor:
    """What Stirling's formula for lgamma adds beyond its leading terms."""
    r = 1.0 / z
    rr = r * r
    return r * (1 / 12 - rr * (1 / 360 - rr * (1 / 1260)))


@kernel
def _lgamma_gain(x: tl.tensor, z: tl.tensor) -> tl.tensor:
    """lgamma(z + x) - lgamma(z) for z > 0, x >= 0, without the cancellation of the difference."""
    small = z < SHIFT_BELOW
    a = tl.where(small, z + SHIFT_BELOW, z)
    gain = x * (tl.log(a + x) - 1.0) + (a - 0.5) * _log1p(x / a) + _series(a + x) - _series(a)
    shift = tl.zeros_like(gain)
    for i in tl.static_range(0, 8, 2):
        shift += tl.log(((z + x + i) / (z + i)) * ((z + x + i + 1.0) / (z + i + 1.0)))
    return gain - tl.where(small, shift, 0.0)


@kernel
def _digamma_loss(x: tl.tensor, z: tl.tensor) -> tl.tensor:
    """digamma(z) - digamma(z + x) for z > 0, x >= 0."""
    small = z < SHIFT_BELOW
    a = tl.where(small, z + SHIFT_BELOW, z)
    r, s = 1.0 / a, 1.0 / (a + x)
    rr, ss = r * r, s * s
    low = 0.5 * r + rr * (1 / 12 - rr * (1 / 120 - rr * (1 / 252)))
    high = 0.5 * s + ss * (1 / 12 - ss * (1 / 120 - ss * (1 / 252)))
    shift = tl.zeros_like(a)
    for i in tl.static_range(8):
        shift += (x / (z + x + i)) / (z + i)
    return high - low - _log1p(x / a) - tl.where(small, shift, 0.0)


@kernel
def _bits(table: tl.tensor, row: tl.tensor, live: tl.tensor, start: tl.tensor, n_bytes: tl.tensor, BG: tl.constexpr) -> tl.tensor:
    """Which genes of BG from ``start`` have their bit set, [R, BG] bool; the lowest gene is the highest bit of its byte."""
    place = start // 8 + tl.arange(0, BG // 8)
    at = table + row.to(tl.int64)[:, None] * n_bytes + place[None, :]
    byte = tl.load(at, mask=live[:, None] & (place < n_bytes)[None, :], other=0).to(tl.int32)
    bits = (byte[:, :, None] >> (7 - tl.arange(0, 8))[None, None, :]) & 1
    return tl.reshape(bits, [row.shape[0], BG]) != 0


@kernel
def _mean(logits: tl.tensor) -> tl.tensor:
    """The unscaled mean, within its range."""
    mean = tl.exp(tl.minimum(tl.maximum(logits, -FARTHEST_LOGIT), FARTHEST_LOGIT))
    return tl.minimum(tl.maximum(mean, LOW), HIGH)


@kernel
def _measured(p: tl.tuple, cell: tl.tensor, live: tl.tensor, start: tl.tensor, BG: tl.constexpr) -> tl.tensor:
    """Which genes of the tile the panels of these cells hold, [C, BG] bool."""
    if p.measured is None:
        found = live[:, None] & (start + tl.arange(0, BG) < p.n_genes)[None, :]
    else:
        found = _bits(p.measured, tl.load(p.panel + cell), live, start, p.n_bytes, BG)
    return found


@kernel
def _tile(p: tl.tuple, u: tl.tensor, cell: tl.tensor, live: tl.tensor, start: tl.tensor, BG: tl.constexpr) -> tl.tensor:
    """A tile's rows of the weight [BG, BK], and means [C, BG] over measured and over hidden genes, 0 elsewhere."""
    gene = start + tl.arange(0, BG)
    w = _rows(p.weight, gene, gene < p.n_genes, p.width, u.shape[1])
    bias = tl.load(p.bias + gene, mask=gene < p.n_genes, other=0.0)
    mean = _mean(tl.dot(u, tl.trans(w), input_precision="tf32x3") + bias[None, :])
    mean = tl.where(_measured(p, cell, live, start, BG), mean, 0.0)
    return w, mean, tl.where(_bits(p.hidden, cell, live, start, p.n_bytes, BG), mean, 0.0)


@kernel
def _rows(table: tl.tensor, row: tl.tensor, live: tl.tensor, width: tl.tensor, BK: tl.constexpr) -> tl.tensor:
    """Rows of a [n, K] matrix as a tile [R, BK], zeros beyond."""
    k = tl.arange(0, BK)
    at = table + row.to(tl.int64)[:, None] * width + k[None, :]
    return tl.load(at, mask=live[:, None] & (k < width)[None, :], other=0.0)


@kernel
def _cells(p: tl.tuple, first: tl.tensor, BC: tl.constexpr) -> tl.tensor:
    """Scored cells of a tile, and which places of the tile hold one."""
    place = first + tl.arange(0, BC)
    live = place < tl.load(p.scored)
    return tl.load(p.order + place, mask=live, other=0), live


@kernel
def sums_kernel(p: tl.tuple, out: tl.tensor, BC: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr) -> None:
    """Sums of the mean over measured and over hidden genes: ``out`` [2, splits, C]. Grid (cell tiles, splits)."""
    first, split, splits = tl.program_id(0) * BC, tl.program_id(1), tl.num_programs(1)
    if first < tl.load(p.scored):
        cell, live = _cells(p, first, BC)
        u = _rows(p.u, cell, live, p.width, BK)
        full, hidden = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
        for start in range(split * BG, p.n_genes, splits * BG):
            _, mean, of_hidden = _tile(p, u, cell, live, start, BG)
            full, hidden = full + tl.sum(mean, 1), hidden + tl.sum(of_hidden, 1)
        at = out + split * p.n_cells + cell
        tl.store(at, full, mask=live)
        tl.store(at + splits * p.n_cells, hidden, mask=live)


@kernel
def _theta(p: tl.tuple, start: tl.tensor, BG: tl.constexpr) -> tl.tensor:
    """Theta of the genes of a tile, and 1 / (theta + epsilon), [1, BG]."""
    gene = start + tl.arange(0, BG)
    theta = tl.load(p.theta + gene, mask=gene < p.n_genes, other=1.0)[None, :]
    return theta, 1.0 / (theta + EPSILON)


@kernel
def zeros_kernel(p: tl.tuple, scale: tl.tensor, out: tl.tensor, BC: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr) -> None:
    """Zero terms of every gene, F and H, and the sums of t dl/dt, F and H: ``out`` [4, splits, C]. Grid (cell tiles, splits)."""
    first, split, splits = tl.program_id(0) * BC, tl.program_id(1), tl.num_programs(1)
    if first < tl.load(p.scored):
        cell, live = _cells(p, first, BC)
        u = _rows(p.u, cell, live, p.width, BK)
        full, hidden = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
        full_pull, hidden_pull = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
        full_scale, hidden_scale = tl.load(scale + cell), tl.load(scale + p.n_cells + cell)
        for start in range(split * BG, p.n_genes, splits * BG):
            theta, inverse = _theta(p, start, BG)
            _, mean, of_hidden = _tile(p, u, cell, live, start, BG)
            value, share = _log1p_share(mean * full_scale[:, None] * inverse)
            full, full_pull = full + tl.sum(theta * value, 1), full_pull + tl.sum(theta * share, 1)
            value, share = _log1p_share(of_hidden * hidden_scale[:, None] * inverse)
            hidden, hidden_pull = hidden + tl.sum(theta * value, 1), hidden_pull + tl.sum(theta * share, 1)
        at, step = out + split * p.n_cells + cell, splits * p.n_cells
        tl.store(at, full, mask=live)
        tl.store(at + step, hidden, mask=live)
        tl.store(at + 2 * step, full_pull, mask=live)
        tl.store(at + 3 * step, hidden_pull, mask=live)


@kernel
def _entries(p: tl.tuple, start: tl.tensor, end: tl.tensor, BE: tl.constexpr) -> tl.tensor:
    """Stored entries from ``start``: where they are, whether there, their genes, counts, and counts that are hidden."""
    at = start + tl.arange(0, BE)
    live = at < end
    x = tl.load(p.value + at, mask=live, other=0.0)
    is_hidden = tl.load(p.entry_hidden + at, mask=live, other=0) != 0
    return at, live, tl.load(p.gene + at, mask=live, other=0), x, tl.where(is_hidden, x, 0.0)


@kernel
def entry_means_kernel(p: tl.tuple, mean: tl.tensor, totals: tl.tensor, BE: tl.constexpr, BK: tl.constexpr) -> None:
    """The unscaled mean at each stored entry, ``mean`` [nnz], and each cell's sums of counts, ``totals`` [2, C]. Grid (C,)."""
    place = tl.program_id(0)
    if place < tl.load(p.scored):
        cell = tl.load(p.order + place)
        k = tl.arange(0, BK)
        u = tl.load(p.u + cell.to(tl.int64) * p.width + k, mask=k < p.width, other=0.0).to(tl.float32)
        full, hidden = tl.zeros([BE], tl.float32), tl.zeros([BE], tl.float32)
        end = tl.load(p.crow + cell + 1)
        for start in range(tl.load(p.crow + cell), end, BE):
            at, live, gene, x, x_hidden = _entries(p, start, end, BE)
            w = _rows(p.weight, gene, live, p.width, BK).to(tl.float32)
            tl.store(mean + at, _mean(tl.sum(w * u[None, :], 1) + tl.load(p.bias + gene)), mask=live)
            full, hidden = full + x, hidden + x_hidden
        tl.store(totals + cell, tl.sum(full, 0))
        tl.store(totals + p.n_cells + cell, tl.sum(hidden, 0))


@kernel
def _count(x: tl.tensor, m: tl.tensor, th: tl.tensor) -> tl.tensor:
    """What a count x adds to the zero term, and to t dl/dt; 0 at x = 0."""
    extra = _lgamma_gain(x, tl.full(x.shape, 1.0, tl.float32)) - _lgamma_gain(x, th)
    extra += x * (_log1p(m / th) + tl.log(th) - tl.log(m + EPSILON))
    return tl.where(x > 0.0, extra, 0.0), x * (m / (th + m) - m / (m + EPSILON))


@kernel
def entry_terms_kernel(p: tl.tuple, scale: tl.tensor, mean: tl.tensor, out: tl.tensor, BE: tl.constexpr) -> None:
    """What stored counts add to each cell's likelihoods and to their sums of t dl/dt: ``out`` [4, C]. Grid (C,)."""
    place = tl.program_id(0)
    if place < tl.load(p.scored):
        cell = tl.load(p.order + place)
        full_scale, hidden_scale = tl.load(scale + cell), tl.load(scale + p.n_cells + cell)
        full, hidden = tl.zeros([BE], tl.float32), tl.zeros([BE], tl.float32)
        full_pull, hidden_pull = tl.zeros([BE], tl.float32), tl.zeros([BE], tl.float32)
        end = tl.load(p.crow + cell + 1)
        for start in range(tl.load(p.crow + cell), end, BE):
            at, live, gene, x, x_hidden = _entries(p, start, end, BE)
            m = tl.load(mean + at, mask=live, other=1.0)
            th = tl.load(p.theta + gene, mask=live, other=1.0) + EPSILON
            value, pull = _count(x, m * full_scale, th)
            full, full_pull = full + value, full_pull + pull
            value, pull = _count(x_hidden, m * hidden_scale, th)
            hidden, hidden_pull = hidden + value, hidden_pull + pull
        tl.store(out + cell, tl.sum(full, 0))
        tl.store(out + p.n_cells + cell, tl.sum(hidden, 0))
        tl.store(out + 2 * p.n_cells + cell, tl.sum(full_pull, 0))
        tl.store(out + 3 * p.n_cells + cell, tl.sum(hidden_pull, 0))


@kernel
def _zero_slopes(mean: tl.tensor, theta: tl.tensor, inverse: tl.tensor, s: tl.tuple, cell: tl.tensor) -> tl.tensor:
    """Slopes of one likelihood's zero terms by the logits, and by theta, weighted by the likelihood's gradient."""
    weight = tl.load(s.weight + cell)[:, None]
    t = mean * tl.load(s.scale + cell)[:, None]
    value, share = _log1p_share(t * inverse)
    return weight * (share * theta - t * tl.load(s.centre + cell)[:, None]), weight * (value - share)


@kernel
def _slopes(p: tl.tuple, s: tl.tuple, means: tl.tuple, cell: tl.tensor, start: tl.tensor, BG: tl.constexpr) -> tl.tensor:
    """Slopes of both likelihoods' zero terms by the logits and by theta, [C, BG]."""
    theta, inverse = _theta(p, start, BG)
    slope, by_theta = _zero_slopes(means[0], theta, inverse, s, cell)
    more, more_theta = _zero_slopes(means[1], theta, inverse, s, cell + p.n_cells)
    inside = (means[0] > LOW) & (means[0] < HIGH)
    return tl.where(inside, slope + more, 0.0), by_theta + more_theta


@kernel
def dense_u_kernel(p: tl.tuple, s: tl.tuple, out: tl.tensor, BC: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr) -> None:
    """Gradient of u from zero terms: ``out`` [splits, C, K]. Grid (cell tiles, splits)."""
    first, split, splits = tl.program_id(0) * BC, tl.program_id(1), tl.num_programs(1)
    if first < tl.load(p.scored):
        cell, live = _cells(p, first, BC)
        u = _rows(p.u, cell, live, p.width, BK)
        grad = tl.zeros([BC, BK], tl.float32)
        for start in range(split * BG, p.n_genes, splits * BG):
            w, mean, of_hidden = _tile(p, u, cell, live, start, BG)
            slope, _ = _slopes(p, s, (mean, of_hidden), cell, start, BG)
            grad += tl.dot(slope.to(w.dtype), w, input_precision="tf32x3")
        k = tl.arange(0, BK)
        at = out + (split.to(tl.int64) * p.n_cells + cell)[:, None] * p.width + k[None, :]
        tl.store(at, grad, mask=live[:, None] & (k < p.width)[None, :])


class GeneGradients(NamedTuple):
    """Gradients of the last layer and of theta: [G, K], [G], [G] float32."""

    weight: Any
    bias: Any
    theta: Any


@kernel
def dense_gene_kernel(p: tl.tuple, s: tl.tuple, out: tl.tuple, BC: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr) -> None:
    """Gradients of weight, bias and theta from zero terms, all cells of a gene tile in one program. Grid (gene tiles,)."""
    start = tl.program_id(0) * BG
    gene = start + tl.arange(0, BG)
    there = gene < p.n_genes
    grad = tl.zeros([BG, BK], tl.float32)
    by_bias, by_theta = tl.zeros([BG], tl.float32), tl.zeros([BG], tl.float32)
    for first in range(0, tl.load(p.scored), BC):
        cell, live = _cells(p, first, BC)
        u = _rows(p.u, cell, live, p.width, BK)
        _, mean, of_hidden = _tile(p, u, cell, live, start, BG)
        slope, of_theta = _slopes(p, s, (mean, of_hidden), cell, start, BG)
        grad += tl.dot(tl.trans(slope.to(u.dtype)), u, input_precision="tf32x3")
        by_bias, by_theta = by_bias + tl.sum(slope, 0), by_theta + tl.sum(of_theta, 0)
    k = tl.arange(0, BK)
    at = out.weight + gene.to(tl.int64)[:, None] * p.width + k[None, :]
    tl.store(at, grad, mask=there[:, None] & (k < p.width)[None, :])
    tl.store(out.bias + gene, by_bias, mask=there)
    tl.store(out.theta + gene, by_theta, mask=there)


@kernel
def _count_slopes(x: tl.tensor, m: tl.tensor, th: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """What a count x adds to the slopes by its logit and by theta, weighted."""
    by_theta = tl.where(x > 0.0, _digamma_loss(x, th) + x / (th + m), 0.0)
    return weight * x * (m / (th + m) - m / (m + EPSILON)), weight * by_theta


@kernel
def entry_slopes_kernel(p: tl.tuple, s: tl.tuple, e: tl.tuple, out: tl.tensor, BE: tl.constexpr, BK: tl.constexpr) -> None:
    """Slopes of stored entries, and the gradient of u they make: ``out`` [C, K]. Grid (C,)."""
    place = tl.program_id(0)
    if place < tl.load(p.scored):
        cell = tl.load(p.order + place)
        full_scale, hidden_scale = tl.load(s.scale + cell), tl.load(s.scale + p.n_cells + cell)
        full_weight, hidden_weight = tl.load(s.weight + cell), tl.load(s.weight + p.n_cells + cell)
        k = tl.arange(0, BK)
        grad = tl.zeros([BK], tl.float32)
        end = tl.load(p.crow + cell + 1)
        for start in range(tl.load(p.crow + cell), end, BE):
            at, live, gene, x, x_hidden = _entries(p, start, end, BE)
            m = tl.load(e.mean + at, mask=live, other=1.0)
            th = tl.load(p.theta + gene, mask=live, other=1.0) + EPSILON
            slope, by_theta = _count_slopes(x, m * full_scale, th, full_weight)
            more, more_theta = _count_slopes(x_hidden, m * hidden_scale, th, hidden_weight)
            slope = tl.where((m > LOW) & (m < HIGH), slope + more, 0.0)
            tl.store(e.slope + at, slope, mask=live)
            tl.store(e.by_theta + at, by_theta + more_theta, mask=live)
            grad += tl.sum(slope[:, None] * _rows(p.weight, gene, live, p.width, BK).to(tl.float32), 0)
        tl.store(out + cell.to(tl.int64) * p.width + k, grad, mask=k < p.width)


@kernel
def entry_gene_kernel(p: tl.tuple, by: tl.tuple, e: tl.tuple, out: tl.tuple, BE: tl.constexpr, BK: tl.constexpr) -> None:
    """Adds what stored entries make of the gradients of weight, bias and theta, one program per gene. Grid (G,)."""
    gene = tl.program_id(0)
    k = tl.arange(0, BK)
    grad = tl.zeros([BK], tl.float32)
    by_bias, by_theta = tl.zeros([BE], tl.float32), tl.zeros([BE], tl.float32)
    end = tl.load(by.start + gene + 1)
    for start in range(tl.load(by.start + gene), end, BE):
        at = start + tl.arange(0, BE)
        live = at < end
        entry = tl.load(by.entry + at, mask=live, other=0)
        cell = tl.load(by.cell + entry, mask=live, other=0)
        slope = tl.load(e.slope + entry, mask=live, other=0.0)
        grad += tl.sum(slope[:, None] * _rows(p.u, cell, live, p.width, BK).to(tl.float32), 0)
        by_bias, by_theta = by_bias + slope, by_theta + tl.load(e.by_theta + entry, mask=live, other=0.0)
    at_k = out.weight + gene.to(tl.int64) * p.width + k
    tl.store(at_k, tl.load(at_k, mask=k < p.width, other=0.0) + grad, mask=k < p.width)
    tl.store(out.bias + gene, tl.load(out.bias + gene) + tl.sum(by_bias, 0))
    tl.store(out.theta + gene, tl.load(out.theta + gene) + tl.sum(by_theta, 0))
