"""What is deployed: the configuration of an endpoint, and the replica that holds the model.

A replica loads our own model folder only (manifest, sha256, safetensors, strict): never a pickle. One call is one
request: its cells form sentences of their own, so an answer is the same alone and among a hundred others.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from cellplane.config import Config
from cellplane.data.sentences import CellTable, MemoryStore, memory_store
from cellplane.errors import IntegrityError
from cellplane.inference import Predictor

from .codec import Cells, to_store
from .limits import MIB, Limits, refuse

log = logging.getLogger(__name__)

NAME = r"[a-z0-9][a-z0-9._-]{0,63}"
REFERENCE = re.compile(rf"^({NAME})(?:@({NAME})|:([1-9][0-9]{{0,8}}))?$")


class ServeConfig(Config):
    """One endpoint serving one model."""

    kind: Literal["serve"] = "serve"
    """Which kind of configuration this is."""
    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    """The model's name in paths: /v1/models/NAME."""
    model: str
    """What is served: a model folder, models:/NAME@ALIAS or models:/NAME/VERSION."""
    tracking_uri: str | None = None
    """Where models:/ names are looked up; None takes MLFLOW_TRACKING_URI or the local store."""
    host: str = "127.0.0.1"
    """Address to listen on; any but loopback needs api_keys_file."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    api_keys_file: Path | None = None
    """Lines of `name sha256 scope[,scope]`; None = no key is asked for, on loopback only."""
    replicas: Annotated[int, Field(ge=1)] = 1
    """Copies of the model; with two, one may die without a pause."""
    num_cpus: Annotated[float, Field(ge=0)] = 1
    """CPUs, and so threads, of each copy; 0 sets none aside, so that an endpoint never keeps training from starting."""
    max_body_bytes: Annotated[int, Field(ge=1)] = 64 * MIB
    """Largest request body."""
    max_json_bytes: Annotated[int, Field(ge=1)] = 16 * MIB
    """Largest JSON body: parsed, it takes tenfold its size."""
    max_decoded_bytes: Annotated[int, Field(ge=1)] = 256 * MIB
    """Largest Arrow body once decompressed."""
    max_cells: Annotated[int, Field(ge=1)] = 10_000
    """Most cells in one request."""
    max_genes: Annotated[int, Field(ge=1)] = 100_000
    """Most genes in one request."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 60
    """Longest time for one answer, then 408."""
    max_ongoing_requests: Annotated[int, Field(ge=1)] = 4
    """Requests a copy takes on at once; they are computed one after the other."""
    max_queued_requests: Annotated[int, Field(ge=1)] = 64
    """Requests that may wait for a copy; more get 503 with Retry-After."""
    graceful_shutdown_timeout_s: Annotated[float, Field(ge=0)] = 20
    """Time for requests in flight when the endpoint goes or changes its version."""
    startup_timeout_s: Annotated[float, Field(gt=0)] = 180
    """Longest time until the model answers; then starting it has failed."""

    def limits(self) -> Limits:
        """What one request may cost."""
        return Limits(
            max_body_bytes=self.max_body_bytes,
            max_json_bytes=self.max_json_bytes,
            max_decoded_bytes=self.max_decoded_bytes,
            max_cells=self.max_cells,
            max_genes=self.max_genes,
            request_timeout_s=self.request_timeout_s,
        )


@dataclass(frozen=True)
class ServedVersion:
    """Which model is served under a name: its folder, and where the registry has it, if it does."""

    name: str
    path: Path
    version: str | None = None
    alias: str | None = None
    run_id: str | None = None

    def check(self, reference: str) -> None:
        """Whether NAME, NAME@ALIAS or NAME:VERSION means this one; ServiceError 400 for no such form, 404 for another."""
        match = REFERENCE.match(reference)
        if match is None:
            raise refuse(400, "a model is asked for as NAME, NAME@ALIAS or NAME:VERSION, in lower case letters, digits, . _ -")
        name, alias, version = match.groups()
        if name != self.name or (alias and alias != self.alias) or (version and version != self.version):
            raise refuse(404, f"model {reference!r} is not served here; served: {', '.join(self.references())}")

    def references(self) -> list[str]:
        """Every way to ask for it."""
        pinned = [f"{self.name}{mark}{value}" for mark, value in (("@", self.alias), (":", self.version)) if value]
        return [self.name, *pinned]


