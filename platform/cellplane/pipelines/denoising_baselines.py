"""What a denoiser has to beat: averages over genes, over neighbours, and over diffused neighbours, and a low-rank table.

Diffusion and the low rank have settings, which are chosen by splitting the counts they are given once more: never by what
is scored. Diffusion is that of MAGIC (van Dijk et al., Cell 2018): an adaptive Gaussian graph, walked t steps.
"""

# C cells, G genes; c the cells of one piece

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.special import gammaln
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from cellplane.data.sentences import CellTable
from cellplane.inference import RATES_PER
from cellplane.pipelines.baselines import COMPONENTS, NEIGHBOURS, log_cp10k

log = logging.getLogger(__name__)

Piece = tuple[NDArray[np.int64], NDArray[Any]]  # rows [c], their shares of the total by gene [c, G]
Answers = Iterable[Piece]
Ask = Callable[[CellTable], Answers]
SettingT = TypeVar("SettingT")
By = Callable[[SettingT], Answers]  # answers by setting; what all settings share is found once

KEPT = 0.9  # of every count (the field's)
PSEUDO_SHARE = 1e-4  # of the gene's mean, mixed into every profile: else a single log 0 decides
CELLS_AT_ONCE = 256
KERNEL_NEIGHBOUR = 5  # whose distance is a cell's own scale (MAGIC's default)
DIFFUSIONS = tuple((neighbours, steps) for neighbours in (15, 30) for steps in (1, 2, 3, 4, 6))
RANKS = (5, 10, 20, 40)


def split_counts(table: CellTable, seed: int) -> tuple[CellTable, CellTable]:
    """Every count split by coin flips: nine tenths of the molecules, and the others."""
    whole = np.rint(table.value).astype(np.int64)
    kept = np.random.default_rng(seed).binomial(whole, KEPT)
    return tuple(stored(table, part.astype(np.float32), part > 0) for part in (kept, whole - kept))  # type: ignore[return-value]


def stored(table: CellTable, value: NDArray[np.float32], kept: NDArray[np.bool_]) -> CellTable:
    """The same cells with these values, only the entries that are ``kept``."""
    before = np.concatenate([[0], np.cumsum(kept)])
    return replace(table, crow=before[table.crow].astype(np.int64), gene=table.gene[kept], value=value[kept])


def splitting_score(answers: Answers, kept: CellTable, rest: CellTable) -> float:
    """Mean nats of the other counts, zeros included, over the measured genes, expected at a ninth of what a cell kept."""
    nats, values = cell_nats(answers, kept, rest)
    return float(nats.sum()) / max(int(values.sum()), 1)


def cell_nats(answers: Answers, kept: CellTable, rest: CellTable) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The same as the sum over the entries of every cell, [C], and how many entries these are, [C]."""
    measured, totals = kept.panel, kept.totals()
    left, mean = matrix(rest)[:, measured], gene_shares(kept)[measured]
    nats, values = np.zeros(kept.n_cells), np.zeros(kept.n_cells, dtype=np.int64)
    for rows, shares in answers:
        profile = shares[:, measured].astype(np.float64) + PSEUDO_SHARE * mean
        expected = profile / profile.sum(1, keepdims=True) * (totals[rows] * (1 - KEPT) / KEPT)[:, None]
        x = left[rows].toarray()
        live = expected > 0  # a cell that kept nothing foretells nothing
        nats[rows] = np.where(live, expected - x * np.log(np.where(live, expected, 1.0)) + gammaln(x + 1.0), 0.0).sum(1)
        values[rows] = live.sum(1)
    return nats, values


def matrix(table: CellTable) -> Any:
    """The counts, CSR [C, G]."""
    return sp.csr_matrix((table.value.astype(np.float64), table.gene, table.crow), shape=(table.n_cells, len(table.panel)))


def gene_shares(table: CellTable) -> NDArray[np.float64]:
    """Share of every gene in all counts, [G]; half a count more for each measured one, so that none is impossible."""
    counts = np.bincount(table.gene, table.value, len(table.panel)) + 0.5 * table.panel
    return np.asarray(counts / counts.sum())


def pieces(n_cells: int) -> Iterator[NDArray[np.int64]]:
    """Rows of some cells at a time."""
    for start in range(0, n_cells, CELLS_AT_ONCE):
        yield np.arange(start, min(start + CELLS_AT_ONCE, n_cells))


def gene_frequency(table: CellTable) -> Answers:
    """Every cell is the average cell."""
    share = gene_shares(table)
    for rows in pieces(table.n_cells):
        yield rows, np.broadcast_to(share, (len(rows), len(share)))


def nonzero_mean(table: CellTable) -> Answers:
    """Each gene's mean, in logarithms, over the cells where it is not 0: what masking rewards, and no denoising at all."""
    scaled = log_cp10k(matrix(table)).tocsc()
    counted = np.maximum(scaled.getnnz(axis=0), 1)
    rate = np.expm1(np.asarray(scaled.sum(axis=0)).ravel() / counted) / RATES_PER
    for rows in pieces(table.n_cells):
        yield rows, np.broadcast_to(rate, (len(rows), len(rate)))


