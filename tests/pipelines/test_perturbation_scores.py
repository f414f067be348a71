"""A perfect prediction scores 1, the mean of the others cannot tell perturbations apart, and noise has its ceiling."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from cellplane.data.sentences import CellTable
from cellplane.genes import GeneVocabulary
from cellplane.pipelines.gene_names import GeneNames
from cellplane.pipelines.perturbation_cells import Pair, Perturbation, Screen
from cellplane.pipelines.perturbation_scores import Case, correlation, differential, discrimination, in_common, measures, summary

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
        measured = truth + noise * rng.normal(size=GENES)
        found.append(Case(f"P{index}", measured, answers, de, (int(de[0]),), 0.9, tuple(f"G{gene}" for gene in range(GENES))))
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
    some[0] = replace(some[0], reliability=0.1)
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


def of_genes(case: Case, kept: np.ndarray) -> Case:
    """As a training set tells it that chose these genes alone."""
    place = {int(gene): at for at, gene in enumerate(kept)}
    return replace(
        case,
        truth=case.truth[kept],
        answers={name: answer[kept] for name, answer in case.answers.items()},
        de=np.array([place[gene] for gene in case.de.tolist() if gene in place]),
        targets=tuple(place[gene] for gene in case.targets if gene in place),
        genes=tuple(case.genes[gene] for gene in kept),
    )


def test_perturbations_are_told_apart_over_the_genes_that_all_have():
    some = cases(noise=1.0)
    shorter = [of_genes(some[0], np.arange(5, GENES)), of_genes(some[1], np.arange(GENES - 5)), *some[2:]]
    everywhere = [of_genes(case, np.arange(5, GENES - 5)) for case in some]
    for case, expected in zip(in_common(shorter), everywhere, strict=True):
        assert case.genes == expected.genes
        assert (case.de.tolist(), case.targets) == (expected.de.tolist(), expected.targets)
        np.testing.assert_array_equal(case.truth, expected.truth)
    for method in ("perfect", "common"):
        assert discrimination(shorter, method) == discrimination(everywhere, method)
    assert in_common(some) == some


def test_genes_that_tell_groups_apart_are_not_differential():
    rng = np.random.default_rng(0)
    group, perturbed = np.repeat(["a", "b"], 200), np.concatenate([np.arange(20), np.arange(200, 290)])  # 10 %, then 45 %
    logs = rng.normal(1, 0.1, (400, GENES))
    logs[group == "b", :20] += 2  # in all cells of the group
    logs[perturbed, 20:40] += 0.1
    one = Perturbation("P", (20,), 0)
    control = np.setdiff1d(np.arange(400), perturbed)
    pairs = [Pair(name, name, one, control[group[control] == name], perturbed[group[perturbed] == name]) for name in ("a", "b")]
    found = differential(screen_of(logs, group), pairs)
    assert set(found.tolist()) == set(range(20, 40))


def test_in_one_group_differential_is_welchs_t():
    logs = np.random.default_rng(1).normal(1, 0.1, (60, GENES))
    rows = np.arange(60)
    found = differential(screen_of(logs, np.repeat("a", 60)), [Pair("a", "a", Perturbation("P", (0,), 0), rows[:20], rows[20:])])
    t = scipy.stats.ttest_ind(logs[20:], logs[:20], equal_var=False).statistic
    assert set(found.tolist()) == set(np.argsort(-np.abs(t))[:20].tolist())


def screen_of(logs: np.ndarray, group: np.ndarray) -> Screen:
    """Cells of which only log counts matter."""
    genes = tuple(f"G{gene}" for gene in range(GENES))
    table = CellTable(np.zeros(len(logs) + 1, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0, np.float32), np.ones(GENES, bool))
    names = GeneNames(GeneVocabulary(genes, "symbol"), genes)
    screen = Screen(table, names, group.astype(object), np.full(len(logs), "", dtype=object), {}, 1.0, {})
    screen.__dict__["logs"] = logs
    return screen


def test_one_perturbation_cannot_be_told_from_others():
    assert np.isnan(discrimination(cases(1), "perfect"))
    assert correlation(np.zeros(3), np.arange(3.0)) == 0
