"""What recovering hidden counts is worth without a network: each gene's mean rate, with a dispersion of its own.

A cell's hidden count is expected in proportion to the gene's share of its data set's counts. Two things can tell how
large the whole is: the total of the hidden counts themselves, which the training loss lets every method know, and the
total of the visible ones, which is all there is when a value is really missing. Everything here gives both.
"""

# C cells, G genes, D data sets, T dispersions tried; c the cells of one piece

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from cellplane.cells import CellBatch
from cellplane.model.kernels import NB_EPSILON
from cellplane.model.masking import Mask

RATE_CELLS, DISPERSION_CELLS = 50_000, 4_096  # training cells that rates, and the costlier dispersions, are estimated from
PSEUDO_COUNT = 0.5  # of every gene, so that no count is impossible (Jeffreys' prior of a Poisson rate)
DISPERSIONS = torch.logspace(-2, 3, 26, dtype=torch.float64)  # theta: from bursts to nearly Poisson, in steps of 1.58
DEPTHS_PER_OCTAVE = 4  # totals in these bins count as equal where only zeros are scored
LISTED = 256  # terms of counts below are looked up
VALUES_AT_ONCE = 1 << 22  # of a dense piece of cells: 16 MB

Predict = Callable[[Tensor], tuple[Tensor, Tensor]]  # cells [c] -> unscaled means [c, G], dispersion [G]
Reduce = Callable[[Tensor], Tensor]  # adds up what several workers found
Sample = Callable[[], Iterable[CellBatch]]
Column = Literal["dataset_index", "batch_index"]


def alone(values: Tensor) -> Tensor:
    """The Reduce of a single worker."""
    return values


@dataclass(frozen=True)
class HiddenNB:
    """Negative log likelihood of each cell's hidden counts, [C] float64 each; 0 where nothing is hidden.

    ``own_total`` scales the means to the hidden counts' total, as the training loss does, ``visible_total`` by the
    visible counts' (one at least).
    """

    own_total: Tensor
    visible_total: Tensor


