"""Scores on small tables whose answers can be counted by hand, and agreement with scikit-learn where it defines the same thing."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_score, recall_score

from cellplane.errors import DataError
from cellplane.pipelines.metrics import annotation_scores, confusion, expected_calibration_error, reliability


def random_labels(seed: int, cells: int = 300) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    names = np.array(["B", "NK", "T", "mono"], dtype=object)
    return names[generator.integers(0, 4, cells)], names[generator.integers(0, 4, cells)]


def test_perfect_predictions_score_one_everywhere():
    scores = annotation_scores(["B", "T", "T"], ["B", "T", "T"])
    assert scores["accuracy"] == scores["macro_f1"] == scores["macro_precision"] == scores["macro_recall"] == 1.0
    assert scores["per_class_f1"] == {"B": 1.0, "T": 1.0}
    assert scores["support"] == {"B": 1, "T": 2}


@pytest.mark.parametrize("seed", range(3))
def test_scores_agree_with_scikit_learn_when_both_sides_know_the_same_classes(seed):
    truth, predicted = random_labels(seed)
    scores = annotation_scores(truth, predicted)
    assert scores["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert scores["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    assert scores["macro_precision"] == pytest.approx(precision_score(truth, predicted, average="macro"))
    assert scores["macro_recall"] == pytest.approx(recall_score(truth, predicted, average="macro"))


def test_a_class_unseen_at_fit_counts_as_wrong_and_drags_the_mean_down():
    scores = annotation_scores(["B", "B", "T", "rare"], ["B", "B", "T", "T"])
    assert scores["accuracy"] == 0.75
    assert scores["per_class_f1"]["rare"] == 0.0
    assert scores["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_a_class_that_is_only_predicted_costs_recall_but_is_no_class_of_the_mean():
    scores = annotation_scores(["B", "B", "T", "T"], ["B", "ghost", "T", "T"])
    assert set(scores["per_class_f1"]) == {"B", "T"}
    assert scores["macro_recall"] == 0.75
    assert scores["macro_precision"] == 1.0


def test_the_order_of_cells_does_not_matter():
    truth, predicted = random_labels(0)
    order = np.random.default_rng(1).permutation(len(truth))
    assert annotation_scores(truth, predicted) == annotation_scores(truth[order], predicted[order])


def test_scores_are_plain_numbers_that_a_tracker_can_store():
    scores = annotation_scores(*random_labels(0))
    assert type(scores["macro_f1"]) is float
    assert all(type(value) is float for value in scores["per_class_f1"].values())
    assert all(type(value) is int for value in scores["support"].values())


@pytest.mark.parametrize(("truth", "predicted"), [([], []), (["B"], ["B", "T"]), ([["B"]], [["B"]])])
def test_labels_that_do_not_pair_up_are_refused(truth, predicted):
    with pytest.raises(DataError, match="one true and one predicted label"):
        annotation_scores(truth, predicted)


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_cells_without_a_true_label_are_refused_and_counted(missing):
    with pytest.raises(DataError, match="1 of 2 cells have no true label"):
        annotation_scores(["B", missing], ["B", "B"])


def test_confusion_agrees_with_scikit_learn_and_counts_every_cell_once():
    truth, predicted = random_labels(2)
    classes = ["mono", "T", "NK", "B"]
    table = confusion(truth, predicted, classes)
    assert table.sum() == len(truth)
    np.testing.assert_array_equal(table, confusion_matrix(truth, predicted, labels=classes))


def test_confusion_names_labels_it_has_no_place_for():
    with pytest.raises(DataError, match="ghost"):
        confusion(["B", "T"], ["B", "ghost"], ["B", "T"])


def test_an_honest_confidence_has_no_calibration_error():
    confidence = np.repeat([0.5, 0.8], [100, 100])
    correct = np.concatenate([np.arange(100) < 50, np.arange(100) < 80])
    assert expected_calibration_error(confidence, correct) == pytest.approx(0.0)


def test_certain_and_always_wrong_is_the_worst_calibration():
    assert expected_calibration_error(np.ones(10), np.zeros(10)) == 1.0


def test_calibration_error_weighs_bins_by_their_cells():
    confidence = np.concatenate([np.full(90, 0.95), np.full(10, 0.55)])
    correct = np.concatenate([np.ones(90), np.zeros(10)])
    assert expected_calibration_error(confidence, correct, bins=10) == pytest.approx(0.9 * 0.05 + 0.1 * 0.55)


def test_every_cell_lands_in_one_bin_and_full_confidence_in_the_last():
    table = reliability(np.linspace(0, 1, 101), np.ones(101), bins=10)
    assert table.cells.sum() == 101
    assert table.cells[-1] == 11
    assert table.edges[0] == 0
    assert table.edges[-1] == 1


def test_bins_without_cells_are_empty_and_not_zero():
    table = reliability([0.95], [1], bins=10)
    assert np.isnan(table.accuracy[:9]).all()
    assert table.accuracy[9] == 1


@pytest.mark.parametrize(("confidence", "correct"), [([], []), ([0.5], [1, 0]), ([1.5], [1]), ([float("nan")], [1]), ([-3.0], [0])])
def test_confidences_that_are_no_probabilities_are_refused(confidence, correct):
    with pytest.raises(DataError, match="calibration needs"):
        expected_calibration_error(confidence, correct)
