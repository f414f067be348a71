"""What is drawn into axes is what was given: values, order, names and scales."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

from cellplane.errors import DataError
from cellplane.pipelines import drawing
from cellplane.pipelines.metrics import annotation_scores


def offsets(points: object) -> np.ndarray:
    return np.ma.filled(points.get_offsets(), np.nan)  # type: ignore[attr-defined]


@pytest.fixture
def layout() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(30, 2))


def test_every_cell_is_drawn_once_in_the_colour_of_its_label(layout):
    labels = np.array(["a", "b", None] * 10, dtype=object)
    axes = drawing.draw_groups(drawing.new_axes(), layout, labels)
    grey, first, second = axes.collections
    np.testing.assert_allclose(offsets(grey), layout[labels == None])  # noqa: E711
    np.testing.assert_allclose(offsets(first), layout[labels == "a"])
    np.testing.assert_allclose(offsets(second), layout[labels == "b"])
    assert [to_hex(points.get_facecolor()[0]).upper() for points in (first, second)] == list(drawing.COLOURS[:2])


def test_the_largest_value_lies_on_top_and_unknown_ones_are_grey(layout):
    values = np.arange(30.0)[::-1].copy()
    values[3] = np.nan
    axes = drawing.draw_values(drawing.new_axes(), layout, values, "confidence")
    grey, known = axes.collections
    np.testing.assert_allclose(offsets(grey), layout[[3]])
    assert np.all(np.diff(known.get_array()) > 0)
    np.testing.assert_allclose(offsets(known)[-1], layout[0])
    assert axes.figure.axes[1].get_ylabel() == "confidence"


@pytest.mark.parametrize("draw", [lambda a, p: drawing.draw_groups(a, p, ["x"]), lambda a, p: drawing.draw_values(a, p, [1.0], "x")])
def test_one_value_a_cell_is_needed(layout, draw):
    with pytest.raises(DataError, match="a cell"):
        draw(drawing.new_axes(), layout)


def test_a_confusion_shows_counts_and_shares_of_rows():
    axes = drawing.draw_confusion(drawing.new_axes(), [[3, 1], [0, 2]], ["a", "b"], ("model", "opinion"))
    assert [text.get_text() for text in axes.texts] == ["3", "1", "2"]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.75, 0.25], [0, 1]])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("opinion", "model")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a (n=4)", "b (n=2)"]


def test_the_rarest_class_stands_lowest():
    truth = np.array(["a"] * 5 + ["b"] * 2 + ["c"], dtype=object)
    axes = drawing.draw_f1(drawing.new_axes(), {"model": annotation_scores(truth, truth)})
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c (n=1)", "b (n=2)", "a (n=5)"]
    np.testing.assert_allclose(offsets(axes.collections[-1])[:, 0], 1)


def test_genes_stand_in_the_order_of_the_first_predictor():
    scores = {"model": {"A": 0.1, "B": 0.5, "C": 0.3}, "ridge": {"A": 0.2, "B": 0.2}}
    axes = drawing.draw_gene_correlations(drawing.new_axes(), scores)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["B", "C", "A"]
    model, ridge = (offsets(points)[:, 1] for points in axes.collections)
    np.testing.assert_allclose(model, [0.5, 0.3, 0.1])
    np.testing.assert_allclose(ridge, [0.2, np.nan, 0.2])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["model (mean 0.300)", "ridge (mean 0.200)"]


def test_many_genes_are_ranked_instead_of_named():
    scores = {"model": {f"GENE{gene}": gene / 100 for gene in range(drawing.NAMED_GENES + 1)}}
    assert "rank" in drawing.draw_gene_correlations(drawing.new_axes(), scores).get_xlabel()


def test_no_gene_is_an_error():
    with pytest.raises(DataError, match="no gene to draw"):
        drawing.draw_gene_correlations(drawing.new_axes(), {"model": {}})


def test_dots_grow_with_the_share_and_are_coloured_by_level():
    shares, levels = np.array([[0.0, 1.0], [0.5, 0.25]]), np.array([[0.0, 2.0], [1.0, 0.5]])
    axes = drawing.draw_dots(drawing.new_axes(), shares, levels, ["B", "T"], ["CD79A", "CD3E"])
    points = axes.collections[0]
    np.testing.assert_allclose(points.get_array(), levels.ravel())
    assert np.array_equal(np.argsort(points.get_sizes()), np.argsort(shares.ravel()))
    np.testing.assert_allclose(offsets(points), [[0, 0], [1, 0], [0, 1], [1, 1]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["CD79A", "CD3E"]


def test_bands_run_from_quartile_to_quartile():
    bands, unknown = {"a": (0.2, 0.5, 0.9), "b": (0.1, 0.3, 0.4)}, {"b": 0.7, "a": 0.05}
    axes = drawing.draw_bands(drawing.new_axes(), bands, unknown, ("confidence", "unknown"))
    _, lines, medians, crosses = axes.collections
    np.testing.assert_allclose([segment[:, 0] for segment in lines.get_segments()], [(0.2, 0.9), (0.1, 0.4)])
    np.testing.assert_allclose(offsets(medians)[:, 0], [0.5, 0.3])
    np.testing.assert_allclose(offsets(crosses)[:, 0], [0.05, 0.7])


def test_gaps_in_our_favour_are_coloured():
    axes = drawing.draw_gaps(drawing.new_axes(), [-1.0, -0.5, 0.5, 0.6, 0.7, np.nan], "lead")
    coloured = [bar for bar in axes.patches if to_hex(bar.get_facecolor()).upper() == drawing.COLOURS[0]]
    assert all(bar.get_x() + bar.get_width() > 0 for bar in coloured)
    assert sum(bar.get_height() for bar in coloured) >= 2
    assert "0.06" in axes.get_legend().get_texts()[0].get_text()


def test_no_gap_is_an_error():
    with pytest.raises(DataError, match="no difference"):
        drawing.draw_gaps(drawing.new_axes(), [np.nan], "lead")


def test_a_change_without_spread_has_no_correlation():
    axes = drawing.draw_change(drawing.new_axes(), np.zeros(3), np.zeros(3), ["a", "b", "c"], [0, 1])
    assert axes.get_title() == "all genes: r -"


def test_perturbed_genes_are_marked_and_named_beside_the_differential_ones():
    truth, guess = np.linspace(-1, 1, 30), np.linspace(-0.5, 0.5, 30)
    genes = [f"G{gene}" for gene in range(30)]
    axes = drawing.draw_change(drawing.new_axes(), truth, guess, genes, [0, 1], targets=[1, 7])
    np.testing.assert_allclose(offsets(axes.collections[-1]), [(truth[1], guess[1]), (truth[7], guess[7])])
    assert sorted(text.get_text() for text in axes.texts) == ["G0", "G1", "G7"]
    assert axes.get_legend().get_texts()[-1].get_text() == "perturbed gene"


def test_names_of_points_at_one_place_do_not_cover_one_another():
    axes = drawing.new_axes()
    axes.set(xlim=(-1, 1), ylim=(-1, 1))
    drawing.name_apart(axes, np.zeros((12, 2)), [f"GENE{gene}" for gene in range(12)])
    axes.figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines that lead to them
    assert len(boxes) == 12
    assert not any(one.overlaps(other) for at, one in enumerate(boxes) for other in boxes[at + 1 :])


def test_names_at_the_right_edge_stay_inside():
    axes = drawing.new_axes()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    drawing.name_apart(axes, np.array([[0.99, 0.99]]), ["A_LONG_GENE_NAME"])
    axes.figure.draw_without_rendering()
    text = Text.get_window_extent(axes.texts[0])
    assert text.x1 <= axes.bbox.x1
    assert text.y1 <= axes.bbox.y1


def test_truth_and_prediction_share_a_scale_and_the_error_is_symmetric():
    places, truth, guess = np.random.default_rng(0).uniform(0, 100, (20, 2)), np.linspace(0, 2, 20), np.linspace(3, 0, 20)
    panels = drawing.axes_in_rows(1, 3)[0]
    drawing.draw_beside_truth(panels, places, truth, guess, "A")
    first, second, error = (panel.collections[0] for panel in panels)
    assert first.get_clim() == second.get_clim() == (0, 3)
    assert error.get_clim() == (-3, 3)
    np.testing.assert_allclose(error.get_array(), guess - truth)
