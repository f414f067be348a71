"""Batch inference: the predictor over files, as Ray Data tasks, exactly once and resumable.

Each input becomes one output of the same name, in memory that does not grow with its cells; it is written beside its
target and renamed, so a file that is there is whole. A second run does only what is missing: an answer counts as done when
this model gave it to this task and the input has not been written since. A damaged model or an unreadable input names the
file and keeps the rest.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from cellplane.artifact.folder import verify_model
from cellplane.config import Config, home
from cellplane.data.answers import answered_copy, takes_answers
from cellplane.data.company import Context, store_in
from cellplane.data.config import DataKeys
from cellplane.data.convert import quiet_ray_data
from cellplane.data.inputs import check_answers
from cellplane.data.sources import CellReader, check_h5ad, known_keys, read_h5ad, write_h5ad
from cellplane.data.stored import DiskRows, Stored, store_cells
from cellplane.errors import CellplaneError, ConfigError, ServiceError
from cellplane.inference import (
    LABELS_DERIVED,
    TASKS,
    BatchedStore,
    Predictor,
    answered,
    batches_of,
    decoded_in,
    flag_column,
    rates_of,
    record,
)
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
    """Folder of the answers: one h5ad of the same name for each input."""
    keys: DataKeys = DataKeys()
    """Where counts, batches and coordinates lie."""
    context: Context = "own"
    """In whose company cells are read: own (those of their batch), section (patches of neighbours) or self (alone)."""
    tracking_uri: str | None = None
    """MLflow server or database, only to find a registered model."""


@dataclass(frozen=True)
class PredictReport:
    """Files written now and found done before, cells of the new ones, and what failed: {input: reason}."""

    written: tuple[Path, ...]
    reused: tuple[Path, ...]
    cells: int
    failed: dict[str, str]


def predict_files(config: PredictConfig) -> PredictReport:
    """Annotates, embeds or denoises every input file into `config.out`; needs an initialised Ray.

    Raises ConfigError for missing settings or two inputs of one name, DataError when an input does not exist.
    """
    import ray
    import ray.data

    (inputs, model, sha256), out = check_predict(config), Path(config.out).absolute()
    if not ray.is_initialized():
        raise ServiceError("batch inference needs Ray: start a local cluster with `cellplane up`, or set RAY_ADDRESS")
    out.mkdir(parents=True, exist_ok=True)
    todo = [path for path in inputs if not answered(path, out / path.name, sha256, ANSWERS[config.task])]
    tasks = [{"input": str(path.absolute()), "out": str(out / path.name), "model": str(model.absolute())} for path in todo]
    settings = {"task": config.task, "context": config.context, "keys": config.keys.model_dump_json(), "home": str(home())}
    with quiet_ray_data():
        rows = ray.data.from_items([{**task, **settings} for task in tasks]).map(_predict_file).take_all() if tasks else []
    found = {row["input"]: json.loads(row["answer"]) for row in rows}
    answers = [found[str(task["input"])] for task in tasks]  # tasks end in any order
    return PredictReport(
        written=tuple(Path(answer["out"]) for answer in answers if answer["error"] is None),
        reused=tuple(out / path.name for path in inputs if path not in todo),
        cells=sum(answer["cells"] for answer in answers),
        failed={answer["input"]: answer["error"] for answer in answers if answer["error"] is not None},
    )


def check_predict(config: PredictConfig) -> tuple[list[Path], Path, str]:
    """Input files, model folder and its checksum, before any cluster is asked; raises as `predict_files`, but for the cluster."""
    for name in ("model", "inputs", "out"):
        if not getattr(config, name):
            raise ConfigError(f"{name} is empty: set it in the config or with -o {name}=...")
    inputs = [Path(path) for path in config.inputs]
    check_answers(inputs, Path(config.out))
    model = resolve_model(config.model, config.tracking_uri, home() / "cache").path
    manifest = verify_model(model)
    if config.task not in (can := TASKS[manifest["task"]]):
        raise ConfigError(f"{config.model} cannot {config.task}, it can {', '.join(can)}; name a model that was fine-tuned for it")
    return inputs, model, manifest["model_sha256"]


def _predict_file(task: dict[str, Any]) -> dict[str, str]:
    """One file in a Ray worker; an error of ours comes back as words, so that the other files go on."""
    os.environ["CELLPLANE_HOME"] = task["home"]
    try:
        keys, paths = DataKeys.model_validate_json(task["keys"]), (Path(task["input"]), Path(task["out"]))
        cells = predict_file(task["task"], Path(task["model"]), keys, paths, task["context"])
        error: str | None = None
    except CellplaneError as problem:
        cells, error = 0, str(problem)
    return {"input": task["input"], "answer": json.dumps({"input": task["input"], "out": task["out"], "cells": cells, "error": error})}


def predict_file(task: str, model: Path, keys: DataKeys, paths: tuple[Path, Path], context: str = "own") -> int:
    """Answers ``paths[0]`` in a copy of it at ``paths[1]``; the number of cells.

    Raises what reading the cells raises, naming the file where it is at fault, and StorageError when the disk is full.
    """
    source, target = paths
    predictor = Predictor.load(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    check_h5ad(source)
    if not takes_answers(source):
        return _predict_whole(task, model, keys, paths, context)
    with CellReader(source) as reader:
        keys = known_keys(keys, reader.obs_columns, reader.obsm_keys)
    with answered_copy(source, target) as answers:
        stored = store_cells(source, predictor.vocabulary, keys, target.parent)
        found = ANSWER[task](predictor, stored, context, target.parent)
        for name, values in found.columns.items():
            answers.column(f"cellplm_{name}", values)
        answers.column("cellplm_flag", flag_column(stored.table))
        place, name = ANSWERS[task]
        answers.matrix(place, name, found.rows)
        answers.note("cellplm", record(predictor.folder, {**stored.report, "context": found.context}))
    return stored.table.n_cells


@dataclass(frozen=True)
class _Found:
    """What is written into a file: ``columns`` of obs [n], ``rows`` of the answer itself, and the ``context`` of it."""

    columns: Mapping[str, Any]
    rows: DiskRows
    context: str


def _annotate(predictor: Predictor, stored: Stored, context: str, folder: Path) -> _Found:
    store, told = store_in(context, stored.table, predictor.max_cells)
    n, classes = stored.table.n_cells, predictor.folder.classes
    names = {name: code for code, name in enumerate(classes)}
    codes, confidence, strange = np.zeros(n, dtype=np.int32), np.zeros(n, dtype=np.float32), np.zeros(n, dtype=np.float32)
    proba = DiskRows((n, len(classes)), np.float32, folder)
    for rows, part in predictor.annotations(store):
        codes[rows] = [names.setdefault(label, len(names)) for label in part.labels]
        confidence[rows], proba[rows] = part.confidence, part.proba
        strange[rows] = 0 if part.unknown_score is None else part.unknown_score
    others = sorted(set(names) - {*classes})  # unknown, and broader names
    ordered = [*classes, *others]
    place = np.array([ordered.index(name) for name in names], dtype=np.int32)
    labels = pd.Categorical.from_codes(place[codes] if n else codes, categories=pd.Index(ordered))
    derived = dict.fromkeys(LABELS_DERIVED)  # None: an earlier model's is removed
    if predictor.judgement.rule is not None:
        derived["unknown_score"] = strange
    return _Found({"cell_type": labels, "confidence": confidence, **derived}, proba, told)


def _embed(predictor: Predictor, stored: Stored, context: str, folder: Path) -> _Found:
    store, told = store_in(context, stored.table, predictor.max_cells)
    latent = DiskRows((stored.table.n_cells, predictor.folder.config.latent_width), np.float32, folder)
    for rows, z in predictor.embeddings(store):
        latent[rows] = z
    return _Found({}, latent, told)


def _denoise(predictor: Predictor, stored: Stored, context: str, folder: Path) -> _Found:
    if context != "own":
        raise ConfigError("denoising reads cells in the context own, with their batch; leave context out")
    store = BatchedStore.of(stored.table, batches_of(predictor.folder), predictor.max_cells)
    rates = DiskRows((stored.table.n_cells, len(stored.columns)), np.float32, folder)
    for rows, shares in predictor.rates(store, decoded_in(predictor.folder, store, None)):
        rates[rows] = rates_of(shares, stored.columns)
    _, told = store_in("own", stored.table, predictor.max_cells)
    return _Found({"size_factor": stored.table.totals().astype(np.float32)}, rates, told)


ANSWER: dict[str, Callable[[Predictor, Stored, str, Path], _Found]] = {"annotate": _annotate, "embed": _embed, "denoise": _denoise}


def _predict_whole(task: str, model: Path, keys: DataKeys, paths: tuple[Path, Path], context: str) -> int:
    """A file whose tables are in the form of old versions, in memory: brought into the present form, and answered."""
    adata = read_h5ad(paths[0])
    with tempfile.TemporaryDirectory(dir=paths[1].parent, prefix=".cellplane-") as folder:
        present = Path(folder) / paths[0].name
        write_h5ad(adata, present)
        return predict_file(task, model, keys, (present, paths[1]), context)