def knn15(table: CellTable) -> Answers:
    """The mean profile of a cell's 15 nearest among 50 principal components, itself included."""
    place, shares = places(table), cell_shares(table)
    near = NearestNeighbors(n_neighbors=min(NEIGHBOURS, table.n_cells)).fit(place)
    for rows in pieces(table.n_cells):
        graph = near.kneighbors_graph(place[rows])
        yield rows, np.asarray((graph @ shares).toarray()) / graph.getnnz(axis=1)[:, None]


def cell_shares(table: CellTable) -> Any:
    """Each cell's counts as shares of its total, CSR [C, G]."""
    return sp.diags(1 / np.maximum(table.totals(), 1.0)) @ matrix(table)


def places(table: CellTable) -> NDArray[np.float64]:
    """Cells among 50 principal components of log counts per 10,000."""
    scaled = log_cp10k(matrix(table)[:, table.panel])
    components = min(COMPONENTS, min(scaled.shape) - 1)
    if components < 1:
        return np.asarray(scaled.toarray())
    with threadpool_limits(limits=1):
        found: NDArray[np.float64] = PCA(components, svd_solver="arpack", random_state=0).fit_transform(scaled)
    return found


def transitions(place: NDArray[Any], neighbours: int) -> Any:
    """One step of a walk between neighbours, CSR [C, C], rows adding up to 1: Gaussian weights, each cell at its own scale."""
    near = min(neighbours, len(place))
    distance, other = NearestNeighbors(n_neighbors=near).fit(place).kneighbors(place)
    scale = np.maximum(distance[:, min(KERNEL_NEIGHBOUR, near - 1)], 1e-9)
    weight = np.exp(-((distance / scale[:, None]) ** 2))
    graph = sp.csr_matrix((weight.ravel(), other.ravel(), np.arange(0, other.size + 1, near)), shape=(len(place), len(place)))
    both = graph + graph.T
    return sp.diags(1 / np.asarray(both.sum(1)).ravel()) @ both


def walked(step: Any, shares: Any, steps: int) -> Answers:
    """Mean shares [c, G] of the cells where a walk of so many steps ends, some starting cells at a time."""
    for rows in pieces(step.shape[0]):
        ends = step[rows].toarray()
        for _ in range(steps - 1):
            ends = ends @ step
        yield rows, np.asarray(ends @ shares)


def low_rank(table: CellTable) -> By[int]:
    """Log counts per 10,000 rebuilt from their first principal components, by their number."""
    scaled = log_cp10k(matrix(table))
    most = min(max(RANKS), min(scaled.shape) - 1)
    with threadpool_limits(limits=1):
        pca = PCA(most, svd_solver="arpack", random_state=0)
        place = pca.fit_transform(scaled)

    def rebuilt(rank: int) -> Answers:
        kept = slice(min(rank, most))
        for rows in pieces(table.n_cells):
            rates = np.expm1(np.clip(place[rows, kept] @ pca.components_[kept] + pca.mean_, 0, None))
            yield rows, rates / np.maximum(rates.sum(1, keepdims=True), 1e-12)

    return rebuilt


def diffusion(table: CellTable) -> By[tuple[int, int]]:
    """Profiles averaged over a walk, by (neighbours, steps)."""
    place, shares = places(table), cell_shares(table)
    step = cache(partial(transitions, place))
    return lambda setting: walked(step(setting[0]), shares, setting[1])


@dataclass
class Tuned:
    """A method with settings, the best of them by splitting once more the counts that it is given; ``chosen`` is the last one."""

    method: Callable[[CellTable], By[Any]]
    settings: tuple[Any, ...]
    seed: int = 0
    chosen: Any = None
    tried: dict[str, float] = field(default_factory=dict)

    def __call__(self, table: CellTable) -> Answers:
        """Answers with the setting that foretells a tenth of these counts best from the others."""
        kept, rest = split_counts(table, self.seed + 1)
        ask = self.method(kept)
        found = {setting: splitting_score(ask(setting), kept, rest) for setting in self.settings}
        self.chosen = min(found, key=lambda setting: found[setting])
        self.tried = {str(setting): round(nats, 6) for setting, nats in found.items()}
        log.info("%s: %s is best of %d settings", self.method.__name__, self.chosen, len(found))
        return self.method(table)(self.chosen)


BASELINES: Mapping[str, Ask] = {"gene_frequency": gene_frequency, "knn15": knn15, "nonzero_mean": nonzero_mean}


def tuned_baselines(seed: int) -> dict[str, Tuned]:
    """The baselines that have settings."""
    return {"diffusion": Tuned(diffusion, DIFFUSIONS, seed), "low_rank": Tuned(low_rank, RANKS, seed)}
