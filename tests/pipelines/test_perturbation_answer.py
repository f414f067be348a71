"""An answer's rates, change and profile are those of one population, whatever its perturbation is called."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cellplane.artifact.golden import Golden
from cellplane.data.config import KnockoutConfig, SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData
from cellplane.inference import Predictor
from cellplane.pipelines.golden import check_golden, with_golden
from cellplane.pipelines.perturbation import KNOWN, PerturbationPipeline
from cellplane.pipelines.perturbation_answer import moved
from cellplane.pipelines.perturbation_cells import kind_of, said_of
from cellplane.pipelines.perturbation_config import PerturbationConfig
from cellplane.pipelines.perturbation_fit import EFFICIENCY
from tests.pipelines.test_perturbation import SHORT

HALF, ALL = 0.5, 1.0
UNKNOWN = {"fallback": "mean_of_training"}


@pytest.fixture(scope="module")
def screen() -> AnnData:
    """400 cells of two batches: controls, three knock-outs and one pair of them."""
    torch.set_num_threads(1)
    knockouts = KnockoutConfig(n_genes=3, n_pairs=1, effect_sigma=1.0)
    return simulate(SimulateConfig(n_cells=400, n_genes=40, n_types=1, n_batches=2, knockouts=knockouts, mean_counts=400, dropout_rate=0.0))


@pytest.fixture(scope="module")
def fitted(screen: AnnData) -> PerturbationPipeline:
    """A pipeline that learned for a moment; treat as read-only."""
    return PerturbationPipeline(config=SHORT).fit(screen)


@pytest.fixture(scope="module")
def pair(fitted: PerturbationPipeline) -> str:
    """The combination that was learned."""
    return next(name for name in fitted.perturbations_ if "+" in name)


def sharing(fitted: PerturbationPipeline, share: float) -> PerturbationPipeline:
    """The same, with this share of what was measured in its answers."""
    return kept_otherwise(fitted, {"share": share})


def kept_otherwise(fitted: PerturbationPipeline, changes: Mapping[str, Any]) -> PerturbationPipeline:
    """The same, with other words beside its network; None takes one away."""
    known = {**json.loads(fitted.folder_.attachments[KNOWN]), **changes}
    kept = json.dumps({key: value for key, value in known.items() if value is not None}).encode()
    other = PerturbationPipeline(config=SHORT)
    other.adopt(replace(fitted.folder_, attachments={**fitted.folder_.attachments, KNOWN: kept}))
    return other


def reversed_pair(pair: str) -> str:
    return "+".join(reversed(pair.split("+")))


@pytest.mark.parametrize("share", [0.0, HALF, ALL])
def test_the_order_of_a_combination_says_nothing(fitted, screen, pair, share):
    found = sharing(fitted, share).predict(screen, [pair, reversed_pair(pair)])
    for table in (found.X, found.layers["delta"], found.layers["rates"]):
        assert np.array_equal(table[0], table[1])
    assert found.obs["seen"].tolist() == [True, True]
    assert list(found.obs["perturbation"]) == [pair, reversed_pair(pair)]


def test_a_name_with_a_control_in_it_means_its_gene(fitted, screen, pair):
    gene = pair.split("+")[0]
    found = sharing(fitted, ALL).predict(screen, [gene, f"control+{gene}"])
    assert np.array_equal(found.X[0], found.X[1])
    assert found.obs["seen"].all()


def test_another_kind_was_not_seen_and_gets_nothing_that_was_measured(fitted, screen, pair):
    asked = {"kind": "crispra"}
    blended, alone = (sharing(fitted, share).predict(screen, [pair], asked) for share in (ALL, 0.0))
    assert not blended.obs["seen"].any()
    assert np.array_equal(blended.X, alone.X)


def test_what_is_said_of_a_combination_is_said_of_any_order():
    config = PerturbationConfig(kinds={"A+B": "crispra", "C": "stimulation"})
    assert [kind_of(name, config) for name in ("A+B", "B + A", "A", "C")] == ["crispra", "crispra", "knockout", "stimulation"]
    assert said_of("B+A", {"A+B": 1, "B+A": 2}, config) == 2
    assert said_of("A+C", {"A+B": 1}, config) is None


@pytest.mark.parametrize("share", [HALF, ALL])
def test_rates_are_of_the_population_that_the_change_tells(fitted, screen, pair, share):
    found = sharing(fitted, share).predict(screen, [pair, "NOGENE"], UNKNOWN, by_group=True)
    assert found.obs["fallback"].tolist() == [False, False, True, True]
    np.testing.assert_allclose(found.layers["rates"].sum(1), 10_000, rtol=1e-5)
    before = controls_rates(fitted, screen)
    for row, group in enumerate(found.obs["group"]):
        fold, delta = np.log(found.layers["rates"][row] / before[group]), found.layers["delta"][row]
        clear = np.abs(delta) > 0.2
        assert clear.sum() > 5
        assert (np.sign(fold) == np.sign(delta))[clear].all()
        assert np.corrcoef(fold, delta)[0, 1] > 0.8  # a log of a mean, a mean of logs


def controls_rates(fitted: PerturbationPipeline, screen: AnnData) -> dict[str, np.ndarray]:
    controls = fitted._controls(screen)[0]
    return {group: 10_000 * controls.profile(controls.rows(group)) for group in set(controls.group)}


def test_a_small_share_moves_the_rates_of_the_network_a_little(fitted, screen, pair):
    alone, hardly = (sharing(fitted, share).predict(screen, [pair]) for share in (0.0, 1e-6))
    np.testing.assert_allclose(alone.layers["rates"], hardly.layers["rates"], rtol=1e-3)
    assert not np.allclose(alone.layers["rates"], sharing(fitted, ALL).predict(screen, [pair]).layers["rates"], rtol=1e-2)


def test_of_genes_that_the_cells_did_not_measure_nothing_is_said(fitted, screen, pair):
    part = screen[:, 5:].copy()
    found = sharing(fitted, ALL).predict(part, [pair, "NOGENE"], UNKNOWN)
    unknown = ~found.var["measured"].to_numpy()
    assert unknown.sum() == 5
    for table in (found.X, found.layers["delta"], found.layers["rates"]):
        assert not table[:, unknown].any()
    np.testing.assert_allclose(found.layers["rates"].sum(1), 10_000, rtol=1e-5)


def test_genes_that_a_screen_did_not_measure_are_not_scored(fitted, screen, pair):
    changes = json.loads(fitted.folder_.attachments[KNOWN])["changes"]
    wild = {name: [100.0] * 5 + change[5:] for name, change in changes.items()}
    found = [kept_otherwise(fitted, {"share": HALF, "changes": mine}).score(screen[:, 5:].copy()) for mine in (changes, wild)]
    assert found[0]["model"] == found[1]["model"]
    assert found[0]["mean_of_others"] == found[1]["mean_of_others"]


def test_rates_move_as_the_mean_log_does():
    rates = np.array([0.5, 0.3, 0.2, 0.0])
    profile = np.log1p([50.0, 30.0, 20.0, 0.0])
    np.testing.assert_allclose(moved(rates, profile, profile, 0.1), rates)
    found = moved(rates, profile, np.log1p([100.0, 30.0, 20.0, 0.0]), 0.1)
    np.testing.assert_allclose(found, np.array([1.0, 0.3, 0.2, 0.0]) / 1.5)


def test_a_gene_never_seen_can_be_raised_and_nothing_falls_below_half_a_count():
    rates, start = np.array([0.999, 0.001]), np.array([5.0, 0.0])
    raised = moved(rates, start, np.array([5.0, 1.0]), 0.1)
    assert raised[1] / raised[0] == pytest.approx(rates[1] / rates[0] * np.expm1(1.0) / 0.1)
    silenced = moved(rates, start, np.array([-0.5, 0.0]), 0.1)
    assert silenced[0] / silenced[1] == pytest.approx(rates[0] / rates[1] * 0.1 / np.expm1(5.0))


def test_only_the_targets_change_by_what_targets_lost_in_training(fitted, screen):
    learned = fitted._known.measured.log_efficiency
    usual = kept_otherwise(fitted, {"efficiencies": None})
    assert learned[0] != EFFICIENCY["knockout"]
    assert list(usual._known.measured.log_efficiency) == list(EFFICIENCY.values())
    errors = [pipeline.score(screen)["target_only"]["mse"] for pipeline in (fitted, usual)]
    assert errors[0] != errors[1]
    lowered = kept_otherwise(fitted, {"efficiencies": {"knockout": 0.0}}).score(screen)
    assert lowered["target_only"]["mse"] == lowered["no_change"]["mse"]


def test_a_saved_model_scores_its_baselines_alike(fitted, screen, tmp_path):
    loaded = PerturbationPipeline.load(fitted.save(tmp_path / "model"))
    assert loaded.score(screen)["target_only"] == fitted.score(screen)["target_only"]


def test_an_early_folder_that_kept_both_orders_answers_both_with_their_mean(fitted, screen, pair):
    changes = json.loads(fitted.folder_.attachments[KNOWN])["changes"]
    other = [value + 1 for value in changes[pair]]
    names = sorted([*fitted.perturbations_, reversed_pair(pair)])
    early = kept_otherwise(fitted, {"efficiencies": None, "share": ALL, "names": names, "changes": {**changes, reversed_pair(pair): other}})
    found = early.predict(screen, [pair, reversed_pair(pair)])
    np.testing.assert_allclose(found.layers["delta"], np.tile(np.array(changes[pair]) + 0.5, (2, 1)), atol=1e-5)


def test_a_change_of_what_no_name_means_any_more_counts_in_the_mean_alone(fitted, screen, pair):
    changes = json.loads(fitted.folder_.attachments[KNOWN])["changes"]
    other = kept_otherwise(fitted, {"share": ALL, "changes": {"NOGENE": [1.0] * 40, "NOBODY": [2.0] * 40, pair: changes[pair]}})
    np.testing.assert_allclose(other._known.measured.mean, (np.array(changes[pair]) + 3) / 3)
    np.testing.assert_allclose(other.predict(screen, [pair]).layers["delta"][0], changes[pair], atol=1e-5)


def test_golden_rates_are_the_networks_own(fitted):
    saved = with_golden(fitted.folder_)
    known = {**json.loads(saved.attachments[KNOWN]), "share": HALF}
    blending = Predictor(replace(saved, attachments={**saved.attachments, KNOWN: json.dumps(known).encode()}))
    expected = Golden.of(saved.attachments).answers["rates"]
    again = Golden.of(with_golden(blending.folder).attachments).answers
    np.testing.assert_array_equal(again["rates"], expected)
    assert check_golden(Predictor(saved)) == 0
