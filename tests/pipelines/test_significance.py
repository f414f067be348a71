"""A difference is called one only when splits that share cells could not have made it by chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from cellplane.errors import DataError
from cellplane.pipelines.significance import bootstrap_interval, paired_difference

LEADS = [0.02, 0.01, 0.03, -0.01, 0.02]


def test_without_shared_cells_it_is_the_paired_t_test():
    found = paired_difference(LEADS)
    assert found.p_value == pytest.approx(stats.ttest_1samp(LEADS, 0).pvalue)
    interval = stats.ttest_1samp(LEADS, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_shared_training_cells_widen_the_interval_by_the_formula():
    plain, corrected = paired_difference(LEADS), paired_difference(LEADS, 0.25)
    assert (corrected.high - corrected.mean) / (plain.high - plain.mean) == pytest.approx(math.sqrt((1 / 5 + 0.25) / (1 / 5)))
    assert corrected.p_value > plain.p_value


def test_chance_is_called_a_difference_about_as_often_as_promised():
    rng = np.random.default_rng(0)
    called = np.mean([paired_difference(rng.normal(size=6).tolist()).verdict != "undecided" for _ in range(1000)])
    assert 0.03 < called < 0.07


@pytest.mark.parametrize(
    ("leads", "verdict"),
    [
        ([0.10, 0.11, 0.09], "better"),
        ([-0.10, -0.11, -0.09], "worse"),
        ([0.10, -0.11, 0.02], "undecided"),
        ([0.0, 0.0], "undecided"),
        ([0.1, 0.1], "better"),
        ([0.5], "undecided"),
    ],
)
def test_the_verdict_follows_sign_and_chance(leads, verdict):
    assert paired_difference(leads).verdict == verdict


def test_one_pair_tells_a_mean_and_no_interval():
    found = paired_difference([0.5])
    assert found.text() == "+0.500"
    assert math.isnan(found.p_value)


def test_differences_must_be_numbers():
    for bad in ([], [math.nan, 1.0]):
        with pytest.raises(DataError, match="finite"):
            paired_difference(bad)


def test_the_bootstrap_holds_the_mean_and_leaves_unknown_values_out():
    low, high = bootstrap_interval([*np.random.default_rng(1).normal(1, 1, 400), math.nan])
    assert low < 1 < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.2)
    with pytest.raises(DataError, match="finite"):
        bootstrap_interval([math.nan])
