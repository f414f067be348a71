"""Populations of perturbed cells are predicted from controls; unknown perturbations are an error or a flagged fallback."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cellplane.data.config import KnockoutConfig, SimulateConfig
from cellplane.data.sentences import MicroBatch
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData
from cellplane.errors import ColumnError, DataError, FileFormatError, VocabularyError
from cellplane.model.perturbation import KINDS, PairedBatch
from cellplane.pipelines.base import NotFittedError
from cellplane.pipelines.perturbation import KNOWN, PerturbationPipeline, fitted_from
from cellplane.pipelines.perturbation_cells import PairObjective, Perturbation, pairs_of, read_screen, understood
from cellplane.pipelines.perturbation_config import PerturbationConfig
from cellplane.pipelines.perturbation_evaluation import INPUT, TRAIN, TRUTH, Split, evaluate_perturbation
from cellplane.pipelines.perturbation_fit import Fold, Measured, efficiencies, hidden_pairs, new_network, predicted, surest_step

RECIPE = {
    "model": {"width": 32, "n_heads": 2, "latent_width": 16, "decoder_width": 32, "decoder_bottleneck": 16, "dropout": 0.0},
    "optimizer": {"steps": 40, "lr": 5e-3, "warmup_steps": 5},
    "keys": {"batch_key": "batch"},
    "control_cells": 32,
    "perturbed_cells": 32,
    "folds": 0,
    "device": "cpu",
}
SHORT = {**RECIPE, "optimizer": {"steps": 4}}


@pytest.fixture(scope="module")
def screen() -> AnnData:
    """700 cells of two batches: controls, five knock-outs and one pair of them."""
    torch.set_num_threads(1)
    knockouts = KnockoutConfig(n_genes=5, n_pairs=1, effect_sigma=1.0)
    return simulate(SimulateConfig(n_cells=700, n_genes=60, n_types=1, n_batches=2, knockouts=knockouts, mean_counts=400, dropout_rate=0.0))


@pytest.fixture(scope="module")
def controls(screen: AnnData) -> AnnData:
    """The control cells alone, without the column that says so."""
    cells = screen[(screen.obs["perturbation"] == "control").to_numpy()].copy()
    del cells.obs["perturbation"]
    return cells


@pytest.fixture(scope="module")
def single(screen: AnnData) -> list[str]:
    """Names of the knock-outs of one gene."""
    return sorted(name for name in set(map(str, screen.obs["perturbation"])) if name != "control" and "+" not in name)


@pytest.fixture(scope="module")
def fitted(screen: AnnData) -> PerturbationPipeline:
    """A pipeline that learned; treat as read-only."""
    return PerturbationPipeline(config=RECIPE).fit(screen)


def relabelled(screen: AnnData, names: dict[str, str]) -> AnnData:
    data = screen.copy()
    data.obs["perturbation"] = [names.get(str(name), str(name)) for name in data.obs["perturbation"]]
    return data


def test_a_population_for_every_perturbation(fitted, controls):
    found = fitted.predict(controls)
    assert list(found.obs["perturbation"]) == list(fitted.perturbations_)
    assert list(found.var_names) == list(controls.var_names)
    np.testing.assert_allclose(found.layers["rates"].sum(1), 10_000, rtol=1e-4)
    before = found.X - found.layers["delta"]
    np.testing.assert_allclose(before, np.broadcast_to(before[0], before.shape), atol=1e-5)
    assert found.obs["seen"].all()
    assert not found.obs["fallback"].any()
    assert (found.obs["control_cells"] == controls.n_obs).all()


def test_a_knock_out_lowers_its_gene_most_of_all(fitted, controls, single):
    found = fitted.predict(controls, single)
    for row, name in enumerate(single):
        assert found.layers["delta"][row, list(found.var_names).index(name)] < -0.5


def test_learning_finds_more_than_the_targets(fitted, screen):
    found = fitted.score(screen)
    assert found["model"]["pearson"] > found["target_only"]["pearson"] + 0.05
    assert found["model"]["pearson"] > found["no_change"]["pearson"] == 0.0
    assert found["model"]["discrimination"] > 0.9


def test_a_combination_never_seen_can_be_asked_in_any_order(fitted, controls, single):
    one, other = (fitted.predict(controls, [name]) for name in (f"{single[0]}+{single[3]}", f"{single[3]}+{single[0]}"))
    np.testing.assert_allclose(one.layers["delta"], other.layers["delta"], atol=1e-5)
    assert not one.obs["seen"].any()
    genes = [list(one.var_names).index(name) for name in (single[0], single[3])]
    assert (one.layers["delta"][0, genes] < -0.5).all()


def test_an_unseen_gene_changes_nothing_but_itself_before_anything_is_learned(screen, controls):
    data = read_screen(screen, PerturbationConfig(**SHORT), None)[0]
    network = new_network(data, pairs_of(data, 5), PerturbationConfig(**SHORT), None)
    meaning = understood(str(screen.var_names[7]), PerturbationConfig(**SHORT), data.genes, ())
    change = predicted(network, data, np.flatnonzero(data.name == ""), meaning).change
    assert change[7] < -0.5
    assert np.abs(np.delete(change, 7)).max() < 0.05 * abs(change[7])


def test_groups_are_predicted_apart_and_averaged_by_their_cells(fitted, controls, single):
    apart, together = fitted.predict(controls, single[:2], by_group=True), fitted.predict(controls, single[:2])
    assert len(apart) == 4
    assert set(apart.obs["group"]) == set(controls.obs["batch"])
    mine = apart[(apart.obs["perturbation"] == single[0]).to_numpy()]
    weights = mine.obs["control_cells"].to_numpy()
    np.testing.assert_allclose(together.X[0], np.average(mine.X, axis=0, weights=weights), atol=1e-5)


def test_perturbed_cells_beside_the_controls_do_not_enter_a_prediction(fitted, screen, controls):
    assert np.array_equal(fitted.predict(screen).X, fitted.predict(controls).X)


def test_an_unknown_gene_is_an_error_or_a_flagged_fallback(fitted, controls, single):
    with pytest.raises(VocabularyError, match="mean_of_training"):
        fitted.predict(controls, ["HS2"])
    found = fitted.predict(controls, ["HS2", single[0]], {"fallback": "mean_of_training"})
    assert found.obs["fallback"].tolist() == [True, False]
    np.testing.assert_allclose(found.layers["delta"][0], fitted._known.measured.mean, atol=1e-5)


def test_a_saved_pipeline_answers_alike(fitted, controls, tmp_path):
    loaded = PerturbationPipeline.load(fitted.save(tmp_path / "model"))
    assert np.array_equal(loaded.predict(controls).X, fitted.predict(controls).X)
    assert loaded.perturbations_ == fitted.perturbations_


def test_a_loaded_pipeline_answers_as_it_was_fitted(screen, controls, tmp_path):
    raised = PerturbationPipeline(config={**SHORT, "kind": "crispra"}).fit(screen)
    loaded = PerturbationPipeline.load(raised.save(tmp_path / "model"))
    found = loaded.predict(controls)
    assert set(found.obs["kind"]) == {"crispra"}
    np.testing.assert_array_equal(found.X, raised.predict(controls).X)


def test_the_same_seed_learns_the_same(screen):
    one, other = (PerturbationPipeline(config=SHORT).fit(screen).folder_.weights for _ in range(2))
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


@pytest.fixture(scope="module")
def named(screen: AnnData, cells: AnnData) -> AnnData:
    """The screen with genes named as the base model's, every second of which is a target's or not measured."""
    out = relabelled(screen, {})
    genes = dict(zip(screen.var_names, cells.var_names, strict=False))
    out.var_names = list(genes.values())
    out.obs["perturbation"] = ["+".join(genes.get(part, part) for part in str(name).split("+")) for name in screen.obs["perturbation"]]
    targets = {part for name in out.obs["perturbation"] for part in name.split("+")}
    return out[:, [at % 2 == 0 or gene in targets for at, gene in enumerate(out.var_names)]].copy()


FROZEN = {**SHORT, "new_genes": "leave_out", "transfer": {"frozen": ("embedder",)}}


def test_a_base_model_brings_its_embedder_and_encoder_over_the_measured_genes(named, base_model):
    pipeline = PerturbationPipeline(base_model, FROZEN).fit(named)
    measured = [gene for gene in base_model.vocabulary.gene_ids if gene in set(named.var_names)]
    assert list(pipeline.folder_.vocabulary.gene_ids) == measured
    assert len(measured) < len(base_model.vocabulary)
    rows = torch.from_numpy(base_model.vocabulary.index(measured))
    assert torch.equal(pipeline.folder_.weights["embedder.genes_GD"], base_model.weights["embedder.genes_GD"][rows])


def test_a_base_models_other_genes_can_be_kept_and_asked_about(named, base_model):
    other = next(gene for gene in base_model.vocabulary.gene_ids if gene not in set(named.var_names))
    with pytest.raises(VocabularyError, match="max_genes"):
        PerturbationPipeline(base_model, FROZEN).fit(named).predict(named, [other])
    pipeline = PerturbationPipeline(base_model, {**FROZEN, "max_genes": None}).fit(named)
    assert pipeline.folder_.vocabulary == base_model.vocabulary
    assert torch.equal(pipeline.folder_.weights["embedder.genes_GD"], base_model.weights["embedder.genes_GD"])
    found = pipeline.predict(named, [other])
    assert not found.obs["seen"].any()
    assert not found.var["measured"].all()


def test_what_a_base_model_leaves_out_of_the_measured_genes_is_the_least_variable(named, base_model):
    config = PerturbationConfig(**{**FROZEN, "max_genes": 12})
    read, _, _ = read_screen(named, config, base_model)
    assert len(read.genes.labels) == 12
    assert read.table.panel.all()
    assert {gene for one in read.meaning.values() for gene in one.genes} <= set(range(12))


def test_a_stimulus_without_a_gene_is_learned_by_itself(screen, controls, single):
    config = {**SHORT, "kinds": {"IFN": "stimulation"}}
    pipeline = PerturbationPipeline(config=config).fit(relabelled(screen, {single[0]: "IFN"}))
    found = pipeline.predict(controls, ["IFN"])
    assert found.uns["cellplm"]["stimuli_without_gene"] == ["IFN"]
    assert found.obs["kind"].tolist() == ["stimulation"]
    assert pipeline.folder_.config.n_stimuli == 1


def test_a_ligands_gene_stands_for_its_stimulus(screen, single):
    config = PerturbationConfig(**{**SHORT, "kinds": {"IFN": "stimulation"}, "targets": {"IFN": (single[1],)}})
    data = read_screen(relabelled(screen, {single[0]: "IFN"}), config, None)[0]
    assert data.stimuli == ()
    assert data.meaning["IFN"].genes == data.meaning[single[1]].genes
    assert data.meaning["IFN"].kind == KINDS.index("stimulation")


def test_bad_inputs_get_clear_errors(screen, controls, single):
    pipeline = PerturbationPipeline(config=SHORT)
    with pytest.raises(NotFittedError, match="call fit"):
        pipeline.predict(controls)
    with pytest.raises(ColumnError, match="perturbation"):
        pipeline.fit(controls)
    with pytest.raises(DataError, match="no cell of obs"):
        pipeline.fit(relabelled(screen, {"control": "untreated"}))
    with pytest.raises(DataError, match="1 perturbations are no genes the model knows"):
        pipeline.fit(relabelled(screen, {single[0]: "HS2"}))
    confounded = screen.copy()
    confounded.obs["batch"] = np.where(confounded.obs["perturbation"] == "control", "a", "b")
    with pytest.raises(DataError, match=r"batch and perturbation coincide.*a: \d+ control, 0 perturbed"):
        pipeline.fit(confounded)
    lonely = screen.copy()
    lonely.obs["batch"] = [f"b{row}" for row in range(screen.n_obs)]
    with pytest.raises(DataError, match="no group has 5 control and 5 perturbed cells"):
        pipeline.fit(lonely)
    names = screen.obs["perturbation"].to_numpy()
    few = screen[np.concatenate([np.flatnonzero(names == name)[:3] for name in ("control", single[0])])].copy()
    few.obs["batch"] = "one"
    with pytest.raises(DataError, match="the groups are too small"):
        pipeline.fit(few)


def test_unknown_perturbations_may_be_left_out(screen, single):
    data = relabelled(screen, {single[0]: "HS2"})
    for changes in ({"unknown": "leave_out"}, {"ignore": ("HS2",)}):
        read = read_screen(data, PerturbationConfig(**{**SHORT, **changes}), None)[0]
        assert "HS2" not in read.meaning
        assert read.table.n_cells == (data.obs["perturbation"] != "HS2").sum()


def test_a_prediction_needs_control_cells(fitted, screen, single):
    with pytest.raises(DataError, match="no cell of obs"):
        fitted.predict(screen[(screen.obs["perturbation"] == single[0]).to_numpy()].copy())


def test_more_genes_than_cells_can_name_are_refused(fitted, controls, single):
    with pytest.raises(DataError, match="perturbs 3 genes"):
        fitted.predict(controls, ["+".join(single[:3])])


def test_from_scratch_only_the_most_variable_genes_and_the_targets_are_read(screen, single):
    data = read_screen(screen, PerturbationConfig(**{**SHORT, "max_genes": 20}), None)[0]
    assert len(data.genes.labels) == 20
    assert set(single) <= set(data.genes.labels)


def test_a_folder_without_what_a_perturbation_keeps_is_refused(fitted):
    for attachments in ({}, {KNOWN: b"{}"}):
        with pytest.raises(FileFormatError, match="fit and save it again"):
            fitted_from(replace(fitted.folder_, attachments=attachments))


def test_a_step_pairs_controls_with_perturbed_cells_of_their_own_group(screen):
    config = PerturbationConfig(**SHORT)
    data = read_screen(screen, config, None)[0]
    pairs = pairs_of(data, 5)
    batch, mask = PairObjective(data, pairs, config).prepare(MicroBatch((0, 3), (5, 6), 7))
    assert isinstance(batch, PairedBatch)
    assert mask is None
    for (start, end), (first, last), pair in zip(batch.spans(), batch.answers.spans(), (pairs[0], pairs[3]), strict=True):
        assert set(batch.row[start:end].tolist()) <= set(pair.control.tolist())
        assert set(batch.answers.row[first:last].tolist()) <= set(pair.perturbed.tolist())
        assert batch.perturbation[start:end, 0].unique().tolist() == [pair.perturbation.genes[0]]
    torch.testing.assert_close(batch.control_SG.sum(1), torch.ones(2))


def test_every_perturbation_weighs_the_same(screen):
    config = PerturbationConfig(**SHORT)
    data = read_screen(screen, config, None)[0]
    pairs = pairs_of(data, 5)[1:]  # the first perturbation in one batch only
    weights = PairObjective(data, pairs, config).weights()
    names = np.array([pair.perturbation.name for pair in pairs])
    assert {round(weights[names == name].sum(), 9) for name in set(names)} == {1.0}


def test_efficiency_is_learned_from_the_training_perturbations(screen):
    data = read_screen(screen, PerturbationConfig(**SHORT), None)[0]
    found = efficiencies(data, pairs_of(data, 5))
    assert found[0] == pytest.approx(np.log(0.1), abs=0.5)  # the simulated knock-outs lose 90 % of their gene
    assert found[1:] == efficiencies(data, [])[1:]


def test_folds_hide_perturbations_or_with_few_of_them_cell_types(screen):
    config = PerturbationConfig(**{**SHORT, "folds": 3})
    data = read_screen(screen, config, None)[0]
    pairs = pairs_of(data, 5)
    folds = hidden_pairs(pairs, config)
    assert sorted(index for fold in folds for index in fold) == list(range(len(pairs)))
    hidden = [{pairs[index].perturbation.name for index in fold} for fold in folds]
    assert sum(map(len, hidden)) == len(set().union(*hidden))
    one = [pair for pair in pairs if pair.perturbation.name == pairs[0].perturbation.name]
    assert hidden_pairs(one, config) == [[0], [1]] or hidden_pairs(one, config) == [[1], [0]]
    assert hidden_pairs(one[:1], config) == []


def fold(curve: dict[int, list[float]]) -> Fold:
    nothing = np.zeros((0, 2))
    names = [f"gene{index}" for index in range(len(curve[0]))]
    return Fold(names, {step: np.array(scores) for step, scores in curve.items()}, nothing, nothing, nothing)


def test_steps_are_taken_only_for_a_gain_that_is_no_accident():
    assert surest_step([fold({0: [0.1, 0.2, 0.3, 0.1], 10: [0.4, 0.5, 0.7, 0.4], 20: [0.3, 0.4, 0.5, 0.3]})]) == 10
    assert surest_step([fold({0: [0.5, 0.5, 0.5, 0.5], 10: [0.9, 0.3, 0.6, 0.4]})]) == 0
    assert surest_step([fold({0: [0.5, 0.5, 0.5, 0.5], 10: [0.1, 0.1, 0.1, 0.1]})]) == 0


def test_what_was_measured_elsewhere_enters_by_its_share_and_only_where_it_was():
    one, other = Perturbation("A", (0,), 0), Perturbation("B", (1,), 0)
    measured = Measured({one.key: np.array([1.0, 3.0]), other.key: np.array([3.0, 5.0])}, 0.25, [0.0] * len(KINDS))
    assert measured.blended(np.zeros(2), one).tolist() == [0.25, 0.75]
    assert measured.blended(np.zeros(2), replace(one, name="A alone")).tolist() == [0.25, 0.75]
    assert measured.blended(np.ones(2), Perturbation("C", (2,), 0)).tolist() == [1.0, 1.0]
    assert measured.blended(np.ones(2), replace(one, kind=1)).tolist() == [1.0, 1.0]
    assert measured.mean.tolist() == [2.0, 4.0]


def test_the_controls_are_split_in_three_in_every_group(screen):
    data = read_screen(screen, PerturbationConfig(**SHORT), None)[0]
    split = Split.of(data, 0)
    for group in set(data.group):
        sizes = [len(split.rows(group, part)) for part in (TRAIN, INPUT, TRUTH)]
        assert sum(sizes) == len(data.rows(group))
        assert max(sizes) - min(sizes) <= 1


def test_what_is_left_out_is_not_trained_on_nor_are_combinations_with_it(screen):
    data = read_screen(screen, PerturbationConfig(**SHORT), None)[0]
    split = Split.of(data, 0)
    pair = next(name for name in data.meaning if "+" in name)
    gene = pair.split("+")[0]
    training = data.only(split.learning(gene, "perturbation"))
    assert not {gene, pair} & set(training.name)
    assert (training.name == "").sum() == (split.part == TRAIN).sum()


def test_evaluating_leaves_out_every_perturbation_in_turn(screen, single):
    found = evaluate_perturbation(screen, {**SHORT, "folds": 0}, seeds=(0, 1))
    assert set(found["seeds"][0]["reliability"]) == set(map(str, set(screen.obs["perturbation"]) - {"control"}))
    assert set(found["pearson"]) == {"model", "network_alone", "target_only", "mean_of_others", "no_change"}
    assert found["pearson"]["target_only"]["mean"] > found["pearson"]["no_change"]["mean"] == 0


def test_evaluating_cell_types_needs_two_of_them(screen):
    with pytest.raises(DataError, match="leaving out a cell type needs two"):
        evaluate_perturbation(screen, {**SHORT, "keys": {"labels_key": "cell_type"}}, leave_out="cell_type")
