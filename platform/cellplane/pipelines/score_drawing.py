"""Drawing scores into matplotlib axes: of methods, of perturbations, of genes. What `task_pictures` puts into the reports.

As in `drawing`, every function fills the axes it is given and nothing else. What a method is (ours, to beat, to explain, the
most there is) has one colour and one marker in all pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellplane.errors import DataError
from cellplane.pipelines.drawing import BESIDE, COLOURS, MARKERS, Axes, name_apart, safe

KIND_LOOKS = {  # by kind of a `protocol.Method`
    "model": (COLOURS[0], "o"),
    "baseline": (COLOURS[1], "^"),
    "control": (COLOURS[2], "s"),
    "ceiling": (COLOURS[6], "D"),
}
NAMED = 3  # genes that are named on each side of a line
SMOOTHNESS = (-0.1, 2.6)  # both axes: 1 is best; what lies further out is drawn at the edge


def lines_size(lines: int) -> tuple[float, float]:
    """Inches with a line for each name."""
    return 10.0, 1.8 + 0.36 * lines


def draw_scores(axes: Axes, scores: Mapping[str, Sequence[float]], kinds: Mapping[str, str], metric: str) -> Axes:
    """A line for each method, the first on top: its values (small), their mean (large) and a sample standard deviation to both sides.

    ``kinds`` says what each method is. The mean and the spread also stand beside the name, for points that lie too close.
    """
    if not scores:
        raise DataError(f"no method has a {metric} to draw")
    places = np.arange(len(scores))[::-1]
    axes.hlines(places, 0, 1, color="#DDDDDD", linewidth=1, zorder=0, transform=axes.get_yaxis_transform())
    told = []
    for place, (name, values) in zip(places, scores.items(), strict=True):
        colour, marker = KIND_LOOKS[kinds[name]]
        mean, spread = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        axes.scatter(values, np.full(len(values), place), 12, colour, alpha=0.45, lw=0)
        axes.errorbar(mean, place, xerr=spread, fmt=marker, color=colour, ms=8, capsize=4)
        told.append(f"{safe(name)}   {mean:.4g}" + (f" +- {spread:.2g}" if len(values) > 1 else ""))
    axes.set_yticks(places, told, fontsize=9)
    axes.set(ylim=(-0.6, len(scores) - 0.4), xlabel=safe(metric))
    _legend_of_kinds(axes, [kinds[name] for name in scores])
    return axes


def draw_smoothness(axes: Axes, found: Mapping[str, tuple[Sequence[float], Sequence[float]]], kinds: Mapping[str, str]) -> Axes:
    """How much the answers of a method vary (x) against how much of their co-expression is real (y); both are 1 for the truth.

    ``found`` are the values of both by seed; means beyond the axes are drawn hollow at their edge, the legend has the numbers.
    """
    if not found:
        raise DataError("no method has a variance ratio and a co-expression slope to draw")
    low, high = SMOOTHNESS
    for at in (axes.axvline, axes.axhline):
        at(1, color="#666666", lw=1, ls="--")
    for index, (name, both) in enumerate(found.items()):
        means = [float(np.mean(values)) for values in both]
        spreads = [float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for values in both]
        colour, inside = COLOURS[index % len(COLOURS)], all(low < mean < high for mean in means)
        marker, label = KIND_LOOKS[kinds[name]][1], f"{safe(name)} ({means[0]:.2f}, {means[1]:.2f})"
        x, y = np.clip(means, low, high)
        axes.errorbar(x, y, spreads[1] * inside, spreads[0] * inside, "none", ecolor=colour, capsize=3)
        axes.scatter(
            x, y, 70, colour if inside else "white", edgecolors=colour, marker=marker, lw=1.5, label=label, clip_on=False, zorder=3
        )
    axes.set(xlim=SMOOTHNESS, ylim=SMOOTHNESS)
    axes.set_xlabel("variance ratio: too smooth < 1 < too different")
    axes.set_ylabel("co-expression slope: invented < 1 < smoothed away")
    axes.legend(**BESIDE, title="method (ratio, slope)")
    return axes


def draw_pairs(axes: Axes, pairs: Mapping[str, tuple[float, float]], names: tuple[str, str]) -> Axes:
    """Two correlations of every gene against one another ({gene: (x, y)}), the most different ones named; on the line both are equal."""
    genes = [gene for gene, both in pairs.items() if np.isfinite(both).all()]
    if not genes:
        raise DataError("there is no gene with both correlations to draw")
    points = np.array([pairs[gene] for gene in genes])
    lead = points[:, 1] - points[:, 0]
    low, high = min(0.0, float(points.min())) - 0.05, max(float(points.max()), 0.5) + 0.05
    axes.plot([low, high], [low, high], "--", color="#666666", lw=1)
    for colour, marker, side, label in ((COLOURS[0], "o", lead > 0, "above"), (COLOURS[1], "^", lead <= 0, "on or below")):
        axes.scatter(points[side, 0], points[side, 1], 26, colour, marker=marker, lw=0, label=f"{label} the line ({side.sum()})")
    axes.set(xlim=(low, high), ylim=(low, high), xlabel=safe(names[0]), ylabel=safe(names[1]))
    order = np.argsort(lead, kind="stable").tolist()
    furthest = list(dict.fromkeys([*order[:NAMED], *order[-NAMED:]]))
    name_apart(axes, points[furthest], [genes[gene] for gene in furthest])
    axes.set_aspect("equal")
    axes.set_title(f"{len(genes)} genes, mean difference {lead.mean():+.3f}", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return axes


def draw_levels(axes: Axes, levels: Sequence[float], shares: Mapping[str, Sequence[float]]) -> Axes:
    """Share of the true counts inside intervals of every level, a line for each name; on the dashed line intervals are honest."""
    axes.plot([0, 1], [0, 1], "--", color="#666666", label="honest: holds what it says")
    for index, (name, values) in enumerate(shares.items()):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        axes.plot(levels, values, marker=marker, color=colour, ms=4, lw=1, label=safe(name))
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="level of the interval (stated share)", ylabel="true counts inside (share)")
    axes.set_aspect("equal")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return axes


def draw_gene_shares(axes: Axes, shares: Mapping[str, float], level: float) -> Axes:
    """Share of each gene's true counts inside its intervals of one level, lowest first, the lowest and the highest named."""
    genes = sorted(shares, key=lambda gene: (shares[gene], gene))
    if not genes:
        raise DataError("there is no gene whose intervals could be drawn")
    values = np.array([shares[gene] for gene in genes])
    axes.axhline(level, color="#666666", ls="--", lw=1, label=f"stated: {level:.0%}")
    axes.scatter(np.arange(len(genes)), values, 20, COLOURS[0], lw=0, label=f"a gene (mean {values.mean():.1%})")
    axes.set(xlabel="gene (rank), least covered first", ylabel=f"true counts inside {level:.0%} intervals (share)")
    axes.set_ylim(max(0.0, min(values.min(), level) - 0.05), 1.0)
    ends = list(dict.fromkeys((0, len(genes) - 1)))
    name_apart(axes, np.column_stack([ends, values[ends]]), [genes[place] for place in ends])
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return axes


