"""What a fitted perturbation keeps beside its network, and what it says of control cells: notebooks and endpoints both ask here."""

# G genes

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellplane.artifact.folder import ModelFolder
from cellplane.data.sentences import CellTable
from cellplane.errors import DataError, FileFormatError, VocabularyError
from cellplane.model.cellplm import CellPLM
from cellplane.pipelines.gene_names import GeneNames
from cellplane.pipelines.perturbation_cells import Key, Names, Perturbation, Screen, kind_of, understood
from cellplane.pipelines.perturbation_config import PerturbationConfig
from cellplane.pipelines.perturbation_fit import EFFICIENCY, Measured, predicted

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
                'targets, set fallback to "mean_of_training" for the mean change of the training perturbations, or fit with a larger '
                "max_genes (null: all genes that are known), for genes beyond it were not read"
            )
        return meaning

    @cached_property
    def _learned(self) -> frozenset[Key]:
        """What the names learned mean."""
        found = (understood(name, self.config, self.genes, self.stimuli) for name in self.names)
        return frozenset(one.key for one in found if one is not None)

    def seen(self, one: Perturbation | None) -> bool:
        """Whether this was in training, whatever it is called."""
        return one is not None and one.key in self._learned

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
    """An answer, and what it is of: a perturbation of a kind, seen in training or not, and a group of so many control cells."""

    name: str
    kind: str
    seen: bool
    group: str
    cells: int
    answer: Answer


PARTS = ("profile", "change", "rates", "control_rates")


def populations(network: CellPLM, state: Fitted, controls: Screen, names: Sequence[str], config: PerturbationConfig) -> list[Row]:
    """What the controls of every group become under every perturbation, in the order of names, then groups."""
    meanings = [state.meaning(name, config) for name in names]
    sizes = {group: int((controls.group == group).sum()) for group in sorted(set(controls.group))}
    return [
        Row(name, kind_of(name, config), state.seen(one), group, cells, _answer(network, state, controls, group, one))
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
        answer = Answer(profile, change, rates, before, mine[0].answer.fallback)
        found.append(replace(mine[0], group=EVERYBODY, cells=int(weights.sum()), answer=answer))
    return found


def _answer(network: CellPLM, state: Fitted, controls: Screen, group: str, perturbation: Perturbation | None) -> Answer:
    """The fallback changes the controls; the measured share of a change moves the population that the network says."""
    rows = controls.rows(group)
    before, shares = controls.mean(rows), controls.profile(rows)
    if perturbation is None:
        own, rates, change = np.zeros_like(before), shares, state.measured.mean
    else:
        population = predicted(network, controls, rows, perturbation)
        own, rates, change = population.change, population.rates, state.measured.blended(population.change, perturbation)
    change = np.where(controls.table.panel, change, 0.0)  # of a gene that these cells did not measure nothing is said
    half_a_count = 0.5 * state.total / float(controls.table.totals()[rows].sum())
    return Answer(before + change, change, moved(rates, before + own, before + change, half_a_count), shares, perturbation is None)


def moved(rates: NDArray[np.float64], start: NDArray[np.float64], end: NDArray[np.float64], least: float) -> NDArray[np.float64]:
    """Rates [G] of a population whose mean log profile moves from ``start`` to ``end`` [G]; they sum to 1 again.

    rate x expm1(end) / expm1(start), over the sum of all: how far a gene's mean lies above expm1 of its mean log is kept.
    Neither side counts as less than ``least``, so that what was never seen can be raised, and nothing becomes infinite. Genes
    without a rate, which were not measured, get none; equal profiles leave the rates.
    """
    after = rates * np.maximum(np.expm1(end), least) / np.maximum(np.expm1(start), least)
    return np.asarray(after / after.sum())


def kept(screen: Screen, measured: Measured, config: PerturbationConfig) -> dict[str, Any]:
    """What `fitted_from` reads again, JSON-ready; changes stand under every name that they were learned by."""
    names = sorted(screen.meaning)
    keys = {name: screen.meaning[name].key for name in names}
    return {
        "names": names,
        "genes": list(screen.genes.labels),
        "stimuli": list(screen.stimuli),
        "changes": {name: measured.changes[key].tolist() for name, key in keys.items() if key in measured.changes},
        "share": measured.share,
        "efficiencies": dict(zip(EFFICIENCY, measured.log_efficiency, strict=True)),
        "total": screen.total,
        "config": config.model_dump(mode="json"),
    }


def fitted_from(folder: ModelFolder) -> Fitted:
    """What a model folder keeps beside its network; FileFormatError when that is missing or broken."""
    try:
        known = json.loads(folder.attachments[KNOWN])
        config = PerturbationConfig.model_validate(known["config"])
        genes, stimuli = GeneNames(folder.vocabulary, tuple(known["genes"])), tuple(known["stimuli"])
        efficiencies = {**EFFICIENCY, **known.get("efficiencies", {})}  # folders of an early version have none: the usual ones
        return Fitted(
            names=tuple(known["names"]),
            stimuli=stimuli,
            measured=Measured(_changes(known["changes"], config, genes, stimuli), known["share"], list(efficiencies.values())),
            total=float(known["total"]),
            genes=genes,
            config=config,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"the model lacks what a perturbation keeps beside its network: {error}; fit and save it again") from error


def _changes(
    known: Mapping[str, Sequence[float]], config: PerturbationConfig, genes: GeneNames, stimuli: tuple[str, ...]
) -> dict[Key, NDArray[np.float64]]:
    """Changes by what their names mean: the mean of those that mean the same, as an early version may have kept A+B and B+A.

    A name that is understood no more (its gene table is not installed) has a place that nobody asks for, and counts in the mean.
    """
    found: dict[Key, list[Sequence[float]]] = {}
    for at, (name, change) in enumerate(known.items()):
        one = understood(name, config, genes, stimuli)
        found.setdefault(((), at) if one is None else one.key, []).append(change)
    return {key: np.mean(np.array(mine, dtype=np.float64), axis=0) for key, mine in found.items()}
