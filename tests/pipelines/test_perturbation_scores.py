"""A perfect prediction scores 1, the mean of the others cannot tell perturbations apart, and noise has its ceiling."""

from __future__ import annotations

import numpy as np
import pytest

from cellplane.pipelines.perturbation_scores import Case, correlation, discrimination, measures, summary

GENES = 60


def cases(n: int = 6, noise: float = 0.0) -> list[Case]:
    """Perturbations that each change genes of their own, all sharing a common part; answers: the truth, and the common part."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=GENES)
    found = []
    for index in range(n):
        truth = common + rng.normal(size=GENES)
        answers = {"perfect": truth, "common": common, "nothing": np.zeros(GENES)}
        de = np.argsort(-np.abs(truth))[:20]
        found.append(Case(f"P{index}", truth + noise * rng.normal(size=GENES), answers, de, (int(de[0]),), 0.9))
    return found


def test_a_perfect_prediction_is_perfect_in_every_way():
    case = cases()[0]
    found = measures(case, case.truth)
    assert {name: value for name, value in found.items() if name != "mse"} == pytest.approx(
        {"pearson": 1, "pearson_top20": 1, "pearson_top20_without_target": 1, "direction": 1}
    )
    assert found["mse"] == 0
    assert measures(case, -case.truth)["direction"] == 0


def test_the_mean_of_the_others_correlates_but_tells_nothing_apart():
    found = summary(cases())
    assert found["common"]["pearson"] > 0.5
    assert found["common"]["discrimination"] == pytest.approx(0.5)
    assert found["perfect"]["discrimination"] == 1
    assert found["nothing"]["pearson"] == 0


def test_without_the_target_its_own_change_does_not_count():
    case = cases()[0]
    only = np.zeros(GENES)
    only[case.targets[0]] = case.truth[case.targets[0]]
    found = measures(case, only)
    assert found["pearson_top20"] > 0
    assert found["pearson_top20_without_target"] == 0


def test_unreliable_perturbations_are_listed_apart():
    some = cases()
    some[0] = Case(some[0].name, some[0].truth, some[0].answers, some[0].de, some[0].targets, 0.1)
    found = summary(some)
    assert found["unreliable"] == {"P0": 0.1}
    assert "P0" not in found["perturbations"]
    assert found["ceiling"] == pytest.approx(np.sqrt(1.8 / 1.9))
    assert found["perfect"]["of_ceiling"] == pytest.approx(1 / found["ceiling"])


def test_the_interval_holds_the_mean_and_narrows_with_certainty():
    found = summary(cases(noise=1.0))["perfect"]
    low, high = found["interval"]
    assert low <= found["pearson"] <= high
    assert high - low > 0
    assert summary(cases())["perfect"]["interval"] == pytest.approx([1, 1])


def test_one_perturbation_cannot_be_told_from_others():
    assert np.isnan(discrimination(cases(1), "perfect"))
    assert correlation(np.zeros(3), np.arange(3.0)) == 0
