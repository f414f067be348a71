"""Without any training the nearest labelled cells vote, in a base model's embedding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cellplane.artifact.folder import load_model, save_model
from cellplane.errors import ConfigError, DataError
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.embedding import CellEmbeddingPipeline
from cellplane.pipelines.neighbours import voting_network

VOTE = {"method": "neighbours", "max_cells": 64}  # as the base model


@pytest.fixture(scope="module")
def voting(training, base_model):
    """Label transfer from the training cells; treat as read-only."""
    return CellTypeAnnotationPipeline(base_model).fit(training, config=VOTE)


def test_nothing_is_trained_and_the_embedding_is_the_base_models(voting, base_model, query):
    assert voting.history_ == []
    expected = CellEmbeddingPipeline(base_model).predict(query)
    np.testing.assert_array_equal(CellEmbeddingPipeline(voting.folder_).predict(query), expected)
    assert not [name for name in voting.folder_.weights if name.startswith(("head.", "decoder."))]


def test_votes_are_probabilities_and_name_the_label(voting, query):
    proba = voting.predict_proba(query)
    np.testing.assert_allclose(proba.sum(1), 1, atol=1e-6)
    assert proba.shape == (query.n_obs, 4)
    assert voting.predict(query).tolist() == [voting.classes_[index] for index in proba.argmax(1)]


def test_it_is_saved_loaded_and_judged_like_any_annotator(voting, query, tmp_path):
    loaded = CellTypeAnnotationPipeline.load(voting.save(tmp_path / "votes"))
    np.testing.assert_array_equal(loaded.predict_proba(query), voting.predict_proba(query))
    assert loaded.unknown_scores(query).shape == (query.n_obs,)
    assert loaded.classes_ == voting.classes_
    assert set(loaded.predict(query, {"unknown": {"reject": True, "refusal_rate": 0.5}})) > {"unknown"}


def test_other_training_cells_make_another_model(training, base_model, tmp_path):
    half = [CellTypeAnnotationPipeline(base_model).fit(training[start::2].copy(), config=VOTE) for start in (0, 1)]
    shas = {load_model(pipeline.save(tmp_path / str(index))).model_sha256 for index, pipeline in enumerate(half)}
    assert len(shas) == 2


def test_an_annotator_may_be_the_base_of_a_vote(fitted, training, query):
    pipeline = CellTypeAnnotationPipeline(fitted.folder_).fit(training, config=VOTE)
    assert pipeline.score(query)["macro_f1"] > 0.8


def test_without_a_base_model_there_is_nothing_to_compare_in(training):
    with pytest.raises(ConfigError, match="name one"):
        CellTypeAnnotationPipeline(config=VOTE).fit(training)
    with pytest.raises(ConfigError, match="base model"):
        voting_network(None)


def test_a_folder_of_classes_without_head_or_voters_is_no_model(voting, tmp_path):
    path = save_model(replace(voting.folder_, attachments={}), tmp_path / "broken")
    with pytest.raises(DataError, match="4 classes with 0 outputs"):
        load_model(path)
