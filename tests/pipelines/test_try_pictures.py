"""Units of a trial stand side by side, named while they can be read."""

from __future__ import annotations

import numpy as np
import pytest

from cellplane.errors import DataError
from cellplane.pipelines.drawing import new_axes
from cellplane.pipelines.try_pictures import draw_units


def test_units_stand_in_the_order_of_the_first_method_with_means_and_the_most_there_is():
    axes = draw_units(new_axes(), {"ours": {"A": 0.2, "B": 0.6}, "other": {"A": 0.5, "B": 0.1}}, ("perturbation", "Pearson"), most=0.9)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["B", "A"]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["ours (mean 0.400)", "other (mean 0.300)", "the most there is, on average (0.900)"]


def test_many_units_are_numbered_instead_of_named():
    axes = draw_units(new_axes(), {"ours": {f"G{unit}": float(unit) for unit in range(60)}}, ("gene", "score"))
    assert axes.get_xticks().tolist() == np.linspace(0, 59, 6).astype(int).tolist()
    assert not any("G" in label.get_text() for label in axes.get_xticklabels())


def test_no_unit_is_an_error():
    with pytest.raises(DataError, match="no gene to draw"):
        draw_units(new_axes(), {"ours": {}}, ("gene", "score"))
