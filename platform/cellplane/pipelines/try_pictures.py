"""Pictures of trials: every unit that was hidden or asked, by each method, side by side."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cellplane.errors import DataError
from cellplane.pipelines.drawing import BESIDE, COLOURS, MARKERS, NAMED_GENES, Axes, safe


def draw_units(axes: Axes, scores: Mapping[str, Mapping[str, float]], names: tuple[str, str], most: float | None = None) -> Axes:
    """A score of every unit for each method, {method: {unit: score}}, in the order of the first method, its best unit first.

    ``names`` are those of the unit and of the score. Dashes are means, a dotted line the ``most`` that they can be. Up to
    40 units are named. DataError for no unit.
    """
    first = next(iter(scores.values()), {})
    units = sorted(first, key=lambda unit: (-np.nan_to_num(first[unit], nan=-np.inf), unit))
    if not units:
        raise DataError(f"there is no {names[0]} to draw")
    for index, (name, values) in enumerate(scores.items()):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        found = np.array([values.get(unit, np.nan) for unit in units])
        axes.scatter(range(len(units)), found, 30, colour, marker=marker, label=f"{safe(name)} (mean {np.nanmean(found):.3f})")
        axes.axhline(float(np.nanmean(found)), color=colour, lw=1, ls="--")
    if most is not None:
        axes.axhline(most, color="#666666", lw=1.2, ls=":", label=f"the most there is, on average ({most:.3f})")
    if len(units) <= NAMED_GENES:
        axes.set_xticks(range(len(units)), [safe(unit) for unit in units], rotation=90, fontsize=8)
    else:
        axes.set_xticks(np.linspace(0, len(units) - 1, 6).astype(int))
    axes.set(xlabel=f"{names[0]}, best first", ylabel=names[1])
    axes.legend(**BESIDE, title="method")
    return axes
