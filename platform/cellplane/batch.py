"""Batch inference: the predictor over files, as Ray Data tasks, exactly once and resumable.

Each input becomes one output of the same name, written beside its target and renamed, so a file that is there is
whole. A second run does only what is missing: an answer counts as done when this model gave it to this task and the
input has not been written since. A damaged model or an unreadable input names the file and keeps the rest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cellplane.artifact.folder import verify_model
from cellplane.config import Config, home
from cellplane.data.config import DataKeys
from cellplane.data.convert import quiet_ray_data
from cellplane.data.inputs import check_answers
from cellplane.data.sentences import CellTable
from cellplane.data.sources import AnnData, read_h5ad, write_h5ad
from cellplane.errors import CellplaneError, ConfigError, ServiceError
from cellplane.inference import (
    TASKS,
    Predictor,
    answered,
    denoise,
    query_keys,
    read_cells,
    record,
    write_annotation,
    write_denoised,
    write_flags,
)
from cellplane.tracking.registry import resolve_model

ANSWERS = {  # what an answer to each task holds, and where
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
    settings = {"task": config.task, "keys": config.keys.model_dump_json(), "home": str(home())}
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
        cells = predict_file(task["task"], Path(task["model"]), keys, paths)
        error: str | None = None
    except CellplaneError as problem:
        cells, error = 0, str(problem)
    return {"input": task["input"], "answer": json.dumps({"input": task["input"], "out": task["out"], "cells": cells, "error": error})}


def predict_file(task: str, model: Path, keys: DataKeys, paths: tuple[Path, Path]) -> int:
    """Reads ``paths[0]``, writes it with the answer added to ``paths[1]``; the number of cells."""
    adata, predictor = read_h5ad(paths[0]), Predictor.load(model)
    keys = query_keys(adata, keys)
    table, report = ANSWER[task](adata, predictor, keys)
    write_flags(adata, table)
    adata.uns["cellplm"] = record(predictor.folder, report)
    write_h5ad(adata, paths[1])
    return int(adata.n_obs)


Answered = tuple[CellTable, Mapping[str, Any]]  # the cells as they were read, and the report of that


def _annotate(adata: AnnData, predictor: Predictor, keys: DataKeys) -> Answered:
    read = read_cells(adata, predictor.vocabulary, keys, predictor.max_cells)
    write_annotation(adata, predictor.annotate(read.store))
    return read.store.table, read.report


def _embed(adata: AnnData, predictor: Predictor, keys: DataKeys) -> Answered:
    read = read_cells(adata, predictor.vocabulary, keys, predictor.max_cells)
    adata.obsm["X_cellplm"] = predictor.embed(read.store)
    return read.store.table, read.report


def _denoise(adata: AnnData, predictor: Predictor, keys: DataKeys) -> Answered:
    found = denoise(predictor, adata, keys)
    write_denoised(adata, found)
    return found.table, found.report


ANSWER: dict[str, Callable[[AnnData, Predictor, DataKeys], Answered]] = {"annotate": _annotate, "embed": _embed, "denoise": _denoise}
