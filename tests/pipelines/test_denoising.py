"""Hidden counts are learned from the same cells, rates come in the caller's order, and nothing hidden reaches the answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError as SklearnNotFittedError
from sklearn.utils.validation import check_is_fitted

from cellplane.artifact.folder import ModelFolder
from cellplane.batch import predict_file
from cellplane.data.config import DataKeys
from cellplane.data.sources import AnnData, cell_table, read_h5ad, write_h5ad
from cellplane.errors import ConfigError, DataError
from cellplane.inference import BatchedStore, Predictor
from cellplane.model.cellplm import new_model
from cellplane.model.masking import mask_genes
from cellplane.pipelines import denoising
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.base import NotFittedError
from cellplane.pipelines.components import main_directions
from cellplane.pipelines.config import DenoisingConfig
from cellplane.pipelines.denoising import Cells, Denoiser, DenoisingPipeline
from tests.pipelines.conftest import RECIPE
from tests.tiny import TINY, random_batch

RATES: dict[str, Any] = {
    "model": {"width": 32, "n_heads": 2, "n_blocks": 1, "latent": "ae", "latent_width": 16, "decoder_width": 32, "decoder_bottleneck": 16},
    "optimizer": {"steps": 200, "lr": 1e-2, "warmup_steps": 5},
    "max_cells": 100,
    "cells_per_step": 100,
}
SHORT = {**RATES, "optimizer": {"steps": 4}}


@pytest.fixture(scope="module")
def denoiser(training: AnnData) -> DenoisingPipeline:
    """A pipeline that learned the training cells; treat as read-only."""
    torch.set_num_threads(1)
    return DenoisingPipeline(config={**RATES, "smoothing": {"share": [0.0]}}).fit(training)


@pytest.fixture(scope="module")
def by_batch(training: AnnData) -> DenoisingPipeline:
    """A pipeline that learned two batches."""
    return DenoisingPipeline(config={**SHORT, "keys": {"batch_key": "batch"}, "smoothing": {"share": [0.0]}}).fit(training)


def test_it_learns_to_recover_hidden_counts(denoiser):
    looks = [row["val/nb_hidden"] for row in denoiser.history_ if "val/nb_hidden" in row]
    assert looks[-1] < 0.93 * looks[0]  # the first look already knows the average cell
    assert int(denoiser.folder_.lineage["best_step"]) > 10


def test_it_begins_at_the_main_directions_of_the_cells_it_learns_from(training, monkeypatch):
    seen = []
    learn = denoising.finetune

    def watched(denoiser, *given):
        seen.append((denoiser.decoder.mean.weight.detach().clone(), given[0].store.store.table))
        return learn(denoiser, *given)

    monkeypatch.setattr(denoising, "finetune", watched)
    DenoisingPipeline(config=SHORT).fit(training)
    ((weights, table),) = seen
    assert table.n_cells == round(0.9 * training.n_obs)  # those that validate tell nothing
    expected = denoising.SPREAD * main_directions(table, 16)
    np.testing.assert_allclose(weights.numpy(), expected, atol=1e-6)


def test_rates_are_shares_of_ten_thousand_that_follow_the_cells(denoiser, query):
    rates = denoiser.predict(query)
    assert (rates.dtype, rates.shape) == (np.float32, query.shape)
    np.testing.assert_allclose(rates.sum(1), 10_000, rtol=1e-5)
    order = np.random.default_rng(0).permutation(query.n_obs)
    np.testing.assert_allclose(denoiser.predict(query[order].copy()), rates[order], rtol=1e-4)
    columns = np.random.default_rng(1).permutation(query.n_vars)
    np.testing.assert_allclose(denoiser.predict(query[:, columns].copy()), rates[:, columns], rtol=1e-4)


def test_rates_of_two_types_differ_where_their_counts_do(denoiser, query):
    rates, types = denoiser.predict(query), query.obs["cell_type"].to_numpy()
    counts = query.X.toarray() / query.X.sum(1)
    for one, other in (("type_0", "type_1"), ("type_2", "type_3")):
        seen, said = (table[types == one].mean(0) - table[types == other].mean(0) for table in (counts, rates))
        assert np.corrcoef(seen, said)[0, 1] > 0.6


def test_a_key_adds_rates_size_factors_and_their_origin(denoiser, query):
    data = query.copy()
    rates = denoiser.predict(data, key_added="cellplm")
    np.testing.assert_array_equal(data.layers["cellplm_denoised"], rates)
    np.testing.assert_allclose(data.obs["cellplm_size_factor"], np.asarray(query.X.sum(1)).ravel())
    assert data.uns["cellplm"]["model_sha256"] == denoiser.folder_.model_sha256
    np.testing.assert_array_equal(data.X.toarray(), query.X.toarray())


def test_genes_without_a_place_are_nan_and_cells_without_counts_are_flagged(denoiser, query):
    data = query[:, :100].copy()
    data.var_names = [*data.var_names[:-1], "nobody knows"]
    counts = data.X.toarray()
    counts[3] = 0
    data.X = sp.csr_matrix(counts)
    rates = denoiser.predict(data, key_added="mine")
    assert np.isnan(rates[:, -1]).all()
    np.testing.assert_allclose(np.nansum(rates, axis=1), 10_000, rtol=1e-5)
    assert data.obs["mine_flag"].notna().sum() == 1
    assert data.obs["mine_size_factor"].iloc[3] == 0


def test_hidden_counts_reach_neither_the_encoder_nor_the_seen_likelihood_scale(training):
    """Noise in place of the hidden values changes no latent; only their own likelihood sees them."""
    network = new_model(replace(TINY, latent="ae"), 0)
    batch = random_batch([6, 5])
    mask = mask_genes(batch, np.array([6, 5]), DenoisingConfig().masking)
    noisy = replace(batch, value=torch.where(mask.entry, batch.value + 7, batch.value))
    denoiser = Denoiser(network, (1.0, 0.1))
    one, other = denoiser(batch, mask), denoiser(noisy, mask)
    torch.testing.assert_close(one.latent, other.latent, rtol=0, atol=0)
    assert not torch.equal(one.loss.total, other.loss.total)


def test_hidden_entries_include_zeros_and_weigh_ten_times_the_others():
    batch = random_batch([8])
    mask = mask_genes(batch, np.array([8]), DenoisingConfig().masking)
    assert int(mask.hidden_C.sum()) > int(mask.entry.sum()) > 0
    assert 0.15 < float(mask.hidden_C.sum()) / (8 * batch.n_genes) < 0.35
    loss = Denoiser(new_model(replace(TINY, latent="ae"), 0), (1.0, 0.1))(batch, mask).loss
    parts = dict(zip(loss.names, loss.parts, strict=True))
    torch.testing.assert_close(loss.total.detach(), 0.1 * parts["nb"] + 0.9 * parts["nb_hidden"])


def test_the_network_and_the_denoiser_share_names_so_that_weights_fit_both():
    network = new_model(replace(TINY, latent="ae"), 0)
    assert Denoiser(network, (1.0, 0.1)).state_dict().keys() == network.state_dict().keys()


def test_two_fits_of_one_seed_are_the_same_bits(training):
    one, other = (DenoisingPipeline(config=SHORT).fit(training).folder_.weights for _ in range(2))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_saved_pipeline_answers_the_same_and_is_no_annotator(denoiser, query, tmp_path):
    path = denoiser.save(tmp_path / "model")
    np.testing.assert_array_equal(DenoisingPipeline.load(path).predict(query), denoiser.predict(query))
    with pytest.raises(DataError, match="not one to annotate with"):
        CellTypeAnnotationPipeline.load(path)


def test_a_file_is_answered_as_the_pipeline_answers(denoiser, query, tmp_path):
    path = denoiser.save(tmp_path / "model")
    write_h5ad(query, tmp_path / "in.h5ad")
    assert predict_file("denoise", path, DataKeys(), (tmp_path / "in.h5ad", tmp_path / "out.h5ad")) == query.n_obs
    np.testing.assert_array_equal(read_h5ad(tmp_path / "out.h5ad").layers["cellplm_denoised"], denoiser.predict(query))


def test_batches_are_learned_and_can_be_chosen(by_batch, query):
    own = by_batch.predict(query)
    sample = query.obs["batch"].to_numpy() == "batch_0"
    first, second = (by_batch.predict(query, target_batch=name) for name in ("batch_0", "batch_1"))
    np.testing.assert_allclose(first[sample], own[sample], rtol=1e-5)
    np.testing.assert_allclose(second[~sample], own[~sample], rtol=1e-5)
    assert np.abs(first - second).max() > 1e-3
    with pytest.raises(ConfigError, match="no batch 'batch_9' was learned; there are batch_0, batch_1"):
        by_batch.predict(query, target_batch="batch_9")


def test_cells_of_unknown_batches_are_decoded_in_the_mean_of_the_rates(by_batch, query):
    stranger = query.copy()
    stranger.obs["batch"] = "batch_9"
    first, second = (by_batch.predict(stranger, target_batch=name) for name in ("batch_0", "batch_1"))
    np.testing.assert_allclose(by_batch.predict(stranger), (first + second) / 2, rtol=1e-4)


def test_a_cell_of_an_unknown_batch_changes_no_other_cells_rates(by_batch, query):
    own, mixed = by_batch.predict(query), query.copy()
    strange = np.arange(query.n_obs) == 3
    mixed.obs["batch"] = np.where(strange, "batch_9", query.obs["batch"].astype(str))
    rates = by_batch.predict(mixed)
    without = by_batch.predict(query[~strange].copy())  # it is read in a sentence of its own batch
    np.testing.assert_allclose(rates[~strange], without, rtol=1e-4)
    assert not np.allclose(rates[strange], own[strange], rtol=1e-2)


@pytest.fixture
def base_with_batches(base_model: ModelFolder) -> ModelFolder:
    """An untrained model whose decoder knows five batches, none of them the user's."""
    config = replace(base_model.config, n_batches=5)
    return replace(base_model, config=config, weights=new_model(config, 0).state_dict())


