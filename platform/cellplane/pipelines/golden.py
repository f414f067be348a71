"""Asking a model for golden answers: when it is saved, and again before it serves (see `artifact.golden`)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cellplane.artifact.folder import ModelFolder
from cellplane.artifact.golden import Golden
from cellplane.data.sentences import CellTable, MemoryStore
from cellplane.inference import TASKS, Predictor

SIZES = (1, 4, 7)  # a lone cell, and two contexts
GENES_PER_CELL = 200  # as many as a shallow cell shows
SEED = 20_240  # of the made-up cells; any would do


def with_golden(folder: ModelFolder) -> ModelFolder:
    """The model with its answers on made-up cells attached; identity and weights stay as they are.

    A model that is not served, as it needs more than cells (a reference, a perturbation), stays without.
    """
    if "embed" not in TASKS[folder.task]:
        return folder
    cells = _cells(len(folder.vocabulary))
    store = _store(cells, len(folder.vocabulary))
    golden = replace(cells, answers=golden_answers(Predictor(folder), store))
    return replace(folder, attachments={**folder.attachments, **golden.attachment()})


def check_golden(predictor: Predictor) -> float | None:
    """Asks again: the largest relative difference, None for a model saved without golden answers.

    IntegrityError when the answers are others.
    """
    golden = Golden.of(predictor.folder.attachments)
    if golden is None:
        return None
    return golden.compare(golden_answers(predictor, _store(golden, len(predictor.vocabulary))))


def golden_answers(predictor: Predictor, store: MemoryStore) -> dict[str, NDArray[np.float32]]:
    """What a model says of these cells, by name of the answer."""
    answers = {"embedding": predictor.embed(store)}
    return {**answers, "proba": predictor.annotate(store).proba} if "annotate" in predictor.tasks else answers


def _cells(n_genes: int) -> Golden:
    rng = np.random.default_rng(SEED)
    chosen = [np.sort(rng.choice(n_genes, min(n_genes, GENES_PER_CELL), replace=False)) for _ in range(sum(SIZES))]
    crow = np.concatenate([[0], np.cumsum([len(genes) for genes in chosen])]).astype(np.int64)
    value = 1 + rng.poisson(1.5, crow[-1]).astype(np.float32)
    return Golden(crow, np.concatenate(chosen).astype(np.int64), value, np.array(SIZES, dtype=np.int64), {})


def _store(cells: Golden, n_genes: int) -> MemoryStore:
    table = CellTable(cells.crow, cells.gene, cells.value, np.ones(n_genes, dtype=bool))
    return MemoryStore(table, np.split(np.arange(table.n_cells), np.cumsum(cells.sizes)[:-1]))