def draw_by_name(
    axes: Axes, ours: Mapping[str, Sequence[float]], others: Mapping[str, Mapping[str, float]], ceiling: Mapping[str, float], metric: str
) -> Axes:
    """A bar for each name: the mean of our values with their spread, other methods as markers, the ceiling as a line across.

    ``ours`` {name: values by seed} decides the order, first on top; ``others`` {method: {name: mean}}.
    """
    if not ours:
        raise DataError("there is nothing to draw bars of")
    names = list(ours)
    places = np.arange(len(names))[::-1]
    means = np.array([np.mean(ours[name]) for name in names])
    spreads = [np.std(ours[name], ddof=1) if len(ours[name]) > 1 else 0.0 for name in names]
    axes.barh(places, means, 0.62, xerr=spreads, color=COLOURS[4], ecolor="#444444", capsize=3, label="ours (spread over seeds)")
    for index, (method, values) in enumerate(others.items()):
        colour, marker = COLOURS[1:][index % (len(COLOURS) - 1)], MARKERS[1:][index % (len(MARKERS) - 1)]
        axes.scatter([values.get(name, np.nan) for name in names], places, 44, colour, marker=marker, lw=0, label=safe(method), zorder=3)
    limits: NDArray[Any] = np.array([ceiling.get(name, np.nan) for name in names])
    axes.vlines(limits, places - 0.4, places + 0.4, color=COLOURS[6], lw=2.5, label="ceiling", zorder=3)
    axes.axvline(0, color="#666666", lw=0.8)
    axes.set_yticks(places, [safe(name) for name in names], fontsize=9)
    axes.set(ylim=(-0.7, len(names) - 0.3), xlabel=safe(metric))
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda at: not labels[at].startswith("ours"))
    axes.legend([handles[at] for at in order], [labels[at] for at in order], **BESIDE, title="method")
    return axes


def finite(values: ArrayLike) -> list[float]:
    """The numbers among them."""
    return [float(value) for value in np.asarray(values, dtype=np.float64).ravel() if np.isfinite(value)]


def _legend_of_kinds(axes: Axes, kinds: Sequence[str]) -> None:
    words = {"model": "ours", "baseline": "baseline", "control": "control", "ceiling": "ceiling"}
    for kind in (kind for kind in words if kind in kinds):
        colour, marker = KIND_LOOKS[kind]
        axes.scatter([], [], 50, colour, marker=marker, label=words[kind])
    axes.legend(**BESIDE)
