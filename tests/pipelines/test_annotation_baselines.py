"""Baselines are chosen by inner folds of the training cells alone, and answer like the estimators they are made of."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from cellplane.data.sources import column
from cellplane.pipelines import annotation_baselines
from cellplane.pipelines.annotation_baselines import inner_scores, position_answers, tuned_baselines, variable_genes
from cellplane.pipelines.baselines import SCALINGS
from cellplane.pipelines.metrics import annotation_scores

FAMILIES = {"logistic regression", "random forest", "pca50 + knn15"}


@pytest.fixture(scope="module")
def learned(training, query):
    train = training.X, column(training, "cell_type")
    return train, tuned_baselines(train, query.X, 0)


def test_every_family_answers_and_the_best_inner_score_is_the_baseline(learned, query):
    _, found = learned
    assert set(found.answers) == set(found.settings) == set(found.inner) == FAMILIES
    assert found.inner[found.best] == max(found.inner.values())
    truth = column(query, "cell_type")
    assert all(annotation_scores(truth, answer)["accuracy"] > 0.8 for answer in found.answers.values())


def test_the_chosen_setting_is_the_best_of_its_family_and_is_what_answers(learned, query):
    (counts, labels), found = learned
    scores = inner_scores(counts, labels, 0, 3)
    mine = {setting: score for (family, setting), score in scores.items() if family == "logistic regression"}
    assert len(mine) == 2 * 2 * 5, "scalings x views x strengths"
    assert mine[found.settings["logistic regression"]] == max(mine.values())
    scaling, space, strength = found.settings["logistic regression"].split()
    if space == "genes":
        alone = LogisticRegression(C=float(strength.removeprefix("C=")), max_iter=1000).fit(SCALINGS[scaling](counts), labels)
        same = alone.predict(SCALINGS[scaling](query.X)) == found.answers["logistic regression"]
        assert same.mean() > 0.97


def test_asked_cells_do_not_influence_one_another(learned, query):
    train, found = learned
    few = tuned_baselines(train, query.X[:5], 0)
    assert all((few.answers[family] == found.answers[family][:5]).all() for family in FAMILIES)


def test_a_panel_keeps_its_genes_and_a_transcriptome_the_variable_ones():
    rng = np.random.default_rng(0)
    steady, varying = rng.poisson(2, (200, 2500)), rng.poisson(2, (200, 100)) * rng.integers(0, 4, (200, 100))
    matrix = SCALINGS["raw"](sparse.csr_matrix(np.hstack([steady, varying])))
    kept = variable_genes(matrix)
    assert len(kept) == 2000
    assert (kept[-100:] == np.arange(2500, 2600)).all()
    assert (variable_genes(matrix[:, :33]) == np.arange(33)).all()


def test_positions_alone_answer_by_the_neighbours_in_the_tissue():
    places = np.array([[float(n), 0.0] for n in range(40)])
    labels = np.array(["left"] * 20 + ["right"] * 20, dtype=object)
    assert position_answers((places, np.array([[2.0, 5.0], [38.0, -5.0]])), labels).tolist() == ["left", "right"]


def test_a_fold_of_one_type_or_a_single_gene_still_answers():
    rng = np.random.default_rng(0)
    counts, labels = sparse.csr_matrix(rng.poisson(2, (12, 1)).astype(np.float32)), np.array(["a"] * 11 + ["b"], dtype=object)
    found = tuned_baselines((counts, labels), counts, 0)
    assert set().union(*found.answers.values()) <= {"a", "b"}


def test_only_what_is_wanted_is_computed(monkeypatch):
    rng = np.random.default_rng(0)
    counts, labels = sparse.csr_matrix(rng.poisson(2, (40, 30)).astype(np.float32)), np.array(["a", "b"] * 20, dtype=object)
    fitted = []
    monkeypatch.setattr(annotation_baselines, "_components", lambda *given: fitted.append(given) or (lambda matrix: matrix.toarray()))
    wanted = {("random forest", "raw genes")}
    found = [key for key, _ in annotation_baselines._answers((counts, labels), counts, 0, wanted)]
    assert (found, fitted) == ([("random forest", "raw genes")], [])
