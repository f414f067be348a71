"""What a cell type model has to beat: three classical annotators, tuned and blind to the test cells.

Each takes raw counts (CSR, cells x genes) and the labels of the training cells, and labels the test cells. Everything
that is learned - components, neighbours, coefficients, and the settings chosen by inner cross-validation - comes from
training cells alone; test counts are only looked at one cell at a time. An untuned baseline is a straw man: on a
33-gene panel the choice of scaling alone moves logistic regression from .59 to .83 accuracy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from cellplane.artifact.space import Space
from cellplane.data.sentences import CellTable
from cellplane.errors import DataError
from cellplane.pipelines.metrics import annotation_scores
from cellplane.pipelines.splits import random_splits

Fit = Callable[[Any, NDArray[Any], int], Any]  # (training counts, labels, seed) -> a fitted scikit-learn estimator
Baseline = Callable[[Any, ArrayLike, Any, int], NDArray[np.object_]]

COMPONENTS, NEIGHBOURS = 50, 15  # scanpy's customary PCA50 and 15 nearest neighbours
STRENGTHS = (0.003, 0.03, 0.3, 3.0, 10.0)  # C of logistic regression, three decades around 1
INNER_FOLDS = 5
PANEL_GENES = 1000  # below this many genes a data set is a targeted panel: totals say little, so raw log1p is tried as well
MAX_ITERATIONS = 1000


def majority(train_counts: Any, train_labels: ArrayLike, test_counts: Any, seed: int = 0) -> NDArray[np.object_]:
    """The most frequent training label for every test cell, [n]."""
    return _run(fit_majority, train_counts, train_labels, (test_counts, seed))


def pca_knn(train_counts: Any, train_labels: ArrayLike, test_counts: Any, seed: int = 0) -> NDArray[np.object_]:
    """The vote of the 15 nearest training cells among 50 principal components, [n]."""
    return _run(fit_pca_knn, train_counts, train_labels, (test_counts, seed))


def logistic_regression(train_counts: Any, train_labels: ArrayLike, test_counts: Any, seed: int = 0) -> NDArray[np.object_]:
    """Multinomial logistic regression on all genes, strength and scaling chosen by inner cross-validation, [n]."""
    return _run(fit_logistic_regression, train_counts, train_labels, (test_counts, seed))


BASELINES: dict[str, Baseline] = {
    "majority": majority,
    "pca_knn": pca_knn,
    "logistic_regression": logistic_regression,
}


def _run(fit: Fit, train_counts: Any, train_labels: ArrayLike, test: tuple[Any, int]) -> NDArray[np.object_]:
    """Fit on the training cells, then label the test cells; one thread, so that it neither crowds nor varies."""
    test_counts, seed = test
    counts, labels = _checked(train_counts, train_labels)
    with threadpool_limits(limits=1):
        fitted = fit(counts, labels, seed)
        return np.asarray(fitted.predict(sparse.csr_matrix(test_counts)), dtype=object)


def _checked(counts: Any, labels: ArrayLike) -> tuple[Any, NDArray[np.object_]]:
    known = np.asarray(labels, dtype=object)
    if known.shape != (counts.shape[0],) or not known.size:
        raise DataError(f"a baseline needs one label for each training cell, found {known.size} labels for {counts.shape[0]} cells")
    if missing := sum(not isinstance(name, str) for name in known):
        raise DataError(f"{missing} of {known.size} training cells have no label; leave them out before fitting")
    return sparse.csr_matrix(counts), known


def fit_majority(counts: Any, labels: NDArray[Any], seed: int) -> Any:
    """An estimator that always answers the most frequent label (the first in the alphabet among equals)."""
    return DummyClassifier(strategy="most_frequent", random_state=seed).fit(counts, labels)


def fit_pca_knn(counts: Any, labels: NDArray[Any], seed: int) -> Any:
    """Log counts per 10,000 -> PCA -> neighbours; on a targeted panel plain log counts too, the better by inner cross-validation."""
    names = ("cp10k", "raw") if counts.shape[1] < PANEL_GENES else ("cp10k",)
    return _best([_pca_knn_on(SCALINGS[name]) for name in names], counts, labels, seed)


def fit_logistic_regression(counts: Any, labels: NDArray[Any], seed: int) -> Any:
    """The best of all scalings x ``STRENGTHS`` by inner cross-validation, refitted on all training cells."""
    candidates = [_logistic_on(scaling, strength) for scaling in SCALINGS.values() for strength in STRENGTHS]
    return _best(candidates, counts, labels, seed)


def table_logs(table: CellTable, total: float, dtype: DTypeLike = np.float32) -> Any:
    """log1p of a table's counts [C, G], each cell's first scaled to the total unless that is 0; computed in ``dtype``, CSR float64."""
    genes = len(table.panel)
    plain = Space(np.zeros((genes, 0), np.float32), np.zeros(genes, np.float32), total)
    values = plain.scaled(table.crow, table.value.astype(dtype, copy=False)).astype(np.float64, copy=False)
    return sparse.csr_matrix((values, table.gene, table.crow), shape=(table.n_cells, genes))


def log_counts(counts: Any) -> Any:
    """log(1 + count), sparse."""
    return sparse.csr_matrix(counts, dtype=np.float64).log1p()


def log_cp10k(counts: Any) -> Any:
    """log(1 + counts per 10,000 of the cell), sparse; each cell by its own total, an empty cell stays empty."""
    matrix = sparse.csr_matrix(counts, dtype=np.float64)
    totals = np.asarray(matrix.sum(axis=1)).ravel()
    return sparse.csr_matrix(sparse.diags(1e4 / np.where(totals > 0, totals, 1.0)) @ matrix).log1p()


SCALINGS: dict[str, Callable[[Any], Any]] = {"raw": log_counts, "cp10k": log_cp10k}


def _pca_knn_on(scaling: Callable[[Any], Any]) -> Fit:
    def fit(counts: Any, labels: NDArray[Any], seed: int) -> Any:
        components = min(COMPONENTS, min(counts.shape) - 1)
        reduce = [PCA(components, svd_solver="arpack", random_state=seed)] if components > 0 else []
        neighbours = KNeighborsClassifier(min(NEIGHBOURS, counts.shape[0]))
        return make_pipeline(FunctionTransformer(scaling), *reduce, neighbours).fit(counts, labels)

    return fit


def _logistic_on(scaling: Callable[[Any], Any], strength: float) -> Fit:
    def fit(counts: Any, labels: NDArray[Any], seed: int) -> Any:
        if len(set(labels)) < 2:
            return fit_majority(counts, labels, seed)
        model = make_pipeline(FunctionTransformer(scaling), LogisticRegression(C=strength, max_iter=MAX_ITERATIONS))
        with warnings.catch_warnings():  # a setting that has not settled is judged by its score like any other
            warnings.simplefilter("ignore", ConvergenceWarning)
            return model.fit(counts, labels)

    return fit


def _best(candidates: Sequence[Fit], counts: Any, labels: NDArray[Any], seed: int) -> Any:
    """The candidate with the highest mean macro-F1 over inner folds (the first among equals), fitted on all cells."""
    if len(candidates) == 1 or len(labels) < INNER_FOLDS:
        return candidates[0](counts, labels, seed)
    folds = list(_folds(labels, seed))
    scores = [np.mean([_score(fit, counts, labels, (inner, seed)) for inner in folds]) for fit in candidates]
    return candidates[int(np.argmax(scores))](counts, labels, seed)


def _score(fit: Fit, counts: Any, labels: NDArray[Any], held_out: tuple[NDArray[np.bool_], int]) -> float:
    out, seed = held_out
    fitted = fit(counts[~out], labels[~out], seed)
    return annotation_scores(labels[out], fitted.predict(counts[out]))["macro_f1"]


def _folds(labels: NDArray[Any], seed: int) -> Iterator[NDArray[np.bool_]]:
    """Masks [n] of the held-out cells of each inner fold: the cells of every class are shuffled and dealt in turn."""
    for split in random_splits(labels, seed, INNER_FOLDS):
        held_out = np.zeros(len(labels), dtype=bool)
        held_out[split.test] = True
        yield held_out
