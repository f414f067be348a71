"""What is drawn of scores is what was given: means and spreads, methods in their order, ceilings, shares of intervals."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex

from cellplane.errors import DataError
from cellplane.pipelines import score_drawing
from cellplane.pipelines.drawing import COLOURS, new_axes
from cellplane.pipelines.protocol import KINDS
from tests.pipelines.test_drawing import offsets

KINDS_OF = {"cellplm": "model", "knn": "baseline", "own_counts": "control"}


def test_every_kind_of_method_has_a_colour_and_a_marker_of_its_own():
    looks = list(score_drawing.KIND_LOOKS.values())
    assert score_drawing.KIND_LOOKS.keys() <= set(KINDS)
    assert all(len(set(part)) == len(looks) == 4 for part in zip(*looks, strict=True))


def test_methods_stand_in_the_order_given_with_mean_and_spread():
    axes = score_drawing.draw_scores(new_axes(), {"knn": [0.2, 0.4], "cellplm": [0.1]}, KINDS_OF, "pearson")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["knn   0.3 +- 0.14", "cellplm   0.1"]
    singles = [offsets(points) for points in axes.collections if len(offsets(points)) == 2]
    np.testing.assert_allclose(singles[0], [(0.2, 1), (0.4, 1)])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["ours", "baseline"]


def test_a_method_that_is_far_off_is_drawn_hollow_at_the_edge_with_its_numbers():
    found = {"cellplm": ([0.9, 1.1], [1.2, 1.2]), "own_counts": ([40.0], [0.1])}
    axes = score_drawing.draw_smoothness(new_axes(), found, KINDS_OF)
    near, far = [points for points in axes.collections if points.get_label().startswith(("cellplm", "own"))]
    np.testing.assert_allclose(offsets(near), [(1.0, 1.2)])
    np.testing.assert_allclose(offsets(far), [(score_drawing.SMOOTHNESS[1], 0.1)])
    assert to_hex(far.get_facecolor()[0]) == "#ffffff"
    assert far.get_label() == "own_counts (40.00, 0.10)"


def test_genes_on_both_sides_of_the_line_are_counted_and_the_furthest_named():
    pairs = {f"G{gene}": (0.3, 0.3 + gene / 100) for gene in range(-5, 6)} | {"unknown": (0.1, np.nan)}
    axes = score_drawing.draw_pairs(new_axes(), pairs, ("knn", "ours"))
    assert axes.get_title() == "11 genes, mean difference +0.000"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["above the line (5)", "on or below the line (6)"]
    assert {text.get_text() for text in axes.texts} == {"G-5", "G-4", "G-3", "G3", "G4", "G5"}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("knn", "ours")


def test_shares_inside_intervals_are_drawn_beside_the_honest_line():
    axes = score_drawing.draw_levels(new_axes(), [0.5, 0.9], {"seed 0": [0.4, 0.8], "seed 1": [0.5, 0.9]})
    honest, first, second = axes.lines
    np.testing.assert_allclose(honest.get_xdata(), honest.get_ydata())
    np.testing.assert_allclose(first.get_ydata(), [0.4, 0.8])
    assert second.get_label() == "seed 1"


def test_the_least_covered_gene_comes_first_and_both_ends_are_named():
    axes = score_drawing.draw_gene_shares(new_axes(), {"A": 0.95, "B": 0.5, "C": 0.8}, 0.9)
    np.testing.assert_allclose(offsets(axes.collections[0])[:, 1], [0.5, 0.8, 0.95])
    assert {text.get_text() for text in axes.texts} == {"A", "B"}


def test_bars_are_ours_markers_the_baselines_and_lines_the_ceiling():
    ours, others = {"B": [0.6, 0.8], "A": [0.1]}, {"mean_of_others": {"A": 0.3, "B": 0.2}}
    axes = score_drawing.draw_by_name(new_axes(), ours, others, {"B": 0.9}, "Pearson")
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], [0.7, 0.1])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["B", "A"]
    marks = next(points for points in axes.collections if points.get_label() == "mean_of_others")
    np.testing.assert_allclose(offsets(marks), [(0.2, 1), (0.3, 0)])
    assert to_hex(axes.patches[0].get_facecolor()).upper() == COLOURS[4]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["ours (spread over seeds)", "mean_of_others", "ceiling"]


@pytest.mark.parametrize(
    "draw",
    [
        lambda axes: score_drawing.draw_scores(axes, {}, {}, "x"),
        lambda axes: score_drawing.draw_smoothness(axes, {}, {}),
        lambda axes: score_drawing.draw_pairs(axes, {"A": (np.nan, 1.0)}, ("x", "y")),
        lambda axes: score_drawing.draw_gene_shares(axes, {}, 0.9),
        lambda axes: score_drawing.draw_by_name(axes, {}, {}, {}, "x"),
    ],
)
def test_nothing_to_draw_is_an_error(draw):
    with pytest.raises(DataError, match=r"no |nothing"):
        draw(new_axes())
