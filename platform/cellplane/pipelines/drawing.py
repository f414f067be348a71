"""Drawing into matplotlib axes, from plain arrays: what the pictures of a run (`plots`) and `cellplane.pl` share.

Every function fills the axes it is given and nothing else; none goes through pyplot, so nothing global changes in a worker or
a notebook. Colours are those of Okabe and Ito (Color Universal Design, 2008), told apart by people with any colour vision;
where there are more classes than colours, the shape of the marker changes.
"""

# C cells, K classes, G genes

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes as Axes  # the door to matplotlib: others take the type from here
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray

from cellplane.errors import DataError
from cellplane.pipelines.metrics import AnnotationScores, expected_calibration_error, reliability

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000", "#B8A800")
MARKERS = ("o", "^", "s", "X", "D")  # 8 colours x 5 shapes: 40 classes before a pair returns
LONGEST_NAME = 48  # characters of a class name before it is cut
NAME_POINTS = 7  # size of a gene's name beside its point
NAMED_GENES = 40  # more cannot be read below one another
BESIDE: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "frameon": False, "fontsize": 9}  # right of the axes
GRADED, SIGNED = "cividis", "PuOr"  # from little to much; from too little to too much


def new_axes(size: tuple[float, float] = (6.0, 6.0)) -> Axes:
    """Axes of a figure of their own, in inches, which pyplot does not know of: `axes.figure` shows or saves it."""
    return Figure(figsize=size, layout="constrained").add_subplot()


def axes_in_a_row(number: int) -> list[Axes]:
    """Square panels beside one another in a figure of their own."""
    figure = Figure(figsize=(5.2 * number, 4.8), layout="constrained")
    return list(figure.subplots(1, number, squeeze=False)[0])


