"""Asking a model for golden answers: when it is saved, and again before it serves (see `artifact.golden`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellplane.artifact.folder import ModelFolder
from cellplane.artifact.golden import ROUGH_TOLERANCE, TOLERANCE, Golden
from cellplane.data.sentences import CellTable, MemoryStore
from cellplane.inference import Predictor
from cellplane.pipelines import imputation_answer, perturbation_answer

SIZES = (1, 4, 7)  # a lone cell, and two contexts
GENES_PER_CELL = 200  # as many as a shallow cell shows
PERTURBATIONS = 3  # of those learned, asked for
SEED = 20_240  # of the made-up cells; any would do


def with_golden(folder: ModelFolder) -> ModelFolder:
    """The model with its answers on made-up cells attached; identity and weights stay as they are."""
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
    tolerance = TOLERANCE if predictor.precision == "float32" else ROUGH_TOLERANCE
    return golden.compare(golden_answers(predictor, _store(golden, len(predictor.vocabulary))), tolerance)


def golden_answers(predictor: Predictor, store: MemoryStore) -> dict[str, NDArray[np.float32]]:
    """What a model says of these cells, by name of the answer: its task's own, and the embedding where it is asked for one."""
    answers = ASKED.get(predictor.task, _embedded)(predictor, store)
    return {name: values.astype(np.float32, copy=False) for name, values in answers.items()}


def _embedded(predictor: Predictor, store: MemoryStore) -> Mapping[str, NDArray[Any]]:
    answers = {"embedding": predictor.embed(store)}
    return {**answers, "proba": predictor.annotate(store).proba} if "annotate" in predictor.tasks else answers


def _imputed(predictor: Predictor, store: MemoryStore) -> Mapping[str, NDArray[Any]]:
    state = imputation_answer.fitted_from(predictor.folder)
    found = imputation_answer.imputed(predictor.model, state, state.problem(store.table), store.sentences)
    return {"counts": found.counts, "sd": found.sd}


def _perturbed(predictor: Predictor, store: MemoryStore) -> Mapping[str, NDArray[Any]]:
    state, nobody = perturbation_answer.fitted_from(predictor.folder), np.full(store.table.n_cells, "", dtype=object)
    controls = state.controls(store.table, nobody, nobody)
    alone = replace(state, measured=replace(state.measured, share=0.0))  # rates follow from the network's own and from the change
    asked = {"change": state, "rates": alone}
    answers = {
        part: perturbation_answer.populations(predictor.model, told, controls, state.names[:PERTURBATIONS], state.config)
        for part, told in asked.items()
    }
    return {part: np.stack([getattr(row.answer, part) for row in rows]) for part, rows in answers.items()}


Asked = Callable[[Predictor, MemoryStore], Mapping[str, NDArray[Any]]]
ASKED: dict[str, Asked] = {"impute": _imputed, "perturb": _perturbed}


def _cells(n_genes: int) -> Golden:
    rng = np.random.default_rng(SEED)
    chosen = [np.sort(rng.choice(n_genes, min(n_genes, GENES_PER_CELL), replace=False)) for _ in range(sum(SIZES))]
    crow = np.concatenate([[0], np.cumsum([len(genes) for genes in chosen])]).astype(np.int64)
    value = 1 + rng.poisson(1.5, crow[-1]).astype(np.float32)
    return Golden(crow, np.concatenate(chosen).astype(np.int64), value, np.array(SIZES, dtype=np.int64), {})


def _store(cells: Golden, n_genes: int) -> MemoryStore:
    table = CellTable(cells.crow, cells.gene, cells.value, np.ones(n_genes, dtype=bool))
    return MemoryStore(table, np.split(np.arange(table.n_cells), np.cumsum(cells.sizes)[:-1]))
