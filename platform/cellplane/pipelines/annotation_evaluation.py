"""`cellplane evaluate annotate --protocol FILE`: runs the protocol of `annotation_protocol`, draws and reports it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellplane.pipelines import plots
from cellplane.pipelines.annotation_protocol import TUNED, Arm, Study, Trial, arms_of, splits_of, study_of
from cellplane.pipelines.job import MODEL_ROW
from cellplane.pipelines.metrics import annotation_scores, confusion
from cellplane.pipelines.protocol import Entry, Evaluation, Ledger, Picture, Place
from cellplane.pipelines.protocol_config import AnnotationProtocol
from cellplane.pipelines.protocol_run import Finished, Ledgers, Opened, Say, base_notes, check_protocol, finish, open_data, out_of, quiet

Truths = dict[Place, NDArray[np.object_]]


def run_annotation_protocol(config: AnnotationProtocol, say: Say = quiet) -> Finished:
    """Every data set, seed, split and arm that the ledger does not know yet, and the report of all.

    Raises ConfigError before any work for files that are not there, DataError for data that cannot be split.
    """
    check_protocol(config)
    out = out_of(config, config.task)
    ledgers = Ledgers(out)
    truths: Truths = {}
    entries: list[Entry] = []
    notes: list[str] = []
    for name, asked in config.data.items():
        opened = open_data(name, asked, config.bases_for(name), config.tracking_uri)
        study = study_of(name, asked, opened.cells, opened.bases, config.fewest_cells)
        found, truth = _measured(config, study, opened, (ledgers, say))
        entries += found
        truths |= truth
        notes += [*_notes(study, found), *base_notes(name, [asked.path], opened.bases)]
    pictures = _drawn(entries, truths, out / "pictures")
    evaluation = Evaluation(config.task, "macro_f1", tuple(entries), tuple(pictures), tuple(notes), ("calibration_error",))
    return finish(evaluation, config, "Cell type annotation, beside tuned baselines and controls")


@dataclass(frozen=True)
class _Turn:
    """An arm's turn on a split."""

    trial: Trial
    arm: Arm
    place: Place


def _turns(config: AnnotationProtocol, study: Study) -> Iterator[_Turn]:
    """Everything that is fitted on a study, seed by seed, so that what is there early is a whole table."""
    for turn, seed in enumerate(config.seeds):
        for split in splits_of(study, turn, seed):
            for arm in arms_of(config, study, split.protocol):
                if seed in arm.seeds:
                    yield _Turn(Trial(study, split, seed), arm, Place(study.name, split.protocol, split.number, seed))


def _measured(config: AnnotationProtocol, study: Study, opened: Opened, to: tuple[Ledgers, Say]) -> tuple[list[Entry], Truths]:
    """Every entry of a study, and the truth of every place."""
    ledgers, say = to
    turns = list(_turns(config, study))
    entries: list[Entry] = []
    for number, turn in enumerate(turns, 1):
        names = [method.name for method in turn.arm.methods]
        ledger = ledgers.of(opened.identity, config.fewest_cells, names, turn.arm.settings)
        known = all(ledger.find(turn.place, name) is not None for name in names)
        found = [ledger.find(turn.place, name) for name in names] if known else _fitted(turn, ledger)
        entries += [entry for entry in found if entry is not None]
        if not known:
            say(_line(turn, [entry for entry in found if entry is not None], f"{number}/{len(turns)}"))
    return entries, {turn.place: turn.trial.truth for turn in turns}


def _fitted(turn: _Turn, ledger: Ledger) -> list[Entry]:
    """One fit's rows, all in the ledger before this returns; the first row carries the seconds."""
    rows: dict[str, Any] = {}
    first, *rest = turn.arm.methods
    share = turn.trial.split.test_share

    def work() -> Any:
        rows.update(turn.arm.work(turn.trial))
        return rows[first.name]

    entries = [ledger.measured(turn.place, first, work, share)]
    if not rows:  # the first row was known, another was lost in a kill
        rows.update(turn.arm.work(turn.trial))
    return entries + [ledger.measured(turn.place, method, lambda name=method.name: rows[name], share) for method in rest]  # type: ignore[misc]


