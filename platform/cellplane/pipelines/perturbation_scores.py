"""How well predicted changes fit measured ones, beside what needs no model, and how well anything could.

Every prediction starts from control cells that the truth does not use (sharing them gives a correlation of .29 from pure
noise, EVALUATION.md). DE genes are chosen on the truth's own controls against the perturbed cells (PROTOCOLS 9).
"""

# G genes

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellplane.errors import DataError
from cellplane.pipelines.imputation_cells import Rows
from cellplane.pipelines.perturbation_cells import Pair, Perturbation, Screen, pairs_of
from cellplane.pipelines.perturbation_config import PerturbationConfig
from cellplane.pipelines.perturbation_fit import Measured, halved
from cellplane.seeds import keyed_seed

log = logging.getLogger(__name__)

Table = NDArray[np.float64]
Predict = Callable[[Rows, Perturbation], Table]  # (control cells, perturbation) -> change of the mean log profile [G]
TOP = 20  # DE genes
RELIABLE = 0.3  # split-half correlation below which a perturbation is listed apart (PROTOCOLS 9)
BOOTSTRAPS = 1000
MEASURES = ("pearson", "pearson_top20", "pearson_top20_without_target", "direction", "mse")


@dataclass(frozen=True)
class Case:
    """A measured change [G] of one perturbation and what each method predicts, all weighted over groups by perturbed cells.

    ``de`` are the 20 most differential genes, ``targets`` the perturbed ones; ``reliability`` the split-half correlation;
    ``genes`` [G] the labels of all, which may be others in another case: each training set chooses its own.
    """

    name: str
    truth: Table
    answers: Mapping[str, Table]
    de: Rows
    targets: tuple[int, ...]
    reliability: float
    genes: tuple[str, ...]


def case_of(screen: Screen, pairs: Sequence[Pair], inputs: Mapping[str, Rows], methods: Mapping[str, Predict], seed: int) -> Case:
    """One perturbation in its groups: ``pair.control`` are the truth's controls, ``inputs`` those each group is predicted from.

    Genes that the screen did not measure have no change, whatever a method says of them.
    """
    weights = np.array([len(pair.perturbed) for pair in pairs], dtype=np.float64)
    one = pairs[0].perturbation

    def mean(tables: Sequence[Table]) -> Table:
        return np.where(screen.table.panel, np.average(tables, axis=0, weights=weights), 0.0)

    truth = mean([screen.mean(pair.perturbed) - screen.mean(pair.control) for pair in pairs])
    answers = {name: mean([predict(inputs[pair.group], one) for pair in pairs]) for name, predict in methods.items()}
    targets = tuple(gene for gene in one.genes if gene < len(truth))
    return Case(one.name, truth, answers, differential(screen, pairs), targets, reliability(screen, pairs, seed), screen.genes.labels)


def differential(screen: Screen, pairs: Sequence[Pair]) -> Rows:
    """The genes whose mean log differs most between perturbed cells and the truth's controls of their own group, at most 20.

    By Welch's t of the mean over groups, weighted by perturbed cells as the truth is: a gene that tells groups apart is none,
    however unequally perturbed cells and controls are spread over them.
    """
    difference, variance = np.zeros((2, screen.logs.shape[1]))
    cells = sum(len(pair.perturbed) for pair in pairs)
    for pair in pairs:
        weight, perturbed, control = len(pair.perturbed) / cells, screen.logs[pair.perturbed], screen.logs[pair.control]
        difference += weight * (perturbed.mean(0) - control.mean(0))
        variance += weight**2 * (perturbed.var(0) / len(perturbed) + control.var(0) / len(control))
    t = np.abs(difference) / np.sqrt(variance + 1e-12)
    return np.argsort(-t, kind="stable")[:TOP]


def reliability(screen: Screen, pairs: Sequence[Pair], seed: int) -> float:
    """Correlation of the change told by half of the perturbed cells and half of the controls with that told by the others."""
    changes = []
    for half in (0, 1):
        parts = [(halved(pair.perturbed, seed)[half], halved(pair.control, seed)[half]) for pair in pairs]
        weights = [len(perturbed) for perturbed, _ in parts]
        changes.append(np.average([screen.mean(perturbed) - screen.mean(control) for perturbed, control in parts], axis=0, weights=weights))
    return correlation(changes[0], changes[1])


def correlation(one: Table, other: Table) -> float:
    """Pearson correlation; 0 where either does not vary, as "no change" does not."""
    if one.std() == 0 or other.std() == 0:
        return 0.0
    return float(np.corrcoef(one, other)[0, 1])


def measures(case: Case, found: Table) -> dict[str, float]:
    """Pearson over all genes, the top 20 with and without the target; share of right directions among the top 20; squared error."""
    others = np.array([gene for gene in case.de if gene not in case.targets], dtype=np.int64)
    return {
        "pearson": correlation(case.truth, found),
        "pearson_top20": correlation(case.truth[case.de], found[case.de]),
        "pearson_top20_without_target": correlation(case.truth[others], found[others]),
        "direction": float((np.sign(case.truth[case.de]) == np.sign(found[case.de])).mean()),
        "mse": float(((case.truth - found) ** 2).mean()),
    }


