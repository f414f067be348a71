"""How well an annotator tells cells of a type it never saw (PROTOCOLS 7), beside the simple scores anybody could take.

One type is removed from training, validation and the training context; the test cells hold it and the known types.
Reported type by type: a mean alone hides that a type with a sister among the known ones is no stranger to a distance.
"""

# C cells, G genes, Z latent, T types

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from cellplane.artifact.judgement import mean_distance
from cellplane.config import Config
from cellplane.data.company import Context
from cellplane.data.config import UNLABELLED
from cellplane.data.sources import AnnData, column, find_counts
from cellplane.errors import ConfigError, DataError
from cellplane.inference import query_keys, read_cells
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.base import stratified_split
from cellplane.pipelines.baselines import PANEL_GENES, log_counts, log_cp10k
from cellplane.pipelines.config import AnnotationConfig
from cellplane.pipelines.unknown import auroc, false_alarms

log = logging.getLogger(__name__)

MODEL_SCORE, NEIGHBOURS, COMPONENTS = "cellplm", 15, 50
SISTER = 0.95  # correlation with the nearest known type's centroid from which a type has a sister


class UnknownEvaluation(Config):
    """What is left out, and how the cells are read."""

    types: tuple[str, ...] | None = None
    """Types that play the stranger, one at a time; None: all of at least min_cells."""
    min_cells: int = 10
    """A smaller type is too few strangers to say anything."""
    contexts: tuple[Context, ...] = ("own", "self")
    """In whose company test cells are read: beside one another, and each alone."""
    test_share: float = 0.2
    """Share of every type's cells that are asked about."""
    seed: int = 0
    """Chooses the test cells."""


@dataclass(frozen=True)
class Split:
    """Cells of one round: rows to learn from, rows to ask about, and which of those are strangers."""

    train: NDArray[np.int64]
    test: NDArray[np.int64]
    strange: NDArray[np.bool_]


