"""Fitting the linear classifier that answers with an annotator's network; see `artifact.linear`.

Form and strength are chosen as those of the tuned baseline are, by inner cross-validation of the training cells: log
counts as they are or per 10,000, all (or the 2,000 most variable) genes or 60 principal components. Its share of the
answer is the one under which the validation cells, of which neither it nor the network has learned, are most likely.
"""

# C cells, G genes, F features, K classes

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from cellplane.artifact.linear import Linear, pooled
from cellplane.artifact.space import Space, rounded
from cellplane.data.company import SharedStore
from cellplane.data.sentences import CellTable, MemoryStore
from cellplane.pipelines.annotation_baselines import ITERATIONS, LOGISTIC_COMPONENTS, variable_genes
from cellplane.pipelines.base import stratified_split
from cellplane.pipelines.baselines import STRENGTHS, table_logs
from cellplane.pipelines.calibration import fit_temperature, negative_log_likelihood
from cellplane.pipelines.metrics import annotation_scores
from cellplane.pipelines.splits import random_splits
from cellplane.pipelines.unknown import CP10K, places_in

log = logging.getLogger(__name__)

TOTALS = (0.0, CP10K)  # counts as they are, or of every cell scaled to this
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the linear classifier in the answer
FOLDS = 3
MOST_CHOOSING, MOST_FITTED = 5_000, 20_000  # cells; where there are more, a network needs no such help

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Form:
    """Counts scaled to ``total`` (0: as they are), ``components`` of their logs (0: genes), strength C of the regression."""

    total: float
    components: int
    strength: float


def fit_linear(
    stores: tuple[MemoryStore, MemoryStore | SharedStore], network: NDArray[np.float32], seed: int, *, calibrated: bool
) -> tuple[Linear | None, NDArray[np.float32]]:
    """The classifier, learned from all cells, and the logits [C, K] that validation cells get from both; None for a share of 0.

    ``network``: its logits of the validation cells, ``stores[1]``, in the order of their table. The returned logits, and
    the share, are of a classifier that has not learned from these cells.
    """
    training, held_out = (store.table for store in stores)
    assert held_out.labels is not None
    with threadpool_limits(limits=1):
        form = choose_form(training, seed)
        candidate = fitted(form, [training], network.shape[1], seed)
        said = places_in(candidate.space, stores[1]) + candidate.bias
        share = best_share(network, said, held_out.labels, calibrated=calibrated)
        log.info("a linear member has a share of %g (total %g, %d components, C %g)", share, form.total, form.components, form.strength)
        if share == 0:
            return None, network
        return replace(fitted(form, [training, held_out], network.shape[1], seed), share=share), pooled(network, said, share)


def best_share(network: NDArray[np.float32], linear: NDArray[np.float32], truth: Labels, *, calibrated: bool) -> float:
    """The share under which the true labels are most likely, the smallest among equals; ``calibrated``: each at its temperature."""
    losses = []
    for share in SHARES:
        both = pooled(network, linear, share)
        losses.append(negative_log_likelihood(both, truth, fit_temperature(both, truth) if calibrated else 1.0))
    return SHARES[int(np.argmin(losses))]


