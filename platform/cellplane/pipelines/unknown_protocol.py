"""`cellplane evaluate unknown --protocol FILE`: every type of a data set left out in turn, with every seed (PROTOCOLS 7).

One fit without a type gives all scores of it, in every context. The report tells each type by itself, for a mean alone hides
that a type with a sister among the known ones is no stranger to a distance, and means over types with and without a sister.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from cellplane.artifact.folder import ModelFolder
from cellplane.pipelines.annotation_protocol import Study, study_of
from cellplane.pipelines.config import AnnotationConfig
from cellplane.pipelines.job import MODEL_ROW
from cellplane.pipelines.protocol import Entry, Evaluation, Found, Method, Place
from cellplane.pipelines.protocol_run import Finished, Ledgers, Opened, Say, base_notes, check_protocol, finish, open_data, out_of, quiet
from cellplane.pipelines.task_protocols import StrangerData, UnknownProtocol
from cellplane.pipelines.unknown_evaluation import MODEL_SCORE, SISTER, Strangers, UnknownEvaluation

SIMPLE = ("max_probability", "entropy", "knn_distance", "pca_distance")  # what anybody could take instead
WITHOUT_NETWORK = ("pca_distance",)
BEST_SIMPLE = "best simple score"  # of each type, chosen by the answer, which nobody can do
BY_TYPE = "by type"
FALSE_ALARMS, REFUSED = "fpr_at_95_tpr", "refusal_rate_known"


def run_unknown_protocol(config: UnknownProtocol, say: Say = quiet) -> Finished:
    """Every data set, seed and type that the ledger does not know yet, and the report of all.

    Raises ConfigError for files and types that are not there, DataError for fewer than three types.
    """
    check_protocol(config)
    ledgers = Ledgers(out_of(config, config.task))
    entries: list[Entry] = []
    notes: list[str] = []
    for name, asked in config.data.items():
        everything = asked.model_copy(update={"types": None})  # so that a type alone is known when all are asked for
        opened = open_data(name, everything, config.bases_for(name), config.tracking_uri)
        study = study_of(name, asked, opened.cells, opened.bases, config.fewest_cells)
        found = list(_measured(config, study, opened, (ledgers, say)))
        entries += found
        notes += [*_notes(config, study, found), *base_notes(name, [asked.path], opened.bases)]
    rate = config.recipe.unknown.refusal_rate
    evaluation = Evaluation(
        config.task,
        "auroc",
        tuple(report_entries(entries)),
        (),
        tuple(notes),
        (FALSE_ALARMS,),
        deciding={_by_type(context): MODEL_ROW for context in config.contexts},
        aims={REFUSED: rate},
    )
    return finish(evaluation, config, "Cells of unknown types, each left out in turn, beside simple scores")


@dataclass(frozen=True)
class _Arm:
    """What is fitted without a type: the recipe, the base it begins with, and what its rows are called."""

    recipe: AnnotationConfig
    base: tuple[str, ModelFolder] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its scores, beside the data."""
        return {"recipe": self.recipe.model_dump(mode="json"), "base": None if self.base is None else self.base[1].model_sha256}

    @cached_property
    def methods(self) -> dict[str, Method]:
        """The row of every score."""
        since = "" if self.base is None else f" from {self.base[0]}"
        simple = [name for name in SIMPLE if self.base is None or name not in WITHOUT_NETWORK]
        return {MODEL_SCORE: Method(MODEL_ROW + since, "model"), **{name: Method(name + since, "baseline") for name in simple}}


@dataclass(frozen=True)
class _Turn:
    """A type's turn to be the stranger: which of all types it is, what is fitted without it, with which seed."""

    strangers: Strangers
    arm: _Arm
    name: str
    number: int
    seed: int

    def rows(self, dataset: str) -> Iterator[tuple[Place, str, Method]]:
        """Where each score goes: (place, score, row), our own score of the first context first."""
        for context in self.strangers.options.contexts:
            for score, method in self.arm.methods.items():
                yield Place(dataset, context, self.number, self.seed), score, method