def axes_in_rows(rows: int, columns: int) -> list[list[Axes]]:
    """Square panels [rows][columns] in a figure of their own."""
    figure = Figure(figsize=(5.2 * columns, 4.6 * rows), layout="constrained")
    return [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def umap_size(classes: int) -> tuple[float, float]:
    """Inches that leave room for the legend."""
    return 11 if classes <= 20 else 13.5, 7


def confusion_size(classes: int) -> tuple[float, float]:
    """Inches in which the names of all classes can be read."""
    side = max(6.0, 3.2 + 0.42 * classes)
    return side + 1.2, side


def f1_size(classes: int) -> tuple[float, float]:
    """Inches with a line for each class."""
    return 9.5, 1.8 + 0.34 * classes


def draw_groups(axes: Axes, layout: NDArray[Any], labels: ArrayLike) -> Axes:
    """Cells at their places [C, 2], one colour and marker for each label [C]; missing labels are grey."""
    named = np.array(["" if name is None else str(name) for name in np.asarray(labels, dtype=object)])
    if len(named) != len(layout):
        raise DataError(f"a UMAP needs one label a cell, found {len(named)} labels for {len(layout)} cells")
    classes = sorted(set(named) - {""})
    if np.any(named == ""):
        nameless = layout[named == ""]
        axes.scatter(nameless[:, 0], nameless[:, 1], _size(layout), "#BBBBBB", marker=".", label=f"no label ({len(nameless)})")
    for index, name in enumerate(classes):
        cells = layout[named == name]
        colour, marker = look(index)
        label = f"{index + 1}  {safe(name)} ({len(cells)})"
        axes.scatter(cells[:, 0], cells[:, 1], _size(layout), colour, marker=marker, lw=0, label=label)
    for index, name in enumerate(classes):
        _number(axes, np.median(layout[named == name], axis=0), str(index + 1))
    legend = axes.legend(**BESIDE, ncols=1 if len(classes) <= 20 else 2, title="label (cells)")
    for handle in legend.legend_handles:
        handle.set_sizes([45.0])  # type: ignore[union-attr]
    return _map(axes)


def draw_values(axes: Axes, layout: NDArray[Any], values: ArrayLike, name: str) -> Axes:
    """Cells at their places [C, 2], coloured by a number [C], the largest on top; unknown ones are grey."""
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.shape != (len(layout),):
        raise DataError(f"a map needs one value a cell, found {numbers.shape} for {len(layout)} cells")
    known = np.flatnonzero(np.isfinite(numbers))
    order = known[np.argsort(numbers[known], kind="stable")]
    unknown = layout[~np.isfinite(numbers)]
    axes.scatter(unknown[:, 0], unknown[:, 1], _size(layout), "#BBBBBB", marker=".")
    points = axes.scatter(layout[order, 0], layout[order, 1], _size(layout), numbers[order], cmap=GRADED, lw=0)
    axes.figure.colorbar(points, ax=axes, shrink=0.7, label=safe(name))
    return _map(axes)


def _map(axes: Axes) -> Axes:
    axes.set(xlabel="UMAP 1 (no unit)", ylabel="UMAP 2 (no unit)", xticks=[], yticks=[])
    axes.set_aspect("equal", adjustable="datalim")
    return axes


def _size(layout: NDArray[Any]) -> float:
    return float(np.clip(14_000 / max(len(layout), 1), 6, 30))


def draw_confusion(
    axes: Axes, matrix: ArrayLike, classes: Sequence[str], names: tuple[str, str] = ("true cell type", "predicted cell type")
) -> Axes:
    """Where the cells of each class of the rows went: colour = share of the row, number = cells. ``matrix`` [K, K]."""
    table = np.asarray(matrix, dtype=np.int64)
    if table.shape != (len(classes), len(classes)):
        raise DataError(f"a confusion matrix of {len(classes)} classes has shape [K, K], found {table.shape}")
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(share, cmap=GRADED, vmin=0, vmax=1)
    shown = [safe(name) for name in classes]
    axes.set_xticks(range(len(shown)), shown, rotation=45, ha="right", rotation_mode="anchor", fontsize=9)
    axes.set_yticks(range(len(shown)), [f"{name} (n={cells})" for name, cells in zip(shown, table.sum(axis=1), strict=True)], fontsize=9)
    for row, column in zip(*np.nonzero(table), strict=True):
        colour = "black" if share[row, column] > 0.55 else "white"
        axes.text(column, row, str(table[row, column]), ha="center", va="center", fontsize=8, color=colour)
    axes.set(xlabel=names[1], ylabel=names[0])
    axes.figure.colorbar(image, ax=axes, shrink=0.7, label="share of the row's cells", format=PercentFormatter(1.0))
    return axes


def draw_f1(axes: Axes, scores: Mapping[str, AnnotationScores]) -> Axes:
    """F1 of every class for one or several predictors (name -> their scores on the same cells), rarest class below."""
    first = next(iter(scores.values()))
    classes = sorted(first["support"], key=lambda name: (first["support"][name], name))
    places = np.arange(len(classes))
    axes.hlines(places, 0, 1, color="#DDDDDD", linewidth=1, zorder=0)
    for index, (name, score) in enumerate(scores.items()):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        values = [score["per_class_f1"].get(label, 0.0) for label in classes]
        shift = 0.18 * ((len(scores) - 1) / 2 - index)  # side by side, so that equal scores stay visible
        axes.scatter(values, places + shift, 42, colour, marker=marker, label=f"{safe(name)} ({score['macro_f1']:.3f})", clip_on=False)
    axes.set_yticks(places, [f"{safe(name)} (n={first['support'][name]})" for name in classes], fontsize=9)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.6, len(classes) - 0.4), xlabel="F1 (0 to 1)", ylabel="true cell type")
    axes.legend(**BESIDE, title="predictor (macro-F1)")
    return axes


