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

from cellplane.data.sentences import CellTable, memory_store
from cellplane.errors import IntegrityError
from cellplane.inference import Predictor
from cellplane.pipelines.golden import check_golden

from .codec import to_store
from .deployment import ServeConfig
from .limits import BATCH_JOB, refuse
from .packing import Answers, PackedStore, Packer
from .routes import Version
from .tasks import OPTIONS, Computation, Question, compute, prepare, worded

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
        self.config, self.predictor = config, load_warm(Path(version.path))
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
        return {
            "name": self.config.name,
            **self._origin(),
            **info,
            "tasks": list(self._tasks),
            "limits": {"max_cells": limits.max_cells, "max_genes": limits.max_genes, "max_body_bytes": limits.max_body_bytes},
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

        ServiceError 409 for a task this model has not, 422 for an option it cannot follow; VocabularyError for foreign genes.
        """
        task, cells, folder = question.task, question.cells, self.predictor.folder
        if task not in self._tasks:
            raise refuse(409, f"model {self.config.name!r} does not {task}; it can {', '.join(self._tasks) or 'nothing here'}")
        store, genes, warnings = await asyncio.to_thread(to_store, cells, folder.vocabulary, folder.max_cells)
        if task == "denoise" and cells.n_cells * len(folder.vocabulary) * 4 > self.config.max_decoded_bytes:
            raise refuse(
                413, f"{cells.n_cells} cells of {len(folder.vocabulary)} rates exceed {self.config.max_decoded_bytes} bytes; {BATCH_JOB}"
            )
        store, computation = prepare(self.predictor, store, question)
        columns, told = worded(self.predictor, store, question, await self._packer(computation, store))
        if not all(np.isfinite(values).all() for values in columns.values() if values.dtype != object):
            raise IntegrityError("the model gave values that are not finite")
        if cells.cell_id is not None:
            columns = {"cell_id": cells.cell_id, **columns}
        about = {
            "model": self.config.name,
            **self._origin(),
            "model_sha256": folder.model_sha256,
            "vocabulary_fingerprint": folder.vocabulary.fingerprint,
            "dtype": question.options.dtype,
            "context": {
                "policy": "sentences of the request" if cells.sentence is not None else "request, by batch",
                "max_cells": folder.max_cells,
                "sentences": len(store.sentences),
                "seed": 0,
            },
            "gene_overlap": genes["overlap"],
            "n_shared": genes["n_shared"],
            "n_dropped": genes["n_dropped"],
            "warnings": warnings,
        }
        return Answer(columns, {**about, **told})

    def _ask(self, computation: Computation, store: PackedStore) -> Answers:
        return compute(self.predictor, computation, store)

    @property
    def _tasks(self) -> tuple[str, ...]:
        """What the model can be asked here."""
        return tuple(task for task in self.predictor.tasks if task in OPTIONS)

    def _origin(self) -> dict[str, str | None]:
        return {"version": self.version.label, "run_id": self.version.run_id}


def load_warm(folder: Path) -> Predictor:
    """The verified model of a folder, used once on two made-up cells, so that the first caller does not wait.

    Raises the model folder's errors, and IntegrityError when the model gives no numbers.
    """
    predictor = Predictor.load(folder)
    genes = np.arange(min(16, len(predictor.folder.vocabulary)), dtype=np.int64)
    table = CellTable(
        crow=np.array([0, len(genes), 2 * len(genes)]),
        gene=np.tile(genes, 2),
        value=np.ones(2 * len(genes), dtype=np.float32),
        panel=np.ones(len(predictor.folder.vocabulary), dtype=bool),
    )
    if not np.isfinite(predictor.embed(memory_store(table, 2))).all():
        raise IntegrityError("the model gives NaN or infinite values on plain counts; it must not be served")
    return predictor
