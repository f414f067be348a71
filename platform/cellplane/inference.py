"""The predictor: cells -> sentences -> network -> answers in the caller's order.

Pipelines, batch jobs and serving all go through here, so that a notebook and an endpoint give the same answer. A cell's
answer depends on the sentence it is seen in; sentences are built deterministically and never mixed between callers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from cellplane.artifact.folder import ModelFolder, describe, load_model
from cellplane.cells import CellBatch
from cellplane.data.config import DataKeys
from cellplane.data.sentences import MemoryStore, PlanConfig, SentenceStore, memory_store
from cellplane.data.sources import AnnData, cell_table
from cellplane.errors import DataError, IntegrityError
from cellplane.genes import GeneVocabulary
from cellplane.model.cellplm import CellPLM, CellPLMOutput, halved
from cellplane.model.config import Precision

log = logging.getLogger(__name__)

CELLS_PER_FORWARD = PlanConfig().cells_per_micro_batch
TASKS = {"pretrain": ("embed",), "annotate": ("annotate", "embed")}  # what each kind of model can be asked


@dataclass(frozen=True)
class Annotation:
    """Cell types in the caller's order: ``labels`` [n] str, ``confidence`` [n] in [0, 1], ``proba`` [n, n_classes]."""

    labels: NDArray[np.object_]
    confidence: NDArray[np.float32]
    proba: NDArray[np.float32]
    classes: tuple[str, ...]


class Predictor:
    """A loaded model that answers on any SentenceStore; always in evaluation, always deterministic."""

    def __init__(self, folder: ModelFolder, device: str = "cpu", precision: Precision = "float32") -> None:
        self.folder, self.device, self.precision = folder, torch.device(device), precision
        self.model = halved(build_network(folder, precision)).to(self.device).eval()

    @classmethod
    def load(cls, folder: Path, device: str = "cpu", precision: Precision = "float32") -> Predictor:
        """The model of a folder, checksums verified; see `artifact.folder.load_model` for the errors.

        In bfloat16 it is several times faster and half as large; embeddings keep their direction to three digits.
        """
        return cls(load_model(folder), device, precision)

    @property
    def vocabulary(self) -> GeneVocabulary:
        """The genes the model knows."""
        return self.folder.vocabulary

    @property
    def classes(self) -> tuple[str, ...]:
        """The cell types the model names; empty for one that only embeds."""
        return self.folder.classes

    @property
    def task(self) -> str:
        """What the model was trained for: pretrain or annotate."""
        return self.folder.task

    @property
    def max_cells(self) -> int:
        """Largest sentence."""
        return self.folder.max_cells

    @property
    def tasks(self) -> tuple[str, ...]:
        """What this model can be asked: embed, annotate."""
        return TASKS[self.folder.task]

    def info(self) -> dict[str, Any]:
        """JSON-ready description: tasks, classes, vocabulary fingerprint, context size, checksum, dtype."""
        return {**describe(self.folder), "tasks": list(self.tasks), "dtype": self.precision}

    def annotate(self, store: SentenceStore) -> Annotation:
        """Cell types of every cell of the store, in the order of its rows. DataError when the model has no classes."""
        classes = self.folder.classes
        if "annotate" not in self.tasks:
            raise DataError(f"this model ({self.folder.task}) can {', '.join(self.tasks)}; fine-tune it for annotation first")
        proba = np.zeros((int(store.sizes.sum()), len(classes)), dtype=np.float32)
        for batch, output in self._forward(store):
            if output.logits is None:
                raise IntegrityError("the model says it annotates but has no annotation head")
            proba[batch.row.numpy()] = output.logits.float().softmax(-1).cpu().numpy()
        best = proba.argmax(1) if len(proba) else np.zeros(0, dtype=np.int64)
        labels = np.array([classes[index] for index in best], dtype=object)
        return Annotation(labels, proba.max(1, initial=0.0), proba, classes)

    def embed(self, store: SentenceStore) -> NDArray[np.float32]:
        """Latent z of every cell, [n, Z] float32, in the order of the store's rows."""
        latent = np.zeros((int(store.sizes.sum()), self.folder.config.latent_width), dtype=np.float32)
        for batch, output in self._forward(store):
            latent[batch.row.numpy()] = output.latent.float().cpu().numpy()
        return latent

    def _forward(self, store: SentenceStore) -> Iterator[tuple[CellBatch, CellPLMOutput]]:
        for sentences in packs(store.sizes, CELLS_PER_FORWARD):
            batch = store.read(sentences)
            if batch.n_genes != len(self.folder.vocabulary):
                raise DataError(f"the cells have {batch.n_genes} gene positions, the model {len(self.folder.vocabulary)}: align them first")
            with torch.inference_mode():
                yield batch, self.model(batch.to(self.device))


