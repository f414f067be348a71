"""Perturbation over the wire: control cells in, one row a perturbation (and group) out.

The answer is a population's, told from all control cells of a group at once, so a request never shares its work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from cellplane.data.sentences import MemoryStore
from cellplane.pipelines.perturbation_answer import EVERYBODY, PER, Fitted, averaged, populations
from cellplane.pipelines.perturbation_cells import Screen
from cellplane.pipelines.perturbation_config import Kind, PerturbationConfig

from .codec import Cells
from .limits import refuse

KINDS: tuple[str, ...] = get_args(Kind)
FALLBACKS = ("error", "mean_of_training")
TABLES = {  # of the answer, perturbations x genes each: which part of a population, times what
    "log_fold_change": ("change", 1.0),
    "mean_log": ("profile", 1.0),
    "rate_control": ("control_rates", PER),
    "rate_perturbed": ("rates", PER),
}
MOST_FORWARD_CELLS = 1_000_000  # control cells x perturbations of a request: minutes of a tiny network


@dataclass(frozen=True)
class Asked:
    """What a request says of perturbations: names (None: all learned), of which kind, each group apart, and what to say of unknown ones."""

    names: tuple[str, ...] | None
    kind: str | None
    by_group: bool
    fallback: str | None


@dataclass(frozen=True, eq=False)
class Perturbation:
    """One request's own work."""

    controls: Screen
    names: tuple[str, ...]
    config: PerturbationConfig
    by_group: bool

    @property
    def context(self) -> dict[str, Any]:
        """What the answer says about who was read with whom."""
        groups = len(set(self.controls.group))
        return {"policy": "control cells of one batch, in their order", "sentences": groups * len(self.names)}


def perturbation_of(state: Fitted, store: MemoryStore, cells: Cells, asked: Asked, max_bytes: int) -> Perturbation:
    """The work of a request; ServiceError 413 for too much, VocabularyError for unknown genes, DataError without control cells."""
    names = state.names if asked.names is None else asked.names
    said = {"kind": asked.kind, "fallback": asked.fallback}
    config = state.config.model_copy(update={key: value for key, value in said.items() if value is not None})
    for name in names:
        state.meaning(name, config)
    n, genes = cells.n_cells, len(state.genes.labels)
    group = np.full(n, EVERYBODY, dtype=object) if cells.batch is None else cells.batch.astype(str).astype(object)
    rows = len(names) * len(set(group))  # averaging over groups comes after
    if rows * genes * 4 * len(TABLES) > max_bytes or len(names) * n > MOST_FORWARD_CELLS:
        raise refuse(413, f"{len(names)} perturbations of {n} control cells are too many for one request; ask for fewer at a time")
    return Perturbation(state.controls(store.table, group, np.full(n, "", dtype=object)), tuple(names), config, asked.by_group)


def perturb(network: Any, state: Fitted, work: Perturbation) -> dict[str, NDArray[Any]]:
    """One row a perturbation, or a perturbation and group."""
    rows = populations(network, state, work.controls, work.names, work.config)
    rows = rows if work.by_group else averaged(rows)
    parts = {name: np.stack([getattr(row.answer, part) for row in rows]) * scale for name, (part, scale) in TABLES.items()}
    return {
        "perturbation": np.array([row.name for row in rows], dtype=object),
        "group": np.array([row.group for row in rows], dtype=object),
        "kind": np.array([row.kind for row in rows], dtype=object),
        "seen": np.array([row.seen for row in rows]),
        "fallback": np.array([row.answer.fallback for row in rows]),
        "control_cells": np.array([row.cells for row in rows], dtype=np.int64),
        **{name: table.astype(np.float32) for name, table in parts.items()},
    }


def told(state: Fitted) -> dict[str, Any]:
    """What the columns of the answer are of."""
    return {
        "genes": list(state.genes.labels),
        "rates_per": PER,
        "total": state.total,
        "measured_share": state.measured.share,
        "stimuli_without_gene": list(state.stimuli),
    }
