"""A linear member is tuned within the training cells, gets its share from validation cells, and answers wherever the model is opened."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from cellplane.artifact.folder import load_model
from cellplane.data.config import DataKeys, SimulateConfig
from cellplane.data.sentences import CellTable, memory_store
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData, cell_table
from cellplane.errors import DataError
from cellplane.genes import GeneVocabulary
from cellplane.inference import Predictor
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.baselines import table_logs
from cellplane.pipelines.config import AnnotationConfig, FinetuneConfig
from cellplane.pipelines.finetuning import LATER, identity_of
from cellplane.pipelines.linear_member import Form, best_share, choose_form, fit_linear, fitted
from cellplane.pipelines.unknown import places_in
from tests.pipelines.conftest import RECIPE

UNTAUGHT = {**RECIPE, "optimizer": {"steps": 1, "lr": 1e-4}}
TYPES = ("type_0", "type_1", "type_2", "type_3")


def table_of(data: AnnData) -> CellTable:
    return cell_table(data, GeneVocabulary.from_ids(data.var_names), DataKeys(labels_key="cell_type"), TYPES)[0]


@pytest.fixture(scope="module")
def few() -> AnnData:
    """120 cells of four types."""
    return simulate(SimulateConfig(n_cells=120, n_genes=150, seed=3))


@pytest.fixture(scope="module")
def both(few: AnnData) -> CellTypeAnnotationPipeline:
    """A network of one step and a linear member; treat as read-only."""
    return CellTypeAnnotationPipeline(config={**UNTAUGHT, "linear": True}).fit(few[:80].copy())


@pytest.fixture(scope="module")
def alone(few: AnnData) -> CellTypeAnnotationPipeline:
    """The network of one step by itself; treat as read-only."""
    return CellTypeAnnotationPipeline(config=UNTAUGHT).fit(few[:80].copy())


def test_it_helps_where_the_network_has_learned_nothing_yet(both, alone, few):
    asked = few[80:].copy()
    before, after = (pipeline.score(asked)["macro_f1"] for pipeline in (alone, both))
    assert after > max(0.8, before + 0.2)


def test_network_and_embeddings_are_those_of_the_fit_without_it(both, alone, few):
    for name, tensor in alone.folder_.weights.items():
        assert both.folder_.weights[name].equal(tensor)
    store = memory_store(table_of(few), 100)
    np.testing.assert_array_equal(Predictor(both.folder_).embed(store), Predictor(alone.folder_).embed(store))


def test_a_saved_pipeline_and_the_endpoints_predictor_answer_to_the_bit(both, few, tmp_path):
    asked = few[80:].copy()
    expected = both.predict_proba(asked)
    path = both.save(tmp_path / "model")
    np.testing.assert_array_equal(CellTypeAnnotationPipeline.load(path).predict_proba(asked), expected)
    served = Predictor(load_model(path)).annotate(memory_store(replace(table_of(asked), labels=None), both.folder_.max_cells))
    np.testing.assert_array_equal(served.proba, expected)


def test_a_share_of_none_is_the_network_alone(alone, few, monkeypatch):
    monkeypatch.setattr("cellplane.pipelines.linear_member.SHARES", (0.0,))
    without = CellTypeAnnotationPipeline(config={**UNTAUGHT, "linear": True}).fit(few[:80].copy())
    assert without.folder_.attachments == alone.folder_.attachments
    np.testing.assert_array_equal(without.predict_proba(few), alone.predict_proba(few))


def test_labels_of_asked_cells_change_nothing(both, few):
    asked = few[80:].copy()
    shuffled = asked.copy()
    shuffled.obs["cell_type"] = np.random.default_rng(0).permutation(asked.obs["cell_type"].to_numpy())
    np.testing.assert_array_equal(both.predict_proba(shuffled), both.predict_proba(asked))


def test_form_and_first_fit_do_not_see_the_validation_cells(few):
    table = table_of(few)
    kept, held = table.rows(np.arange(80)), table.rows(np.arange(80, 120))
    assert held.labels is not None
    wrong = replace(held, labels=(held.labels + 1) % 4)
    network = np.zeros((40, 4), np.float32)
    right_member, right = fit_linear((memory_store(kept, 100), memory_store(held, 100)), network, 0, calibrated=True)
    wrong_member, _ = fit_linear((memory_store(kept, 100), memory_store(wrong, 100)), network, 0, calibrated=True)
    assert right_member is not None
    assert right_member.share > 0
    assert wrong_member is None, "what is told wrongly by the validation cells gets no share"
    first = fitted(choose_form(kept, 0), [kept], 4, 0)
    said = places_in(first.space, memory_store(held, 100)) + first.bias
    assert right.argmax(1).tolist() == said.argmax(1).tolist(), "an undecided network changes no label"
    assert not np.array_equal(right_member.bias, first.bias), "what is kept has learned from all cells"


def test_the_share_goes_to_whoever_knows():
    truth = np.arange(60) % 3
    knows = (4 * np.eye(3)[truth]).astype(np.float32)
    guesses = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    assert best_share(knows, guesses, truth, calibrated=False) == 0
    assert best_share(guesses, knows, truth, calibrated=False) == 1
    assert best_share(guesses, guesses, truth, calibrated=True) == 0, "among equals the network stays alone"


@pytest.mark.parametrize("components", [0, 60])
@pytest.mark.parametrize("n_types", [2, 4])
def test_it_says_what_scikit_learn_says(few, components, n_types):
    table = table_of(few)
    table = table.rows(np.flatnonzero(table.labels < n_types))
    member = fitted(Form(1e4, components, 0.3), [table], n_types, 0)
    logits = places_in(member.space, memory_store(table, 100)) + member.bias
    logs, labels = table_logs(table, 1e4), table.labels
    if components:
        dense = logs.toarray() - np.asarray(logs.mean(axis=0))
        left, sizes, _ = np.linalg.svd(dense, full_matrices=False)
        width = min(components, len(dense) - 1)
        logs = (left * sizes)[:, :width]
    expected = LogisticRegression(C=0.3, max_iter=300).fit(logs, labels).predict_proba(logs)
    found = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_genes_that_are_missing_at_prediction_are_borne(both, few):
    fewer = few[80:, 30:].copy()
    assert both.score(fewer)["macro_f1"] > 0.6
    assert np.isfinite(both.predict_proba(fewer)).all()


def test_one_cell_type_is_refused_as_before(few):
    single = few[(few.obs["cell_type"] == "type_0").to_numpy()].copy()
    with pytest.raises(DataError, match="at least two"):
        CellTypeAnnotationPipeline(config={**UNTAUGHT, "linear": True}).fit(single)


def test_a_handful_of_cells_is_enough_for_a_form(few):
    table = table_of(few)
    rows = np.concatenate([np.flatnonzero(table.labels == 0)[:2], np.flatnonzero(table.labels == 1)[:1]])
    form = choose_form(table.rows(rows), 0)
    member = fitted(form, [table.rows(rows)], 2, 0)
    assert np.isfinite(member.bias).all()


def test_it_answers_with_the_vote_of_neighbours_too(few, base_model):
    config = {"method": "neighbours", "linear": True}
    pipeline = CellTypeAnnotationPipeline(base_model, config).fit(few[:80].copy())
    assert pipeline._fitted().judgement.linear is not None
    assert pipeline.score(few[80:].copy())["macro_f1"] > 0.6


def test_a_job_without_it_keeps_the_identity_of_earlier_versions(tmp_path):
    assert LATER["linear"] is False
    assert AnnotationConfig().linear is False
    data = tmp_path / "cells.h5ad"
    data.write_bytes(b"cells")
    plain, other = (identity_of(FinetuneConfig(data=str(data), linear=linear)) for linear in (False, True))
    assert plain != other
