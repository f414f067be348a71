"""Trying annotation: labels of the user's own cells are hidden and named again, by the model and by tuned simple methods."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellplane.data.columns import missing_column
from cellplane.data.config import DataKeys
from cellplane.data.sentences import CellTable
from cellplane.data.sources import AnnData, cell_table, column, find_counts, read_h5ad
from cellplane.errors import ColumnError, ConfigError, DataError
from cellplane.genes import GeneVocabulary
from cellplane.inference import query_keys
from cellplane.pipelines.annotation import UNLABELLED, CellTypeAnnotationPipeline
from cellplane.pipelines.annotation_baselines import Tuned, tuned_baselines
from cellplane.pipelines.drawing import confusion_size, draw_confusion, new_axes
from cellplane.pipelines.job import MODEL_ROW
from cellplane.pipelines.metrics import annotation_scores, confusion
from cellplane.pipelines.plots import per_class_f1_plot, reliability_plot, save_axes
from cellplane.pipelines.protocol import Entry, Found, Method, Picture, Place
from cellplane.pipelines.second_opinion import counts_of
from cellplane.pipelines.splits import Split, batch_splits, block_splits, random_splits
from cellplane.pipelines.try_config import TryAnnotation
from cellplane.pipelines.try_parts import Bench, Task, Tried, base_of, evaluation_of, how_long, still_to_go
from cellplane.pipelines.verdict import Measure, Verdict, macro_f1_lead

SIMPLE = "tuned simple methods"  # where several families were chosen
MEASURE = Measure("macro-F1", "hidden cells")
CELL_STEP_S = 1.5e-4  # measured: 120 s for 3 networks x 500 steps x 466 cells of 800 genes, on two cores that others used too
CELLS_A_FOLD = 2  # of a type in each fold; rarer types cannot be tried
PAIR = "both"  # the ledger's name for an entry with all answers of a split


@dataclass(frozen=True)
class Study:
    """Cells to learn from and cells to ask, the labels of both [n] (None: unknown), and which rows to use when."""

    train: AnnData
    asked: AnnData
    labels: NDArray[Any]
    truth: NDArray[Any]
    splits: tuple[Split, ...]
    notes: tuple[str, ...]


def measure_annotation(config: TryAnnotation, bench: Bench) -> Tried:
    """Hides, answers, compares; every split is measured once and remembered."""
    study = read_study(config)
    entries, found = list[Entry](), list[tuple[Split, Entry]]()
    for number, split in enumerate(study.splits, 1):
        place = Place(Path(config.data).stem, split.protocol, split.number, config.seed)
        to_go = still_to_go([entry.seconds for _, entry in found], len(study.splits)) or f", {first_guess(config, study.splits)} in all"
        bench.say(f"[{number}/{len(study.splits)}] {len(split.test)} labels hidden, {len(split.train)} cells to learn from{to_go}")
        entry = bench.ledger.measured(place, Method(PAIR, "control"), lambda split=split: _measured(config, study, split), split.test_share)  # type: ignore[misc]
        found.append((split, entry))
        entries += _rows(entry, study, split)
    pooled = _pooled(study, found)
    verdict = _verdict(pooled, [entry.details["best"] for _, entry in found], config.seed)
    names = {MODEL_ROW: pooled["model"], verdict.baseline: pooled["simple"]}
    pictures = _pictures(pooled, names, bench.pictures)
    return Tried(verdict, evaluation_of("macro_f1", entries, "annotate", study.notes, pictures))


def first_guess(config: TryAnnotation, splits: Sequence[Split]) -> str:
    """How long a trial takes on two cores, told before anything was measured: networks x steps x cells of every split."""
    networks = 0 if config.recipe.method == "neighbours" else config.recipe.members
    cells = sum(min(len(split.train), config.recipe.max_cells) for split in splits)
    return how_long(networks * config.recipe.optimizer.steps * cells * CELL_STEP_S)


def read_study(config: TryAnnotation) -> Study:
    """The cells and what to hide of them; DataError when there is nothing to hide."""
    key = str(config.recipe.keys.labels_key)
    asked = read_h5ad(Path(config.data))
    truth = _labels(asked, key)
    if not any(label is not None for label in truth):
        where = "without any there is nothing to hide: label some cells" + (", or use `cellplane annotate`" if config.reference else "")
        raise DataError(f"{config.data}: no cell has a label in obs[{key!r}]; {where}")
    if config.reference:
        train = read_h5ad(Path(config.reference))
        return _by_reference(config, train, asked, truth)
    rare = {name for name, cells in Counter(truth).items() if name is not None and cells < CELLS_A_FOLD * config.folds}
    notes = (
        [f"Types with fewer than {CELLS_A_FOLD * config.folds} labelled cells cannot be tried: {', '.join(sorted(rare))}."] if rare else []
    )
    kept = np.array([None if label in rare else label for label in truth], dtype=object)
    types = sorted({label for label in kept if label is not None})
    if len(types) < 2:
        raise DataError(
            f"{config.data}: obs[{key!r}] has {len(types)} types with {CELLS_A_FOLD * config.folds} labelled cells or more "
            f"({', '.join(types) or 'none'}); naming types again needs two of them"
        )
    rows = np.flatnonzero(kept != None)  # noqa: E711  (an array of objects)
    cells = asked[rows]
    protocol = _protocol(config, cells)
    splits = tuple(_placed(split, rows) for split in _splits(protocol, config, cells, kept[rows]))
    if not splits:
        raise DataError(f"{config.data}: leaving out any sample leaves one type to learn from; hide single cells: -o split=random")
    notes.append(TOLD[protocol])
    if protocol == "random" and (sample := config.recipe.keys.batch_key) is not None and len(set(column(cells, sample))) < 2:
        notes[-1] = f"obs[{sample!r}] names a single sample, so single cells were hidden: this tells how other cells of it would be named."
    if protocol == "batch" and (more := len(set(column(cells, str(config.recipe.keys.batch_key)))) - len(splits)):
        notes.append(f"{more} samples were not hidden: without any of them a single type is left to learn from.")
    return Study(asked, asked, kept, kept, splits, tuple(notes))


TOLD = {
    "random": "Single cells were hidden: this tells how unlabelled cells of the SAME samples would be named. Name the sample column "
    "(--batch-key) to hide whole samples instead.",
    "batch": "Whole samples were hidden, one at a time: this tells how a new sample would be named.",
    "blocks": "Blocks of tissue were hidden, with a band around them left out: neighbours cannot give the answer away.",
    "reference": "All labels of the file were hidden and named from the reference; names that the reference does not have count as wrong.",
}


def _labels(data: AnnData, key: str) -> NDArray[Any]:
    found = column(data, key)
    found[np.isin(found, UNLABELLED)] = None
    return found


def _by_reference(config: TryAnnotation, train: AnnData, asked: AnnData, truth: NDArray[Any]) -> Study:
    labels = _labels(train, str(config.recipe.keys.labels_key))
    rows, theirs = (np.flatnonzero([label is not None for label in both]) for both in (labels, truth))
    notes = [TOLD["reference"]]
    if foreign := sorted(set(truth[theirs]) - set(labels[rows])):
        cells = int(np.isin(truth[theirs], foreign).sum())
        notes.append(f"{cells} cells have names that the reference lacks: {', '.join(foreign[:8])}.")
    if len(foreign) == len(set(truth[theirs])):
        raise DataError(f"reference and file share no label ({', '.join(foreign[:5])}): rename the types of one of them")
    _aligned(train, asked, config.recipe.keys)  # too few shared genes are found here, not after a fit
    return Study(train, asked, labels, truth, (Split("reference", 0, rows, theirs),), tuple(notes))


def _protocol(config: TryAnnotation, data: AnnData) -> str:
    keys = config.recipe.keys
    if config.split == "auto":
        if keys.batch_key is not None:
            return "batch" if len(set(column(data, keys.batch_key))) > 1 else "random"
        return "blocks" if keys.spatial_key is not None else "random"
    needed = {"batch": "batch_key", "blocks": "spatial_key"}.get(config.split)
    if needed is not None and getattr(keys, needed) is None:
        raise ConfigError(f"split {config.split} needs to know recipe.keys.{needed}")
    return config.split


def _splits(protocol: str, config: TryAnnotation, data: AnnData, labels: NDArray[Any]) -> Sequence[Split]:
    keys = config.recipe.keys
    if protocol == "batch":
        return [split for split in batch_splits(column(data, str(keys.batch_key))) if len(set(labels[split.train])) > 1]
    if protocol == "blocks":
        if keys.spatial_key not in data.obsm:
            raise ColumnError(missing_column(str(keys.spatial_key), list(data.obsm), "obsm"))
        return list(block_splits(np.asarray(data.obsm[str(keys.spatial_key)], dtype=np.float64), config.seed, config.folds))
    return list(random_splits(labels, config.seed, config.folds))


def _placed(split: Split, rows: NDArray[np.int64]) -> Split:
    return Split(split.protocol, split.number, rows[split.train], rows[split.test])


def _measured(config: TryAnnotation, study: Study, split: Split) -> Found:
    """Answers of the model and of every simple method for the hidden cells of a split."""
    train, asked = study.train[split.train].copy(), study.asked[split.test].copy()
    pipeline = fitted_annotator(config, train)
    answers = pipeline.predict(asked, key_added="tried").astype(str)
    confidence = asked.obs["tried_confidence"].to_numpy()
    tuned = tuned_answers((train, study.labels[split.train]), asked, config.recipe.keys, config.seed)
    details = {"model": answers.tolist(), "confidence": [round(float(value), 5) for value in confidence], "best": tuned.best}
    details |= {"simple": {name: given.tolist() for name, given in tuned.answers.items()}, "settings": dict(tuned.settings)}
    return Found({}, details)


def fitted_annotator(config: TryAnnotation, train: AnnData) -> CellTypeAnnotationPipeline:
    """The model, learned from the labelled cells of ``train``."""
    recipe = config.recipe.model_copy(update={"seed": config.seed})
    return CellTypeAnnotationPipeline(base_of(config), recipe).fit(train)


def tuned_answers(train: tuple[AnnData, NDArray[Any]], asked: AnnData, keys: DataKeys, seed: int) -> Tuned:
    """What the simple methods, tuned on the training cells, say of the asked ones, over the genes that both measured."""
    cells, labels = train
    mine, theirs = _aligned(cells, asked, keys)
    shared = np.flatnonzero(mine.panel & theirs.panel)
    return tuned_baselines((counts_of(mine)[:, shared], labels.astype(str)), counts_of(theirs)[:, shared], seed)


def _aligned(train: AnnData, asked: AnnData, keys: DataKeys) -> tuple[CellTable, CellTable]:
    """Both over the genes of the training cells; VocabularyError when they share too few."""
    vocabulary = GeneVocabulary.from_ids(dict.fromkeys(find_counts(train, keys).gene_ids))
    mine, theirs = (cell_table(cells, vocabulary, query_keys(cells, keys))[0] for cells in (train, asked))
    return mine, theirs


def _rows(entry: Entry, study: Study, split: Split) -> list[Entry]:
    """A row of scores for the model and for each simple method."""
    truth, found = study.truth[split.test], []
    answers: Mapping[str, Any] = {MODEL_ROW: entry.details["model"], **entry.details["simple"]}
    for name, given in answers.items():
        scores = annotation_scores(truth, np.array(given, dtype=object))
        method = Method(name, "model" if name == MODEL_ROW else "baseline")
        found.append(Entry(entry.place, method, {"macro_f1": scores["macro_f1"], "accuracy": scores["accuracy"]}, 0.0, entry.test_share))
    return found


def _pooled(study: Study, found: Sequence[tuple[Split, Entry]]) -> dict[str, NDArray[Any]]:
    """Every hidden cell once: truth, the model's answer and confidence, and that of the simple method its split chose."""
    parts = {
        "truth": [study.truth[split.test] for split, _ in found],
        "model": [entry.details["model"] for _, entry in found],
        "simple": [entry.details["simple"][entry.details["best"]] for _, entry in found],
    }
    pooled = {name: np.concatenate([np.array(part, dtype=object) for part in values]) for name, values in parts.items()}
    return {**pooled, "confidence": np.concatenate([entry.details["confidence"] for _, entry in found])}


