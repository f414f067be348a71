"""Neighbours and ridge regression: right on easy data, tuned without the genes that are scored."""

from __future__ import annotations

import numpy as np
import pytest

from cellplane.pipelines.imputation_baselines import ALPHAS, BASELINES, NEIGHBOURS, Counts, baseline_predictions, neighbours_average, ridge
from cellplane.pipelines.metrics import correlations, rank_correlations


def cells(n: int, seed: int, mixing: np.ndarray) -> np.ndarray:
    """Counts of genes that follow two hidden programmes."""
    rng = np.random.default_rng(seed)
    return rng.poisson(rng.gamma(2, 2, (n, 2)) @ mixing).astype(np.float64)


@pytest.fixture(scope="module")
def counts() -> tuple[Counts, np.ndarray]:
    """300 reference and 120 query cells; 24 observed and 6 hidden genes, and the truth of the latter."""
    mixing = np.random.default_rng(0).gamma(0.5, 4, (2, 30))
    query, reference = cells(120, 1, mixing), cells(300, 2, mixing)
    return Counts(query[:, :24], reference[:, :24], reference[:, 24:]), query[:, 24:]


def test_both_find_genes_that_follow_the_observed_ones(counts):
    given, truth = counts
    share = np.log1p(truth / given.query.sum(1, keepdims=True) * np.median(given.query.sum(1)))
    for name, (setting, found) in baseline_predictions(given, 0).items():
        assert found.shape == truth.shape
        assert setting in BASELINES[name][1]
        assert np.nanmean(correlations(share, found)) > 0.3


def test_the_scored_genes_do_not_choose_the_setting(counts):
    given, _ = counts
    noise = np.random.default_rng(5).permutation(given.hidden.ravel()).reshape(given.hidden.shape)
    both = (given, Counts(given.query, given.reference, noise))
    settings = [{name: setting for name, (setting, _) in baseline_predictions(one, 0).items()} for one in both]
    assert settings[0] == settings[1]


def test_a_neighbour_is_the_cell_with_the_same_direction():
    reference, values = np.eye(4), np.arange(8.0).reshape(4, 2)
    assert neighbours_average(2 * np.eye(4)[[2, 0]], reference, values, 1).tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert neighbours_average(np.eye(4)[:1], reference, values, NEIGHBOURS[-1]).tolist() == [values.mean(0).tolist()]


def test_a_large_penalty_answers_the_mean(counts):
    given, _ = counts
    found = ridge(given.query, given.reference, given.hidden, 1e12)
    np.testing.assert_allclose(found, np.broadcast_to(given.hidden.mean(0), found.shape), rtol=1e-3)
    assert len(ALPHAS) == len(NEIGHBOURS) == 4


def test_correlations_know_what_cannot_be_told():
    truth = np.array([[0.0, 1.0, 1.0], [1.0, 1.0, 2.0], [2.0, 1.0, 4.0]])
    found = np.array([[5.0, 1.0, 3.0], [3.0, 2.0, 3.0], [1.0, 3.0, 3.0]])
    pearson, spearman = correlations(truth, found), rank_correlations(truth, found)
    assert (pearson[0], pearson[2]) == (pytest.approx(-1), 0)
    assert np.isnan(pearson[1])
    assert np.isnan(spearman[1])
    assert rank_correlations(truth[:, [2]], np.exp(truth[:, [2]]))[0] == pytest.approx(1)