@dataclass(frozen=True)
class Answer:
    """Columns of an answer by name, [n] or [n, width] each, and what it says about itself, JSON-ready."""

    columns: dict[str, NDArray[Any]]
    about: dict[str, Any]


class ModelReplica:
    """A loaded, warmed-up model that answers one request at a time. Raises the model folder's errors when it is damaged."""

    def __init__(self, config: ServeConfig, version: ServedVersion) -> None:
        torch.set_num_threads(max(1, int(config.num_cpus)))
        self.config, self.version = config, version
        self.predictor = load_warm(version.path)
        self._turn = asyncio.Lock()
        log.info("model %s version %s is loaded: %s", version.name, version.version, self.predictor.folder.model_sha256[:16])

    async def describe(self, reference: str | None = None) -> dict[str, Any]:
        """Name, version, tasks, classes, context size, checksums and limits; None asks for whatever is served."""
        self.version.check(reference or self.version.name)
        info = {key: value for key, value in self.predictor.info().items() if key != "lineage"}
        limits = self.config.limits()
        return {
            "name": self.version.name,
            **self._origin(),
            **info,
            "limits": {"max_cells": limits.max_cells, "max_genes": limits.max_genes, "max_body_bytes": limits.max_body_bytes},
        }

    async def card(self, reference: str) -> str:
        """The model card, Markdown."""
        self.version.check(reference)
        return self.predictor.folder.card

    async def genes(self, reference: str) -> dict[str, Any]:
        """The model's genes in order, their namespace and fingerprint."""
        self.version.check(reference)
        vocabulary = self.predictor.folder.vocabulary
        return {"gene_ids": list(vocabulary.gene_ids), "namespace": vocabulary.namespace, "vocabulary_fingerprint": vocabulary.fingerprint}

    async def predict(self, reference: str, task: str, cells: Cells) -> Answer:
        """The task's answer for every cell, in the order sent.

        ServiceError 404 for another version, 409 for a task this model has not; VocabularyError for foreign genes.
        """
        self.version.check(reference)
        if task not in self.predictor.tasks:
            raise refuse(409, f"model {self.version.name!r} does not {task}; it can {', '.join(self.predictor.tasks)}")
        async with self._turn:
            return await asyncio.to_thread(self._answer, task, cells)

    def _answer(self, task: str, cells: Cells) -> Answer:
        folder = self.predictor.folder
        store, genes, warnings = to_store(cells, folder.vocabulary, folder.max_cells)
        columns = TASKS[task](self.predictor, store)
        if not all(np.isfinite(values).all() for values in columns.values() if values.dtype != object):
            raise IntegrityError("the model gave values that are not finite")
        if cells.cell_id is not None:
            columns = {"cell_id": cells.cell_id, **columns}
        about = {
            "model": self.version.name,
            **self._origin(),
            "model_sha256": folder.model_sha256,
            "vocabulary_fingerprint": folder.vocabulary.fingerprint,
            "dtype": "float32",
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
        return Answer(columns, {**about, "classes": list(folder.classes)} if task == "annotate" else about)

    def _origin(self) -> dict[str, str | None]:
        return {"version": self.version.version, "alias": self.version.alias, "run_id": self.version.run_id}


def _annotate(predictor: Predictor, store: MemoryStore) -> dict[str, NDArray[Any]]:
    answer = predictor.annotate(store)
    strange = 1 - answer.confidence if answer.unknown_score is None else answer.unknown_score  # models of earlier versions have none
    return {"cell_type": answer.labels, "confidence": answer.confidence, "unknown_score": strange, "proba": answer.proba}


def _embed(predictor: Predictor, store: MemoryStore) -> dict[str, NDArray[Any]]:
    return {"embedding": predictor.embed(store)}


TASKS: dict[str, Callable[[Predictor, MemoryStore], dict[str, NDArray[Any]]]] = {"annotate": _annotate, "embed": _embed}


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
        raise IntegrityError(f"the model in {folder} gives NaN or infinite values on plain counts; it must not be served")
    return predictor
