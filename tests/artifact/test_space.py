"""The nearest ones are those of a whole stable sort, equals included; what fits into 16 bits is kept in them."""

from __future__ import annotations

import numpy as np
import pytest

from cellplane.artifact.space import nearest_columns, rounded, sixteen_bits


@pytest.mark.parametrize("k", [0, 1, 7, 39, 40, 50])
@pytest.mark.parametrize("levels", [3, 1000], ids=["many equals", "few equals"])
def test_the_nearest_are_what_a_stable_sort_begins_with(k, levels):
    rng = np.random.default_rng(k)
    distance = rng.integers(0, levels, (60, 40)).astype(np.float64)
    np.testing.assert_array_equal(nearest_columns(distance, k), np.argsort(distance, axis=1, kind="stable")[:, :k])


def test_equal_and_missing_distances_keep_the_order_of_their_columns():
    distance = np.array([[1.0, 1.0, 1.0, 1.0], [np.nan, 2.0, np.nan, 1.0], [np.inf, 3.0, np.inf, np.inf]])
    for k in (1, 2, 3):
        np.testing.assert_array_equal(nearest_columns(distance, k), np.argsort(distance, axis=1, kind="stable")[:, :k])


def test_there_may_be_no_cells():
    assert nearest_columns(np.zeros((0, 5)), 2).shape == (0, 2)


def test_only_what_16_bits_hold_is_kept_in_them():
    values = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    assert sixteen_bits(rounded(values)).dtype == np.float16
    for kept in (values, np.full(3, 1e6, dtype=np.float32)):
        assert sixteen_bits(kept) is kept
