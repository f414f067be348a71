"""What a fitted perturbation keeps beside its network, and what it says of control cells: notebooks and endpoints both ask here."""

# G genes

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cellplane.artifact.folder import ModelFolder
from cellplane.data.sentences import CellTable
from cellplane.errors import DataError, FileFormatError, VocabularyError
from cellplane.model.cellplm import CellPLM
from cellplane.pipelines.gene_names import GeneNames
from cellplane.pipelines.perturbation_cells import Names, Perturbation, Screen, understood
from cellplane.pipelines.perturbation_config import PerturbationConfig
from cellplane.pipelines.perturbation_fit import Measured, predicted

KNOWN = "perturbation.json"  # attachment of the model folder
PER = 10_000.0  # rates are given per so many counts
EVERYBODY = "all"  # the group of a row that averages over groups


@dataclass(frozen=True)
class Fitted:
    """What predicting needs beside the network: names learned, what was measured of them, free stimuli, and the counts' scale."""

    names: tuple[str, ...]
    stimuli: tuple[str, ...]
    measured: Measured
    total: float
    genes: GeneNames
    config: PerturbationConfig

    def meaning(self, name: str, config: PerturbationConfig) -> Perturbation | None:
        """What a name means; None: it is not known and the fallback answers. VocabularyError where there is no fallback."""
        meaning = understood(name, config, self.genes, self.stimuli)
        if meaning is None and config.fallback == "error":
            raise VocabularyError(
                f"{name} is no gene the model knows, nor a stimulus it learned ({', '.join(self.stimuli) or 'none'}): name its gene in "
                'targets, or set fallback to "mean_of_training" for the mean change of the training perturbations'
            )
        return meaning

    def controls(self, table: CellTable, group: Names, name: Names) -> Screen:
        """The cells without a ``name`` that show counts, each in its ``group`` [n]; DataError when there are none."""
        screen = Screen(table, self.genes, group, name, {}, self.total, dict(zip(group, group, strict=True)), self.stimuli)
        controls = screen.only((name == "") & (table.totals() > 0))
        if controls.table.n_cells == 0:
            raise DataError("no control cell has counts in genes the model knows: a prediction starts from control cells")
        return controls


@dataclass(frozen=True)
class Answer:
    """One predicted population [G]: mean log profile, its change, rates, those of its controls; whether it is the fallback."""

    profile: NDArray[np.float64]
    change: NDArray[np.float64]
    rates: NDArray[np.float64]
    control_rates: NDArray[np.float64]
    fallback: bool


@dataclass(frozen=True)
class Row:
    """An answer, and what it is of: a perturbation, a group of so many control cells."""

    name: str
    group: str
    cells: int
    answer: Answer


PARTS = ("profile", "change", "rates", "control_rates")


def populations(network: CellPLM, state: Fitted, controls: Screen, names: Sequence[str], config: PerturbationConfig) -> list[Row]:
    """What the controls of every group become under every perturbation, in the order of names, then groups."""
    meanings = [state.meaning(name, config) for name in names]
    sizes = {group: int((controls.group == group).sum()) for group in sorted(set(controls.group))}
    return [
        Row(name, group, cells, _answer(network, state, controls, group, one))
        for name, one in zip(names, meanings, strict=True)
        for group, cells in sizes.items()
    ]


def averaged(rows: Sequence[Row]) -> list[Row]:
    """One row a perturbation: the mean over groups, weighted by their control cells."""
    found = []
    for name in dict.fromkeys(row.name for row in rows):
        mine = [row for row in rows if row.name == name]
        weights = np.array([row.cells for row in mine], dtype=np.float64)
        parts = [np.stack([getattr(row.answer, part) for row in mine]) for part in PARTS]
        profile, change, rates, before = (np.average(tables, axis=0, weights=weights) for tables in parts)
        found.append(Row(name, EVERYBODY, int(weights.sum()), Answer(profile, change, rates, before, mine[0].answer.fallback)))
    return found


def _answer(network: CellPLM, state: Fitted, controls: Screen, group: str, perturbation: Perturbation | None) -> Answer:
    rows = controls.rows(group)
    before, shares = controls.mean(rows), controls.profile(rows)
    if perturbation is None:
        change = state.measured.mean
        return Answer(before + change, change, shares, shares, fallback=True)
    population = predicted(network, controls, rows, perturbation)
    change = state.measured.blended(population.change, perturbation.name)
    return Answer(before + change, change, population.rates, shares, fallback=False)


def fitted_from(folder: ModelFolder) -> Fitted:
    """What a model folder keeps beside its network; FileFormatError when that is missing or broken."""
    try:
        known = json.loads(folder.attachments[KNOWN])
        return Fitted(
            names=tuple(known["names"]),
            stimuli=tuple(known["stimuli"]),
            measured=Measured({name: np.array(change, dtype=np.float64) for name, change in known["changes"].items()}, known["share"]),
            total=float(known["total"]),
            genes=GeneNames(folder.vocabulary, tuple(known["genes"])),
            config=PerturbationConfig.model_validate(known["config"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"the model lacks what a perturbation keeps beside its network: {error}; fit and save it again") from error