def choose_form(table: CellTable, seed: int) -> Form:
    """The form with the best mean macro-F1 over inner folds of the cells; a middling one where they are too few for folds."""
    table = _thinned(table, MOST_CHOOSING, seed)
    labels = _labels(table)
    logs = {total: table_logs(table, total) for total in TOTALS}
    found: dict[Form, list[float]] = {}
    for split in random_splits(labels, seed, FOLDS):
        if len(set(labels[split.train])) < 2 or not len(split.test):
            continue
        for total, logs_CG in logs.items():
            for view in _views(logs_CG[split.train], table.panel, seed):
                features = [view.features(logs_CG[rows]) for rows in (split.train, split.test)]
                for strength, model in _regressions(features[0], labels[split.train], STRENGTHS, seed):
                    answers = model.predict(features[1]).astype(str)
                    score = annotation_scores(labels[split.test].astype(str), answers)["macro_f1"]
                    found.setdefault(Form(total, view.components, strength), []).append(score)
    return max(found, key=lambda form: float(np.mean(found[form])), default=Form(TOTALS[0], 0, STRENGTHS[len(STRENGTHS) // 2]))


def fitted(form: Form, tables: Sequence[CellTable], n_classes: int, seed: int) -> Linear:
    """The classifier of this form, learned from the tables' cells; as it will be after saving, with a share of 1."""
    kept = [_thinned(table, MOST_FITTED, seed) for table in tables]
    logs_CG = sparse.csr_matrix(sparse.vstack([table_logs(table, form.total) for table in kept]))
    labels = np.concatenate([_labels(table) for table in kept])
    views = {view.components: view for view in _views(logs_CG, kept[0].panel, seed)}
    view = views.get(form.components, views[0])
    _, model = next(iter(_regressions(view.features(logs_CG), labels, (form.strength,), seed)))
    assert len(model.classes_) == n_classes, "the split keeps a cell of every type"
    coefficients, intercept = model.coef_, model.intercept_
    if n_classes == 2:  # scikit-learn keeps the difference of both
        coefficients, intercept = (np.concatenate([-part, part]) / 2 for part in (coefficients, intercept))
    weights_GK = np.zeros((logs_CG.shape[1], n_classes))
    weights_GK[view.genes] = view.of_genes(coefficients.T)
    axes, mean = rounded(weights_GK), np.asarray(logs_CG.mean(axis=0)).ravel()
    bias = intercept if view.pca is not None else intercept + mean @ weights_GK  # components of an average cell are 0
    return Linear(Space(axes, mean.astype(np.float32), form.total), bias.astype(np.float32), 1.0)


@dataclass(frozen=True)
class View:
    """What the regression sees of log counts: some genes [g], or their components."""

    genes: NDArray[np.int64]
    pca: Any = None

    @property
    def components(self) -> int:
        """As a form names it: asked for, not found."""
        return 0 if self.pca is None else LOGISTIC_COMPONENTS

    def features(self, logs_CG: Any) -> Any:
        """[C, F]."""
        mine = logs_CG[:, self.genes]
        return mine if self.pca is None else self.pca.transform(mine)

    def of_genes(self, coefficients_FK: NDArray[np.float64]) -> NDArray[np.float64]:
        """Coefficients of the genes, [g, K]."""
        out: NDArray[np.float64] = coefficients_FK if self.pca is None else self.pca.components_.T @ coefficients_FK
        return out


def _views(logs_CG: Any, panel: NDArray[np.bool_], seed: int) -> Iterator[View]:
    measured = np.flatnonzero(panel)
    genes = measured[variable_genes(logs_CG[:, measured])]
    yield View(genes)
    size = min(LOGISTIC_COMPONENTS, logs_CG.shape[0] - 1, len(genes) - 1)
    if size > 0 and logs_CG[:, genes].nnz:
        yield View(genes, PCA(size, svd_solver="arpack", random_state=seed).fit(logs_CG[:, genes]))


def _regressions(features: Any, labels: Labels, strengths: Sequence[float], seed: int) -> Iterator[tuple[float, Any]]:
    """The regression at each strength, begun where the stronger penalty ended; each is to be used before the next."""
    model = LogisticRegression(max_iter=ITERATIONS, warm_start=True, random_state=seed)
    for strength in strengths:
        with warnings.catch_warnings():  # a setting that has not settled is judged by its score like any other
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.set_params(C=strength).fit(features, labels)
        yield strength, model


def _thinned(table: CellTable, most: int, seed: int) -> CellTable:
    """About so many of the cells at most, the same share of each type and one of it at least."""
    if table.n_cells <= most:
        return table
    return table.rows(stratified_split(_labels(table), 1 - most / table.n_cells, seed)[0])


def _labels(table: CellTable) -> Labels:
    assert table.labels is not None
    return np.asarray(table.labels)
