"""How well labels and counts were predicted, and how far the stated confidence can be believed.

Every number here is computed from answers alone, so a model and its baselines are judged by the same code. Macro
averages run over the classes that occur in the truth: a class nobody has cannot be found, and a prediction of it
already costs the recall of the class the cell really belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from cellplane.errors import DataError

# Bins of equal width, as in Guo et al., "On calibration of modern neural networks", ICML 2017.
CALIBRATION_BINS = 15
ROUNDING = 1e-13  # a column no longer than this for each cell differs from 0, or its mean, by rounding alone


class AnnotationScores(TypedDict):
    """Scores of one set of predictions; all in [0, 1] but ``support``, the cells of each class."""

    accuracy: float
    macro_f1: float
    macro_precision: float
    macro_recall: float
    per_class_f1: dict[str, float]
    support: dict[str, int]


@dataclass(frozen=True)
class Reliability:
    """Cells grouped by stated confidence; bins without cells hold NaN. Edges [B+1], everything else [B]."""

    edges: NDArray[np.float64]
    confidence: NDArray[np.float64]  # mean stated confidence
    accuracy: NDArray[np.float64]  # share that was right
    cells: NDArray[np.int64]


@dataclass(frozen=True)
class GeneScores:
    """Scores of every gene over the cells, on log1p of the counts, each [G].

    ``pearson`` and ``cosine`` in [-1, 1], NaN for a gene that does not vary (is 0 everywhere) in the truth; 0 where only the
    prediction is constant (0). ``rmse`` and ``mae`` in log units.
    """

    pearson: NDArray[np.float64]
    cosine: NDArray[np.float64]
    rmse: NDArray[np.float64]
    mae: NDArray[np.float64]

    def means(self) -> dict[str, float]:
        """Means over the genes that have a value: pearson, cosine, rmse, mae.

        Raises DataError when no gene varies, because nothing could be told from such a truth.
        """
        if np.isnan(self.pearson).all():
            raise DataError(f"none of the {len(self.pearson)} genes varies over the cells; score on cells that differ")
        return {name: float(np.nanmean(getattr(self, name))) for name in ("pearson", "cosine", "rmse", "mae")}


def gene_scores(truth: ArrayLike, predicted: ArrayLike) -> GeneScores:
    """How well each gene's counts were predicted, from true and predicted counts [C, G]; negative predictions count as 0.

    The scores of the released imputation recipe. Raises DataError for other shapes, no cells, or counts that are not
    finite or (in the truth) negative.
    """
    true, guess = np.asarray(truth, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if true.shape != guess.shape or true.ndim != 2 or not true.size:
        raise DataError(f"scoring counts needs two tables of the same cells and genes, found shapes {true.shape} and {guess.shape}")
    if not (np.isfinite(true).all() and np.isfinite(guess).all() and (true >= 0).all()):
        raise DataError("scoring counts needs finite numbers and a truth that is nowhere negative; pass counts, not scaled values")
    true, guess = np.log1p(true), np.log1p(np.maximum(guess, 0))
    difference = guess - true
    return GeneScores(
        pearson=_alignment(true - true.mean(0), guess - guess.mean(0)),
        cosine=_alignment(true, guess),
        rmse=np.sqrt((difference**2).mean(0)),
        mae=np.abs(difference).mean(0),
    )


def correlations(truth: ArrayLike, predicted: ArrayLike) -> NDArray[np.float64]:
    """Pearson correlation of every column over the rows, [G]; NaN where the truth does not vary, 0 where only the prediction does not.

    Raises DataError for other shapes or no rows.
    """
    true, guess = np.asarray(truth, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if true.shape != guess.shape or true.ndim != 2 or not len(true):
        raise DataError(f"correlating needs two tables of the same cells and genes, found shapes {true.shape} and {guess.shape}")
    return _alignment(true - true.mean(0), guess - guess.mean(0))


def rank_correlations(truth: ArrayLike, predicted: ArrayLike) -> NDArray[np.float64]:
    """Spearman correlation of every column, as `correlations`; equal values share their mean rank."""
    return correlations(rankdata(np.asarray(truth), axis=0), rankdata(np.asarray(predicted), axis=0))


def _alignment(true: NDArray[np.float64], guess: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosine of the angle between the columns; NaN where the truth is 0, 0 where only the guess is."""
    sizes = np.linalg.norm(true, axis=0), np.linalg.norm(guess, axis=0)
    known = np.where(sizes[0] > ROUNDING * len(true), sizes[0], np.nan)
    return np.asarray((true * guess).sum(0) / (known * np.where(sizes[1] > ROUNDING * len(guess), sizes[1], np.inf)))


