"""How much neighbours count is chosen on counts nobody was shown, kept with the model, and left out where batches are exchanged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cellplane.artifact.folder import SMOOTHING, ModelFolder, load_model, save_model
from cellplane.data.config import DataKeys
from cellplane.data.sentences import CellTable
from cellplane.data.sources import AnnData, cell_table
from cellplane.genes import GeneVocabulary
from cellplane.inference import BatchedStore, Predictor
from cellplane.model.cellplm import new_model
from cellplane.pipelines.config import DenoisingConfig, SmoothingConfig
from cellplane.pipelines.denoising import DenoisingPipeline, begun_at
from cellplane.pipelines.denoising_baselines import gene_shares, matrix, split_counts
from cellplane.pipelines.denoising_smoothing import Setting, chosen, in_place, smoothed, smoothing_of
from tests.pipelines.test_denoising import SHORT
from tests.tiny import TINY

FORCED: dict[str, Any] = {**SHORT, "smoothing": {"share": [0.5], "neighbours": [10], "steps": [2], "components": 10}}


@pytest.fixture(scope="module")
def table(cells: AnnData) -> CellTable:
    return cell_table(cells, GeneVocabulary.from_ids(cells.var_names), DataKeys())[0]


@pytest.fixture(scope="module")
def folder(cells: AnnData, table: CellTable) -> ModelFolder:
    """A denoiser that learned nothing but the average cell."""
    config = replace(TINY, n_genes=cells.n_vars, n_batches=0, n_datasets=0, latent="ae")
    network = begun_at(new_model(config, 0), gene_shares(table), np.zeros((cells.n_vars, 0)))
    vocabulary = GeneVocabulary.from_ids(cells.var_names)
    return ModelFolder(config=config, weights=network.state_dict(), vocabulary=vocabulary, task="denoise", max_cells=100)


@pytest.fixture(scope="module")
def smooth(training: AnnData) -> DenoisingPipeline:
    torch.set_num_threads(1)
    return DenoisingPipeline(config=FORCED).fit(training)


def test_a_network_that_learned_nothing_leaves_most_to_the_neighbours(folder, table):
    config = DenoisingConfig(smoothing=SmoothingConfig(components=10))
    found = smoothed(folder, table, np.arange(0, table.n_cells, 5), config)
    predictor = Predictor(found)
    assert predictor.smoothing is not None
    assert predictor.smoothing.share >= 0.65
    assert found.lineage["smoothing"].startswith(f"{predictor.smoothing.share:g} of ")


def test_neighbours_that_share_nothing_are_left_out(folder, table):
    """Every cell is drawn from the same rates: the network says these already, and neighbours only bring noise."""
    counts = sp.csr_matrix(np.random.default_rng(0).poisson(np.tile(300 * gene_shares(table), (120, 1))).astype(np.float32))
    same = CellTable(counts.indptr.astype(np.int64), counts.indices.astype(np.int64), counts.data, table.panel)
    weights = {**folder.weights, "decoder.mean.weight": torch.zeros_like(folder.weights["decoder.mean.weight"])}
    config = DenoisingConfig(smoothing=SmoothingConfig(components=10, neighbours=(3,), steps=(1,)))
    assert smoothed(replace(folder, weights=weights), same, np.arange(0, 120, 4), config).attachments == {}


def test_what_is_kept_back_of_the_validation_cells_is_not_among_the_reference(folder, table):
    held = np.arange(0, table.n_cells, 3)
    kept, rest = split_counts(table.rows(held), 0)
    reference = in_place(table, held, kept)
    np.testing.assert_array_equal(matrix(reference)[held].toarray(), matrix(kept).toarray())
    others = np.setdiff1d(np.arange(table.n_cells), held)
    np.testing.assert_array_equal(matrix(reference)[others].toarray(), matrix(table)[others].toarray())
    config = DenoisingConfig(smoothing=SmoothingConfig(components=10, neighbours=(10,), steps=(1, 2), share=(0.0, 0.5)))
    best, nats = chosen(folder, (reference, kept, rest), config)
    assert best is not None
    assert best.steps in (1, 2)
    assert 0 < nats < 10


def test_a_share_of_zero_keeps_no_cells(folder, table):
    off = DenoisingConfig(smoothing=SmoothingConfig(share=(0.0,)))
    assert smoothed(folder, table, np.arange(0, table.n_cells, 5), off) is folder


def test_only_so_many_cells_are_kept_and_one_gene_has_no_neighbours(table):
    config = DenoisingConfig(smoothing=SmoothingConfig(kept_cells=40, components=5))
    found = smoothing_of(table, config, Setting(5, 1, 0.5))
    assert found is not None
    assert len(found.crow) == 41
    one = np.zeros(len(table.panel), dtype=bool)
    one[0] = True
    assert smoothing_of(replace(table, panel=one), config, Setting(5, 1, 0.5)) is None


def test_a_saved_denoiser_answers_as_before_and_its_neighbours_are_part_of_what_it_is(smooth, query, tmp_path):
    path = smooth.save(tmp_path / "model")
    again = DenoisingPipeline.load(path)
    np.testing.assert_array_equal(again.predict(query), smooth.predict(query))
    bare = save_model(replace(load_model(path), attachments={}), tmp_path / "bare")
    assert load_model(bare).model_sha256 != load_model(path).model_sha256
    assert SMOOTHING in load_model(path).attachments
    assert not np.allclose(DenoisingPipeline.load(bare).predict(query), smooth.predict(query), rtol=1e-2)


def test_smoothed_rates_still_add_up_and_follow_the_order_of_the_cells(smooth, query):
    rates = smooth.predict(query)
    np.testing.assert_allclose(rates.sum(1), 10_000, rtol=1e-4)
    order = np.random.default_rng(0).permutation(query.n_obs)
    np.testing.assert_allclose(smooth.predict(query[order].copy()), rates[order], rtol=1e-3, atol=1e-3)


def test_cells_decoded_in_another_batch_are_not_mixed_with_counts_of_their_own(training, query):
    pipeline = DenoisingPipeline(config={**FORCED, "keys": {"batch_key": "batch"}}).fit(training)
    other = sorted(set(map(str, training.obs["batch"])))[0]
    asked = pipeline.predict(query, target_batch=other)
    alone = DenoisingPipeline()
    alone.adopt(replace(pipeline.folder_, attachments={}))
    alone.config = pipeline.config
    np.testing.assert_array_equal(asked, alone.predict(query, target_batch=other))
    assert not np.allclose(pipeline.predict(query), alone.predict(query), rtol=1e-2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"share": [1.5]}, "between 0 and 1"), ({"share": []}, "at least one value"), ({"steps": [0]}, "from 1 on")],
)
def test_settings_out_of_range_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        SmoothingConfig.model_validate(changes)


def test_a_network_begins_at_the_average_cell(table, folder):
    rates = np.concatenate([shares for _, shares in Predictor(folder).rates(_store(table))])
    expected = gene_shares(table)
    assert np.corrcoef(np.log(rates.mean(0) + 1e-9), np.log(expected))[0, 1] > 0.7


def _store(table: CellTable) -> BatchedStore:
    return BatchedStore.of(table, (), 100)