def _verdict(pooled: Mapping[str, NDArray[Any]], chosen: Sequence[str], seed: int) -> Verdict:
    truth, model, simple = pooled["truth"], pooled["model"], pooled["simple"]
    scores = [annotation_scores(truth, answer)["macro_f1"] for answer in (model, simple)]
    name = chosen[0] if len(set(chosen)) == 1 else f"{SIMPLE} ({', '.join(sorted(set(chosen)))})"
    return Verdict(MEASURE, len(truth), scores[0], name, scores[1], macro_f1_lead(truth, model, simple, seed))


def _pictures(pooled: Mapping[str, NDArray[Any]], names: Mapping[str, NDArray[Any]], folder: Path) -> list[Picture]:
    truth, model = pooled["truth"], pooled["model"]
    classes = sorted({*truth, *model})
    axes = draw_confusion(new_axes(confusion_size(len(classes))), confusion(truth, model, classes), classes)
    scores = {name: annotation_scores(truth, answer) for name, answer in names.items()}
    known = np.asarray(pooled["confidence"], dtype=np.float64).clip(0, 1)
    return [
        Picture("Hidden labels and what the model said", save_axes(axes, folder / "confusion.png"), "Every hidden cell once."),
        Picture("F1 by cell type", per_class_f1_plot(scores, folder / "f1.png"), "Rare types below: there one cell counts much."),
        Picture(
            "Can the confidence be believed?",
            reliability_plot(known, truth == model, folder / "reliability.png"),
            "Bars on the diagonal: of the cells named with a confidence of 0.8, 80 % are right.",
        ),
    ]