def evaluate_unknown(
    data: AnnData,
    recipe: AnnotationConfig,
    options: UnknownEvaluation | None = None,
    model: Any = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Every type's AUROC and false alarms at 95 % found, by context and score, JSON-ready, with means and refusal rates.

    ``model`` is the base model of every fit (None: from scratch); ``progress`` hears (type, round, rounds). Raises
    ConfigError for a type that is not there, DataError for fewer than three types: without one, two must be left to learn.
    """
    options = options or UnknownEvaluation()
    strangers = Strangers.of(data, recipe, options)
    rows: dict[str, Any] = {}
    for done, name in enumerate(strangers.types):
        if progress is not None:
            progress(name, done, len(strangers.types))
        rows[name] = strangers.left_out(name, model)
        log.info("unknown evaluation: %s, %d of %d", name, done + 1, len(strangers.types))
    return {"types": rows, "summary": {context: summary(rows, context) for context in options.contexts}}


@dataclass(frozen=True)
class Strangers:
    """Cells whose ``types`` play the stranger in turn: their ``labels`` [C] (None where there is none) and log counts [C, G]."""

    data: AnnData
    labels: NDArray[np.object_]
    expression: Any
    types: tuple[str, ...]
    recipe: AnnotationConfig
    options: UnknownEvaluation

    @classmethod
    def of(cls, data: AnnData, recipe: AnnotationConfig, options: UnknownEvaluation) -> Strangers:
        """Reads the cells; raises as `evaluate_unknown`."""
        labels = column(data, str(recipe.keys.labels_key))
        types = _types(labels[_usable(labels)], options)
        return cls(data, labels, _expression(data, recipe), tuple(types), recipe, options)

    def left_out(self, name: str, model: Any = None) -> dict[str, Any]:
        """What a fit without this type says of it: its row of `evaluate_unknown`, JSON-ready."""
        split = _split(self.labels, _usable(self.labels), name, self.options)
        sister, correlation = nearest_type(self.expression, self.labels, split, name)
        pipeline = CellTypeAnnotationPipeline(model, self.recipe).fit(self.data[split.train].copy())
        found = {context: _scored(pipeline, self.data, self.expression, (split, context)) for context in self.options.contexts}
        return {
            "cells": int(split.strange.sum()),
            "nearest_type": sister,
            "nearest_correlation": round(correlation, 4),
            "has_sister": bool(correlation >= SISTER),
            "entropy_share": _entropy_share(pipeline),
            "contexts": found,
        }


def _usable(labels: NDArray[np.object_]) -> NDArray[np.int64]:
    return np.flatnonzero([label is not None and label not in UNLABELLED for label in labels])


def _types(labels: NDArray[np.object_], options: UnknownEvaluation) -> list[str]:
    names, cells = np.unique(labels.astype(str), return_counts=True)
    if len(names) < 3:
        raise DataError(f"there are {len(names)} cell types: with one left out two must remain to learn, so three are needed")
    if options.types is None:
        return [str(name) for name in names[cells >= options.min_cells]]
    if absent := sorted(set(options.types) - set(names)):
        raise ConfigError(f"there are no cells of type {absent[0]!r}; there are {', '.join(names[:20])}")
    return list(options.types)


def _split(labels: NDArray[np.object_], usable: NDArray[np.int64], stranger: str, options: UnknownEvaluation) -> Split:
    """The type's cells are asked about at the same share as all others (or all of them, where these would be few)."""
    kept, asked = (usable[rows] for rows in stratified_split(labels[usable].astype(str), options.test_share, options.seed))
    train, test = kept[labels[kept] != stranger], asked
    if (labels[test] == stranger).sum() < options.min_cells:
        test = np.union1d(asked, usable[labels[usable] == stranger])
    return Split(train, test, labels[test] == stranger)


def _expression(data: AnnData, recipe: AnnotationConfig) -> Any:
    """Log counts, sparse [C, G]: per 10,000, or as they are on a targeted panel."""
    counts = find_counts(data, recipe.keys).matrix
    return log_counts(counts) if counts.shape[1] < PANEL_GENES else log_cp10k(counts)


def nearest_type(expression: Any, labels: NDArray[np.object_], split: Split, stranger: str) -> tuple[str, float]:
    """The known type whose mean expression is most like the stranger's, and the correlation."""
    mean = np.asarray(expression[np.flatnonzero(labels == stranger)].mean(0)).ravel()
    found = {}
    for name in sorted(set(labels[split.train])):
        other = np.asarray(expression[split.train[labels[split.train] == name]].mean(0)).ravel()
        found[str(name)] = float(np.corrcoef(mean, other)[0, 1])
    best = max(found, key=lambda name: found[name])
    return best, found[best]


def _entropy_share(pipeline: CellTypeAnnotationPipeline) -> float:
    rule = pipeline._fitted().judgement.rule
    assert rule is not None
    return float(rule.weights[0])


def _scored(pipeline: CellTypeAnnotationPipeline, data: AnnData, expression: Any, asked: tuple[Split, Context]) -> dict[str, Any]:
    split, context = asked
    scores = _scores(pipeline, data, split, context) | {"pca_distance": pca_distance(expression, split)}
    judgement = pipeline._fitted().judgement
    assert judgement.rule is not None
    known = scores[MODEL_SCORE][~split.strange]
    return {
        "auroc": {name: round(auroc(split.strange, score), 4) for name, score in scores.items()},
        "fpr_at_95_tpr": {name: round(false_alarms(split.strange, score), 4) for name, score in scores.items()},
        "refusal_rate_asked": judgement.refusal_rate,
        "refusal_rate_known": round(float((known > judgement.rule.threshold(judgement.refusal_rate)).mean()), 4),
    }


def _scores(pipeline: CellTypeAnnotationPipeline, data: AnnData, split: Split, context: Context) -> dict[str, NDArray[Any]]:
    """The model's score and the simple ones, each [C] over the test cells, larger is stranger."""
    predictor, keys = pipeline._fitted(), pipeline.settings().keys
    asked = data[split.test].copy()
    vocabulary, size = predictor.folder.vocabulary, predictor.folder.max_cells
    store = read_cells(asked, vocabulary, query_keys(asked, keys), size, context=predictor.company(context)).store
    answer, z = predictor.annotate(store), predictor.embed(store)
    train = data[split.train].copy()
    beside = predictor.embed(read_cells(train, vocabulary, query_keys(train, keys), size).store)
    assert answer.unknown_score is not None
    p = answer.proba.astype(np.float64).clip(1e-12)
    return {
        MODEL_SCORE: answer.unknown_score,
        "max_probability": 1 - p.max(1),
        "entropy": -(p * np.log(p)).sum(1),
        "knn_distance": mean_distance(z, beside, NEIGHBOURS),
    }


def pca_distance(expression: Any, split: Split) -> NDArray[np.float64]:
    """Mean distance of the test cells to the 15 nearest training cells among 50 principal components: no network at all."""
    components = min(COMPONENTS, min(expression[split.train].shape) - 1)
    with threadpool_limits(limits=1):
        pca = PCA(components, svd_solver="arpack", random_state=0).fit(expression[split.train])
        train, test = pca.transform(expression[split.train]), pca.transform(expression[split.test])
    return mean_distance(test.astype(np.float32), train.astype(np.float32), NEIGHBOURS)


def summary(rows: Mapping[str, Any], context: str) -> dict[str, Any]:
    """Means over types of one context: all, and those without a sister; the best simple score; the refusal rate of known cells."""
    found = [row["contexts"][context] for row in rows.values()]
    alone = [row["contexts"][context] for row in rows.values() if not row["has_sister"]]
    names = list(found[0]["auroc"]) if found else []
    simple = [max(value for name, value in one["auroc"].items() if name != MODEL_SCORE) for one in found]
    return {
        "mean_auroc": {name: _mean([one["auroc"][name] for one in found]) for name in names},
        "mean_auroc_without_sister": {name: _mean([one["auroc"][name] for one in alone]) for name in names},
        "types_at_or_above_best_simple": sum(one["auroc"][MODEL_SCORE] >= best for one, best in zip(found, simple, strict=True)),
        "types": len(found),
        "refusal_rate_known": _mean([one["refusal_rate_known"] for one in found]),
    }


def _mean(values: list[float]) -> float | None:
    return round(float(np.mean(values)), 4) if values else None