def hidden_nb(batch: CellBatch, mask: Mask, predict: Predict) -> HiddenNB:
    """How likely the hidden counts are under the predicted means, piece by piece; see `HiddenNB`."""
    found = torch.zeros(2, batch.n_cells, dtype=torch.float64)
    step = max(1, VALUES_AT_ONCE // batch.n_genes)
    for start in range(0, batch.n_cells, step):
        cells = torch.arange(start, min(start + step, batch.n_cells))
        mean, theta = predict(cells)
        hidden = mask.rows(start, start + len(cells))
        found[:, cells] = _both(_dense(batch.take(cells)), hidden, mean * batch.panels[batch.panel_index[cells]], theta)
    return HiddenNB(*found)


def _dense(batch: CellBatch) -> Tensor:
    """Counts, [C, G] float32."""
    dense = torch.zeros(batch.n_cells, batch.n_genes)
    dense[batch.cell_of_entry(), batch.gene] = batch.value
    return dense


def _both(x: Tensor, hidden: Tensor, mean: Tensor, theta: Tensor) -> Tensor:
    """The two likelihoods of some cells, [2, c]; ``mean`` is 0 where nothing was measured."""
    inside = mean * hidden
    total, known = (x * hidden).sum(1), (x * ~hidden).sum(1).clamp(min=1)
    by_own = total / inside.sum(1).clamp(min=NB_EPSILON)
    by_visible = known / (mean.sum(1) - inside.sum(1)).clamp(min=NB_EPSILON)
    return torch.stack([_nb(x * hidden, inside * scale[:, None], theta) for scale in (by_own, by_visible)])


def _nb(x: Tensor, mean: Tensor, theta: Tensor) -> Tensor:
    """Negative log likelihood of each row, [c] float64 (MODEL: NB with mean and theta); where the mean is 0 nothing is asked."""
    theta = theta + NB_EPSILON
    nll = (theta * torch.log1p(mean / theta)).double().sum(1)
    row, gene = x.nonzero(as_tuple=True)
    k, m, t = x[row, gene].double(), mean[row, gene].double(), theta[gene].double()
    terms = (
        torch.lgamma(t) + torch.lgamma(k + 1) - torch.lgamma(k + t) + k * (torch.log(t) + torch.log1p(m / t) - torch.log(m + NB_EPSILON))
    )
    return nll.index_add(0, row, terms)


@dataclass(frozen=True)
class GeneMeans:
    """``rates`` [D + 1, G] float32: share of each gene in a data set's counts, the first row of all together; ``dispersion`` [G].

    With ``column`` batch_index every sample counts as a data set of its own.
    """

    rates: Tensor
    dispersion: Tensor
    column: Column = "dataset_index"

    @classmethod
    def fit(
        cls, sample: Sample, few: Sample, shape: tuple[int, int], column: Column = "dataset_index", reduce: Reduce = alone
    ) -> GeneMeans:
        """From training cells: rates of ``sample``, dispersions by maximum likelihood over a grid of ``few`` of them.

        ``shape`` is (data sets, genes); ``reduce`` adds up what several workers found, each on its own part.
        """
        many, rest = _grouped(sample(), column), _grouped(few(), column)
        rates = _rates(reduce(_counts(many, shape)))
        return cls(rates, _dispersions(reduce(_grid(rest, rates))), column)

    def predict(self, batch: CellBatch) -> Predict:
        """Means of these cells, whatever is hidden in them."""
        row_C = _row(next(_grouped([batch], self.column)), len(self.rates))
        return lambda cells: (self.rates[row_C[cells]], self.dispersion)


def _grouped(batches: Iterable[CellBatch], column: Column) -> Iterator[CellBatch]:
    """The batches with the column that tells groups apart in the place of their data set."""
    return (replace(batch, dataset_index=getattr(batch, column)) for batch in batches)


def _row(batch: CellBatch, rows: int) -> Tensor:
    """Where each cell's data set stands in the rates, [C]; unknown ones at the first row."""
    return torch.where(batch.dataset_index < rows - 1, batch.dataset_index + 1, 0)


def _counts(batches: Iterable[CellBatch], shape: tuple[int, int]) -> Tensor:
    """Counts by data set and gene, [D + 1, G] float64, the first row of cells of no known data set."""
    counts = torch.zeros(shape[0] + 1, shape[1], dtype=torch.float64)
    for batch in batches:
        place = _row(batch, len(counts))[batch.cell_of_entry()] * batch.n_genes + batch.gene
        counts.view(-1).index_add_(0, place, batch.value.double())
    return counts


def _rates(counts: Tensor) -> Tensor:
    """Shares with a pseudo-count; a data set without any cell takes all data sets' together."""
    together = counts.sum(0)
    rows = torch.where(counts.sum(1, keepdim=True) > 0, counts, together)
    rows = torch.cat([together[None], rows[1:]]) + PSEUDO_COUNT
    return (rows / rows.sum(1, keepdim=True)).float()


def _grid(batches: Iterable[CellBatch], rates: Tensor) -> Tensor:
    """Negative log likelihood of each gene's counts at each dispersion, [T, G] float64, totals known."""
    grid = torch.zeros(len(DISPERSIONS), rates.shape[1], dtype=torch.float64)
    for batch in batches:
        for scale, number, row, panel in _depths(batch, rates):
            mean = (scale * rates[row] * panel).double()
            grid += number * DISPERSIONS[:, None] * torch.log1p(mean / DISPERSIONS[:, None])
        grid += _at_counts(batch, rates)
    return grid


def _scales(batch: CellBatch, rates: Tensor) -> Tensor:
    """What a data set's rates are multiplied by to give each cell's expected counts, [C]."""
    row, total = _row(batch, len(rates)), batch.totals()
    pairs, which = torch.stack([row, batch.panel_index]).unique(dim=1, return_inverse=True)  # type: ignore[no-untyped-call]
    measured = torch.stack([(rates[r] * batch.panels[p]).sum() for r, p in pairs.t().tolist()])
    return total / measured[which].clamp(min=NB_EPSILON)


def _depths(batch: CellBatch, rates: Tensor) -> Iterator[tuple[Tensor, int, int, Tensor]]:
    """(mean scale, number of cells, row of the rates, panel) of cells that are about as deep."""
    scale, row = _scales(batch, rates), _row(batch, len(rates))
    depth = (scale.clamp(min=NB_EPSILON).log2() * DEPTHS_PER_OCTAVE).floor().long()
    alike, which = torch.stack([row, batch.panel_index, depth]).unique(dim=1, return_inverse=True)  # type: ignore[no-untyped-call]
    for index, (r, p, _) in enumerate(alike.t().tolist()):
        members = scale[which == index]
        yield members.mean(), len(members), r, batch.panels[p]


def _at_counts(batch: CellBatch, rates: Tensor) -> Tensor:
    """What counts above 0 add to the likelihood at each dispersion, [T, G] float64."""
    cell = batch.cell_of_entry()
    mean = (_scales(batch, rates)[cell] * rates[_row(batch, len(rates))[cell], batch.gene]).double()
    x = batch.value.double()
    listed = x.clamp(max=LISTED - 1).long()
    small = listed == x
    added = torch.zeros(len(DISPERSIONS), batch.n_genes, dtype=torch.float64)
    for index, theta in enumerate(DISPERSIONS):
        constant = _constant(torch.arange(LISTED, dtype=torch.float64), theta)[listed]
        constant[~small] = _constant(x[~small], theta)
        added[index].index_add_(0, batch.gene, constant + x * (torch.log1p(mean / theta) - torch.log(mean + NB_EPSILON)))
    return added


def _constant(x: Tensor, theta: Tensor) -> Tensor:
    return torch.lgamma(theta) + torch.lgamma(x + 1) - torch.lgamma(x + theta) + x * torch.log(theta)


def _dispersions(grid: Tensor) -> Tensor:
    """The most likely dispersion of each gene, [G] float32."""
    return DISPERSIONS[grid.argmin(0)].float()
