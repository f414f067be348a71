"""How well taken-out counts are recovered, by two protocols, beside what needs no network (PROTOCOLS 8).

*masking*: a tenth of the non-zeros becomes 0 and nobody is told which; errors of log1p of the rates per 10,000 there. It
rewards whoever fills zeros: the mean of a gene where it is not 0 wins it without denoising anything, so it is listed.
*splitting*: every count is split at random, nine tenths for the model, one tenth to be foretold, zeros included; nats per
entry. Independent only where counts are Poisson. In both, the whole data set is thinned before anything is learned.
"""

# C cells, G genes, M measured genes; c the cells of one piece

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.special import gammaln
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from cellplane.data.sentences import CellTable
from cellplane.errors import DataError
from cellplane.inference import RATES_PER
from cellplane.pipelines.baselines import COMPONENTS, NEIGHBOURS, log_cp10k
from cellplane.pipelines.job import MODEL_ROW, Scores

Piece = tuple[NDArray[np.int64], NDArray[Any]]  # rows [c], their shares of the total by gene [c, G]
Answers = Iterable[Piece]
Ask = Callable[[CellTable], Answers]

FLIPPED, KEPT = 0.1, 0.9  # of the non-zeros of a cell, of every count (both the field's)
ENOUGH_NONZEROS = 5  # a cell with no more loses none (the released protocol)
RATE_SCALE = 20.0  # non-zeros are chosen with weights exp(-count / 20) (the released protocol)
PSEUDO_SHARE = 1e-4  # of the gene's mean, mixed into every profile: else a single log 0 decides
CELLS_AT_ONCE = 256


def evaluate(ask: Ask, table: CellTable, seed: int) -> Scores:
    """Rows cellplm, gene_frequency, knn15 and nonzero_mean; `mask_rmse`, `mask_mae`, `mask_pearson`, `split_nll` each.

    ``ask`` is given the thinned cells and answers with each cell's shares. Raises DataError when there is nothing to hide.
    """
    flipped, entries = flip(table, seed)
    split, rest = split_counts(table, seed)
    methods: dict[str, Ask] = {MODEL_ROW: ask, **BASELINES}
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
    return _entries(table, table.value, kept), entries


def split_counts(table: CellTable, seed: int) -> tuple[CellTable, CellTable]:
    """Every count split by coin flips: nine tenths of the molecules, and the others."""
    whole = np.rint(table.value).astype(np.int64)
    kept = np.random.default_rng(seed).binomial(whole, KEPT)
    return tuple(_entries(table, part.astype(np.float32), part > 0) for part in (kept, whole - kept))  # type: ignore[return-value]


def _entries(table: CellTable, value: NDArray[np.float32], kept: NDArray[np.bool_]) -> CellTable:
    """The same cells with these values, only the entries that are ``kept``."""
    lengths = np.add.reduceat(np.r_[kept, False], table.crow[:-1]) * (np.diff(table.crow) > 0)
    crow = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return replace(table, crow=crow, gene=table.gene[kept], value=value[kept])


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


def splitting_score(answers: Answers, kept: CellTable, rest: CellTable) -> float:
    """Mean nats of the other counts, zeros included, over the measured genes, expected at a ninth of what a cell kept."""
    measured, totals = kept.panel, kept.totals()
    left, mean = _matrix(rest)[:, measured], _gene_shares(kept)[measured]
    nats, values = 0.0, 0
    for rows, shares in answers:
        profile = shares[:, measured].astype(np.float64) + PSEUDO_SHARE * mean
        expected = profile / profile.sum(1, keepdims=True) * (totals[rows] * (1 - KEPT) / KEPT)[:, None]
        x = left[rows].toarray()
        live = expected > 0  # a cell that kept nothing foretells nothing
        nats += float((expected - x * np.log(np.where(live, expected, 1.0)) + gammaln(x + 1.0))[live].sum())
        values += int(live.sum())
    return nats / max(values, 1)


def _matrix(table: CellTable) -> Any:
    return sp.csr_matrix((table.value.astype(np.float64), table.gene, table.crow), shape=(table.n_cells, len(table.panel)))


def _gene_shares(table: CellTable) -> NDArray[np.float64]:
    """Share of every gene in all counts, [G]; half a count more for each measured one, so that none is impossible."""
    counts = np.bincount(table.gene, table.value, len(table.panel)) + 0.5 * table.panel
    return np.asarray(counts / counts.sum())


def _pieces(table: CellTable) -> Iterator[NDArray[np.int64]]:
    for start in range(0, table.n_cells, CELLS_AT_ONCE):
        yield np.arange(start, min(start + CELLS_AT_ONCE, table.n_cells))


def gene_frequency(table: CellTable) -> Answers:
    """Every cell is the average cell."""
    share = _gene_shares(table)
    for rows in _pieces(table):
        yield rows, np.broadcast_to(share, (len(rows), len(share)))


def knn15(table: CellTable) -> Answers:
    """The mean profile of a cell's 15 nearest among 50 principal components, itself included."""
    counts = _matrix(table)
    shares = sp.diags(1 / np.maximum(table.totals(), 1.0)) @ counts
    scaled = log_cp10k(counts[:, table.panel])
    components = min(COMPONENTS, min(scaled.shape) - 1)
    place = PCA(components, svd_solver="arpack", random_state=0).fit_transform(scaled) if components > 0 else scaled.toarray()
    near = NearestNeighbors(n_neighbors=min(NEIGHBOURS, table.n_cells)).fit(place)
    for rows in _pieces(table):
        graph = near.kneighbors_graph(place[rows])
        yield rows, np.asarray((graph @ shares).toarray()) / graph.getnnz(axis=1)[:, None]


def nonzero_mean(table: CellTable) -> Answers:
    """Each gene's mean, in logarithms, over the cells where it is not 0: what masking rewards, and no denoising at all."""
    scaled = log_cp10k(_matrix(table)).tocsc()
    counted = np.maximum(scaled.getnnz(axis=0), 1)
    rate = np.expm1(np.asarray(scaled.sum(axis=0)).ravel() / counted) / RATES_PER
    for rows in _pieces(table):
        yield rows, np.broadcast_to(rate, (len(rows), len(rate)))


BASELINES: dict[str, Ask] = {"gene_frequency": gene_frequency, "knn15": knn15, "nonzero_mean": nonzero_mean}
