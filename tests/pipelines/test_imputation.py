"""Genes the query did not measure are filled in from a reference; what is hidden cannot reach the answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cellplane.data.config import SimulateConfig
from cellplane.data.sentences import MicroBatch
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData
from cellplane.errors import ColumnError, ConfigError, DataError, FileFormatError, VocabularyError
from cellplane.inference import decoded
from cellplane.model.cellplm import new_model
from cellplane.pipelines.base import NotFittedError
from cellplane.pipelines.imputation import KNOWN, SpatialImputationPipeline, fitted_from, greedy_panel
from cellplane.pipelines.imputation_cells import ImputationObjective, patches, shown
from cellplane.pipelines.imputation_config import ImputationConfig
from cellplane.pipelines.imputation_evaluation import evaluate_imputation
from cellplane.pipelines.imputation_fit import Scaling, Until, best_step, impute, mixed, new_network
from cellplane.pipelines.imputation_reading import read_pair
from cellplane.train.finetune import Course
from tests.tiny import ANNOTATOR, random_batch

N_HIDDEN = 12
RECIPE = {
    "model": {"width": 32, "n_heads": 2, "latent_width": 16, "decoder_width": 32, "decoder_bottleneck": 16},
    "optimizer": {"steps": 60, "lr": 1e-2, "warmup_steps": 5},
    "query_cells": 64,
    "reference_cells": 64,
    "folds": 2,
    "neighbours": 20,
    "validate_every": 20,
    "device": "cpu",
}
SHORT = {**RECIPE, "optimizer": {"steps": 4}, "validate_every": 2}


@pytest.fixture(scope="module")
def tissue() -> AnnData:
    """160 cells with positions and all their genes."""
    torch.set_num_threads(1)
    return simulate(SimulateConfig(n_cells=320, n_genes=60, spatial=True, n_batches=1, mean_counts=300, batch_sigma=0.0))[::2].copy()


@pytest.fixture(scope="module")
def reference() -> AnnData:
    """As many cells of the same kinds, without positions."""
    cells = simulate(SimulateConfig(n_cells=320, n_genes=60, spatial=True, n_batches=1, mean_counts=300, batch_sigma=0.0))[1::2].copy()
    del cells.obsm["spatial"]
    return cells


@pytest.fixture(scope="module")
def query(tissue: AnnData) -> AnnData:
    """The tissue without its last genes."""
    return tissue[:, :-N_HIDDEN].copy()


@pytest.fixture(scope="module")
def fitted(query: AnnData, reference: AnnData) -> SpatialImputationPipeline:
    """A pipeline that learned; treat as read-only."""
    return SpatialImputationPipeline(config=RECIPE).fit(query, reference)


def with_noise(tissue: AnnData, seed: int = 0) -> AnnData:
    """The tissue, every count of the hidden genes replaced."""
    counts = tissue.X.toarray()
    counts[:, -N_HIDDEN:] = np.random.default_rng(seed).integers(0, 500, (tissue.n_obs, N_HIDDEN))
    return AnnData(X=counts.astype(np.float32), obs=tissue.obs.copy(), var=tissue.var.copy(), obsm=dict(tissue.obsm))


def test_it_imputes_what_the_query_lacks_and_beats_chance_by_far(fitted, query, tissue):
    found = fitted.predict(query)
    assert list(found.var_names) == list(tissue.var_names[-N_HIDDEN:]) == list(fitted.genes_)
    assert list(found.obs_names) == list(query.obs_names)
    np.testing.assert_array_equal(found.obsm["spatial"], query.obsm["spatial"])
    scores = fitted.score(tissue)
    assert scores["model"]["pearson"] > 0.3
    assert scores["genes"] == N_HIDDEN
    assert set(scores) >= {"model", "knn", "ridge"}


def test_replacing_every_scored_value_by_noise_leaves_the_prediction_bit_identical(fitted, tissue, query):
    alone, beside_truth, beside_noise = (fitted.predict(data) for data in (query, tissue, with_noise(tissue)))
    for layer in ("log1p", "sd"):
        assert np.array_equal(alone.layers[layer], beside_noise.layers[layer], equal_nan=True)
    assert np.array_equal(alone.X, beside_truth.X, equal_nan=True)
    assert np.array_equal(alone.X, beside_noise.X, equal_nan=True)


def test_hidden_counts_of_the_query_do_not_change_what_is_learned(tissue, reference, query):
    genes = tuple(tissue.var_names[-N_HIDDEN:])
    one, other = (SpatialImputationPipeline(config={**SHORT, "genes": genes}).fit(data, reference) for data in (tissue, with_noise(tissue)))
    bare = SpatialImputationPipeline(config=SHORT).fit(query, reference)
    for name, weight in one.folder_.weights.items():
        assert torch.equal(weight, other.folder_.weights[name])
        assert torch.equal(weight, bare.folder_.weights[name])


def test_the_answer_is_in_counts_at_the_cells_own_depth(fitted, query):
    found = fitted.predict(query, {"min_correlation": -1.0})
    deeper = query.copy()
    deeper.X = deeper.X * 3
    np.testing.assert_allclose(fitted.predict(deeper, {"min_correlation": -1.0}).X, 3 * found.X, rtol=1e-3)
    np.testing.assert_allclose(found.layers["log1p"], np.log1p(found.X), rtol=1e-5)
    assert (found.layers["sd"] >= np.sqrt(found.X) * 0.999).all()


def test_genes_that_cannot_be_trusted_are_refused_and_listed(fitted, query):
    expected = fitted.expected_correlation_
    threshold = float(np.median(expected))
    found = fitted.predict(query, {"min_correlation": threshold})
    refused = found.var["refused"].to_numpy()
    assert refused.tolist() == (expected < threshold).tolist()
    assert 0 < refused.sum() < N_HIDDEN
    assert found.uns["cellplm"]["refused"] == list(found.var_names[refused])
    assert np.isnan(found.X[:, refused]).all()
    assert np.isfinite(found.X[:, ~refused]).all()


def test_a_gene_of_unknown_expectation_is_refused_like_the_poorest(fitted, query):
    state, wanted = fitted._state(), np.flatnonzero(fitted._state().wanted)
    expected = np.where(np.arange(len(state.expected)) == wanted[2], np.nan, state.expected)
    pipeline = SpatialImputationPipeline()
    pipeline.adopt(fitted.folder_)
    pipeline._known = replace(state, expected=expected)
    found = pipeline.predict(query, {"min_correlation": -0.99})
    assert found.var["refused"].tolist() == [number == 2 for number in range(N_HIDDEN)]
    assert found.uns["cellplm"]["refused"] == [fitted.genes_[2]]
    assert np.isnan(found.X[:, 2]).all()
    assert not pipeline.predict(query, {"min_correlation": -1.0}).var["refused"].any(), "-1 refuses nothing"


def test_an_answer_shares_nothing_with_the_cells_it_is_about(fitted, query):
    for cells in (query.copy(), query[::2]):
        before, found = cells.obsm["spatial"].copy(), fitted.predict(cells)
        found.obsm["spatial"][:] = -1.0
        found.obs["cell_type"] = "other"
        np.testing.assert_array_equal(cells.obsm["spatial"], before)
        assert (cells.obs["cell_type"].astype(str) != "other").all()


def test_expected_correlations_lie_near_the_true_ones(fitted, tissue):
    true = fitted.score(tissue)["model"]["per_gene"]
    error = fitted.expected_correlation_ - np.array([true[gene] for gene in fitted.genes_])
    assert abs(error.mean()) < 0.2


def test_a_saved_pipeline_answers_alike_with_the_reference_it_kept(fitted, query, tmp_path):
    loaded = SpatialImputationPipeline.load(fitted.save(tmp_path / "model"))
    assert np.array_equal(loaded.predict(query).X, fitted.predict(query).X, equal_nan=True)
    assert loaded.genes_ == fitted.genes_
    assert loaded.suggest_panel(3) == fitted.suggest_panel(3)


def test_cells_can_be_read_beside_another_reference(fitted, query, reference):
    other = fitted.predict(query, {"min_correlation": -1.0}, reference[::2, :-3].copy())
    assert list(other.var_names) == list(fitted.genes_[:-3]), "only genes that it measured"
    assert "80 given reference cells" in other.uns["cellplm"]["context"]
    same = fitted.predict(query, {"min_correlation": -1.0}, reference)
    np.testing.assert_allclose(same.X, fitted.predict(query, {"min_correlation": -1.0}).X, rtol=1e-4)


def test_the_same_seed_learns_the_same(query, reference):
    one, other = (SpatialImputationPipeline(config=SHORT).fit(query, reference).folder_.weights for _ in range(2))
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_the_callers_data_is_not_changed(query, reference):
    before = query.X.toarray().copy(), reference.X.toarray().copy(), list(query.obs), list(query.uns)
    SpatialImputationPipeline(config=SHORT).fit(query, reference).predict(query)
    assert np.array_equal(query.X.toarray(), before[0])
    assert np.array_equal(reference.X.toarray(), before[1])
    assert (list(query.obs), list(query.uns)) == before[2:]


def test_a_base_model_brings_its_encoder_and_its_genes(query, reference, base_model, cells):
    genes = dict(zip(reference.var_names, cells.var_names, strict=False))
    named = [data.copy() for data in (query, reference)]
    for data in named:
        data.var_names = [genes[gene] for gene in data.var_names]
    pipeline = SpatialImputationPipeline(base_model, {**SHORT, "new_genes": "leave_out"}).fit(*named)
    assert pipeline.folder_.vocabulary == base_model.vocabulary
    assert pipeline.folder_.config.platform_tokens == 2
    assert pipeline.folder_.config.latent == base_model.config.latent
    assert pipeline.predict(named[0]).n_vars == N_HIDDEN


def test_the_official_recipe_has_no_tokens_and_raw_counts(query, reference):
    pipeline = SpatialImputationPipeline(config={**SHORT, "recipe": "official", "masked_cells": 0.95}).fit(query, reference)
    config = pipeline.folder_.config
    assert (config.platform_tokens, config.input_total) == (0, 0.0)
    assert np.isfinite(pipeline.predict(query, {"min_correlation": -1.0}).X).all()


def test_a_panel_is_suggested_from_the_imputed_genes_best_first(fitted):
    panel = fitted.suggest_panel(4)
    assert len(set(panel)) == 4
    assert set(panel) <= set(fitted.genes_)
    assert fitted.suggest_panel(2) == panel[:2]
    with pytest.raises(DataError, match="a panel of 99 genes"):
        fitted.suggest_panel(99)


def test_the_first_gene_of_a_panel_is_the_one_that_speaks_for_others():
    rng = np.random.default_rng(0)
    known, hub, alone = rng.normal(size=(3, 500))
    followers = hub[:, None] + 0.1 * rng.normal(size=(500, 3))
    followed_known = known[:, None] + 0.1 * rng.normal(size=(500, 3))
    logs = np.column_stack([known, alone, hub, followers, followed_known])
    assert greedy_panel(logs, 1, 2)[0] in (2, 3, 4, 5)
    assert greedy_panel(logs, 1, 2)[1] == 1


def test_no_panel_is_suggested_where_nothing_varies(query, reference):
    lonely = SpatialImputationPipeline(config={**SHORT, "kept_reference": 1, "reference_cells": 1, "neighbours": 1, "ridges": ()})
    lonely.fit(query, reference)
    with pytest.raises(DataError, match="no gene varies over the kept reference"):
        lonely.suggest_panel(3)
    with pytest.raises(DataError, match="5 cells"):
        greedy_panel(np.column_stack([np.arange(5.0), np.ones((5, 4))]), 1, 2)


def test_patches_hold_every_cell_once_and_lie_together():
    rng = np.random.default_rng(0)
    config = SimulateConfig(n_cells=300, n_genes=60, spatial=True)
    pair = read_pair(*tissue_and_reference(config), ImputationConfig(**SHORT), None)
    table = pair.problem.cells.query
    found = patches(table, 40)
    assert sorted(np.concatenate(found).tolist()) == list(range(table.n_cells))
    assert max(map(len, found)) <= 40
    spread = np.mean([table.coordinates[rows].std(0).mean() for rows in found])
    random = np.mean([table.coordinates[rng.permutation(table.n_cells)[:40]].std(0).mean() for _ in found])
    assert spread < 0.5 * random


def tissue_and_reference(config: SimulateConfig) -> tuple[AnnData, AnnData]:
    cells = simulate(config)
    return cells[::2, :40].copy(), cells[1::2].copy()


def test_a_step_shows_no_hidden_gene_of_either_platform():
    config = ImputationConfig(**SHORT)
    problem = read_pair(*tissue_and_reference(SimulateConfig(n_cells=200, n_genes=60, spatial=True)), config, None).problem
    masks = problem.masks("joint")
    objective = ImputationObjective(problem.cells, patches(problem.cells.query, 64), masks, config)
    batch, mask = objective.prepare(MicroBatch((0, 1), (7, 8), 9))
    visible = ~mask.hidden_CG & batch.panels[batch.panel_index]
    assert not visible[:, problem.wanted].any()
    assert not batch.panels[0, problem.wanted].any()
    assert batch.panels[1, problem.wanted].all()
    assert visible[batch.platform_index == 0][:, problem.observed].float().mean() > 0.6
    assert batch.coordinates[batch.platform_index == 1].isnan().all()
    again, _ = objective.prepare(MicroBatch((0, 1), (7, 8), 9))
    assert torch.equal(batch.row, again.row)
    other, _ = objective.prepare(MicroBatch((0, 1), (17, 18), 9))
    assert not torch.equal(batch.row, other.row)


def test_predicting_reads_a_batch_without_the_hidden_counts():
    config = ImputationConfig(**SHORT)
    problem = read_pair(*tissue_and_reference(SimulateConfig(n_cells=200, n_genes=60, spatial=True)), config, None).problem
    batch = shown(problem.cells.batch([(np.arange(10), np.arange(10))]), problem.masks("joint"))
    assert not np.isin(batch.gene.numpy(), np.flatnonzero(problem.wanted)).any()
    rates = impute(new_network(problem, config), problem, config).query
    np.testing.assert_allclose(rates[:, problem.observed].sum(1), 1, rtol=1e-5)


def test_steps_are_chosen_by_the_mean_over_folds():
    assert best_step([{10: 0.1, 20: 0.5}, {10: 0.4, 20: 0.3, 30: 0.2}]) == 20
    assert best_step([{10: 0.1, 20: 0.2, 30: 0.3}, {10: 0.2}]) == 30


def test_the_last_fit_is_kept_at_the_step_that_was_chosen():
    config = ImputationConfig(**{**SHORT, "optimizer": {"steps": 50}, "validate_every": 20})
    for wanted, best in ((20, 0), (40, 1), (50, 2)):
        look = Until(wanted, config, Course())
        assert int(np.argmax([look().score[0] for _ in range(3)])) == best


def test_neighbours_are_brought_to_the_models_level_and_spread():
    rng = np.random.default_rng(0)
    near, model = rng.normal(2, 3, (50, 2)), rng.normal(5, 1, (50, 2))
    found = Scaling.between(near, model)(near)
    np.testing.assert_allclose(found.mean(0), model.mean(0))
    np.testing.assert_allclose(found.std(0), model.std(0))
    assert np.array_equal(mixed(model, near, 0.0), np.maximum(model, 0))


def test_bad_inputs_get_clear_errors(query, reference, tissue):
    pipeline = SpatialImputationPipeline(config=SHORT)
    with pytest.raises(NotFittedError, match="call fit"):
        pipeline.predict(query)
    with pytest.raises(DataError, match=r"fit\(data, reference\)"):
        pipeline.fit(query)
    with pytest.raises(VocabularyError, match=r"3 of 3 genes|share 3 observed"):
        pipeline.fit(query[:, :3].copy(), reference)
    with pytest.raises(DataError, match="measured every gene of the reference"):
        pipeline.fit(tissue, reference)
    with pytest.raises(DataError, match="1 of 1 genes to impute were not measured"):
        SpatialImputationPipeline(config={**SHORT, "genes": ("NOSUCH",)}).fit(query, reference)
    nowhere = query.copy()
    del nowhere.obsm["spatial"]
    with pytest.raises(ColumnError, match="spatial"):
        pipeline.fit(nowhere, reference)


def test_cells_without_positions_are_imputed_when_no_positions_are_asked_for(query, reference):
    nowhere = query.copy()
    del nowhere.obsm["spatial"]
    pipeline = SpatialImputationPipeline(config={**SHORT, "keys": {"spatial_key": None}}).fit(nowhere, reference)
    assert pipeline.predict(nowhere).n_obs == query.n_obs


def test_a_query_with_too_few_of_the_fitted_genes_is_refused(fitted, query):
    with pytest.raises(VocabularyError):
        fitted.predict(query[:, :5].copy())


def test_a_folder_without_what_an_imputation_keeps_is_refused(fitted):
    for attachments in ({}, {**fitted.folder_.attachments, KNOWN: b"{}"}):
        with pytest.raises(FileFormatError, match="fit and save it again"):
            fitted_from(replace(fitted.folder_, attachments=attachments))


def test_evaluating_hides_every_shared_gene_once(tissue, reference):
    found = evaluate_imputation(tissue, reference, SHORT, gene_folds=2)
    for name in ("model", "knn", "ridge"):
        assert len(found[name]["per_gene"]) == tissue.n_vars
        assert len(found[name]["by_fold"]) == 2
    assert set(found["trust"]) == {"correlation", "mean_error", "refused", "pearson_of_accepted"}
    with pytest.raises(DataError, match="too few to hide"):
        evaluate_imputation(tissue, reference, SHORT, gene_folds=50)


def test_decoding_needs_a_decoder():
    with pytest.raises(ConfigError, match="decoder"):
        decoded(new_model(ANNOTATOR, 0), random_batch([3]))