def test_new_batches_begin_as_the_mean_of_the_base_models(base_with_batches, training):
    pipeline = DenoisingPipeline(base_with_batches, config={"keys": {"batch_key": "batch"}})
    cells = Cells.of(training, base_with_batches, pipeline.config)
    network = pipeline._network(cells, cells.table, pipeline.config)
    expected = base_with_batches.weights["decoder.batch.table"].mean(0)
    assert network.decoder.batch.table.shape[0] == 2
    torch.testing.assert_close(network.decoder.batch.table, expected.expand(2, -1))
    torch.testing.assert_close(network.encoder.norm.weight, base_with_batches.weights["encoder.norm.weight"])


def test_without_fit_a_base_model_answers_zero_shot(base_model, query):
    pipeline = DenoisingPipeline(base_model)
    table, _ = cell_table(query, base_model.vocabulary, DataKeys())
    shares = np.zeros((query.n_obs, len(base_model.vocabulary)), dtype=np.float32)
    for rows, found in Predictor(base_model).rates(BatchedStore.of(table, (), base_model.max_cells)):
        shares[rows] = found
    rates = pipeline.predict(query)
    known = ~np.isnan(rates[0])
    assert known.sum() == 120
    np.testing.assert_allclose(rates[:, known], 10_000 * shares[:, base_model.vocabulary.index(query.var_names[known])], rtol=1e-5)
    with pytest.raises(NotFittedError, match="call fit"):
        DenoisingPipeline().predict(query)