def packs(sizes: NDArray[np.int64], budget: int) -> Iterator[list[int]]:
    """Consecutive sentences packed up to ``budget`` cells; a longer sentence comes alone."""
    current: list[int] = []
    cells = 0
    for sentence, size in enumerate(sizes.tolist()):
        if current and cells + size > budget:
            yield current
            current, cells = [], 0
        current.append(sentence)
        cells += size
    if current:
        yield current


def build_network(folder: ModelFolder, precision: Precision = "float32") -> CellPLM:
    """The network with the folder's weights; every tensor must be there with the right shape and nothing else.

    Raises IntegrityError naming the keys.
    """
    network = CellPLM(replace(folder.config, precision=precision))
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in folder.weights.items()}
    if expected != found:
        missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        common = sorted(expected.keys() & found.keys())
        shapes = [f"{name}: {found[name]} instead of {expected[name]}" for name in common if expected[name] != found[name]]
        raise IntegrityError(
            f"the weights do not belong to this configuration: missing {missing[:5]}, not expected {extra[:5]}, misshapen {shapes[:5]}"
        )
    network.load_state_dict(dict(folder.weights), strict=True)
    return network


@dataclass(frozen=True)
class Read:
    """An AnnData as sentences, and what to report about reading it."""

    store: MemoryStore
    report: Mapping[str, Any]


def read_cells(adata: AnnData, vocabulary: GeneVocabulary, keys: DataKeys, max_cells: int, classes: tuple[str, ...] | None = None) -> Read:
    """The cells as sentences of at most ``max_cells`` by ``keys.batch_key``; labels only when ``classes`` are given."""
    table, report = cell_table(adata, vocabulary, keys, classes)
    return Read(memory_store(table, max_cells), report)


def query_keys(data: AnnData, keys: DataKeys) -> DataKeys:
    """The training keys for other data: no labels are read, and a batch column the data do not have is not used."""
    batch = keys.batch_key if keys.batch_key in data.obs else None
    spatial = keys.spatial_key if keys.spatial_key in data.obsm else None
    return keys.model_copy(update={"labels_key": None, "batch_key": batch, "spatial_key": spatial})


def write_annotation(data: AnnData, annotation: Annotation, key_added: str = "cellplm") -> None:
    """Writes labels (categorical), confidence and probabilities into ``data`` under our usual keys."""
    data.obs[f"{key_added}_cell_type"] = pd.Categorical(annotation.labels, categories=list(annotation.classes))
    data.obs[f"{key_added}_confidence"] = annotation.confidence
    data.obsm[f"{key_added}_cell_type_proba"] = annotation.proba


def record(folder: ModelFolder, report: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into `uns["cellplm"]`: model, context policy, where counts and genes came from."""
    return {
        "model_sha256": folder.model_sha256,
        "lineage": dict(folder.lineage),
        "context": f"own: sentences of at most {folder.max_cells} cells of one batch, dealt by seed 0",
        "dtype": "float32",
        **{key: value for key, value in report.items() if value is not None},
    }
