"""Embeddings come from the model as it is, in the caller's order, and nothing is tuned on the labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cellplane.artifact.folder import save_model
from cellplane.errors import ColumnError, ConfigError, DataError, VocabularyError
from cellplane.model.cellplm import new_model
from cellplane.pipelines.embedding import CellEmbeddingPipeline


@pytest.fixture
def pipeline(base_model) -> CellEmbeddingPipeline:
    return CellEmbeddingPipeline(base_model)


def test_an_embedding_has_a_row_for_every_cell_in_order(pipeline, query):
    latent = pipeline.fit(query).predict(query)
    assert latent.shape == (query.n_obs, 16)
    assert latent.dtype == np.float32
    assert np.isfinite(latent).all()
    parts = [pipeline.predict(query[query.obs["batch"] == name].copy()) for name in ("batch_0", "batch_1")]
    by_sample = CellEmbeddingPipeline(pipeline.predictor.folder, {"batch_key": "batch"}).predict(query)
    for name, part in zip(("batch_0", "batch_1"), parts, strict=True):
        np.testing.assert_allclose(by_sample[(query.obs["batch"] == name).to_numpy()], part, atol=1e-5)


def test_the_data_is_changed_only_when_a_key_is_given(pipeline, query):
    data = query.copy()
    latent = pipeline.predict(data)
    assert not len(data.obsm)
    assert set(data.uns) == set(query.uns)
    np.testing.assert_array_equal(pipeline.predict(data, key_added="cellplm"), latent)
    np.testing.assert_array_equal(data.obsm["X_cellplm"], latent)
    assert (data.uns["cellplm"]["n_shared"], data.uns["cellplm"]["n_genes"]) == (120, 150)
    assert list(data.obs) == list(query.obs)


def test_a_saved_pipeline_embeds_the_same_bits(pipeline, query, tmp_path):
    pipeline.save(tmp_path / "model")
    np.testing.assert_array_equal(CellEmbeddingPipeline.load(tmp_path / "model").predict(query), pipeline.predict(query))


def test_an_annotator_embeds_too_and_its_clusters_are_the_types(fitted, query):
    scores = CellEmbeddingPipeline(fitted.folder_).score(query, ["cell_type"])
    assert scores.keys() == {"nmi", "ari"}
    assert scores["nmi"] > 0.8
    assert scores["ari"] > 0.8


def test_shuffled_labels_score_nothing(fitted, query):
    data = query.copy()
    data.obs["cell_type"] = np.random.default_rng(0).permutation(data.obs["cell_type"].astype(str))
    assert abs(CellEmbeddingPipeline(fitted.folder_).score(data, ["cell_type"])["ari"]) < 0.1


def test_an_official_checkpoint_embeds(official, query):
    latent = CellEmbeddingPipeline(pretrain_prefix="tiny", pretrain_directory=official).predict(query)
    assert latent.shape == (query.n_obs, 8)


def test_a_folder_is_as_good_as_a_model_in_memory(pipeline, base_model, query, tmp_path):
    path = save_model(base_model, tmp_path / "base")
    np.testing.assert_array_equal(CellEmbeddingPipeline(path).predict(query), pipeline.predict(query))


def test_what_cannot_be_embedded_is_said(pipeline, query):
    with pytest.raises(ConfigError, match="needs a model"):
        CellEmbeddingPipeline()
    with pytest.raises(ColumnError, match="did you mean 'cell_type'"):
        pipeline.score(query, ["cell_types"])
    with pytest.raises(ConfigError, match="did you mean 'batch_key'"):
        CellEmbeddingPipeline(pipeline.predictor.folder, {"batchkey": "batch"})
    stranger = query.copy()
    stranger.var_names = [f"nobody{n}" for n in range(stranger.n_vars)]
    with pytest.raises(VocabularyError):
        pipeline.predict(stranger)


def test_the_context_is_chosen_and_recorded(pipeline, query):
    data = query.copy()
    alone = pipeline.predict(data, context="self", key_added="alone")
    np.testing.assert_allclose(pipeline.predict(data[:5].copy(), context="self"), alone[:5], atol=1e-5)
    assert data.uns["cellplm"]["context"].startswith("self")
    assert np.abs(pipeline.predict(data) - alone).max() > 1e-4


@pytest.fixture(scope="module")
def two_batches(base_model) -> CellEmbeddingPipeline:
    """A base whose decoder learned two batches, and shows them far apart."""
    config = replace(base_model.config, n_batches=2)
    weights = {name: tensor.clone() for name, tensor in new_model(config, 0).state_dict().items()}
    table = next(name for name in weights if "batch" in name and weights[name].ndim == 2 and len(weights[name]) >= 2)
    weights[table][:2] = torch.randn(2, weights[table].shape[1], generator=torch.Generator().manual_seed(0)) * 3
    return CellEmbeddingPipeline(replace(base_model, config=config, weights=weights, lineage={"decoder_batches": '["first", "second"]'}))


def test_corrected_expression_is_that_of_one_batch(two_batches, query):
    data = query.copy()
    assert two_batches.target_batches == ("first", "second")
    first, second = (two_batches.correct(data, name) for name in two_batches.target_batches)
    known = ~np.isnan(first[0])
    assert known.sum() == 120
    np.testing.assert_allclose(first[:, known].sum(1), 1e4, rtol=1e-3)
    assert np.abs(first - second)[:, known].max() > 1
    mean = two_batches.correct(data, key_added="cellplm")
    np.testing.assert_allclose(mean[:, known], (first + second)[:, known] / 2, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(data.layers["cellplm_corrected"], mean)
    assert data.uns["cellplm"]["target_batch"] == "the mean of 2"


def test_a_batch_that_was_not_learned_is_refused(two_batches, pipeline, fitted, query):
    with pytest.raises(ConfigError, match="first, second"):
        two_batches.correct(query, "third")
    for without in (pipeline, CellEmbeddingPipeline(fitted.folder_)):
        with pytest.raises(DataError, match="no batches"):
            without.correct(query)


def test_types_that_lie_in_one_batch_alone_are_told_with_corrected_cells(two_batches, query):
    data = query.copy()
    data.obs["batch"] = data.obs["cell_type"].astype(str)
    told = CellEmbeddingPipeline(two_batches.model, {"batch_key": "batch", "labels_key": "cell_type"})
    told.correct(data, key_added="cellplm")
    assert "4 of 4 cell types lie in one of 4 batches alone" in data.uns["cellplm"]["warnings"][-1]
    two_batches.correct(data, key_added="cellplm")
    assert not any("batches alone" in sentence for sentence in data.uns["cellplm"].get("warnings", []))