def test_a_base_model_without_a_decoder_is_refused(fitted, training, query):
    with pytest.raises(ConfigError, match="decodes no counts"):
        DenoisingPipeline(fitted.folder_).fit(training, SHORT)
    with pytest.raises(DataError, match="decodes no counts"):
        DenoisingPipeline(fitted.folder_).predict(query)


def test_fitting_from_a_base_model_changes_only_what_may_learn(base_model, training):
    pipeline = DenoisingPipeline(base_model, config={"optimizer": {"steps": 3}, "transfer": {"learn": "head"}, "max_cells": 100})
    weights = pipeline.fit(training).folder_.weights
    changed = {name.split(".")[0] for name, tensor in base_model.weights.items() if not torch.equal(tensor, weights[name])}
    assert changed == {"decoder"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"seen_weight": 2.0}, "copying would be learned"),
        ({"masking": {"cell_mask_rate": 0.0}}, "nothing would be hidden"),
        ({"model": {"decoder": "none"}}, "must be negative_binomial"),
        ({"transfer": {"learn": "head"}}, "there is none; name one"),
        ({"transfer": {"frozen": ["decoder"]}}, "there is none; name one"),
    ],
)
def test_a_wrong_configuration_is_refused(training, config, message):
    with pytest.raises(ConfigError, match=message):
        DenoisingPipeline(config=config).fit(training)


def test_nobody_with_counts_is_nothing_to_learn(training):
    empty = training[:5].copy()
    empty.X = empty.X * 0
    with pytest.raises(DataError, match="0 of 5 cells have counts"):
        DenoisingPipeline(config=SHORT).fit(empty)


def test_scikit_learn_knows_the_estimators(denoiser, query):
    for pipeline in (denoiser, CellTypeAnnotationPipeline(config=RECIPE)):
        again = clone(pipeline)
        assert again.get_params()["config"] == pipeline.config
        assert again.folder_ is None
        with pytest.raises(SklearnNotFittedError):
            check_is_fitted(again)
    check_is_fitted(denoiser)
    changed = clone(denoiser).set_params(config={"seed": 5})
    assert changed.configured(None).seed == 5
    assert "not fitted" in repr(changed)


def test_another_base_model_can_be_set(base_model, base_with_batches):
    pipeline = DenoisingPipeline(base_model)
    assert pipeline.base is base_model
    assert pipeline.set_params(model=base_with_batches).base is base_with_batches
