"""Embeddings come from the model as it is, in the caller's order, and nothing is tuned on the labels."""

from __future__ import annotations

import numpy as np
import pytest

from cellplane.artifact.folder import save_model
from cellplane.errors import ColumnError, ConfigError, VocabularyError
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
