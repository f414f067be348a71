"""Telling strangers from known types: reference cells, and the rule that is learned from known cells alone.

The score weighs two signs: how undecided the calibrated probabilities are, and how far a cell lies from the training cells
of its predicted class. The distance is measured among the main components of expression: in the network's z, which is
trained to see only what tells the known types apart, strangers fall onto known types (pbmc3k, each type left out: AUROC
.69 in z, .86 in 20 components). The weights come from leave-one-type-out inside the training data: each type plays the
stranger once. The network is not fitted again for that, a small classifier on the components is. Taking the type's output
away from the network that has learned it would not do: its entropy then knows too much, and got weights of .4 to .9 on
pbmc3k where none was best (AUROC .80 instead of .85). The threshold is a quantile over known cells that were not trained on.
"""

# C cells, K classes, N reference cells, F features

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from cellplane.artifact.judgement import Reference, StrangerRule, mean_distance, stranger_features
from cellplane.artifact.space import Space, rounded
from cellplane.data.company import READ_ONLY, SharedStore
from cellplane.data.sentences import CellTable, MemoryStore
from cellplane.pipelines.baselines import PANEL_GENES, table_logs
from cellplane.pipelines.config import UnknownConfig
from cellplane.seeds import keyed_seed

SHARES = np.linspace(0, 1, 21)  # of the entropy in the score, tried in leave-one-type-out
MOST_SCORES = 4000  # of known cells that are kept: the 95th percentile is then known to 0.4 %
COMPONENTS = 20  # pbmc3k: .858 with 20, .813 with 50; osmFISH with the entropy: .756 and .776
MOST_FITTED = 20_000  # training cells that the components are made from
CP10K = 1e4
STRENGTH = 0.3  # C of the small classifier; 0.03 and 3 choose the same shares within 0.1
LEAST_SPREAD = 1e-3
FEW = 5  # strangers or known cells below which an area under a curve says nothing


@dataclass(frozen=True)
class Seen:
    """What a network says of labelled cells: ``logits`` [C, K], their place ``z`` [C, Z], ``label`` [C]."""

    logits: NDArray[np.float32]
    z: NDArray[np.float32]
    label: NDArray[np.int64]


def fit_space(table: CellTable, seed: int, components: int = COMPONENTS) -> Space | None:
    """Main components of the cells' log counts, per 10,000 but for a targeted panel; None where cells or genes are too few."""
    rows = np.sort(np.random.default_rng(keyed_seed(seed, "space")).permutation(table.n_cells)[:MOST_FITTED])
    part = table.rows(rows)
    components = min(components, int(part.panel.sum()) - 1, part.n_cells - 1)
    if components < 1 or not len(part.value):
        return None
    total = 0.0 if part.panel.sum() < PANEL_GENES else CP10K
    matrix = table_logs(part, total)
    with threadpool_limits(limits=1):
        pca = PCA(components, svd_solver="arpack", random_state=seed).fit(matrix)
    return Space(rounded(pca.components_.T), pca.mean_.astype(np.float32), total)


def places_in(space: Space, store: MemoryStore | SharedStore) -> NDArray[np.float32]:
    """Where a store's cells lie, in the order of its table."""
    out = np.zeros((store.table.n_cells, space.axes.shape[1]), dtype=np.float32)
    for sentence in range(len(store.sentences)):
        batch = store.read([sentence])
        row = batch.row.numpy()
        out[row[row != READ_ONLY]] = space.places(batch)[row != READ_ONLY]
    return out


def reference_of(cells: Seen, neighbours: int, cells_per_class: int, seed: int) -> Reference:
    """Training cells to compare with, at most so many of each class, drawn by the seed; their z as it will be stored."""
    kept: list[int] = []
    classes = cells.logits.shape[1]
    for index in range(classes):
        rows = np.flatnonzero(cells.label == index)
        drawn = np.random.default_rng(keyed_seed(seed, f"reference {index}")).permutation(rows)[:cells_per_class]
        kept.extend(np.sort(drawn).tolist())
    z, label = cells.z[kept], cells.label[kept]
    z = rounded(z)
    return Reference(z, label, _scales(z, label, classes, neighbours), neighbours)


