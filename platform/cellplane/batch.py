"""Batch inference: the predictor over files, as Ray Data tasks, exactly once and resumable.

Each input becomes one output of the same name, in memory that does not grow with its cells; it is written beside its
target and renamed, so a file that is there is whole. A second run does only what is missing: an answer counts as done when
this model gave it to this task and the input has not been written since. A damaged model or an unreadable input names the
file and keeps the rest.
"""

from __future__ import annotations

import glob
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import TypeAdapter

from cellplane.artifact.folder import read_manifest, verify_model
from cellplane.config import Config, home
from cellplane.data.answer_tables import NAMES, PLACE, RECORD, SUFFIX, is_table, read_record, write_answers
from cellplane.data.answers import answered_copy, takes_answers
from cellplane.data.company import Context
from cellplane.data.config import DataKeys
from cellplane.data.convert import quiet_ray_data
from cellplane.data.files import fault, gone_if_empty
from cellplane.data.guard import none_usable
from cellplane.data.inputs import check_answers
from cellplane.data.manifest import parse_vocabulary
from cellplane.data.sources import CellReader, check_h5ad, known_keys, read_h5ad, write_h5ad
from cellplane.data.stored import DiskRows, Stored, check_answerable, store_cells
from cellplane.errors import CellplaneError, ConfigError, DataError, ServiceError
from cellplane.genes import GeneVocabulary, gene_warnings
from cellplane.inference import (
    LABELS_DERIVED,
    TASKS,
    BatchedStore,
    Predictor,
    answered,
    decoded_in,
    flag_column,
    keys_of,
    rates_of,
    reading_keys,
    record,
)
from cellplane.results import same_call, with_warnings
from cellplane.tracking.registry import resolve_model

ANSWERS: dict[str, tuple[Literal["obsm", "layers"], str]] = {  # what an answer to each task holds, and where
    "annotate": ("obsm", "cellplm_cell_type_proba"),
    "embed": ("obsm", "X_cellplm"),
    "denoise": ("layers", "cellplm_denoised"),
}


class PredictConfig(Config):
    """Annotating, embedding or denoising the cells of h5ad files."""

    kind: Literal["predict"] = "predict"
    """What this file configures."""
    task: Literal["annotate", "embed", "denoise"] = "annotate"
    """What is asked of the model."""
    model: str = ""
    """Model folder or models:/NAME@ALIAS."""
    inputs: tuple[str, ...] = ()
    """h5ad files."""
    out: str = ""
    """Folder of the answers: one file of the same name for each input; or, for one input, a file whose name ends in .parquet."""
    format: Literal["h5ad", "parquet"] = "h5ad"
    """h5ad: a copy of each input with the answers in it; parquet: the answers alone, one row a cell, under the same names."""
    keys: DataKeys = DataKeys()
    """Where counts, batches and coordinates lie; what is not named here lies as in the cells that the model learned."""
    context: Context = "own"
    """In whose company cells are read: own (those of their batch), section (patches of neighbours), self (alone), or the model's panel."""
    tracking_uri: str | None = None
    """MLflow server or database, only to find a registered model."""


@dataclass(frozen=True)
class PredictReport:
    """Files written now and found done before, cells of the new ones, and what failed: {input: reason}."""

    written: tuple[Path, ...]
    reused: tuple[Path, ...]
    cells: int
    failed: dict[str, str]


Task = dict[str, str]


def predict_files(config: PredictConfig) -> PredictReport:
    """Annotates, embeds or denoises every input file into `config.out`; needs an initialised Ray.

    A worker that dies is replaced and its file begun anew. Raises ConfigError for missing settings or two inputs of one
    name, DataError when an input does not exist.
    """
    import ray
    import ray.data

    def on_ray(tasks: list[Task]) -> Iterable[Task]:
        if not ray.is_initialized():
            raise ServiceError("batch inference needs Ray: start a local cluster with `cellplane up`, or set RAY_ADDRESS")
        with quiet_ray_data():
            rows: list[Task] = ray.data.from_items(tasks).map(answer_task).take_all() if tasks else []
        return rows

    return predict_with(config, on_ray)


