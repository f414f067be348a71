"""Our side of reading: the loader, and what bare Arrow would give.

Bare Arrow is the least that reading can be: the columns a batch is made of, mapped and copied once into arrays that are
there already, in the types that PyTorch needs; no manifest, no packing, no batch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.dlpack import from_dlpack

from cellplane.benchmark.worker import measured, serve
from cellplane.data.loader import ShardStore, prefetch
from cellplane.data.manifest import Manifest, read_manifest
from cellplane.data.sentences import PlanConfig, StepPlan

TURNS = 3  # of every round: an epoch takes a tenth of a second
SMALL_COLUMNS = ("cell", "batch", "dataset", "platform", "label")


def open_shards(folder: str) -> None:
    """Makes the store (which verifies) and reads everything once."""
    _opened[folder] = ShardStore(Path(folder))
    read(folder)


def read(folder: str, ahead: int = 0) -> dict[str, float]:
    """One epoch of the loader: planned, mapped, decoded, packed; each batch is let go before the next, or read ``ahead`` by a thread."""
    store = _opened[folder]
    plan = StepPlan(store.sizes, PlanConfig(micro_batches_per_step=1))
    batches = (plan.at(step)[0].read(store) for step in range(plan.steps_of_epoch(0)))
    found = {"cells": 0, "entries": 0}

    def run() -> None:
        source = prefetch(batches, ahead) if ahead else batches
        while (batch := next(source, None)) is not None:
            found["cells"] += batch.n_cells
            found["entries"] += batch.gene.numel()
            del batch

    return {**measured(run), **found}


def bare_arrow(folder: str, genes_as: str = "int64") -> dict[str, float]:
    """The same columns of the same blocks in the same order, straight from Arrow, in a batch's types (genes in ``genes_as``).

    As the loader it keeps its mapping and its arrays from one epoch to the next: a new mapping would fault every page in again.
    """
    if (folder, genes_as) not in _bare:
        _bare[folder, genes_as] = _bare_parts(folder, genes_as)
    manifest, files, place = _bare[folder, genes_as]
    plan = StepPlan(_opened[folder].sizes, PlanConfig(micro_batches_per_step=1))
    order = [sentence for step in range(plan.steps_of_epoch(0)) for sentence in plan.at(step)[0].sentences]

    def run() -> None:
        for index in order:
            row = manifest.sentences[index]
            batch = files[row.shard].get_batch(row.index)
            genes, values = batch.column("gene"), batch.column("x")
            small = ((name, batch.column(name)) for name in SMALL_COLUMNS)
            for name, array in (("gene", genes.values), ("x", values.values), ("crow", genes.offsets), *small):
                place[name][: len(array)].copy_(from_dlpack(array.to_numpy()))

    return {**measured(run), "cells": manifest.cells, "entries": manifest.nnz}


def _bare_parts(folder: str, genes_as: str) -> Bare:
    manifest = read_manifest(Path(folder))
    files = [pa.ipc.open_file(pa.memory_map(str(Path(folder) / entry.name)).read_buffer()) for entry in manifest.shards]
    entries, cells = (max(getattr(row, name) for row in manifest.sentences) for name in ("nnz", "cells"))
    sizes = {"gene": (entries, genes_as), "x": (entries, "float32"), **{name: (cells + 1, "int64") for name in ("crow", *SMALL_COLUMNS)}}
    return manifest, files, {name: torch.from_numpy(np.ones(size, dtype=dtype)) for name, (size, dtype) in sizes.items()}


Bare = tuple[Manifest, list[Any], dict[str, torch.Tensor]]
_opened: dict[str, ShardStore] = {}
_bare: dict[tuple[str, str], Bare] = {}


def in_turn(folder: str, rounds: int) -> dict[str, Any]:
    """Medians of CPU and wall seconds of the loader and of bare Arrow, measured in turn in this process; for `data_ray` too."""
    open_shards(folder)
    runs: dict[str, Callable[[], dict[str, float]]] = {
        "ours": lambda: read(folder),
        "ahead": lambda: read(folder, ahead=1),
        "bare": lambda: bare_arrow(folder),
        "bare_int32": lambda: bare_arrow(folder, "int32"),
    }
    for run in runs.values():
        run()  # memory that is touched for the first time
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for _ in range(TURNS * rounds):
        for name, run in runs.items():
            answers[name].append(run())
    medians = {f"{name}_{key}": median(answer[key] for answer in found) for name, found in answers.items() for key in ("cpu_s", "wall_s")}
    return {**medians, "cells": answers["ours"][0]["cells"], "entries": answers["ours"][0]["entries"]}


def train_worker(folder: str, rounds: int) -> dict[str, Any]:
    """`in_turn` inside a worker of Ray Train."""
    from cellplane.benchmark.data_ray import in_train_worker

    return in_train_worker("cellplane.benchmark.data_ours", "in_turn", {"folder": folder, "rounds": rounds})


if __name__ == "__main__":
    serve({command.__name__: command for command in (open_shards, read, bare_arrow, train_worker)})
