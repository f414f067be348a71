"""Scores on small tables whose answers can be counted by hand, and agreement with scikit-learn where it defines the same thing."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_score, recall_score

from cellplane.errors import DataError
from cellplane.pipelines.metrics import annotation_scores, confusion, expected_calibration_error, gene_scores, reliability


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


def test_perfectly_imputed_counts_score_one_and_zero():
    counts = np.random.default_rng(0).poisson(3, (50, 4))
    assert gene_scores(counts, counts).means() == pytest.approx({"pearson": 1.0, "cosine": 1.0, "rmse": 0.0, "mae": 0.0})


def test_gene_scores_are_those_of_numpy_on_log_counts():
    rng = np.random.default_rng(0)
    truth, guess = rng.poisson(3, (50, 4)), rng.gamma(2, 2, (50, 4))
    scores = gene_scores(truth, guess)
    for gene in range(4):
        a, b = np.log1p(truth[:, gene]), np.log1p(guess[:, gene])
        assert scores.pearson[gene] == pytest.approx(np.corrcoef(a, b)[0, 1])
        assert scores.cosine[gene] == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)))
        assert scores.rmse[gene] == pytest.approx(np.sqrt(np.mean((a - b) ** 2)))
        assert scores.mae[gene] == pytest.approx(np.mean(np.abs(a - b)))


def test_a_gene_that_does_not_vary_is_left_out_of_the_correlation_and_a_constant_guess_earns_nothing():
    truth = np.array([[2.0, 1.0, 0.0], [2.0, 5.0, 0.0], [2.0, 9.0, 0.0]])
    scores = gene_scores(truth, np.array([[1.0, 3.0, 1.0], [2.0, 3.0, 2.0], [3.0, 3.0, 3.0]]))
    assert np.isnan(scores.pearson).tolist() == [True, False, True]
    assert np.isnan(scores.cosine).tolist() == [False, False, True]
    assert scores.pearson[1] == 0.0
    assert scores.means()["pearson"] == 0.0


def test_negative_predictions_count_as_none():
    truth = np.array([[0.0], [3.0]])
    assert gene_scores(truth, np.array([[-5.0], [3.0]])).mae.tolist() == [0.0]


@pytest.mark.parametrize(
    ("truth", "predicted", "said"),
    [
        (np.ones((2, 3)), np.ones((2, 2)), r"\(2, 3\) and \(2, 2\)"),
        (np.ones((0, 3)), np.ones((0, 3)), "shapes"),
        (np.ones(3), np.ones(3), "shapes"),
        (-np.ones((2, 3)), np.ones((2, 3)), "negative"),
        (np.ones((2, 3)), np.full((2, 3), np.nan), "finite"),
    ],
)
def test_tables_that_cannot_be_scored_are_refused(truth, predicted, said):
    with pytest.raises(DataError, match=said):
        gene_scores(truth, predicted)


def test_a_truth_in_which_nothing_varies_is_refused():
    with pytest.raises(DataError, match="none of the 2 genes varies"):
        gene_scores(np.ones((3, 2)), np.ones((3, 2))).means()