def _turns(config: UnknownProtocol, study: Study) -> Iterator[_Turn]:
    """Seed by seed, so that what is there early is a whole table."""
    asked = study.asked
    assert isinstance(asked, StrangerData)
    arms = [_Arm(config.recipe), *(_Arm(config.finetune or config.recipe, base) for base in study.bases.items())]
    order = sorted(set(study.types))
    for seed in config.seeds:
        options = UnknownEvaluation(
            types=asked.types, min_cells=config.fewest_cells, contexts=config.contexts, test_share=config.test_share, seed=seed
        )
        plain = Strangers.of(study.cells, config.recipe.model_copy(update={"keys": asked.keys}), options)
        for name in plain.types:
            for arm in arms:
                yield _Turn(replace(plain, recipe=_told(arm.recipe, asked, seed)), arm, name, order.index(name), seed)


def _told(recipe: AnnotationConfig, asked: StrangerData, seed: int) -> AnnotationConfig:
    """The recipe with what a data set and a seed fill in."""
    keys = asked.keys.model_copy(update={"spatial_key": None})
    size, steps = asked.max_cells or recipe.max_cells, asked.optimizer or recipe.optimizer
    return recipe.model_copy(update={"keys": keys, "seed": seed, "max_cells": size, "optimizer": steps})


def _measured(config: UnknownProtocol, study: Study, opened: Opened, to: tuple[Ledgers, Say]) -> Iterator[Entry]:
    """Every entry of a data set; a turn that is not wholly known is fitted."""
    ledgers, say = to
    turns = list(_turns(config, study))
    for number, turn in enumerate(turns, 1):
        ledger = ledgers.of("unknown", opened.identity, config.fewest_cells, config.test_share, turn.arm.settings)
        rows = list(turn.rows(study.name))
        known = [entry for place, _, method in rows if (entry := ledger.find(place, method.name)) is not None]
        if len(known) == len(rows):
            yield from known
            continue
        scored = _Once(turn)
        work = [partial(scored.found, place.protocol, score) for place, score, _ in rows]
        found = [ledger.measured(place, method, one, scored.test_share) for (place, _, method), one in zip(rows, work, strict=True)]
        say(_line(turn, found, f"{number}/{len(turns)}"))
        yield from found


class _Once:
    """A turn's fit, when the first of its scores is asked for."""

    def __init__(self, turn: _Turn) -> None:
        self.turn = turn

    @cached_property
    def row(self) -> Mapping[str, Any]:
        """What `Strangers.left_out` says."""
        return self.turn.strangers.left_out(self.turn.name, None if self.turn.arm.base is None else self.turn.arm.base[1])

    @property
    def test_share(self) -> float:
        """Test cells for each training cell, near enough: the stranger's own are in no training set."""
        share = self.turn.strangers.options.test_share
        return share / (1 - share)

    def found(self, context: str, score: str) -> Found:
        """One score in one context; ours with the known cells that its threshold refuses."""
        row, scored = self.row, self.row["contexts"][context]
        metrics = {"auroc": scored["auroc"][score], FALSE_ALARMS: scored[FALSE_ALARMS][score]}
        if score == MODEL_SCORE:
            metrics[REFUSED] = scored[REFUSED]
        told = {name: row[name] for name in ("cells", "nearest_type", "nearest_correlation", "entropy_share")}
        return Found(metrics, {"type": self.turn.name, **told})


def _line(turn: _Turn, found: Sequence[Entry], number: str) -> str:
    ours = turn.arm.methods[MODEL_SCORE].name
    scores = ", ".join(f"{entry.place.protocol} {entry.metrics['auroc']:.3f}" for entry in found if entry.method.name == ours)
    place, seconds = found[0].place, sum(entry.seconds for entry in found)
    return f"[{number}] {place.dataset} seed {place.seed}: {ours} without {turn.name}  AUROC {scores}  {seconds:.0f} s"


def report_entries(entries: Sequence[Entry]) -> list[Entry]:
    """The entries under the tables that they are told in: for every context by type, then means without and with a sister.

    A type has a sister when its centroid correlates .95 or more with the nearest known type's, in the mean over seeds.
    """
    found: list[Entry] = []
    for dataset, context in dict.fromkeys((entry.place.dataset, entry.place.protocol) for entry in entries):
        mine = [entry for entry in entries if (entry.place.dataset, entry.place.protocol) == (dataset, context)]
        sisters = {kind: _nearest(mine, kind) for kind in dict.fromkeys(entry.details["type"] for entry in mine)}
        found += _told_by_type(mine, sisters)
        for has_sister in (False, True):
            some = [entry for entry in mine if (sisters[entry.details["type"]][1] >= SISTER) == has_sister]
            table = f"{context} context: types {'with' if has_sister else 'without'} a sister"
            found += [replace(entry, place=replace(entry.place, protocol=table)) for entry in [*some, *_best_simple(some)]]
    return found