def draw_reliability(axes: Axes, confidence: ArrayLike, correct: ArrayLike) -> Axes:
    """Share of right answers against stated confidence; the diagonal is an honest model. The error stands in the title."""
    table = reliability(confidence, correct)
    centres, width = (table.edges[:-1] + table.edges[1:]) / 2, 0.9 * np.diff(table.edges)
    axes.plot([0, 1], [0, 1], "--", color="#666666", label="honest: right as often as stated")
    axes.bar(centres, np.nan_to_num(table.accuracy), width, color=COLOURS[4], edgecolor="white", label="right answers")
    axes.plot(table.confidence, table.accuracy, "o", color=COLOURS[6], ms=5, label="mean of the bin")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="stated confidence (probability)", ylabel="right answers (share of cells)")
    error = expected_calibration_error(confidence, correct)
    axes.set_title(f"expected calibration error {error:.3f}, {table.cells.sum()} cells", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return axes


def draw_gene_correlations(axes: Axes, scores: Mapping[str, Mapping[str, float]]) -> Axes:
    """Pearson correlation over cells of every gene for one or several predictors ({name: {gene: r}}), best gene first.

    Genes stand in the order of the first predictor; up to 40 are named.
    """
    first = next(iter(scores.values()))
    genes = sorted(first, key=lambda gene: (-np.nan_to_num(first[gene], nan=-2), gene))
    if not genes:
        raise DataError("there is no gene to draw: none varies in the truth")
    for index, (name, values) in enumerate(scores.items()):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        found = np.array([values.get(gene, np.nan) for gene in genes])
        axes.scatter(range(len(genes)), found, 24, colour, marker=marker, label=f"{safe(name)} (mean {np.nanmean(found):.3f})")
        axes.axhline(float(np.nanmean(found)), color=colour, lw=1, ls="--")
    axes.axhline(0, color="#666666", lw=0.8)
    named = len(genes) <= NAMED_GENES
    if named:
        axes.set_xticks(range(len(genes)), [safe(gene) for gene in genes], rotation=90, fontsize=8)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel=f"gene{'' if named else ' (rank)'}, best first", ylabel="Pearson correlation over cells (-1 to 1)")
    axes.legend(**BESIDE, title="predictor")
    return axes


def draw_tissue(axes: Axes, places_um: NDArray[Any], values: ArrayLike, look: tuple[str, float, float] | None = None) -> Axes:
    """A value [C] of every cell at its place [C, 2] in micrometres; ``look`` = (colour map, least, most value of its scale)."""
    numbers = np.asarray(values, dtype=np.float64)
    colours, least, most = look or (GRADED, float(np.nanmin(numbers)), float(np.nanmax(numbers)))
    size = float(np.clip(12_000 / max(len(numbers), 1), 2, 40))
    points = axes.scatter(places_um[:, 0], places_um[:, 1], size, numbers, cmap=colours, vmin=least, vmax=most, lw=0)
    axes.figure.colorbar(points, ax=axes, shrink=0.7, label="log1p of counts")
    axes.set(xlabel="x (um)", ylabel="y (um)")
    axes.set_aspect("equal")
    return axes


def draw_beside_truth(panels: Sequence[Axes], places_um: NDArray[Any], truth: NDArray[Any], predicted: NDArray[Any], gene: str) -> None:
    """A gene in the tissue, three panels: truth [C], prediction [C] on the same scale, and prediction minus truth."""
    most = max(float(truth.max()), float(predicted.max()), 1e-6)
    error = predicted - truth
    widest = max(float(np.abs(error).max()), 1e-6)
    pictures: dict[str, tuple[NDArray[Any], tuple[str, float, float]]] = {
        "truth": (truth, (GRADED, 0.0, most)),
        "prediction": (predicted, (GRADED, 0.0, most)),
        "prediction - truth": (error, (SIGNED, -widest, widest)),
    }
    for panel, (name, (values, scale)) in zip(panels, pictures.items(), strict=True):
        draw_tissue(panel, places_um, values, scale)
        panel.set_title(f"{safe(gene)}: {name}")