def answer_annotation(config: TryAnnotation, winner: str) -> tuple[AnnData | None, str]:
    """All cells of the file with obs auto_cell_type, auto_source and, by the model, auto_confidence; labelled cells keep their name."""
    key = str(config.recipe.keys.labels_key)
    data = read_h5ad(Path(config.data))
    given = _labels(data, key)
    asked = np.flatnonzero([label is None for label in given])
    if not len(asked):
        return None, "every cell of the file has a label: there is nothing to answer"
    train = read_h5ad(Path(config.reference)) if config.reference else data
    labels = _labels(train, key)
    known = np.flatnonzero([label is not None for label in labels])
    learned, query = (train[known].copy(), labels[known]), data[asked].copy()
    confidence = np.full(data.n_obs, np.nan, dtype=np.float32)
    if winner == MODEL_ROW:
        pipeline = fitted_annotator(config, learned[0])
        answers = pipeline.predict(query, key_added="auto").astype(str)
        confidence[asked] = query.obs["auto_confidence"].to_numpy()
    else:
        tuned = tuned_answers(learned, query, config.recipe.keys, config.seed)
        answers = tuned.answers[tuned.best]
        winner = tuned.best
    given[asked] = answers
    data.obs["auto_cell_type"] = pd.Categorical(given.astype(str))
    data.obs["auto_source"] = pd.Categorical(np.where(np.isin(np.arange(data.n_obs), asked), "predicted", "given"))
    data.obs["auto_confidence"] = confidence
    return data, f"{len(asked)} unlabelled cells named by {winner}"


ANNOTATE = Task(TryAnnotation, measure_annotation, answer_annotation)
