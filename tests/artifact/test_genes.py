"""A model learns to know more genes without forgetting or changing anything it knew."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cellplane.artifact.folder import load_model, save_model
from cellplane.artifact.genes import PER_GENE, with_genes, with_only
from cellplane.errors import IntegrityError, VocabularyError
from cellplane.genes import GeneVocabulary
from cellplane.inference import Predictor, build_network
from cellplane.model.config import ModelConfig
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from tests.pipelines.conftest import RECIPE, base_model, cells
from tests.tiny import ANNOTATOR, GENES, dense_batch, random_batch, random_counts, tiny_folder

__all__ = ["base_model", "cells"]

BASES = {
    "negative binomial": replace(ANNOTATOR, n_classes=0, latent="gmvae", decoder="negative_binomial"),
    "gaussian": replace(ANNOTATOR, n_classes=0, latent="gmvae", decoder="gaussian"),
    "annotation": ANNOTATOR,
}


@pytest.fixture(params=BASES, ids=str)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return BASES[request.param]


def test_new_genes_begin_as_the_mean_and_old_ones_stay_bit_by_bit(config):
    model = tiny_folder(config)
    grown = with_genes(model, ["NEW1", GENES[3], "NEW2", "NEW1"])
    assert grown.vocabulary.gene_ids == (*GENES, "NEW1", "NEW2")
    assert grown.config == replace(config, n_genes=len(GENES) + 2)
    tables = [name for name in PER_GENE if name in model.weights]
    assert "embedder.genes_GD" in tables
    assert (len(tables) > 1) == (config.decoder != "none")
    for name, tensor in model.weights.items():
        assert torch.equal(grown.weights[name][: len(tensor)], tensor), name
        assert len(grown.weights[name]) == len(tensor) + 2 * (name in tables), name
    for name in tables:
        for row in grown.weights[name][-2:]:
            torch.testing.assert_close(row, model.weights[name].mean(0))


def test_every_tensor_with_a_row_for_each_gene_grows(config):
    """Two networks that differ in their number of genes alone differ in these tensors alone."""
    small, large = (build_network(tiny_folder(config)), with_genes(tiny_folder(config), ["NEW1"]))
    shapes = {name: tensor.shape for name, tensor in build_network(large).state_dict().items()}
    assert {name for name, tensor in small.state_dict().items() if shapes[name] != tensor.shape} <= set(PER_GENE)


def test_answers_about_cells_without_new_genes_stay_the_same(config):
    model = tiny_folder(config)
    grown = with_genes(model, ["NEW1", "NEW2"])
    batch = random_batch([3, 5])
    wide = replace(batch, panels=torch.cat([batch.panels, torch.zeros(len(batch.panels), 2, dtype=torch.bool)], dim=1))
    with torch.inference_mode():
        before, after = build_network(model).eval()(batch), build_network(grown).eval()(wide)
    assert torch.equal(before.latent, after.latent)


def test_a_grown_model_saves_loads_and_is_another(config, tmp_path):
    model = load_model(save_model(tiny_folder(config), tmp_path / "model"))
    grown = with_genes(model, ["NEW1"])
    assert grown.model_sha256 == ""
    again = load_model(save_model(grown, tmp_path / "grown"))
    assert again.lineage["added_genes"] == "1"
    assert again.model_sha256 != model.model_sha256
    assert Predictor(again).vocabulary == grown.vocabulary


def test_a_model_that_knows_all_genes_is_returned_as_it_is():
    model = tiny_folder()
    assert with_genes(model, GENES[:4]) is model


def test_a_model_over_some_of_its_genes_answers_about_cells_of_these_as_before(config):
    model = tiny_folder(config)
    kept = GeneVocabulary(tuple(reversed(GENES[2:])), model.vocabulary.namespace)  # another order too
    narrow = with_only(model, kept)
    assert (narrow.vocabulary, narrow.config.n_genes, narrow.model_sha256) == (kept, len(kept), "")
    counts_CG = random_counts(8)
    counts_CG[:, :2] = 0
    measured_G = torch.arange(len(GENES)) >= 2
    wide = dense_batch(counts_CG, [3, 5], measured_G)
    few = dense_batch(counts_CG[:, model.vocabulary.index(kept.gene_ids)], [3, 5])
    with torch.inference_mode():
        before, after = build_network(model).eval()(wide), build_network(narrow).eval()(few)
    torch.testing.assert_close(before.latent, after.latent)


def test_a_model_over_its_own_genes_is_returned_as_it_is_and_unknown_ones_are_refused():
    model = tiny_folder()
    assert with_only(model, model.vocabulary) is model
    with pytest.raises(VocabularyError, match=r"1 genes are none of the model's, e\.g\. \['NEW1'\]"):
        with_only(model, GeneVocabulary.from_ids([*GENES, "NEW1"]))


def test_a_table_of_another_size_than_the_vocabulary_is_refused():
    model = replace(tiny_folder(), vocabulary=GeneVocabulary.from_ids(GENES[:-1]))
    with pytest.raises(IntegrityError, match=r"embedder.genes_GD has \d+ rows for \d+ genes"):
        with_genes(model, ["NEW1"])


def test_fine_tuning_adds_the_genes_of_the_data_when_asked(cells, base_model):
    recipe = {**RECIPE, "optimizer": {"steps": 3, "warmup_steps": 1}}
    pipeline = CellTypeAnnotationPipeline(base_model, {**recipe, "new_genes": "add"}).fit(cells)
    fitted = pipeline.folder_
    assert fitted.vocabulary.gene_ids == (*base_model.vocabulary.gene_ids, *cells.var_names[120:])
    assert np.isfinite(pipeline.predict_proba(cells)).all()
    left_out = CellTypeAnnotationPipeline(base_model, recipe).fit(cells).folder_
    assert left_out.vocabulary == base_model.vocabulary
