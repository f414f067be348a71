"""What a perturbation is scored on reaches no prediction: neither through the network, nor through a scale, nor a choice of genes."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from cellplane.data.config import KnockoutConfig, SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData
from cellplane.errors import DataError
from cellplane.pipelines import perturbation_fit
from cellplane.pipelines.perturbation_cells import pairs_of, read_cells, read_screen
from cellplane.pipelines.perturbation_config import PerturbationConfig
from cellplane.pipelines.perturbation_evaluation import TRAIN, TRUTH, Split, cases_of
from cellplane.pipelines.perturbation_fit import Fold, hidden_pairs
from cellplane.pipelines.perturbation_scores import Case
from tests.pipelines.test_perturbation import SHORT

FEW = 20  # of 40 genes
RECIPE = {**SHORT, "min_cells": 4}


@pytest.fixture(scope="module")
def screen() -> AnnData:
    """400 cells of two batches: controls, three knock-outs and one pair of them."""
    knockouts = KnockoutConfig(n_genes=3, n_pairs=1, effect_sigma=1.0)
    return simulate(SimulateConfig(n_cells=400, n_genes=40, n_types=1, n_batches=2, knockouts=knockouts, mean_counts=400, dropout_rate=0.0))


@pytest.fixture(scope="module")
def stimulated() -> AnnData:
    """400 cells of three cell types, half of them with one gene knocked out."""
    knockouts = KnockoutConfig(n_genes=1, n_pairs=0, effect_sigma=1.0)
    return simulate(SimulateConfig(n_cells=400, n_genes=40, n_types=3, n_batches=1, knockouts=knockouts, mean_counts=400, dropout_rate=0.0))


def replaced_by_noise(data: AnnData, split: Split, unit: str, leave_out: str) -> AnnData:
    """Far higher counts of other genes in all that is scored, and none at all in some of the truth's controls."""
    rng = np.random.default_rng(5)
    truth = np.flatnonzero(split.part == TRUTH)
    rows = np.concatenate([truth, np.flatnonzero(split.held(unit, leave_out))])
    counts = data.X.toarray()
    counts[rows] = rng.poisson(rng.gamma(0.3, 100, data.n_vars), (len(rows), data.n_vars)) + np.arange(data.n_vars) % 7 * 50
    counts[truth[::10]] = 0
    out = data.copy()
    out.X = sp.csr_matrix(counts.astype(np.float32))
    return out


def case(data: AnnData, config: PerturbationConfig, leave_out: str, name: str) -> Case:
    return next(one for one in cases_of(data, config, leave_out) if one.name == name)


def assert_the_same_answers(one: Case, other: Case) -> None:
    assert one.genes == other.genes
    assert one.answers.keys() == other.answers.keys()
    for method, found in one.answers.items():
        assert np.array_equal(found, other.answers[method]), method
    assert not np.array_equal(one.truth, other.truth)


@pytest.mark.parametrize("genes", [5000, FEW])
@pytest.mark.parametrize("combination", [False, True])
def test_noise_in_what_is_scored_leaves_every_answer_as_it_was(screen, genes, combination):
    config = PerturbationConfig(**{**RECIPE, "max_genes": genes, "folds": 0 if combination else 2, "validate_every": 2})
    split = Split.of(read_cells(screen, config, None)[0], config.seed)
    unit = next(name for name in sorted(split.screen.meaning) if ("+" in name) == combination)
    noisy = replaced_by_noise(screen, split, unit, "perturbation")
    before = case(screen, config, "perturbation", unit)
    assert len(before.genes) == min(genes, 40)
    assert_the_same_answers(before, case(noisy, config, "perturbation", unit))


