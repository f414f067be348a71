"""The two operations that grow with cells x genes, as a GPU likes them; `kernels` holds what they must equal.

`fused_reconstruction`: the likelihoods by the Triton kernels of `triton_kernels`, in the order they need one another.
`dense_gene_sum`: the counts made dense for some cells at a time and multiplied, since a GPU multiplies a hundred dense
zeros in the time it takes to fetch one row of the gene table. No function here makes the host wait for the device.
"""

# C cells, G genes, K bottleneck width, D width; B bytes of one bit a gene; F full and H hidden likelihood

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cellplane.model import triton_kernels as kernels
from cellplane.model.kernels import DISPERSION_RANGE, NB_EPSILON, Counts
from cellplane.model.linear import compute_dtype
from cellplane.model.triton_kernels import ByGene, GeneGradients, Problem, Scaled, Stored

DENSE_BYTES = 256 << 20  # of counts made dense at a time: 6,900 cells of 19,374 genes in bfloat16
PROGRAMS_PER_PROCESSOR = 2  # of a dense kernel, so that one computes while the other waits for memory


@dataclass(frozen=True)
class Tiles:
    """How much of the problem one program holds. ``splits`` programs share the genes of a tile of cells; None: by the device."""

    cells: int = 64
    genes: int = 64
    entries: int = 32
    warps: int = 4
    stages: int = 3
    splits: int | None = None


TILES = {2: Tiles(), 4: Tiles(genes=32, stages=1)}  # by the bytes of a value of u: float32 fills shared memory sooner


def available(device: torch.device) -> bool:
    """Whether the Triton kernels can run there."""
    return device.type == "cuda" and kernels.VERSION is not None


def fused_reconstruction(
    u_CK: Tensor, weight_GK: Tensor, bias_G: Tensor, log_dispersion_G: Tensor, counts: Counts
) -> tuple[Tensor, Tensor]:
    """What `chunked_reconstruction` gives, for cells with hidden genes; 0 for the others, which no loss looks at.

    Products are computed in the dtype of ``u_CK``, everything else in float32. Bitwise reproducible.
    """
    full, hidden = _Fused.apply(u_CK, weight_GK, bias_G, log_dispersion_G, counts)  # type: ignore[no-untyped-call]
    return full, hidden


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u_CK: Tensor, weight_GK: Tensor, bias_G: Tensor, log_dispersion_G: Tensor, counts: Counts
    ) -> tuple[Tensor, Tensor]:
        """Means and totals, then their scale, then the terms; the centres of the slopes fall out on the way."""
        cells = scored_cells(counts)
        with _on(u_CK.device):
            launch = Launch(problem_of(u_CK, weight_GK, bias_G, log_dispersion_G, counts, cells))
            mean, totals_2C = launch.entry_means()
            scale_2C = totals_2C / launch.sums().clamp(min=NB_EPSILON)
            terms_4C = launch.zeros(scale_2C) + launch.entry_terms(scale_2C, mean)
        centre_2C = terms_4C[2:] / totals_2C.clamp(min=NB_EPSILON)
        ctx.save_for_backward(u_CK, weight_GK, bias_G, log_dispersion_G, mean, scale_2C, centre_2C)
        ctx.counts, ctx.cells = counts, cells
        return terms_4C[0].clone(), terms_4C[1].clone()

    @staticmethod
    def backward(ctx: Any, grad_full_C: Tensor, grad_hidden_C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        """Slopes of stored entries and of tiles, summed by cell and by gene."""
        u_CK, weight_GK, bias_G, log_dispersion_G, mean, scale_2C, centre_2C = ctx.saved_tensors
        with _on(u_CK.device):
            launch = Launch(problem_of(u_CK, weight_GK, bias_G, log_dispersion_G, ctx.counts, ctx.cells))
            scaled = Scaled(scale_2C, centre_2C, torch.stack([grad_full_C, grad_hidden_C]).float())
            stored = Stored(mean, torch.zeros_like(mean), torch.zeros_like(mean))
            by_u = launch.entry_slopes(scaled, stored) + launch.dense_u(scaled)  # the first also fills in the stored slopes
            genes = launch.by_gene(scaled, stored)
        raw_G = log_dispersion_G.float().exp()
        inside_G = (raw_G > DISPERSION_RANGE[0]) & (raw_G < DISPERSION_RANGE[1])
        by_dispersion = (genes.theta * raw_G * inside_G).to(log_dispersion_G.dtype)
        return by_u.to(u_CK.dtype), genes.weight.to(weight_GK.dtype), genes.bias.to(bias_G.dtype), by_dispersion, None


@dataclass(frozen=True)
class ScoredCells:
    """Bits of hidden and of measured genes, and the cells that are scored first in ``order``."""

    hidden_CB: Tensor
    measured_PB: Tensor | None
    order: Tensor
    scored: Tensor


def scored_cells(counts: Counts) -> ScoredCells:
    """Which cells are scored, found on the device."""
    measured_PB = None if counts.everything_measured else packed_bits(counts.panels)
    unscored_C = counts.hidden_C == 0
    order = torch.argsort(unscored_C.to(torch.uint8), stable=True).int()
    return ScoredCells(counts.hidden_bits.contiguous(), measured_PB, order, (~unscored_C).sum(dtype=torch.int32)[None])


def packed_bits(rows_CG: Tensor) -> Tensor:
    """[C, ceil(G / 8)] uint8 of [C, G] bool, the gene of lowest index in the highest bit, as numpy packs them."""
    padded = F.pad(rows_CG.to(torch.uint8), (0, -rows_CG.shape[1] % 8))
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=rows_CG.device)
    packed: Tensor = (padded.view(len(padded), -1, 8) << shifts).sum(2, dtype=torch.uint8)
    return packed