def predict_with(config: PredictConfig, answer_all: Callable[[list[Task]], Iterable[Task]]) -> PredictReport:
    """The same, with ``answer_all`` calling `answer_task` on every task, in any order, wherever it likes."""
    inputs, model, sha256 = check_predict(config)
    targets = dict(zip(inputs, targets_of(config, inputs), strict=True))
    todo = [path for path in inputs if not _is_done(path, targets[path], sha256, config)]
    tasks = [{"input": str(path.absolute()), "out": str(targets[path]), "model": str(model.absolute())} for path in todo]
    settings = {"task": config.task, "context": config.context, "keys": _keys(config, model).model_dump_json(), "home": str(home())}
    _sweep([targets[path] for path in todo])
    with gone_if_empty(targets[inputs[0]].parent):  # all are in one folder
        rows = answer_all([{**task, **settings} for task in tasks])
        found = {row["input"]: json.loads(row["answer"]) for row in rows}
        _sweep([targets[path] for path in todo])
    answers = [found[task["input"]] for task in tasks]  # tasks end in any order
    return PredictReport(
        written=tuple(Path(answer["out"]) for answer in answers if answer["error"] is None),
        reused=tuple(targets[path] for path in inputs if path not in todo),
        cells=sum(answer["cells"] for answer in answers),
        failed={answer["input"]: answer["error"] for answer in answers if answer["error"] is not None},
    )


def _sweep(targets: Sequence[Path]) -> None:
    """Removes what writers that were killed left of these files; nobody writes them now."""
    for target in targets:
        for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
            left.unlink(missing_ok=True)


def targets_of(config: PredictConfig, inputs: Sequence[Path]) -> list[Path]:
    """Where the answer to each input goes; ConfigError for one file as the answer to several, or two answers of one name."""
    out = Path(config.out).absolute()
    if is_table(out):
        if len(inputs) != 1:
            raise ConfigError(f"{config.out} is one file and there are {len(inputs)} inputs; name a folder, and format=parquet")
        return [out]
    targets = [out / (f"{path.stem}{SUFFIX}" if config.format == "parquet" else path.name) for path in inputs]
    if len(set(targets)) != len(targets):
        raise ConfigError("two inputs have the same file name, their answers would overwrite each other: rename one")
    return targets


def _is_done(source: Path, target: Path, sha256: str, config: PredictConfig) -> bool:
    """Whether the answer is there, of this model, to this task, in this company, about the input as it is now."""
    if not is_table(target):
        return answered(source, target, sha256, ANSWERS[config.task], config.context)
    if not target.is_file() or target.stat().st_mtime_ns < source.stat().st_mtime_ns:
        return False
    try:
        said = read_record(target)
    except DataError:
        return False
    return same_call(said.get(RECORD, {}), sha256, config.context) and said.get(PLACE) == _place(config.task)


def _place(task: str) -> dict[str, str]:
    place, name = ANSWERS[task]
    return {"in": place, "as": name}


def check_predict(config: PredictConfig) -> tuple[list[Path], Path, str]:
    """Input files, model folder and its checksum, before any cluster is asked; raises as `predict_files`, but for the cluster."""
    for name in ("model", "inputs", "out"):
        if not getattr(config, name):
            raise ConfigError(f"{name} is empty: set it in the config or with -o {name}=...")
    inputs = [Path(path) for path in config.inputs]
    check_answers(inputs, Path(config.out))
    targets_of(config, inputs)
    model = resolve_model(config.model, config.tracking_uri, home() / "cache").path
    manifest = verify_model(model)
    if config.task not in (can := TASKS[manifest["task"]]):
        raise ConfigError(f"{config.model} cannot {config.task}, it can {', '.join(can)}; name a model that was fine-tuned for it")
    return inputs, model, manifest["model_sha256"]


def _keys(config: PredictConfig, model: Path) -> DataKeys:
    """How the files are read: as is said, else as the cells that the model learned."""
    return reading_keys(keys_of(read_manifest(model, "cellplane-model")["lineage"]), config.keys)