def discrimination(cases: Sequence[Case], method: str) -> float:
    """How high each true perturbation ranks among all predictions by correlation with its truth: 1 always first, .5 chance.

    Over the genes that all cases have. NaN for a single perturbation. "The mean of the others" cannot win here.
    """
    if len(cases) < 2:
        return float("nan")
    ranks, comparable = [], in_common(cases)
    for at, case in enumerate(comparable):
        scores = np.array([correlation(case.truth, other.answers[method]) for other in comparable])
        own = scores[at]
        better, equal = (scores > own).sum(), (scores == own).sum() - 1
        ranks.append(1 - (better + equal / 2) / (len(cases) - 1))
    return float(np.mean(ranks))


def in_common(cases: Sequence[Case]) -> list[Case]:
    """The cases over the genes that all of them have, in their order; differential genes and targets are those among them."""
    common = set(cases[0].genes).intersection(*(case.genes for case in cases))
    return [case if len(case.genes) == len(common) else _over(case, common) for case in cases]


def _over(case: Case, genes: set[str]) -> Case:
    kept = np.flatnonzero([gene in genes for gene in case.genes])
    place = {int(gene): at for at, gene in enumerate(kept)}
    return replace(
        case,
        truth=case.truth[kept],
        answers={name: answer[kept] for name, answer in case.answers.items()},
        de=np.array([place[gene] for gene in case.de.tolist() if gene in place], dtype=np.int64),
        targets=tuple(place[gene] for gene in case.targets if gene in place),
        genes=tuple(case.genes[gene] for gene in kept),
    )


def summary(cases: Sequence[Case], seed: int = 0) -> dict[str, Any]:
    """Means over the reliable perturbations for every method, with a bootstrap interval; unreliable ones are listed apart.

    ``ceiling`` is the mean correlation that a perfect prediction would have with such noisy truths, sqrt(2 r / (1 + r)) of the
    split-half reliability r; ``of_ceiling`` the score divided by it.
    """
    reliable = [case for case in cases if case.reliability >= RELIABLE] or list(cases)
    r = np.clip([case.reliability for case in reliable], 0, 1)
    ceiling = float(np.sqrt(2 * r / (1 + r)).mean())
    found: dict[str, Any] = {
        "perturbations": [case.name for case in reliable],
        "unreliable": {case.name: case.reliability for case in cases if case.reliability < RELIABLE},
        "reliability": {case.name: case.reliability for case in cases},
        "ceiling": ceiling,
    }
    for method in cases[0].answers:
        scores = [measures(case, case.answers[method]) for case in reliable]
        means = {name: float(np.mean([score[name] for score in scores])) for name in MEASURES}
        pearson = np.array([score["pearson"] for score in scores])
        drawn = np.random.default_rng(keyed_seed(seed, "bootstrap")).integers(0, len(pearson), (BOOTSTRAPS, len(pearson)))
        interval = np.quantile(pearson[drawn].mean(1), [0.025, 0.975]).tolist()
        by_name = {case.name: float(value) for case, value in zip(reliable, pearson, strict=True)}
        extra = {"interval": interval, "of_ceiling": means["pearson"] / max(ceiling, 1e-9), "discrimination": discrimination(cases, method)}
        found[method] = {**means, **extra, "by_perturbation": by_name}
    return found


def baselines(screen: Screen, measured: Measured) -> dict[str, Predict]:
    """What needs no network: only the target changes (by its kind's efficiency), the mean of the training perturbations, no change."""
    log_efficiency, mean_change = measured.log_efficiency, measured.mean

    def target_only(rows: Rows, one: Perturbation) -> Table:
        before = screen.mean(rows)
        change = np.zeros_like(before)
        for gene in one.genes:
            if gene < len(change):
                change[gene] = np.log1p(np.expm1(before[gene]) * np.exp(log_efficiency[one.kind])) - before[gene]
        return change

    return {
        "target_only": target_only,
        "mean_of_others": lambda rows, one: mean_change,  # noqa: ARG005
        "no_change": lambda rows, one: np.zeros_like(mean_change),  # noqa: ARG005
    }


def screen_scores(screen: Screen, predict: Predict, measured: Measured, config: PerturbationConfig) -> dict[str, Any]:
    """Every perturbation of a screen scored by `summary`: one half of each group's controls goes in, the other tells the truth.

    Rows: model, target_only (by the efficiencies of the training pairs), mean_of_others (here the mean of the training
    perturbations) and no_change.
    """
    pairs = pairs_of(screen, 2 * config.min_cells)
    if not pairs:
        raise DataError(f"no group has {2 * config.min_cells} controls and as many cells of one perturbation: nothing can be scored")
    methods = {"model": predict, **baselines(screen, measured)}
    cases = []
    for name in sorted({pair.perturbation.name for pair in pairs}):
        mine = [pair for pair in pairs if pair.perturbation.name == name]
        halves = {pair.group: halved(pair.control, config.seed) for pair in mine}
        truth = [Pair(pair.group, pair.cell_type, pair.perturbation, halves[pair.group][1], pair.perturbed) for pair in mine]
        cases.append(case_of(screen, truth, {group: half[0] for group, half in halves.items()}, methods, config.seed))
    return summary(cases, config.seed)