def _line(turn: _Turn, found: Sequence[Entry], number: str) -> str:
    first, place = found[0], turn.place
    scores = f"macro-F1 {first.metrics['macro_f1']:.3f}  accuracy {first.metrics['accuracy']:.3f}"
    return (
        f"[{number}] {place.dataset} {place.protocol} {place.split} seed {place.seed}: {first.method.name}  {scores}  {first.seconds:.0f} s"
    )


def _notes(study: Study, found: Sequence[Entry]) -> list[str]:
    """What a reader must know of a data set: cells and types left out, the guard band, what the baseline was, how long a fit took."""
    size = f"{study.cells.n_obs} cells of {len(set(study.types))} types"
    lines = [f"{study.name}: {size}; {study.dropped} cells of rare or unnamed types left out"]
    if study.places is not None:
        unit = "unit unknown" if study.asked.um_per_unit is None else f"{study.asked.um_per_unit:g} um each"
        blocks = [split for split in splits_of(study, 0, 0) if split.protocol == "blocks"]
        kept = np.mean([len(split.train) / (study.cells.n_obs - len(split.test)) for split in blocks])
        band = f"a guard band of {study.asked.guard_units:g} units ({unit})"
        lines.append(f"{study.name}: {band} leaves {kept:.0%} of the cells outside a block to learn from")
    chosen = [entry.details["family"] for entry in found if entry.method.name == TUNED]
    if chosen:
        counts = ", ".join(f"{family} {chosen.count(family)}" for family in sorted(set(chosen)))
        lines.append(f"{study.name}: families chosen by inner cross-validation, times of {len(chosen)}: {counts}")
    if seconds := [entry.seconds for entry in found if entry.method.name == MODEL_ROW]:
        lines.append(f"{study.name}: a fit from scratch took {np.mean(seconds):.0f} s (at most {max(seconds):.0f})")
    return lines


def _drawn(entries: Sequence[Entry], truths: Truths, folder: Path) -> list[Picture]:
    """Confusion, per-class F1 beside the baseline, and reliability, for every table."""
    pictures = []
    for dataset, protocol in dict.fromkeys((entry.place.dataset, entry.place.protocol) for entry in entries):
        table = [entry for entry in entries if (entry.place.dataset, entry.place.protocol) == (dataset, protocol)]
        pictures += _pictures(table, truths, (folder, f"{dataset}, {protocol}"))
    return pictures


def _pictures(table: Sequence[Entry], truths: Truths, where: tuple[Path, str]) -> list[Picture]:
    folder, title = where
    name = title.replace(", ", "-")
    rows = {row: pooled([entry for entry in table if entry.method.name == row], truths) for row in (MODEL_ROW, TUNED)}
    truth, answers, confidence = rows[MODEL_ROW]
    classes = sorted({*truth, *answers})
    scores = {row: annotation_scores(true, guess) for row, (true, guess, _) in rows.items()}
    matrix = confusion(truth, answers, classes)
    return [
        Picture(
            f"{title}: truth and prediction",
            plots.confusion_plot(matrix, classes, folder / f"{name}-confusion.png", title),
            "Rows are true types, each asked once a seed; a bright diagonal is right.",
        ),
        Picture(
            f"{title}: F1 by type",
            plots.per_class_f1_plot(scores, folder / f"{name}-f1.png", title),
            "Ours beside the tuned baseline on the same cells, all splits together; rare types are at the bottom.",
        ),
        Picture(
            f"{title}: reliability",
            plots.reliability_plot(confidence, answers == truth, folder / f"{name}-reliability.png", title),
            "Bars on the dashed line: the stated confidence is the share of right answers.",
        ),
    ]


def pooled(entries: Sequence[Entry], truths: Mapping[Place, NDArray[np.object_]]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Truth, answers and confidence (empty for rows that state none) of all places of a row, one after the other."""
    truth = np.concatenate([truths[entry.place] for entry in entries])
    answers = np.concatenate([np.array(entry.details["answers"], dtype=object) for entry in entries])
    stated = [np.array(entry.details.get("confidence", []), dtype=np.float64) for entry in entries]
    return truth, answers, np.concatenate(stated)
