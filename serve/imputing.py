"""Imputation over the wire: which cells are asked about, which reference they are read beside, which genes are dared.

A cell's answer rests on its patch of the request and on the reference, so a request never shares its work with another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellplane.data.patches import patches
from cellplane.data.sentences import MemoryStore
from cellplane.pipelines.imputation_answer import Fitted, imputed
from cellplane.pipelines.imputation_fit import Problem

from .codec import REFERENCE_ROLE, Cells
from .limits import BATCH_JOB, refuse

KEPT, BODY = "kept", "body"  # the reference that lies in the model folder, or the one that came along


@dataclass(frozen=True, eq=False)
class Imputation:
    """One request's own work: cells beside their reference, read in ``parts``; ``rows`` of the request that are answered."""

    problem: Problem
    parts: list[NDArray[np.int64]]
    rows: NDArray[np.int64]
    reference: str

    @property
    def context(self) -> dict[str, Any]:
        """What the answer says about who was read with whom."""
        beside = f"{self.problem.cells.reference.n_cells} {'kept' if self.reference == KEPT else 'given'} reference cells"
        return {"policy": f"patches of the request beside {beside}", "sentences": len(self.parts)}


@dataclass(frozen=True)
class Asked:
    """What a request says of an imputation: genes by name (None: all), its reference, the least correlation to expect."""

    genes: tuple[str, ...] | None
    reference: str | None
    min_correlation: float | None


def imputation_of(state: Fitted, store: MemoryStore, cells: Cells, asked: Asked, max_bytes: int) -> Imputation:
    """The work of a request; ServiceError 422 for genes or references that make no sense, 413 for too large an answer."""
    beside = np.zeros(cells.n_cells, dtype=bool) if cells.role is None else cells.role == REFERENCE_ROLE
    reference = asked.reference or (BODY if beside.any() else KEPT)
    if reference not in (KEPT, BODY):
        raise refuse(422, f"there is no reference {reference[:40]!r}; the model has {KEPT!r}, or send cells with the role 'reference'")
    if (reference == BODY) != bool(beside.any()):
        raise refuse(422, "the reference 'body' and cells with the role 'reference' come together; 'kept' comes without them")
    rows = np.flatnonzero(~beside)
    query, others = store.table.rows(rows), None if reference == KEPT else store.table.rows(np.flatnonzero(beside))
    genes = _genes(state, asked)
    if others is not None:
        if asked.genes is not None and (missing := int((genes & ~others.panel).sum())):
            raise refuse(422, f"{missing} of the genes asked for were not measured in the reference that was sent")
        genes &= others.panel
    problem = state.problem(query, others, genes)
    if len(rows) * int(problem.wanted.sum()) * 8 > max_bytes:
        raise refuse(413, f"{len(rows)} cells of {int(problem.wanted.sum())} genes exceed {max_bytes} bytes; {BATCH_JOB}")
    return Imputation(problem, _parts(state, store, cells, rows), rows, reference)


def _genes(state: Fitted, asked: Asked) -> NDArray[np.bool_]:
    """Flags of the genes that are answered, [G]: those asked for and trusted."""
    wanted = state.wanted.copy()
    if asked.genes is not None:
        places = state.names.find(asked.genes)
        if unknown := [gene[:40] for gene, at in zip(asked.genes, places.tolist(), strict=True) if at < 0 or not state.wanted[at]]:
            raise refuse(
                422, f"{len(unknown)} genes are not imputed by this model, e.g. {unknown[:5]}; GET /v1/models/NAME lists those that are"
            )
        wanted[:] = False
        wanted[places] = True
    trusted: NDArray[np.bool_] = wanted & state.trusted(_least(state, asked))
    if not trusted.any():
        raise refuse(
            422, f"every gene asked for is expected to correlate less than {_least(state, asked):g}; lower min_correlation to see them"
        )
    return trusted


def _least(state: Fitted, asked: Asked) -> float:
    return state.config.min_correlation if asked.min_correlation is None else asked.min_correlation


def _parts(state: Fitted, store: MemoryStore, cells: Cells, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The patches, rows counted among the cells that are answered: the request's sentences, else as the cells' places say."""
    if cells.sentence is None:
        return patches(store.table.rows(rows), state.config.query_cells)
    place = np.full(cells.n_cells, -1, dtype=np.int64)
    place[rows] = np.arange(len(rows))
    parts = [place[part][place[part] >= 0] for part in store.sentences]
    return [part for part in parts if len(part)]


def impute(network: Any, state: Fitted, work: Imputation) -> dict[str, NDArray[Any]]:
    """Expected counts at each cell's own depth, and their standard deviation."""
    found = imputed(network, state, work.problem, work.parts)
    return {"rate": found.counts.astype(np.float32), "sd": found.sd.astype(np.float32)}


def told(state: Fitted, work: Imputation, asked: Asked) -> dict[str, Any]:
    """Names and expected correlations of the answer's columns, and which genes were refused."""
    answered = work.problem.wanted
    asked_for = state.wanted if asked.genes is None else np.isin(np.arange(len(state.wanted)), state.names.find(asked.genes))
    refused = asked_for & ~state.trusted(_least(state, asked))
    everything = answered | refused
    ids = [state.names.vocabulary.gene_ids[gene] for gene in np.flatnonzero(everything)]
    return {
        "genes": state.names.call(answered),
        "expected_r": _numbers(state.expected[answered]),
        "refused": dict(zip(state.names.call(refused), _numbers(state.expected[refused]), strict=True)),
        "vocabulary_ids": dict(zip(state.names.call(everything), ids, strict=True)),
        "reference": work.reference,
        "partner_share": state.share,
        "observed_genes": int(work.problem.observed.sum()),
    }


def _numbers(values: NDArray[np.float64]) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
