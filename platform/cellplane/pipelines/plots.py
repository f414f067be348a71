"""The pictures of a run, each a PNG: losses, confusion, UMAP, F1 by class, calibration.

Figures are built as objects and never through pyplot, so that nothing global changes in a worker or a notebook. What is
also drawn into a person's own axes lies in `drawing`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from cellplane.errors import DataError
from cellplane.pipelines.drawing import (
    COLOURS,
    MARKERS,
    Axes,
    confusion_size,
    draw_confusion,
    draw_f1,
    draw_groups,
    draw_reliability,
    f1_size,
    new_axes,
    safe,
    umap_size,
)
from cellplane.pipelines.metrics import AnnotationScores, reliability

DPI = 150

# What each term of the loss is called in a journal, and for a reader; anything else there is not a loss.
LOSS_TERMS = {
    "loss": "total loss",
    "nb": "negative binomial,\nall genes",
    "nb_hidden": "negative binomial,\nhidden genes",
    "gaussian": "Gaussian,\nall genes",
    "gaussian_hidden": "Gaussian,\nhidden genes",
    "kl": "KL divergence\nof the latent",
    "cluster": "cluster\nassignment",
    "cross_entropy": "cross-entropy\nof the labels",
}

UMAP_NEIGHBOURS, UMAP_DISTANCE = 15, 0.5  # scanpy's defaults


def loss_plot(rows: Sequence[Mapping[str, Any]], path: Path, title: str = "Loss") -> Path:
    """Total loss above each of its components, by optimizer step, from journal rows {"step", "metrics"}.

    Terms are found as `train/<term>` and `val/<term>` for the terms of ``LOSS_TERMS``; each has its own scale. Raises
    DataError when the rows hold none of them.
    """
    curves = {(term, split): curve for term in LOSS_TERMS for split in ("train", "val") if (curve := _curve(rows, f"{split}/{term}"))}
    if not curves:
        raise DataError(f"none of the {len(rows)} journal rows holds a loss: expected train/loss or another of {', '.join(LOSS_TERMS)}")
    terms = list(dict.fromkeys(term for term, _ in curves))
    figure = Figure(figsize=(8, 2.2 + 1.7 * len(terms)), layout="constrained")
    panels = figure.subplots(len(terms), 1, sharex=True, squeeze=False, height_ratios=[2] + [1] * (len(terms) - 1))[:, 0]
    for axes, term in zip(panels, terms, strict=True):
        for split, style, colour, name in (("train", "-", COLOURS[0], "training"), ("val", "--", COLOURS[1], "validation")):
            if (drawn := curves.get((term, split))) is not None:
                marker = MARKERS[0] if len(drawn) <= 60 else None
                axes.plot(*zip(*drawn, strict=True), style, color=colour, marker=marker, ms=4, label=name)
        axes.set_ylabel(f"{LOSS_TERMS[term]}\n(nats)", fontsize=9)
        axes.grid(alpha=0.3)
    panels[0].legend(frameon=False, fontsize=9)
    panels[-1].set_xlabel("optimizer step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_title(safe(title))
    return _save(figure, path)


# Panels of the course of a run: what each metric is called, and whether its axis is logarithmic.
COURSE = {
    "train/lr": ("learning rate", False),
    "train/grad_norm": ("norm of gradients\n(before clipping)", True),
    "train/cells_per_s": ("cells a second", False),
    "train/mfu": ("share of the peak\n(MFU)", False),
    "train/data_wait_s": ("waited for cells\n(s a step)", False),
    "train/nan_skips": ("skipped steps\n(so far)", False),
    "system/rss_bytes": ("resident memory\n(bytes, rank 0)", False),
    "system/gpu_peak_bytes": ("GPU memory\n(peak bytes, rank 0)", False),
}


def course_plot(rows: Sequence[Mapping[str, Any]], path: Path, title: str = "Course of the run") -> Path:
    """Learning rate, gradients, speed and memory by optimizer step, from journal rows; panels only for what was journalled.

    Raises DataError when the rows hold none of ``COURSE``.
    """
    curves = {key: curve for key in COURSE if (curve := _curve(rows, key))}
    if not curves:
        raise DataError(f"none of the {len(rows)} journal rows holds one of {', '.join(COURSE)}")
    return _stacked({key: [("measured", "-", COLOURS[0], curve)] for key, curve in curves.items()}, path, title)


def validation_plot(rows: Sequence[Mapping[str, Any]], path: Path, title: str = "Held-out cells") -> Path:
    """Every `val/...` metric of the journal rows by optimizer step. Raises DataError when there is none."""
    keys = list(dict.fromkeys(key for row in rows for key in row["metrics"] if key.startswith("val/")))
    if not keys:
        raise DataError(f"none of the {len(rows)} journal rows holds a val/... metric: nothing was held out (validation.share)")
    return _stacked({key: [("held out", "-", COLOURS[1], _curve(rows, key))] for key in keys}, path, title)


_Drawn = tuple[str, str, str, list[tuple[int, float]]]  # name, style, colour, (step, value)


def _stacked(panels: Mapping[str, Sequence[_Drawn]], path: Path, title: str) -> Path:
    """One panel below the other over the same steps."""
    figure = Figure(figsize=(8, 1.2 + 1.5 * len(panels)), layout="constrained")
    for axes, (key, curves) in zip(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels.items(), strict=True):
        label, logarithmic = COURSE.get(key, (key, False))
        for name, style, colour, curve in curves:
            marker = MARKERS[0] if len(curve) <= 60 else None
            axes.plot(*zip(*curve, strict=True), style, color=colour, marker=marker, ms=3, label=name)
        if logarithmic and all(value > 0 for *_, curve in curves for _, value in curve):
            axes.set_yscale("log")
        axes.set_ylabel(safe(label), fontsize=9)
        axes.grid(alpha=0.3)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(safe(title))
    return _save(figure, path)


def confusion_plot(matrix: ArrayLike, classes: Sequence[str], path: Path, title: str = "Confusion matrix") -> Path:
    """Where the cells of each true class (rows) went: colour = share of the row, number = cells. ``matrix`` [K, K]."""
    axes = draw_confusion(new_axes(confusion_size(len(classes))), matrix, classes)
    return save_axes(axes, path, title)


def umap_plot(embedding: ArrayLike, labels: ArrayLike, path: Path, title: str = "UMAP of the embedding", seed: int = 0) -> Path:
    """Cells in two dimensions, one colour and marker for each label [n]; missing labels are grey. Same seed, same picture."""
    layout = umap_layout(embedding, seed)
    classes = {str(name) for name in np.asarray(labels, dtype=object) if name is not None}
    axes = draw_groups(new_axes(umap_size(len(classes))), layout, labels)
    axes.set_title(f"{safe(title)}\n{len(layout)} cells, seed {seed}", fontsize=11)
    return save_axes(axes, path)


def umap_layout(embedding: ArrayLike, seed: int = 0) -> NDArray[np.float32]:
    """Two UMAP coordinates a cell, [n, 2] float32, the same for the same seed; fewer than 5 cells keep their first two columns."""
    points = np.asarray(embedding, dtype=np.float32)
    if points.ndim != 2 or not points.size or not np.isfinite(points).all():
        raise DataError(f"a UMAP needs finite numbers of shape [cells, dimensions], found shape {points.shape}")
    if len(points) < 5:
        return np.pad(points, ((0, 0), (0, 2)))[:, :2]
    import umap  # ten seconds of compiling, spent only by the picture that needs it

    near = min(UMAP_NEIGHBOURS, len(points) - 1)
    model = umap.UMAP(n_neighbors=near, min_dist=UMAP_DISTANCE, random_state=seed, n_jobs=1)
    return np.asarray(model.fit_transform(points), dtype=np.float32)


def per_class_f1_plot(scores: Mapping[str, AnnotationScores], path: Path, title: str = "F1 by cell type") -> Path:
    """F1 of every class for one or several predictors (name -> their scores on the same cells), rarest class below."""
    classes = next(iter(scores.values()))["support"]
    return save_axes(draw_f1(new_axes(f1_size(len(classes))), scores), path, title)


def reliability_plot(confidence: ArrayLike, correct: ArrayLike, path: Path, title: str = "Reliability of the confidence") -> Path:
    """Share of right answers against stated confidence, and how many cells stated it; the diagonal is an honest model."""
    table = reliability(confidence, correct)
    figure = Figure(figsize=(6, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    draw_reliability(upper, confidence, correct)
    upper.set(title=f"{safe(title)}\n{upper.get_title()}", xlabel="")
    centres, width = (table.edges[:-1] + table.edges[1:]) / 2, 0.9 * np.diff(table.edges)
    lower.bar(centres, table.cells, width, color=COLOURS[0])
    lower.set(xlim=(0, 1), xlabel="stated confidence (probability)", ylabel="cells")
    lower.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    return _save(figure, path)


def save_axes(axes: Axes, path: Path, title: str | None = None) -> Path:
    """The figure of these axes as a PNG, with a title where one is given."""
    if title is not None:
        axes.set_title(safe(title))
    figure = axes.get_figure(root=True)
    assert figure is not None
    return _save(figure, path)


def _curve(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of a metric in the order of steps; a step written twice keeps its last value."""
    return sorted({int(row["step"]): float(row["metrics"][key]) for row in rows if key in row["metrics"]}.items())


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, format="png")
    return path