def refuse_if_none_answerable(config: PredictConfig) -> None:
    """DataError with the reason for each input when this model can answer none, seen before a cluster is started for nothing.

    One that it can, or an answer that is there already, is enough: the rest is said of the others in the report.
    """
    inputs, model, sha256 = check_predict(config)
    keys, vocabulary, reasons = _keys(config, model), parse_vocabulary(model), list[str]()
    for path, target in zip(inputs, targets_of(config, inputs), strict=True):
        if _is_done(path, target, sha256, config):
            return
        try:
            check_answerable(path, keys, vocabulary)
        except DataError as error:
            reasons.append(str(error))
        else:
            return
    raise DataError(none_usable(reasons))


def answer_task(task: Task) -> Task:
    """One file in a worker; an error of ours comes back as words, so that the other files go on."""
    fault("before_answer")
    os.environ["CELLPLANE_HOME"] = task["home"]
    try:
        keys, paths = DataKeys.model_validate_json(task["keys"]), (Path(task["input"]), Path(task["out"]))
        context: Context = TypeAdapter(Context).validate_python(task["context"])
        cells = predict_file(task["task"], Path(task["model"]), keys, paths, context)
        error: str | None = None
    except CellplaneError as problem:
        cells, error = 0, str(problem)
    fault("after_answer")
    return {"input": task["input"], "answer": json.dumps({"input": task["input"], "out": task["out"], "cells": cells, "error": error})}


def predict_file(task: str, model: Path, keys: DataKeys, paths: tuple[Path, Path], context: Context = "own") -> int:
    """Answers ``paths[0]`` in a copy of it at ``paths[1]``, or beside it when that is a Parquet file; the number of cells.

    Raises what reading the cells raises, naming the file where it is at fault, and StorageError when the disk is full.
    """
    source, target = paths
    target.parent.mkdir(parents=True, exist_ok=True)
    check_h5ad(source)
    if not takes_answers(source):
        return _predict_whole(task, model, keys, paths, context)
    with _loading(model) as coming:
        return _predict_parts(task, coming, keys, paths, context)


@dataclass(frozen=True)
class _Coming:
    """A model that is being read and verified: its genes at once, itself as soon as it is there."""

    vocabulary: GeneVocabulary
    predictor: Callable[[], Predictor]


@contextmanager
def _loading(model: Path) -> Iterator[_Coming]:
    """A model, read beside what the block does until it asks for it; raises what `Predictor.load` raises when it does."""
    with ThreadPoolExecutor(1) as thread:
        loaded = thread.submit(Predictor.load, model)
        try:
            vocabulary = parse_vocabulary(model)
        except (CellplaneError, OSError):
            loaded.result()  # says better what is wrong with the folder
            raise
        yield _Coming(vocabulary, loaded.result)


def _predict_parts(task: str, coming: _Coming, keys: DataKeys, paths: tuple[Path, Path], context: Context) -> int:
    """The same for a file whose cells can be read a part at a time."""
    source, target = paths
    with CellReader(source) as reader:
        keys = known_keys(keys, reader.obs_columns, reader.obsm_keys)
        names = reader.cell_names(0, reader.n_cells) if is_table(target) else np.zeros(0, dtype=object)
        genes = reader.gene_names if is_table(target) else []
    asked, (place, name) = (source, keys, context), ANSWERS[task]
    if is_table(target):
        found, stored = _answer(task, coming, asked, target.parent)
        about = {
            RECORD: _record(coming.predictor(), stored, found),
            PLACE: _place(task),
            NAMES: list(genes if place == "layers" else coming.predictor().classes),
        }
        write_answers(target, names, _columns(found, stored), (name, found.rows), about)
        return stored.table.n_cells
    with answered_copy(source, target) as answers:
        found, stored = _answer(task, coming, asked, target.parent)
        for column, values in _columns(found, stored).items():
            answers.column(column, values)
        answers.matrix(place, name, found.rows)
        answers.note("cellplm", _record(coming.predictor(), stored, found))
    return stored.table.n_cells


