"""The replica that holds one version of a model, and what it says to a request.

A replica loads our own model folder only (manifest, sha256, safetensors, strict): never a pickle. Requests that wait
together are packed into one forward, each in sentences of its own (see `packing`), so an answer is the same alone and
among a hundred others.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cellplane.data.sentences import CellTable, MemoryStore, memory_store
from cellplane.errors import ConfigError, DataError, IntegrityError, VocabularyError
from cellplane.genes import gene_warnings
from cellplane.inference import Predictor
from cellplane.model.config import Precision
from cellplane.pipelines.golden import check_golden, golden_answers

from .codec import to_store
from .deployment import ServeConfig
from .limits import refuse
from .options import OPTIONS
from .packing import Answers, PackedStore, Packer
from .routes import Version
from .tasks import Computation, Loaded, Prepared, Question, compute, prepare, worded

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """Columns of an answer by name, [n] or [n, width] each, and what it says about itself, JSON-ready."""

    columns: dict[str, NDArray[Any]]
    about: dict[str, Any]


class ModelReplica:
    """One version of a model, loaded and warmed up. Raises the model folder's errors when it is damaged."""

    def __init__(self, config: ServeConfig, version: Version) -> None:
        torch.set_num_threads(max(1, int(config.num_cpus)))
        device = "cuda" if config.num_gpus and torch.cuda.is_available() else "cpu"
        self.config, self.predictor = config, load_warm(Path(version.path), device, config.dtype)
        self.loaded = Loaded.of(self.predictor)
        self.version = replace(version, model_sha256=self.predictor.folder.model_sha256)
        self._packer = Packer(self._ask, config.max_cells_per_forward)
        log.info("model %s version %s is loaded: %s", config.name, version.label, self.version.model_sha256[:16])

    async def check(self) -> Version:
        """The version as it is, after it gave its golden answers again; IntegrityError when they are others."""
        gap = await asyncio.to_thread(check_golden, self.predictor)
        told = "has no golden answers" if gap is None else f"gives its golden answers to {gap:.1e}"
        log.info("model %s version %s %s", self.config.name, self.version.label, told)
        return self.version

    async def describe(self) -> dict[str, Any]:
        """Name, version, tasks, classes, context size, checksums and limits."""
        info = {key: value for key, value in self.predictor.info().items() if key != "lineage"}
        limits = self.config.limits()
        most = {name: getattr(limits, name) for name in ("max_cells", "max_genes", "max_body_bytes", "max_decoded_bytes")}
        return {
            "name": self.config.name,
            **self._origin(),
            **info,
            **self.loaded.describe(),
            "tasks": list(self._tasks),
            "limits": most,
        }

    async def card(self) -> str:
        """The model card, Markdown."""
        return self.predictor.folder.card

    async def genes(self) -> dict[str, Any]:
        """The model's genes in order, their namespace and fingerprint."""
        vocabulary = self.predictor.folder.vocabulary
        return {"gene_ids": list(vocabulary.gene_ids), "namespace": vocabulary.namespace, "vocabulary_fingerprint": vocabulary.fingerprint}

    async def load(self) -> dict[str, int]:
        """How much was asked so far, and in how few forwards."""
        return {"requests_total": self._packer.requests, "total": self._packer.forwards, "cells_total": self._packer.cells}

    async def predict(self, question: Question) -> Answer:
        """The task's answer for every cell, in the order sent.

        ServiceError 409 for a task this model has not, 413 for too large an answer, 422 for an option it cannot follow;
        VocabularyError for foreign genes.
        """
        task, cells, folder = question.task, question.cells, self.predictor.folder
        if task not in self._tasks:
            raise refuse(409, f"model {self.config.name!r} does not {task}; it can {', '.join(self._tasks) or 'nothing here'}")
        if cells.role is not None and task != "impute":
            raise refuse(422, f"column 'role' says which cells are an imputation's reference; leave it out to {task}")
        store, genes, warnings = await asyncio.to_thread(to_store, cells, self.loaded.align, self.loaded.max_cells)
        if task != "impute":  # whose query never measured all genes of the model
            warnings += gene_warnings(genes, len(folder.vocabulary))
        prepared = await asyncio.to_thread(self._prepare, store, question)
        answers = await self._packer(prepared.computation, prepared.store)
        columns, told = await asyncio.to_thread(self._worded, prepared, question, answers)
        if cells.cell_id is not None and task != "perturb":  # its rows are populations
            columns = {"cell_id": cells.cell_id if prepared.rows is None else cells.cell_id[prepared.rows], **columns}
        about = {
            "model": self.config.name,
            **self._origin(),
            "model_sha256": folder.model_sha256,
            "vocabulary_fingerprint": folder.vocabulary.fingerprint,
            "dtype": question.options.dtype,
            "precision": self.predictor.precision,
            "context": {**prepared.context, "max_cells": self.loaded.max_cells, "seed": 0},
            "gene_overlap": genes["overlap"],
            "n_shared": genes["n_shared"],
            "n_dropped": genes["n_dropped"],
            "warnings": warnings,
        }
        return Answer(columns, {**about, **told})

    def _prepare(self, store: MemoryStore, question: Question) -> Prepared:
        try:
            return prepare(self.loaded, store, question, self.config.max_decoded_bytes)
        except VocabularyError:
            raise
        except (DataError, ConfigError) as error:
            raise refuse(422, str(error)) from error

    def _worded(self, prepared: Prepared, question: Question, answers: Answers) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        columns, told = worded(self.loaded, prepared, question, answers)
        if not all(np.isfinite(values).all() for values in columns.values() if values.dtype != object):
            raise IntegrityError("the model gave values that are not finite")
        return columns, told

    def _ask(self, computation: Computation, store: PackedStore) -> Answers:
        return compute(self.loaded, computation, store)

    @property
    def _tasks(self) -> tuple[str, ...]:
        """What the model can be asked here."""
        return tuple(task for task in self.predictor.tasks if task in OPTIONS)

    def _origin(self) -> dict[str, str | None]:
        return {"version": self.version.label, "run_id": self.version.run_id}


def load_warm(folder: Path, device: str = "cpu", precision: Precision = "float32") -> Predictor:
    """The verified model of a folder, used once on two made-up cells, so that the first caller does not wait.

    Raises the model folder's errors, and IntegrityError when the model gives no numbers.
    """
    predictor = Predictor.load(folder, device, precision)
    genes = np.arange(min(16, len(predictor.folder.vocabulary)), dtype=np.int64)
    table = CellTable(
        crow=np.array([0, len(genes), 2 * len(genes)]),
        gene=np.tile(genes, 2),
        value=np.ones(2 * len(genes), dtype=np.float32),
        panel=np.ones(len(predictor.folder.vocabulary), dtype=bool),
    )
    store = memory_store(table, 2)
    answers = {"embedding": predictor.embed(store)} if "embed" in predictor.tasks else golden_answers(predictor, store)
    if not all(np.isfinite(values).all() for values in answers.values()):
        raise IntegrityError("the model gives NaN or infinite values on plain counts; it must not be served")
    return predictor