def _scales(z: NDArray[np.float32], label: NDArray[np.int64], classes: int, neighbours: int) -> NDArray[np.float32]:
    """Median distance inside every class; a class of one cell, or of equal ones, takes the median of the others, or 1."""
    own = [z[label == index] for index in range(classes)]
    scale = np.array([np.median(mean_distance(one, one, neighbours, itself=True)) if len(one) > 1 else np.nan for one in own])
    usable = np.isfinite(scale) & (scale > 0)
    return np.where(usable, scale, np.median(scale[usable]) if usable.any() else 1.0).astype(np.float32)


def fit_rule(held_out: Seen, reference: Reference, temperature: float, config: UnknownConfig) -> StrangerRule:
    """The score and its quantiles, from known cells that were not trained on."""
    features = stranger_features(softmax(held_out.logits / temperature, axis=1).astype(np.float32), held_out.z, reference)
    centre, spread = features.mean(0), np.maximum(features.std(0), LEAST_SPREAD)
    share = config.entropy_share if config.entropy_share is not None else best_share(held_out, reference)
    rule = StrangerRule(centre, spread, np.array([share, 1 - share]), np.zeros(0))
    known = np.sort(rule.scores(features)).astype(np.float64)
    if len(known) > MOST_SCORES:
        known = known[np.linspace(0, len(known) - 1, MOST_SCORES).round().astype(np.int64)]
    return StrangerRule(centre, spread, rule.weights, known)


def best_share(cells: Seen, reference: Reference) -> float:
    """The share of the entropy with the highest mean AUROC when each type plays the stranger; one half where none can.

    The probabilities are those of a small classifier that is fitted without the type, on the places of the reference cells.
    """
    curves = []
    for index in range(cells.logits.shape[1]):
        strange = cells.label == index
        if min(strange.sum(), (~strange).sum()) < FEW or cells.logits.shape[1] < 3:
            continue
        rest = _without_class(reference, index)
        features = stranger_features(_surrogate(rest, cells.z), cells.z, rest)
        known = features[~strange]
        scaled = (features - known.mean(0)) / np.maximum(known.std(0), LEAST_SPREAD)
        curves.append([auroc(strange, share * scaled[:, 0] + (1 - share) * scaled[:, 1]) for share in SHARES])
    if not curves:
        return 0.5
    return float(SHARES[int(np.argmax(np.mean(curves, axis=0)))])


def _surrogate(reference: Reference, z: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities of the reference's classes by logistic regression, [C, K]."""
    centre, spread = reference.z.mean(0), max(float(reference.z.std(0).max()), LEAST_SPREAD)
    with warnings.catch_warnings(), threadpool_limits(limits=1):  # a fit that has not settled ranks cells all the same
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = LogisticRegression(C=STRENGTH, max_iter=300).fit((reference.z - centre) / spread, reference.label)
    proba: NDArray[np.float32] = fitted.predict_proba((z - centre) / spread).astype(np.float32)
    return proba


def _without_class(reference: Reference, index: int) -> Reference:
    """The reference as if the class had never been: neither its cells nor its place among the classes."""
    kept = reference.label != index
    label = reference.label[kept]
    return Reference(reference.z[kept], label - (label > index), np.delete(reference.scale, index), reference.neighbours)


def auroc(strange: NDArray[np.bool_], score: ArrayLike) -> float:
    """Chance that a stranger scores higher than a known cell; .5 is a coin. NaN when one of both kinds is missing."""
    if strange.all() or not strange.any():
        return float("nan")
    return float(roc_auc_score(strange, score))


def false_alarms(strange: NDArray[np.bool_], score: ArrayLike, found: float = 0.95) -> float:
    """Share of known cells refused where this share of strangers is; NaN when one of both kinds is missing."""
    if strange.all() or not strange.any():
        return float("nan")
    false_rate, true_rate, _ = roc_curve(strange, score, drop_intermediate=False)
    return float(false_rate[np.argmax(true_rate >= found)])