def annotation_scores(truth: ArrayLike, predicted: ArrayLike) -> AnnotationScores:
    """Accuracy, macro scores and F1 of every class, as plain numbers.

    A cell whose class the predictor never saw counts as wrong, and its class as F1 0. A class never predicted has
    precision 0. Raises DataError when there is nothing to score, lengths differ or a cell has no true label.
    """
    true, guess = _labels(truth, predicted)
    classes = sorted(set(true))
    hit = np.array([np.sum((true == name) & (guess == name)) for name in classes], dtype=np.float64)
    support = np.array([np.sum(true == name) for name in classes], dtype=np.float64)
    claimed = np.array([np.sum(guess == name) for name in classes], dtype=np.float64)
    f1 = 2 * hit / (support + claimed)
    return AnnotationScores(
        accuracy=float(np.mean(true == guess)),
        macro_f1=float(f1.mean()),
        macro_precision=float((hit / np.maximum(claimed, 1)).mean()),
        macro_recall=float((hit / support).mean()),
        per_class_f1=dict(zip(classes, f1.tolist(), strict=True)),
        support=dict(zip(classes, support.astype(int).tolist(), strict=True)),
    )


def confusion(truth: ArrayLike, predicted: ArrayLike, classes: Sequence[str]) -> NDArray[np.int64]:
    """Cells of each true class (rows) given each predicted class (columns), [K, K] in the order of ``classes``.

    Raises DataError naming labels that are not among ``classes``: leaving them out would hide mistakes.
    """
    true, guess = _labels(truth, predicted)
    place = {name: index for index, name in enumerate(classes)}
    if unknown := sorted({str(name) for name in (*true, *guess) if name not in place}):
        raise DataError(f"labels {unknown[:5]} are not among the {len(classes)} classes of the table; pass the union of both label sets")
    table = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(table, ([place[name] for name in true], [place[name] for name in guess]), 1)
    return table


def expected_calibration_error(confidence: ArrayLike, correct: ArrayLike, bins: int = CALIBRATION_BINS) -> float:
    """Mean distance between stated confidence and share of right answers, weighted by cells; 0 is honest, 1 is worst."""
    table = reliability(confidence, correct, bins)
    filled = table.cells > 0
    gaps = np.abs(table.confidence[filled] - table.accuracy[filled])
    return float(np.sum(gaps * table.cells[filled]) / table.cells.sum())


def reliability(confidence: ArrayLike, correct: ArrayLike, bins: int = CALIBRATION_BINS) -> Reliability:
    """Stated confidence against the share of right answers in ``bins`` equal bins over [0, 1].

    ``correct`` holds one truth value a cell. Raises DataError for empty input, other lengths or confidence outside [0, 1].
    """
    stated, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if stated.shape != right.shape or stated.ndim != 1 or not stated.size:
        raise DataError(f"calibration needs one confidence and one truth value a cell, found shapes {stated.shape} and {right.shape}")
    if not np.all((stated >= 0) & (stated <= 1 + 1e-6)):
        raise DataError("calibration needs confidences between 0 and 1; pass probabilities, not logits")
    place = np.minimum((stated * bins).astype(np.int64), bins - 1)
    cells = np.bincount(place, minlength=bins)
    shared = np.where(cells > 0, cells, np.nan)
    return Reliability(
        edges=np.linspace(0, 1, bins + 1),
        confidence=np.bincount(place, stated, bins) / shared,
        accuracy=np.bincount(place, right, bins) / shared,
        cells=cells,
    )


def _labels(truth: ArrayLike, predicted: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both label columns as object arrays [n], checked."""
    true, guess = np.asarray(truth, dtype=object), np.asarray(predicted, dtype=object)
    if true.shape != guess.shape or true.ndim != 1 or not true.size:
        raise DataError(f"scoring needs one true and one predicted label a cell, found shapes {true.shape} and {guess.shape}")
    if missing := sum(not isinstance(name, str) for name in true):
        raise DataError(f"{missing} of {true.size} cells have no true label; leave them out before scoring")
    return true, guess
