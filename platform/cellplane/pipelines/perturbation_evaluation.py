"""Perturbations that were never seen: each left out of training in turn, or the perturbed cells of one cell type.

The controls of every group are split in three by the seed: A trains, B is predicted from, C tells the truth. A combination is
left out with any of its genes (PROTOCOLS 9). What is scored, C and the cells left out, reaches no prediction: which genes are
read, and the total that counts are scaled to, are told by the training cells of each unit as well.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cellplane.artifact.folder import ModelFolder
from cellplane.config import Config
from cellplane.data.sources import AnnData
from cellplane.errors import DataError
from cellplane.model.cellplm import CellPLM
from cellplane.pipelines.base import as_config
from cellplane.pipelines.imputation_cells import Rows
from cellplane.pipelines.perturbation_cells import Pair, Screen, check_groups, pairs_of, read_cells, with_counts
from cellplane.pipelines.perturbation_config import PerturbationConfig
from cellplane.pipelines.perturbation_fit import Measured, learn, predicted
from cellplane.pipelines.perturbation_scores import Case, Predict, baselines, case_of, correlation, summary
from cellplane.seeds import keyed_seed
from cellplane.train.finetune import Course

log = logging.getLogger(__name__)

LeaveOut = Literal["perturbation", "cell_type"]
TRAIN, INPUT, TRUTH = range(3)


def evaluate_perturbation(
    data: AnnData,
    config: Config | Mapping[str, Any] | None = None,
    leave_out: LeaveOut = "perturbation",
    seeds: Sequence[int] = (0,),
    base: ModelFolder | None = None,
) -> dict[str, Any]:
    """`summary` of every seed's split under "seeds", and the mean and spread over seeds of each method's Pearson; JSON-ready.

    DataError where leaving something out leaves nothing to learn from.
    """
    given: PerturbationConfig = as_config(PerturbationConfig, config, PerturbationConfig())
    found = []
    for seed in seeds:
        recipe = given.model_copy(update={"seed": given.seed + seed})
        cases = list(cases_of(data, recipe, leave_out, base))
        found.append(summary(cases, seed))
    methods = [name for name, value in found[0].items() if isinstance(value, dict) and "pearson" in value]
    pearson = {name: [one[name]["pearson"] for one in found] for name in methods}
    return {"seeds": found, "pearson": {name: {"mean": float(np.mean(row)), "spread": float(np.std(row))} for name, row in pearson.items()}}


@dataclass(frozen=True)
class Split:
    """A screen with each control's part [n] (-1: no control)."""

    screen: Screen
    part: NDArray[np.int64]

    @classmethod
    def of(cls, screen: Screen, seed: int) -> Split:
        """Deals the controls of every group to three parts, before those without counts are left out: counts decide nothing here."""
        part = np.full(len(screen.name), -1)
        for group in sorted(set(screen.group)):
            rows = np.random.default_rng(keyed_seed(seed, "controls", group)).permutation(screen.rows(group))
            part[rows] = np.arange(len(rows)) % 3
        kept = with_counts(screen)
        return cls(screen.only(kept), part[kept])

    def learning(self, unit: str, leave_out: LeaveOut) -> NDArray[np.bool_]:
        """The cells [n] that may be learned from when ``unit`` is left out; they alone tell genes and scale, see `Screen.told_by`."""
        flags: NDArray[np.bool_] = (self.part == TRAIN) | ((self.part < 0) & ~self.held(unit, leave_out))
        return flags

    def held(self, unit: str, leave_out: LeaveOut) -> NDArray[np.bool_]:
        """Perturbed cells [n] that are left out: those of a cell type, or with any gene of a perturbation."""
        screen = self.screen
        if leave_out == "cell_type":
            return np.array([bool(name) and screen.cell_type[group] == unit for name, group in zip(screen.name, screen.group, strict=True)])
        genes = set(screen.meaning[unit].genes)
        return np.array([bool(name) and bool(genes & set(screen.meaning[name].genes)) for name in screen.name])

    def rows(self, group: str, part: int) -> Rows:
        """Controls of a group in one part."""
        return np.flatnonzero((self.screen.group == group) & (self.part == part))

    def pairs(self, screen: Screen, config: PerturbationConfig) -> list[Pair]:
        """What can be scored, in this screen of the same cells: enough perturbed cells, and enough controls in every part."""
        found = pairs_of(screen, 3 * config.min_cells)
        return [pair for pair in found if all(len(self.rows(pair.group, part)) >= config.min_cells for part in (INPUT, TRUTH))]


def cases_of(
    data: AnnData, config: PerturbationConfig, leave_out: LeaveOut, base: ModelFolder | None = None, known: Collection[str] = ()
) -> Iterator[Case]:
    """Every perturbation (in every cell type) as a model sees it that learned without it, beside the baselines; split by the seed.

    Each is told in the genes and the scale that its training cells tell. What is ``known`` of what is left out in turn is passed
    over. DataError where leaving something out leaves nothing to learn from.
    """
    cells, start, _ = read_cells(data, config, base)
    split = Split.of(cells, config.seed)
    check_groups(split.screen.group, split.screen.name, config)
    units = sorted({_unit(pair, leave_out) for pair in split.pairs(split.screen, config)})
    if len(units) < 2:
        raise DataError(f"leaving out a {leave_out.replace('_', ' ')} needs two of them with enough cells, found {units}")
    for unit in (unit for unit in units if unit not in known):
        yield from _left_out(split, unit, leave_out, config, start)


def _unit(pair: Pair, leave_out: LeaveOut) -> str:
    return pair.cell_type if leave_out == "cell_type" else pair.perturbation.name


def _left_out(split: Split, unit: str, leave_out: LeaveOut, config: PerturbationConfig, start: ModelFolder | None) -> Iterator[Case]:
    """One unit's cases."""
    learning = split.learning(unit, leave_out)
    if not pairs_of(split.screen.only(learning), config.min_cells):
        raise DataError(f"leaving out {unit} leaves nothing to learn from: no group has {config.min_cells} controls and cells that stay")
    screen = split.screen.told_by(learning, config.max_genes)
    learned = learn(screen.only(learning), config, start, Course())
    network = _asking(learned.network, screen)
    methods: dict[str, Predict] = {"model": _blending(network, learned.measured), "network_alone": network}
    methods |= baselines(screen, learned.measured)
    mine = [pair for pair in split.pairs(screen, config) if _unit(pair, leave_out) == unit]
    for name in sorted({pair.perturbation.name for pair in mine}):
        same = [pair for pair in mine if pair.perturbation.name == name]
        truth = [replace(pair, control=split.rows(pair.group, TRUTH)) for pair in same]
        inputs = {pair.group: split.rows(pair.group, INPUT) for pair in same}
        case = case_of(screen, truth, inputs, methods, config.seed)
        scores = {method: round(correlation(case.truth, found), 3) for method, found in case.answers.items()}
        log.info("left out %s: %d steps, reliability %.2f, %s", unit, learned.step, case.reliability, scores)
        yield replace(case, name=f"{name} in {unit}" if leave_out == "cell_type" else name)


def _blending(network: Predict, measured: Measured) -> Predict:
    return lambda rows, one: measured.blended(network(rows, one), one)


def _asking(network: CellPLM, screen: Screen) -> Predict:
    return lambda rows, one: predicted(network, screen, rows, one).change
