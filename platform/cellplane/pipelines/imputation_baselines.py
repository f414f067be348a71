"""What an imputation has to beat: neighbours in the reference and ridge regression, tuned like the model.

Both read log counts scaled by the total of the observed genes, the same for query and reference, and are tuned on observed
genes that are hidden from the query in turn, never on the genes that are scored (PROTOCOLS 6).
"""

# n query cells, m reference cells, O observed genes, H hidden genes

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from cellplane.pipelines.metrics import correlations

Table = NDArray[np.float64]
Baseline = Callable[[Table, Table, Table, float], Table]  # (query [n, O], reference [m, O], values [m, H], setting) -> [n, H]

NEIGHBOURS = (15.0, 50.0, 100.0, 200.0)
ALPHAS = (50.0, 1000.0, 3000.0, 10000.0)
FOLDS = 3  # of the observed genes, each hidden once to choose a setting


def neighbours_average(query: Table, reference: Table, values: Table, neighbours: float) -> Table:
    """Mean ``values`` [m, H] of the reference cells nearest by cosine, [n, H]; all of them where there are fewer."""
    index = NearestNeighbors(n_neighbors=min(int(neighbours), len(reference)), metric="cosine", algorithm="brute")
    near = index.fit(reference).kneighbors(query, return_distance=False)
    found: Table = np.stack([values[rows].mean(0) for rows in near])
    return found


def ridge(query: Table, reference: Table, values: Table, alpha: float) -> Table:
    """Linear regression in the reference with this penalty, applied to the query, [n, H]."""
    found: Table = np.asarray(Ridge(alpha=alpha).fit(reference, values).predict(query)).reshape(len(query), -1)
    return found


BASELINES: dict[str, tuple[Baseline, tuple[float, ...]]] = {
    "knn": (neighbours_average, NEIGHBOURS),
    "ridge": (ridge, ALPHAS),
}


@dataclass(frozen=True)
class Counts:
    """What the baselines read: counts of observed genes, [n, O] and [m, O], and the reference's of hidden genes, [m, H]."""

    query: Table
    reference: Table
    hidden: Table


def baseline_predictions(counts: Counts, seed: int) -> dict[str, tuple[float, Table]]:
    """(chosen setting, log1p of the hidden genes' scaled counts [n, H]) of every baseline."""
    found = {}
    rng = np.random.default_rng(seed)
    folds = np.array_split(rng.permutation(counts.query.shape[1]), FOLDS)
    with threadpool_limits(limits=1):
        for name, (predict, settings) in BASELINES.items():
            best = max(settings, key=lambda setting: _score(counts, folds, predict, setting))
            found[name] = best, predict(*_logs(counts), best)
    return found


def _logs(counts: Counts) -> tuple[Table, Table, Table]:
    """Log counts scaled by what was observed: the query's, the reference's, and the reference's hidden genes."""
    totals, theirs = counts.query.sum(1), counts.reference.sum(1)
    total = float(np.median(totals[totals > 0]))
    return _scaled(counts.query, totals, total), _scaled(counts.reference, theirs, total), _scaled(counts.hidden, theirs, total)


def _scaled(counts: Table, totals: Table, total: float) -> Table:
    scaled: Table = np.log1p(counts * (total / np.maximum(totals, 1e-12))[:, None] * (totals > 0)[:, None])
    return scaled


def _score(counts: Counts, folds: Sequence[NDArray[np.int64]], predict: Baseline, setting: float) -> float:
    """Mean correlation over observed genes, each fold hidden from the query once."""
    scores = []
    for hidden in folds:
        shown = np.setdiff1d(np.arange(counts.query.shape[1]), hidden)
        inner = Counts(counts.query[:, shown], counts.reference[:, shown], counts.reference[:, hidden])
        truth = _scaled(counts.query[:, hidden], counts.query.sum(1), float(np.median(counts.query.sum(1))))
        scores.append(correlations(truth, predict(*_logs(inner), setting)))
    return float(np.nanmean(np.concatenate(scores)))