def draw_change(
    axes: Axes, truth: NDArray[Any], predicted: NDArray[Any], genes: Sequence[str], de: Sequence[int], targets: Sequence[int] = ()
) -> Axes:
    """Predicted against measured change of every gene [G]; the differential ones (positions ``de``) are coloured and named.

    ``targets`` are the perturbed genes, with a square around them and named too.
    """
    top = np.asarray(de, dtype=np.int64)
    both = np.concatenate([truth, predicted])
    reach = 1.1 * max(float(np.abs(both).max(initial=0)), 1e-6)
    axes.axhline(0, color="#CCCCCC", lw=0.8)
    axes.axvline(0, color="#CCCCCC", lw=0.8)
    axes.plot([-reach, reach], [-reach, reach], "--", color="#666666", lw=1)
    rest = np.setdiff1d(np.arange(len(genes)), top)
    axes.scatter(truth[rest], predicted[rest], 14, "#999999", lw=0, label=f"other genes ({len(rest)})")
    label = f"top {len(top)} differential (r {_correlation(truth[top], predicted[top])})"
    axes.scatter(truth[top], predicted[top], 30, COLOURS[3], lw=0, label=label)
    if aimed := list(targets):
        axes.scatter(truth[aimed], predicted[aimed], 130, "none", edgecolors=COLOURS[0], marker="s", lw=1.8, label="perturbed gene")
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
    named = list(dict.fromkeys([*top.tolist(), *aimed]))
    name_apart(axes, np.column_stack([truth[named], predicted[named]]), [genes[gene] for gene in named])
    axes.set(xlabel="measured change (log1p of counts)", ylabel="predicted change (log1p of counts)")
    axes.set_title(f"all genes: r {_correlation(truth, predicted)}", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return axes


def name_apart(axes: Axes, points: NDArray[Any], names: Sequence[str]) -> None:
    """Names beside their points [n, 2], moved up or down until none covers another; thin lines lead to those moved far.

    Call it when the limits of the axes are set.
    """
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    size = np.array([axes.bbox.width, axes.bbox.height]) * 72 / axes.figure.dpi
    spots = (np.asarray(points, dtype=np.float64) - (left, low)) / (right - left, high - low) * size
    line = 1.3 * NAME_POINTS
    taken: list[tuple[float, float, float]] = []  # start, end, bottom, in points
    for at in np.argsort(spots[:, 0], kind="stable").tolist():
        text = safe(names[at])
        wide = 0.7 * NAME_POINTS * len(text)  # of capitals and digits in DejaVu Sans
        x = spots[at, 0] + 3 if spots[at, 0] + 3 + wide < size[0] else spots[at, 0] - 3 - wide
        moves = [step * sign for step in range(len(names) + 1) for sign in (1, -1)]
        free = (
            (move, y)
            for move in moves
            if 0 <= (y := spots[at, 1] + 3 + move * line) <= size[1] - line
            and not any(abs(y - other) < line and x < end and start < x + wide for start, end, other in taken)
        )
        move, y = next(free, (0, spots[at, 1] + 3))
        taken.append((x, x + wide, y))
        leader = {"arrowstyle": "-", "color": "#888888", "lw": 0.6} if abs(move) > 1 else None
        offset = (x - spots[at, 0], y - spots[at, 1])
        axes.annotate(text, tuple(points[at]), offset, textcoords="offset points", fontsize=NAME_POINTS, arrowprops=leader)


def _correlation(first: NDArray[Any], second: NDArray[Any]) -> str:
    varies = len(first) > 1 and np.std(first) > 0 and np.std(second) > 0
    return f"{np.corrcoef(first, second)[0, 1]:.2f}" if varies else "-"


def draw_dots(axes: Axes, shares: NDArray[Any], levels: NDArray[Any], types: Sequence[str], genes: Sequence[str]) -> Axes:
    """A dot for every type and gene [K, G]: its size the share of cells that show the gene, its colour the mean level."""
    row, column = (index.ravel() for index in np.indices(shares.shape))
    points = axes.scatter(column, row, 4 + 160 * shares.ravel(), levels.ravel(), cmap=GRADED, lw=0.3, edgecolors="#444444")
    axes.set_xticks(range(len(genes)), [safe(gene) for gene in genes], rotation=90, fontsize=8)
    axes.set_yticks(range(len(types)), [safe(name) for name in types], fontsize=9)
    axes.set(xlim=(-0.7, len(genes) - 0.3), ylim=(len(types) - 0.4, -0.6), xlabel="marker gene", ylabel="predicted cell type")
    axes.figure.colorbar(points, ax=axes, shrink=0.7, label="mean log1p of counts per 10,000")
    for share in (0.25, 0.5, 1.0):
        axes.scatter([], [], 4 + 160 * share, "#888888", label=f"{share:.0%}")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=9, ncols=3, title="cells that show the gene")
    return axes


