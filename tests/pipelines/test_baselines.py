"""The baselines learn, are deterministic, and never learn from test cells."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from cellplane.errors import DataError
from cellplane.pipelines import baselines
from cellplane.pipelines.baselines import BASELINES
from cellplane.pipelines.metrics import annotation_scores

GENES = 60
TYPES = ("B", "NK", "T")


def simulated(seed: int, cells: int, genes: int = GENES) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Poisson counts of three types, each with its own marker genes, at depths that vary fivefold."""
    generator = np.random.default_rng(seed)
    kind = generator.integers(0, len(TYPES), cells)
    rates = np.full((len(TYPES), genes), 0.3)
    for index in range(len(TYPES)):
        rates[index, index * 8 : index * 8 + 8] = 2.0
    depth = generator.uniform(0.5, 2.5, (cells, 1))
    counts = generator.poisson(rates[kind] * depth).astype(np.float32)
    return sparse.csr_matrix(counts), np.array(TYPES, dtype=object)[kind]


@pytest.fixture(scope="module")
def cells() -> tuple[sparse.csr_matrix, np.ndarray, sparse.csr_matrix, np.ndarray]:
    train, test = simulated(0, 150), simulated(1, 60)
    return (*train, *test)


@pytest.mark.parametrize("name", BASELINES)
def test_every_test_cell_gets_a_training_label_and_the_same_one_again(cells, name):
    counts, labels, test, _ = cells
    first, again = (BASELINES[name](counts, labels, test, 3) for _ in range(2))
    assert first.dtype == object
    assert first.shape == (test.shape[0],)
    assert set(first) <= set(labels)
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("name", ["pca_knn", "logistic_regression"])
def test_types_with_markers_are_found(cells, name):
    counts, labels, test, truth = cells
    assert annotation_scores(truth, BASELINES[name](counts, labels, test, 0))["macro_f1"] > 0.9


def test_majority_answers_the_most_frequent_label(cells):
    _, _, test, _ = cells
    counts, labels = cells[0][:10], np.array(["T"] * 6 + ["B"] * 4, dtype=object)
    assert set(BASELINES["majority"](counts, labels, test, 0)) == {"T"}


@pytest.mark.parametrize("name", BASELINES)
def test_a_prediction_does_not_depend_on_the_other_test_cells(cells, name):
    counts, labels, test, _ = cells
    noise = sparse.csr_matrix(np.random.default_rng(9).poisson(50, (200, GENES)))
    alone = BASELINES[name](counts, labels, test[:20], 0)
    crowded = BASELINES[name](counts, labels, sparse.vstack([test[:20], noise]), 0)
    np.testing.assert_array_equal(alone, crowded[:20])


@pytest.mark.parametrize("name", ["pca_knn", "logistic_regression"])
def test_what_is_fitted_is_the_same_whatever_the_test_counts_are(cells, name, monkeypatch):
    counts, labels, test, _ = cells
    noise = sparse.csr_matrix(np.random.default_rng(5).poisson(20, test.shape))
    learned = []

    def remember(candidates, *data):
        learned.append(best(candidates, *data))
        return learned[-1]

    best = baselines._best
    monkeypatch.setattr(baselines, "_best", remember)
    BASELINES[name](counts, labels, test, 0)
    BASELINES[name](counts, labels, noise, 0)
    before, after = (fitted_numbers(model) for model in learned)
    assert before.keys() == after.keys()
    assert before
    for key in before:
        np.testing.assert_array_equal(before[key], after[key])


def fitted_numbers(model) -> dict[str, np.ndarray]:
    """Every array the steps of a fitted pipeline learned."""
    kinds = (PCA, LogisticRegression, KNeighborsClassifier)
    steps = [step for step in model if isinstance(step, kinds)]
    names = ("components_", "mean_", "coef_", "intercept_", "_fit_X", "_y")
    return {f"{type(step).__name__}.{name}": np.asarray(getattr(step, name)) for step in steps for name in names if hasattr(step, name)}


def test_components_come_from_training_cells_alone(cells):
    counts, labels, _, _ = cells
    model = baselines.fit_pca_knn(counts, labels, 0)
    scaled = model[0].transform(counts)
    np.testing.assert_allclose(model[1].mean_, np.asarray(scaled.mean(axis=0)).ravel(), atol=1e-12)
    assert model[2].n_samples_fit_ == counts.shape[0]


def test_targeted_panels_may_use_plain_log_counts_where_totals_mislead():
    """One gene of unbounded, uninformative level makes the total of a small panel worthless."""
    generator = np.random.default_rng(0)
    kind = generator.integers(0, 2, 200)
    markers = generator.poisson(np.where(kind[:, None] == np.array([[0, 1, 0, 1]]), 6.0, 2.0))
    loud = generator.integers(0, 3000, (200, 1)) * generator.integers(0, 2, (200, 1))
    counts, labels = sparse.csr_matrix(np.hstack([markers, loud])), np.array(["a", "b"], dtype=object)[kind]
    model = baselines.fit_logistic_regression(counts[:150], labels[:150], 0)
    assert model[0].func is baselines.log_counts


def test_data_sets_of_many_genes_keep_the_depth_normalised_neighbours():
    counts, labels = simulated(0, 40, genes=baselines.PANEL_GENES)
    assert baselines.fit_pca_knn(counts, labels, 0)[0].func is baselines.log_cp10k


def test_scaling_ignores_depth_and_survives_an_empty_cell():
    counts = sparse.csr_matrix(np.array([[1, 3, 0], [10, 30, 0], [0, 0, 0]]))
    scaled = baselines.log_cp10k(counts).toarray()
    np.testing.assert_allclose(scaled[0], scaled[1])
    np.testing.assert_allclose(np.expm1(scaled[0]).sum(), 1e4)
    assert (scaled[2] == 0).all()


def test_inner_folds_hold_out_every_cell_once_and_spread_every_class():
    labels = np.array(["a"] * 50 + ["b"] * 10 + ["c"], dtype=object)
    folds = list(baselines._folds(labels, 0))
    assert np.sum(folds, axis=0).tolist() == [1] * len(labels)
    assert all(np.sum(labels[fold] == "a") == 10 for fold in folds)
    assert all(np.sum(labels[fold] == "b") == 2 for fold in folds)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("counted", [["T"], ["T", "T", "B"], ["T"] * 30, ["T"] * 29 + ["B"], ["T"] * 5 + ["B"] * 5])
def test_tiny_and_lopsided_training_sets_still_answer(cells, name, counted):
    counts, test = cells[0][: len(counted)], cells[2]
    predicted = BASELINES[name](counts, np.array(counted, dtype=object), test, 0)
    assert set(predicted) <= set(counted)


def test_the_callers_counts_are_left_alone(cells):
    counts, labels, test, _ = cells
    before = counts.copy(), test.copy()
    BASELINES["pca_knn"](counts, labels, test, 0)
    assert (counts != before[0]).nnz == 0
    assert (test != before[1]).nnz == 0


def test_labels_that_do_not_fit_the_cells_are_refused(cells):
    counts, labels, test, _ = cells
    with pytest.raises(DataError, match="one label for each training cell"):
        BASELINES["majority"](counts, labels[:-1], test, 0)
    with pytest.raises(DataError, match="no label"):
        BASELINES["majority"](counts, np.append(labels[:-1], None), test, 0)
