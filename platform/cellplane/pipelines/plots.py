"""The pictures of a run, each a PNG: losses, confusion, UMAP, F1 by class, calibration.

Figures are built as objects and never through pyplot, so that nothing global changes in a worker or a notebook.
Colours are those of Okabe and Ito (Color Universal Design, 2008), told apart by people with any colour vision; where
there are more classes than colours, the shape of the marker changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray

from cellplane.errors import DataError
from cellplane.pipelines.metrics import AnnotationScores, expected_calibration_error, reliability

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000", "#B8A800")
MARKERS = ("o", "^", "s", "X", "D")  # 8 colours x 5 shapes: 40 classes before a pair returns
DPI = 150
LONGEST_NAME = 48  # characters of a class name before it is cut

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
BESIDE: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "frameon": False, "fontsize": 9}  # right of the axes


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
    panels[0].set_title(_safe(title))
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
        axes.set_ylabel(_safe(label), fontsize=9)
        axes.grid(alpha=0.3)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(_safe(title))
    return _save(figure, path)


def confusion_plot(matrix: ArrayLike, classes: Sequence[str], path: Path, title: str = "Confusion matrix") -> Path:
    """Where the cells of each true class (rows) went: colour = share of the row, number = cells. ``matrix`` [K, K]."""
    table = np.asarray(matrix, dtype=np.int64)
    if table.shape != (len(classes), len(classes)):
        raise DataError(f"a confusion matrix of {len(classes)} classes has shape [K, K], found {table.shape}")
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    side = max(6.0, 3.2 + 0.42 * len(classes))
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="cividis", vmin=0, vmax=1)
    names = [_safe(name) for name in classes]
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=9)
    axes.set_yticks(range(len(names)), [f"{name} (n={cells})" for name, cells in zip(names, table.sum(axis=1), strict=True)], fontsize=9)
    for row, column in zip(*np.nonzero(table), strict=True):
        colour = "black" if share[row, column] > 0.55 else "white"
        axes.text(column, row, str(table[row, column]), ha="center", va="center", fontsize=8, color=colour)
    axes.set(xlabel="predicted cell type", ylabel="true cell type")
    axes.set_title(_safe(title))
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of the true type's cells", format=PercentFormatter(1.0))
    return _save(figure, path)


def umap_plot(embedding: ArrayLike, labels: ArrayLike, path: Path, title: str = "UMAP of the embedding", seed: int = 0) -> Path:
    """Cells in two dimensions, one colour and marker for each label [n]; missing labels are grey. Same seed, same picture."""
    layout, named = umap_layout(embedding, seed), np.array(["" if name is None else str(name) for name in np.asarray(labels, dtype=object)])
    if len(named) != len(layout):
        raise DataError(f"a UMAP needs one label a cell, found {len(named)} labels for {len(layout)} cells")
    classes = sorted(set(named) - {""})
    figure = Figure(figsize=(11 if len(classes) <= 20 else 13.5, 7), layout="constrained")
    axes = figure.add_subplot()
    size = float(np.clip(14_000 / len(layout), 6, 30))
    if np.any(named == ""):
        nameless = layout[named == ""]
        axes.scatter(nameless[:, 0], nameless[:, 1], size, "#BBBBBB", marker=".", label=f"no label ({len(nameless)})")
    for index, name in enumerate(classes):
        cells = layout[named == name]
        colour, marker = _look(index)
        axes.scatter(cells[:, 0], cells[:, 1], size, colour, marker=marker, lw=0, label=f"{index + 1}  {_safe(name)} ({len(cells)})")
    for index, name in enumerate(classes):
        _number(axes, np.median(layout[named == name], axis=0), str(index + 1))
    axes.set(xlabel="UMAP 1 (no unit)", ylabel="UMAP 2 (no unit)", xticks=[], yticks=[])
    axes.set_title(f"{_safe(title)}\n{len(layout)} cells, seed {seed}", fontsize=11)
    axes.set_aspect("equal", adjustable="datalim")
    legend = axes.legend(**BESIDE, ncols=1 if len(classes) <= 20 else 2, title="label (cells)")
    for handle in legend.legend_handles:
        handle.set_sizes([45.0])  # type: ignore[union-attr]
    return _save(figure, path)


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
    first = next(iter(scores.values()))
    classes = sorted(first["support"], key=lambda name: (first["support"][name], name))
    places = np.arange(len(classes))
    figure = Figure(figsize=(9.5, 1.8 + 0.34 * len(classes)), layout="constrained")
    axes = figure.add_subplot()
    axes.hlines(places, 0, 1, color="#DDDDDD", linewidth=1, zorder=0)
    for index, (name, score) in enumerate(scores.items()):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        values = [score["per_class_f1"].get(label, 0.0) for label in classes]
        shift = 0.18 * ((len(scores) - 1) / 2 - index)  # side by side, so that equal scores stay visible
        axes.scatter(values, places + shift, 42, colour, marker=marker, label=f"{_safe(name)} ({score['macro_f1']:.3f})", clip_on=False)
    axes.set_yticks(places, [f"{_safe(name)} (n={first['support'][name]})" for name in classes], fontsize=9)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.6, len(classes) - 0.4), xlabel="F1 (0 to 1)", ylabel="true cell type")
    axes.set_title(_safe(title))
    axes.legend(**BESIDE, title="predictor (macro-F1)")
    return _save(figure, path)


def reliability_plot(confidence: ArrayLike, correct: ArrayLike, path: Path, title: str = "Reliability of the confidence") -> Path:
    """Share of right answers against stated confidence, and how many cells stated it; the diagonal is an honest model."""
    table = reliability(confidence, correct)
    error = expected_calibration_error(confidence, correct)
    centres, width = (table.edges[:-1] + table.edges[1:]) / 2, 0.9 * np.diff(table.edges)
    figure = Figure(figsize=(6, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], "--", color="#666666", label="honest: right as often as stated")
    upper.bar(centres, np.nan_to_num(table.accuracy), width, color=COLOURS[4], edgecolor="white", label="right answers")
    upper.plot(table.confidence, table.accuracy, "o", color=COLOURS[6], ms=5, label="mean of the bin")
    upper.set(ylim=(0, 1.02), ylabel="right answers (share of cells)")
    upper.set_title(f"{_safe(title)}\nexpected calibration error {error:.3f}, {table.cells.sum()} cells", fontsize=11)
    upper.legend(frameon=False, fontsize=9, loc="upper left")
    lower.bar(centres, table.cells, width, color=COLOURS[0])
    lower.set(xlim=(0, 1), xlabel="stated confidence (probability)", ylabel="cells")
    lower.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    return _save(figure, path)


def _curve(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of a metric in the order of steps; a step written twice keeps its last value."""
    return sorted({int(row["step"]): float(row["metrics"][key]) for row in rows if key in row["metrics"]}.items())


def _look(index: int) -> tuple[str, str]:
    """Colour and marker of the class at this place: colours run first, then the shape changes."""
    return COLOURS[index % len(COLOURS)], MARKERS[(index // len(COLOURS)) % len(MARKERS)]


def _number(axes: Axes, place: NDArray[Any], text: str) -> None:
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "#666666", "alpha": 0.65, "linewidth": 0.5}
    axes.text(float(place[0]), float(place[1]), text, ha="center", va="center", fontsize=8, bbox=box)


def _safe(name: str) -> str:
    """A name as the figure shows it: shortened, and `$` is a dollar, not mathematics."""
    short = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 3] + "..."
    return short.replace("$", r"\$")


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, format="png")
    return path