def draw_bands(axes: Axes, bands: Mapping[str, tuple[float, float, float]], shares: Mapping[str, float], names: tuple[str, str]) -> Axes:
    """A line for each name: the middle half of a value in [0, 1] with its median, and a share beside it; ``names`` of both."""
    places = np.arange(len(bands))
    low, middle, high = (np.array([band[part] for band in bands.values()]) for part in range(3))
    axes.hlines(places, 0, 1, color="#DDDDDD", linewidth=1, zorder=0)
    axes.hlines(places, low, high, color=COLOURS[4], linewidth=6, label=f"{names[0]}: middle half of the cells")
    axes.scatter(middle, places, 40, COLOURS[0], zorder=3, label=f"{names[0]}: median")
    axes.scatter([shares[name] for name in bands], places, 40, COLOURS[3], marker="X", zorder=3, label=names[1], clip_on=False)
    axes.set_yticks(places, [safe(name) for name in bands], fontsize=9)
    axes.set(xlim=(-0.02, 1.02), ylim=(len(bands) - 0.4, -0.6), xlabel=f"{names[0]}, {names[1]} (0 to 1)", ylabel="sample")
    axes.legend(**BESIDE)
    return axes


def draw_gaps(axes: Axes, gaps: ArrayLike, name: str) -> Axes:
    """How often a difference of this size occurs: right of 0 in colour, its mean as a line; the outermost 1 % are not shown."""
    known = np.asarray(gaps, dtype=np.float64)
    known = known[np.isfinite(known)]
    if not len(known):
        raise DataError("there is no difference to draw")
    low, high = np.quantile(known, (0.005, 0.995))
    edges = np.linspace(min(low, 0.0), max(high, 0.0, low + 1e-9), 41)
    counts, _ = np.histogram(known, edges)
    colours = [COLOURS[0] if middle > 0 else "#999999" for middle in (edges[:-1] + edges[1:]) / 2]
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=colours)
    axes.axvline(0, color="#666666", lw=1)
    axes.axvline(float(known.mean()), color=COLOURS[3], lw=2, label=f"mean {known.mean():.4f}")
    axes.set(xlabel=safe(name), ylabel="cells")
    axes.legend(frameon=False, fontsize=9)
    return axes


def look(index: int) -> tuple[str, str]:
    """Colour and marker of the class at this place: colours run first, then the shape changes."""
    return COLOURS[index % len(COLOURS)], MARKERS[(index // len(COLOURS)) % len(MARKERS)]


def _number(axes: Axes, place: NDArray[Any], text: str) -> None:
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "#666666", "alpha": 0.65, "linewidth": 0.5}
    axes.text(float(place[0]), float(place[1]), text, ha="center", va="center", fontsize=8, bbox=box)


def safe(name: str) -> str:
    """A name as a figure shows it: shortened, and `$` is a dollar, not mathematics."""
    short = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 3] + "..."
    return short.replace("$", r"\$")
