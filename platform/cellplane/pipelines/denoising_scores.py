"""How well taken-out counts are recovered, by two protocols, beside what needs no network (PROTOCOLS 8).

*masking*: a tenth of the non-zeros becomes 0 and nobody is told which; errors of log1p of the rates per 10,000 there. It
rewards whoever fills zeros: the mean of a gene where it is not 0 wins it without denoising anything, so it is listed.
*splitting*: every count is split at random, nine tenths for the model, one tenth to be foretold, zeros included; nats per
entry. Independent only where counts are Poisson. In both, the whole data set is thinned before anything is learned.
"""

# C cells, G genes

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cellplane.data.sentences import CellTable
from cellplane.errors import DataError
from cellplane.inference import RATES_PER
from cellplane.pipelines.denoising_baselines import BASELINES, Answers, Ask, split_counts, splitting_score, stored
from cellplane.pipelines.job import MODEL_ROW, Scores

FLIPPED = 0.1  # of the non-zeros of a cell (the field's)
ENOUGH_NONZEROS = 5  # a cell with no more loses none (the released protocol)
RATE_SCALE = 20.0  # non-zeros are chosen with weights exp(-count / 20) (the released protocol)


def evaluate(ask: Ask, table: CellTable, seed: int) -> Scores:
    """Rows cellplm, gene_frequency, knn15 and nonzero_mean; `mask_rmse`, `mask_mae`, `mask_pearson`, `split_nll` each.

    ``ask`` is given the thinned cells and answers with each cell's shares. Raises DataError when there is nothing to hide.
    """
    flipped, entries = flip(table, seed)
    split, rest = split_counts(table, seed)
    methods: Mapping[str, Ask] = {MODEL_ROW: ask, **BASELINES}
    masked = {name: masking_scores(method(flipped), table, entries) for name, method in methods.items()}
    foretold = {name: splitting_score(method(split), split, rest) for name, method in methods.items()}
    return {name: {**masked[name], "split_nll": foretold[name]} for name in methods}


def flip(table: CellTable, seed: int) -> tuple[CellTable, NDArray[np.int64]]:
    """The cells with a tenth of their non-zeros gone, small counts first, and which stored entries these were, ascending."""
    rng, gone = np.random.default_rng(seed), []
    for start, end in zip(table.crow[:-1], table.crow[1:], strict=True):
        wanted = round(FLIPPED * (end - start))
        if end - start > ENOUGH_NONZEROS and wanted:
            weight = np.exp(-table.value[start:end] / RATE_SCALE) + 1e-12
            gone.append(start + rng.choice(end - start, wanted, replace=False, p=weight / weight.sum()))
    if not gone:
        raise DataError(f"no cell has more than {ENOUGH_NONZEROS} non-zero counts: there is nothing to hide and score")
    entries = np.sort(np.concatenate(gone)).astype(np.int64)
    kept = np.ones(len(table.gene), dtype=bool)
    kept[entries] = False
    return stored(table, table.value, kept), entries


def masking_scores(answers: Answers, table: CellTable, entries: NDArray[np.int64]) -> dict[str, float]:
    """Errors at the entries that were taken out, in log1p of counts per 10,000; the truth by each cell's whole total."""
    cell = np.repeat(np.arange(table.n_cells), np.diff(table.crow))[entries]
    truth = np.log1p(RATES_PER * table.value[entries] / table.totals()[cell])
    found = np.zeros(len(entries))
    for rows, shares in answers:
        at = _where(cell, rows)
        found[at.entry] = np.log1p(RATES_PER * shares[at.row, table.gene[entries[at.entry]]])
    error = found - truth
    spread = found.std() * truth.std()
    pearson = float(((found - found.mean()) * (truth - truth.mean())).mean() / spread) if spread > 0 else 0.0
    return {"mask_rmse": float(np.sqrt((error**2).mean())), "mask_mae": float(np.abs(error).mean()), "mask_pearson": pearson}


@dataclass(frozen=True)
class _Where:
    """Which entries belong to some rows, and to which of them."""

    entry: NDArray[np.int64]
    row: NDArray[np.int64]


def _where(cell: NDArray[np.int64], rows: NDArray[np.int64]) -> _Where:
    """``cell`` is ascending."""
    first, last = np.searchsorted(cell, rows, "left"), np.searchsorted(cell, rows, "right")
    row = np.repeat(np.arange(len(rows)), last - first)
    offset = np.arange(len(row)) - np.repeat(np.cumsum(last - first) - (last - first), last - first)
    return _Where(first[row] + offset, row)