def _answer(task: str, coming: _Coming, asked: tuple[Path, DataKeys, Context], scratch: Path) -> tuple[_Found, Stored]:
    """What a model says of a file's cells, and the cells as they were read."""
    source, keys, context = asked
    stored = store_cells(source, coming.vocabulary, keys, scratch)
    fault("cells_read")
    return ANSWER[task](coming.predictor(), stored, context, scratch), stored


def _columns(found: _Found, stored: Stored) -> dict[str, Any]:
    """Columns of obs [n]; None removes one of that name."""
    return {**{f"cellplm_{name}": values for name, values in found.columns.items()}, "cellplm_flag": flag_column(stored.table)}


def _record(predictor: Predictor, stored: Stored, found: _Found) -> dict[str, Any]:
    warned = with_warnings(stored.report, gene_warnings(stored.report, len(predictor.vocabulary)))
    return record(predictor.folder, {**warned, "context": found.context})


@dataclass(frozen=True)
class _Found:
    """What is written into a file: ``columns`` of obs [n], ``rows`` of the answer itself, and the ``context`` of it."""

    columns: Mapping[str, Any]
    rows: DiskRows
    context: str


def _annotate(predictor: Predictor, stored: Stored, context: Context, folder: Path) -> _Found:
    store, told = predictor.store(stored.table, context)
    n, classes = stored.table.n_cells, predictor.folder.classes
    names = {name: code for code, name in enumerate(classes)}
    codes, confidence, strange = np.zeros(n, dtype=np.int32), np.zeros(n, dtype=np.float32), np.zeros(n, dtype=np.float32)
    proba = DiskRows((n, len(classes)), np.float32, folder)
    for rows, part in predictor.annotations(store):
        codes[rows] = [names.setdefault(label, len(names)) for label in part.labels]
        confidence[rows], proba[rows] = part.confidence, part.proba
        strange[rows] = 0 if part.unknown_score is None else part.unknown_score
        fault("cells_answered")
    others = sorted(set(names) - {*classes})  # unknown, and broader names
    ordered = [*classes, *others]
    place = np.array([ordered.index(name) for name in names], dtype=np.int32)
    labels = pd.Categorical.from_codes(place[codes] if n else codes, categories=pd.Index(ordered))
    derived = dict.fromkeys(LABELS_DERIVED)  # None: an earlier model's is removed
    if predictor.judgement.rule is not None:
        derived["unknown_score"] = strange
    return _Found({"cell_type": labels, "confidence": confidence, **derived}, proba, told)


def _embed(predictor: Predictor, stored: Stored, context: Context, folder: Path) -> _Found:
    store, told = predictor.store(stored.table, context)
    latent = DiskRows((stored.table.n_cells, predictor.folder.config.latent_width), np.float32, folder)
    for rows, z in predictor.embeddings(store):
        latent[rows] = z
        fault("cells_answered")
    return _Found({}, latent, told)


def _denoise(predictor: Predictor, stored: Stored, context: Context, folder: Path) -> _Found:
    if context != "own":
        raise ConfigError("denoising reads cells in the context own, with their batch; leave context out")
    store = BatchedStore.for_model(stored.table, predictor.folder)
    rates = DiskRows((stored.table.n_cells, len(stored.columns)), np.float32, folder)
    for rows, shares in predictor.rates(store, decoded_in(predictor.folder, store, None)):
        rates[rows] = rates_of(shares, stored.columns)
        fault("cells_answered")
    _, told = predictor.store(stored.table, "own")
    return _Found({"size_factor": stored.table.totals().astype(np.float32)}, rates, told)


ANSWER: dict[str, Callable[[Predictor, Stored, Context, Path], _Found]] = {"annotate": _annotate, "embed": _embed, "denoise": _denoise}


def _predict_whole(task: str, model: Path, keys: DataKeys, paths: tuple[Path, Path], context: Context) -> int:
    """A file whose tables are in the form of old versions, in memory: brought into the present form, and answered."""
    adata = read_h5ad(paths[0])
    with tempfile.TemporaryDirectory(dir=paths[1].parent, prefix=".cellplane-") as folder:
        present = Path(folder) / paths[0].name
        write_h5ad(adata, present)
        return predict_file(task, model, keys, (present, paths[1]), context)