def problem_of(u_CK: Tensor, weight_GK: Tensor, bias_G: Tensor, log_dispersion_G: Tensor, counts: Counts, cells: ScoredCells) -> Problem:
    """What the kernels read."""
    return Problem(
        u=u_CK.contiguous(),
        weight=weight_GK.to(u_CK.dtype).contiguous(),
        bias=bias_G.float().contiguous(),
        theta=log_dispersion_G.float().exp().clamp(*DISPERSION_RANGE),
        hidden=cells.hidden_CB,
        measured=cells.measured_PB,
        panel=counts.panel_index,
        order=cells.order,
        scored=cells.scored,
        crow=counts.crow,
        gene=counts.gene,
        value=counts.value,
        entry_hidden=counts.entry_hidden.view(torch.uint8),
        n_cells=len(u_CK),
        n_genes=len(bias_G),
        n_bytes=cells.hidden_CB.shape[1],
        width=u_CK.shape[1],
    )


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the device current, where Triton launches; nothing on a CPU, where only its interpreter runs."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Launch:
    """One problem's kernels with their grids and outputs. What unscored cells would hold stays 0."""

    def __init__(self, problem: Problem) -> None:
        self.p, tiles = problem, TILES[problem.u.element_size()]
        self.cell_tiles, self.gene_tiles = -(-problem.n_cells // tiles.cells), -(-problem.n_genes // tiles.genes)
        self.splits = tiles.splits or min(self.gene_tiles, _programs(problem.u.device, self.cell_tiles))
        self.dense = {"BC": tiles.cells, "BG": tiles.genes, "num_warps": tiles.warps, "num_stages": tiles.stages}
        self.row = {"BK": max(16, 1 << (problem.width - 1).bit_length())}  # a tensor core's product needs 16 at least
        self.stored = {"BE": tiles.entries, "num_warps": tiles.warps}

    def _new(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self.p.u.device)

    def entry_means(self) -> tuple[Tensor, Tensor]:
        """Means at stored entries [nnz], and totals of the counts [2, C]."""
        mean, totals_2C = self._new(len(self.p.gene)), self._new(2, self.p.n_cells)
        if self.p.n_cells:
            kernels.entry_means_kernel[(self.p.n_cells,)](self.p, mean, totals_2C, **self.stored, **self.row)
        return mean, totals_2C

    def sums(self) -> Tensor:
        """Sums of the unscaled means [2, C]."""
        out = self._new(2, self.splits, self.p.n_cells)
        if self.p.n_cells:
            kernels.sums_kernel[(self.cell_tiles, self.splits)](self.p, out, **self.dense, **self.row)
        return out.sum(1)

    def zeros(self, scale_2C: Tensor) -> Tensor:
        """Zero terms F and H, and sums of t dl/dt F and H, [4, C]."""
        out = self._new(4, self.splits, self.p.n_cells)
        if self.p.n_cells:
            kernels.zeros_kernel[(self.cell_tiles, self.splits)](self.p, scale_2C, out, **self.dense, **self.row)
        return out.sum(1)

    def entry_terms(self, scale_2C: Tensor, mean: Tensor) -> Tensor:
        """The same four of stored counts, [4, C]."""
        out = self._new(4, self.p.n_cells)
        if self.p.n_cells:
            kernels.entry_terms_kernel[(self.p.n_cells,)](self.p, scale_2C, mean, out, **self.stored)
        return out

    def entry_slopes(self, scaled: Scaled, stored: Stored) -> Tensor:
        """Fills in the slopes of stored entries; the gradient of u they make, [C, K]."""
        out = self._new(self.p.n_cells, self.p.width)
        if self.p.n_cells:
            kernels.entry_slopes_kernel[(self.p.n_cells,)](self.p, scaled, stored, out, **self.stored, **self.row)
        return out

    def dense_u(self, scaled: Scaled) -> Tensor:
        """Gradient of u from zero terms, [C, K]."""
        out = self._new(self.splits, self.p.n_cells, self.p.width)
        if self.p.n_cells:
            kernels.dense_u_kernel[(self.cell_tiles, self.splits)](self.p, scaled, out, **self.dense, **self.row)
        return out.sum(0)

    def by_gene(self, scaled: Scaled, stored: Stored) -> GeneGradients:
        """Gradients of weight, bias and theta: zero terms by tiles of genes, then each gene's stored entries."""
        p = self.p
        out = GeneGradients(self._new(p.n_genes, p.width), self._new(p.n_genes), self._new(p.n_genes))
        kernels.dense_gene_kernel[(self.gene_tiles,)](p, scaled, out, **self.dense, **self.row)
        if len(p.gene):
            kernels.entry_gene_kernel[(p.n_genes,)](p, by_gene(p.crow, p.gene, p.n_genes), stored, out, **self.stored, **self.row)
        return out


def _programs(device: torch.device, cell_tiles: int) -> int:
    """Programs that share a tile of cells, so that the device is full however few cells there are."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return -(-PROGRAMS_PER_PROCESSOR * processors // max(cell_tiles, 1))


def by_gene(crow: Tensor, gene: Tensor, n_genes: int) -> ByGene:
    """Stored entries in the order of their genes, within a gene in the order of cells."""
    dtype = torch.int16 if n_genes < 1 << 15 else torch.int32  # half the passes of a radix sort
    key, entry = torch.sort(gene.to(dtype), stable=True)
    start = torch.searchsorted(key, torch.arange(n_genes + 1, dtype=dtype, device=gene.device))
    return ByGene(start, entry.int(), cell_of_entry(crow, len(gene)).int())


def cell_of_entry(crow: Tensor, entries: int) -> Tensor:
    """The cell each stored entry belongs to, [nnz] int64; the host does not wait."""
    return torch.searchsorted(crow[1:], torch.arange(entries, dtype=crow.dtype, device=crow.device), right=True)


def dense_gene_sum(table_GD: Tensor, gene: Tensor, crow: Tensor, weight: Tensor) -> Tensor:
    """[C, D]: what `kernels.gene_sum` gives, by dense products in autocast's dtype (without it, the table's)."""
    out: Tensor = _DenseGeneSum.apply(table_GD, gene, crow, weight)  # type: ignore[no-untyped-call]
    return out


class _DenseGeneSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_GD: Tensor, gene: Tensor, crow: Tensor, weight: Tensor) -> Tensor:
        """Pieces of cells, each made dense and multiplied."""
        ctx.dtype = compute_dtype(table_GD)
        ctx.save_for_backward(gene, crow, weight)
        ctx.table = table_GD.shape, table_GD.dtype
        table_GD = table_GD.to(ctx.dtype)
        pieces = _pieces(len(crow) - 1, len(table_GD), ctx.dtype)
        products = [densify((gene, crow, weight), piece, len(table_GD), ctx.dtype) @ table_GD for piece in pieces]
        return products[0] if len(products) == 1 else torch.cat([table_GD.new_zeros(0, table_GD.shape[1]), *products])

    @staticmethod
    def backward(ctx: Any, grad_CD: Tensor) -> tuple[Tensor, None, None, None]:
        """The same pieces made dense again, transposed; their products are added in float32."""
        (n_genes, width), dtype = ctx.table
        grad_CD = grad_CD.to(ctx.dtype)
        pieces = _pieces(len(grad_CD), n_genes, ctx.dtype)
        if len(pieces) == 1:
            return (densify(ctx.saved_tensors, pieces[0], n_genes, ctx.dtype).T @ grad_CD).to(dtype), None, None, None
        out_GD = torch.zeros(n_genes, width, dtype=torch.float32, device=grad_CD.device)
        for piece in pieces:
            out_GD += densify(ctx.saved_tensors, piece, n_genes, ctx.dtype).T @ grad_CD[piece[0] : piece[1]]
        return out_GD.to(dtype), None, None, None


def _pieces(n_cells: int, n_genes: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    step = max(1, DENSE_BYTES // (n_genes * dtype.itemsize))
    return [(start, min(start + step, n_cells)) for start in range(0, n_cells, step)]


def densify(stored: tuple[Tensor, Tensor, Tensor], piece: tuple[int, int], n_genes: int, dtype: torch.dtype) -> Tensor:
    """[c, G]: the weights of these cells' entries at their genes; ``stored`` is (gene, crow, weight) of all cells.

    Entries of other cells add 0 somewhere, because the host does not know where a piece's entries begin.
    """
    gene, crow, weight = stored
    size = (piece[1] - piece[0]) * n_genes
    at, weight = (cell_of_entry(crow, len(gene)) - piece[0]) * n_genes + gene, weight.to(dtype)
    if piece != (0, len(crow) - 1):
        at, weight = at % size, torch.where((at >= 0) & (at < size), weight, 0)
    return torch.zeros(size, dtype=dtype, device=weight.device).scatter_add_(0, at, weight).view(-1, n_genes)