@pytest.mark.parametrize("genes", [5000, FEW])
def test_nor_do_the_cells_of_a_cell_type_that_is_left_out_reach_an_answer(stimulated, genes):
    config = PerturbationConfig(**{**RECIPE, "keys": {"labels_key": "cell_type"}, "max_genes": genes, "folds": 2, "validate_every": 4})
    split = Split.of(read_cells(stimulated, config, None)[0], config.seed)
    unit = sorted(set(split.screen.cell_type.values()))[0]
    name = f"{next(iter(split.screen.meaning))} in {unit}"
    noisy = replaced_by_noise(stimulated, split, unit, "cell_type")
    assert_the_same_answers(case(stimulated, config, "cell_type", name), case(noisy, config, "cell_type", name))


def test_controls_without_counts_do_not_change_who_is_dealt_where(screen):
    config = PerturbationConfig(**RECIPE)
    part = Split.of(read_cells(screen, config, None)[0], config.seed).part
    emptied = np.flatnonzero(part == TRUTH)[:3]
    counts = screen.X.toarray()
    counts[emptied] = 0
    data = screen.copy()
    data.X = sp.csr_matrix(counts)
    np.testing.assert_array_equal(Split.of(read_cells(data, config, None)[0], config.seed).part, np.delete(part, emptied))


def test_scale_and_genes_are_told_by_the_cells_that_are_learned_from_alone(screen):
    config = PerturbationConfig(**{**RECIPE, "max_genes": FEW})
    split = Split.of(read_cells(screen, config, None)[0], config.seed)
    unit = sorted(split.screen.meaning)[0]
    learning = split.learning(unit, "perturbation")
    seen = split.screen.told_by(learning, FEW)
    alone = read_screen(screen[learning].copy(), config.model_copy(update={"unknown": "leave_out"}), None)[0]
    targets = {gene for one in split.screen.meaning.values() for gene in one.genes}
    assert seen.table.n_cells == screen.n_obs
    assert len(seen.genes.labels) == FEW
    assert {split.screen.genes.labels[gene] for gene in targets} <= set(seen.genes.labels)
    assert len(set(seen.genes.labels) & set(alone.genes.labels)) >= FEW - 1  # the target left out takes the place of one gene
    assert seen.total == np.median(seen.table.totals()[split.part == TRAIN])
    assert {name: seen.genes.labels[one.genes[0]] for name, one in seen.meaning.items()} == {
        name: split.screen.genes.labels[one.genes[0]] for name, one in split.screen.meaning.items()
    }


def test_a_scale_that_nobody_told_is_no_number(screen):
    assert np.isnan(read_cells(screen, PerturbationConfig(**RECIPE), None)[0].total)


def test_leaving_out_what_everything_holds_leaves_nothing_to_learn_from(screen):
    pair = next(name for name in map(str, screen.obs["perturbation"]) if "+" in name)
    kept = screen[screen.obs["perturbation"].isin(["control", pair, pair.split("+")[0]]).to_numpy()].copy()
    with pytest.raises(DataError, match="leaves nothing to learn from"):
        list(cases_of(kept, PerturbationConfig(**RECIPE), "perturbation"))


@pytest.mark.parametrize("keys", [{"batch_key": "batch"}, {}])
def test_the_controls_that_tell_a_hidden_pairs_truth_are_not_trained_on(screen, monkeypatch, keys):
    config = PerturbationConfig(**{**RECIPE, "keys": keys, "folds": 2})
    data = read_screen(screen, config, None)[0]
    pairs = pairs_of(data, config.min_cells)
    seen = []
    fit = perturbation_fit._fit

    def watched(network, data, kept, config, look, course):
        seen.append((kept, look))
        return fit(network, data, kept, config, look, course)

    monkeypatch.setattr(perturbation_fit, "_fit", watched)
    for hidden in hidden_pairs(pairs, config):
        Fold.of(data, pairs, hidden, config, None)
    assert seen
    for kept, look in seen:
        trained = set(np.concatenate([pair.control for pair in kept]))
        told = set(np.concatenate([half[1] for half in look.halves]))
        assert trained
        assert told
        assert not trained & told