def _nearest(entries: Sequence[Entry], kind: str) -> tuple[str, float]:
    """The known type that a type is most like, and how much, in the mean over seeds."""
    mine = {entry.place.seed: entry.details for entry in entries if entry.details["type"] == kind}
    names = [told["nearest_type"] for told in mine.values()]
    return max(sorted(set(names)), key=names.count), float(np.mean([told["nearest_correlation"] for told in mine.values()]))


def _told_by_type(entries: Sequence[Entry], sisters: Mapping[str, tuple[str, float]]) -> Iterator[Entry]:
    """One row a type: the AUROC of every score, and what else is known of ours."""
    for place in dict.fromkeys(entry.place for entry in entries):
        mine = [entry for entry in entries if entry.place == place]
        kind = mine[0].details["type"]
        sister, correlation = sisters[kind]
        word = f"sister {sister}" if correlation >= SISTER else "no sister"
        ours = next((entry.metrics for entry in mine if entry.method.name == MODEL_ROW), {})
        more = {name: value for name, value in ours.items() if name != "auroc"}
        metrics = {**{entry.method.name: entry.metrics["auroc"] for entry in mine}, **more}
        told = {**mine[0].details, "has_sister": correlation >= SISTER}
        yield Entry(replace(place, protocol=_by_type(place.protocol)), Method(f"{kind}: {word}", "stranger"), metrics, details=told)


def _by_type(context: str) -> str:
    return f"{context} context: {BY_TYPE}"


def _best_simple(entries: Sequence[Entry]) -> Iterator[Entry]:
    """For each type and seed the largest AUROC and the fewest false alarms that a simple score has."""
    for place in dict.fromkeys(entry.place for entry in entries):
        simple = [entry for entry in entries if entry.place == place and entry.method.name in SIMPLE]
        best = max(simple, key=lambda entry: entry.metrics["auroc"], default=None)
        if best is not None:
            yield replace(best, method=Method(BEST_SIMPLE, "control"), seconds=0.0, details={**best.details, "score": best.method.name})


def _notes(config: UnknownProtocol, study: Study, entries: Sequence[Entry]) -> list[str]:
    """Cells and types, in how many rounds no simple score was better, what was refused of known cells, how long a fit took."""
    network, kin = (
        config.recipe.model,
        {kind: _nearest(entries, kind) for kind in dict.fromkeys(entry.details["type"] for entry in entries)},
    )
    size = f"{study.cells.n_obs} cells of {len(set(study.types))} types, {len(kin)} of them left out in turn"
    lines = [f"{study.name}: {size}; {study.dropped} cells of rare or unnamed types are in no round"]
    near = "; ".join(f"{kind}: {other} ({correlation:.2f})" for kind, (other, correlation) in kin.items())
    lines.append(f"{study.name}: nearest known types and the correlation of their centroids, {SISTER} makes a sister: {near}")
    if network.n_blocks + network.local_blocks == 0 and len(config.contexts) > 1:
        lines.append(f"{study.name}: the recipe has no attention, so no cell sees another and all contexts are one")
    for context in config.contexts:
        ours = {entry.place: entry for entry in entries if entry.place.protocol == context and entry.method.name == MODEL_ROW}
        best = {entry.place: entry.metrics["auroc"] for entry in _best_simple(entries) if entry.place in ours}
        level = sum(entry.metrics["auroc"] >= best[place] for place, entry in ours.items())
        refused = np.mean([entry.metrics[REFUSED] for entry in ours.values()])
        rate = f"{refused:.1%} of the known cells were refused, {config.recipe.unknown.refusal_rate:.1%} was asked"
        lines.append(f"{study.name}, {context} context: at or above the best simple score in {level} of {len(ours)} rounds; {rate}")
    seconds: dict[tuple[int, int], float] = defaultdict(float)
    for entry in entries:
        if entry.method.name in (MODEL_ROW, *SIMPLE):  # one fit, whose time is that of its first score
            seconds[entry.place.split, entry.place.seed] += entry.seconds
    took = list(seconds.values())
    return [*lines, f"{study.name}: a fit with all its scores took {np.mean(took):.0f} s (at most {max(took):.0f})"]
