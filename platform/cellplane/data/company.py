"""In whose company a model reads the cells it is asked about: the sentences of an answer (PROTOCOLS 2).

own: the cells asked about, each sample in sentences of its own; for a model that reads where cells lie, these are patches of
tissue. section: patches for any model.
self: every cell alone. panel: as own, with the model's own reference cells in every sentence. Another data set: its cells
join the sentences as read-only tokens, with their counts and places and nothing else. Everything is deterministic, and what
was done is told in one line, for `uns["cellplm"]["context"]`.
"""

# C cells

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from cellplane.cells import CellBatch
from cellplane.data.columns import as_names
from cellplane.data.patches import patches, patches_of
from cellplane.data.sentences import CellTable, MemoryStore, memory_store
from cellplane.errors import ConfigError, DataError
from cellplane.seeds import keyed_seed

Context = Literal["own", "section", "self", "panel"]
READ_ONLY = -1  # the `row` of a cell that nobody asked about


@dataclass(frozen=True)
class SharedStore:
    """A SentenceStore of cells asked about (``asked``) and read-only ones (``others``) in the same sentences.

    ``sentences`` hold rows of the asked cells, or n_asked + rows of the others. ``row`` of a read-only cell is READ_ONLY.
    """

    asked: CellTable
    others: CellTable
    sentences: Sequence[NDArray[np.int64]]

    @property
    def table(self) -> CellTable:
        """The cells asked about."""
        return self.asked

    @property
    def n_asked(self) -> int:
        """Cells that are answered."""
        return self.asked.n_cells

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Cells of every sentence, read-only ones included."""
        return np.array([len(rows) for rows in self.sentences], dtype=np.int64)

    @cached_property
    def _panels(self) -> torch.Tensor:
        return torch.from_numpy(np.stack([self.asked.panel, self.others.panel]))

    def read(self, sentences: Sequence[int]) -> CellBatch:
        """See SentenceStore; asked and read-only cells keep the panels of their own data sets."""
        wanted = [self.sentences[index] for index in sentences]
        rows = np.concatenate(wanted) if wanted else np.zeros(0, dtype=np.int64)
        own = rows < self.asked.n_cells
        parts = self.asked.rows(rows[own]), self.others.rows(rows[~own] - self.asked.n_cells)
        joined = joined_tables(*parts).rows(_places(own))
        packed = MemoryStore(joined, _edges([len(part) for part in wanted])).read(range(len(wanted)))
        row = torch.from_numpy(np.where(own, rows, READ_ONLY))
        return replace(packed, row=row, panels=self._panels, panel_index=torch.from_numpy((~own).astype(np.int64)))


def _places(own: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Where each cell stands once those of the first kind come before the others."""
    place = np.empty(len(own), dtype=np.int64)
    place[own], place[~own] = np.arange(own.sum()), own.sum() + np.arange((~own).sum())
    return place


def _edges(lengths: Sequence[int]) -> list[NDArray[np.int64]]:
    ends = np.cumsum(lengths, dtype=np.int64)
    return [np.arange(end - length, end) for length, end in zip(lengths, ends, strict=True)]


def joined_tables(first: CellTable, second: CellTable) -> CellTable:
    """The cells of both, one after the other; a place that one lacks is missing, labels are not kept, the panel is the first's."""
    places = None
    if first.coordinates is not None or second.coordinates is not None:
        places = np.concatenate([_coordinates(table) for table in (first, second)])
    return CellTable(
        crow=np.concatenate([first.crow, first.crow[-1] + second.crow[1:]]),
        gene=np.concatenate([first.gene, second.gene]),
        value=np.concatenate([first.value, second.value]),
        panel=first.panel,
        coordinates=places,
    )


def _coordinates(table: CellTable) -> NDArray[np.float32]:
    return np.full((table.n_cells, 2), np.nan, dtype=np.float32) if table.coordinates is None else table.coordinates


def own_store(table: CellTable, max_cells: int) -> MemoryStore:
    """Each sample in sentences of its own."""
    return memory_store(table, max_cells)


def section_store(table: CellTable, max_cells: int) -> MemoryStore:
    """Each sample cut into patches; ConfigError for cells without coordinates."""
    if table.coordinates is None:
        raise ConfigError("the context 'section' needs to know where cells lie: name the obsm entry of their coordinates, keys.spatial_key")
    return near_store(table, max_cells)


def near_store(table: CellTable, max_cells: int) -> MemoryStore:
    """Each sample cut into patches, or as `own_store` where nobody knows where cells lie."""
    return own_store(table, max_cells) if table.coordinates is None else MemoryStore(table, patches(table, max_cells))


def self_store(table: CellTable, max_cells: int) -> MemoryStore:  # noqa: ARG001  (same call for every context)
    """Every cell alone."""
    return MemoryStore(table, np.arange(table.n_cells, dtype=np.int64)[:, None])  # type: ignore[arg-type]  # rows, as cheap as can be


CONTEXTS: dict[str, Callable[[CellTable, int], MemoryStore]] = {"own": own_store, "section": section_store, "self": self_store}
NEAR = "own, near"  # what "own" means to a model that reads where cells lie
PANEL_TOLD = "panel: sentences of at most {} cells of one batch and the model's {} reference cells"
TOLD = {
    "own": "own: sentences of at most {} cells of one batch, dealt by seed 0",
    "section": "section: patches of at most {} neighbouring cells of one batch",
    "self": "self: every cell alone",
    NEAR: "own: patches of at most {} neighbouring cells of one batch, where they have coordinates",
}


def context_for(context: str, reads_places: bool) -> str:
    """What a context's name means to a model."""
    return NEAR if context == "own" and reads_places else context


def store_in(context: str, table: CellTable, max_cells: int) -> tuple[MemoryStore, str]:
    """The cells in this context, and what to record of it; ConfigError for a name that is none."""
    if context == NEAR:
        return near_store(table, max_cells), TOLD[NEAR].format(max_cells)
    if context not in CONTEXTS:
        raise ConfigError(
            f"no context {context!r}; there are {', '.join((*CONTEXTS, 'panel'))}, or give an AnnData whose cells to read beside"
        )
    return CONTEXTS[context](table, max_cells), TOLD[context].format(max_cells)


def store_with_panel(
    table: CellTable, panel: CellTable, max_cells: int, sentences: Sequence[NDArray[np.int64]] | None = None
) -> tuple[SharedStore, str]:
    """The cells with the whole panel in each of their sentences, and what to record of it.

    ``sentences`` are rows of the table; None: each sample in sentences of its own, as long as the panel leaves room. So a
    cell is answered alike whoever else is asked about in other sentences. ConfigError when the panel leaves no room.
    """
    if (room := max_cells - panel.n_cells) < 1:
        raise ConfigError(f"the model's panel of {panel.n_cells} cells leaves no room in a sentence of {max_cells}")
    asked = own_store(table, room).sentences if sentences is None else sentences
    everybody = table.n_cells + np.arange(panel.n_cells, dtype=np.int64)
    store = SharedStore(table, panel, [np.concatenate([rows, everybody]) for rows in asked])
    return store, PANEL_TOLD.format(room, panel.n_cells)


def store_beside(table: CellTable, others: CellTable, max_cells: int) -> tuple[SharedStore, str]:
    """The cells with those of another data set in their sentences, and what to record of it.

    Cells of one batch meet the others of that batch, where there are any, else all of them. Where both have coordinates a
    sentence is a patch of the tissue that both lie in; else it is half asked cells and half others, drawn by seed 0.
    Raises DataError when there are no others, ConfigError for a model that reads cells one at a time.
    """
    if others.n_cells == 0:
        raise DataError("the context holds no cells; leave it out, or give some")
    if max_cells < 2:  # one asked, one other
        raise ConfigError("this model reads every cell alone, so no other cells can be its context")
    located = table.coordinates is not None and others.coordinates is not None
    deal = _patches if located else _halves
    sentences = [part for asked, near in _groups(table, others) for part in deal(table, others, (asked, near), max_cells)]
    how = f"patches of at most {max_cells} cells" if located else f"half of at most {max_cells} cells each, dealt by seed 0"
    return SharedStore(table, others, sentences), f"given: {others.n_cells} read-only cells of another data set, {how}"


Group = tuple[NDArray[np.int64], NDArray[np.int64]]  # rows of asked cells, and of the others that may join them


def _groups(table: CellTable, others: CellTable) -> list[Group]:
    everybody = np.arange(others.n_cells)
    if table.batch is None:
        return [(np.arange(table.n_cells), everybody)] if table.n_cells else []
    names = as_names(table.batch)
    theirs = np.full(others.n_cells, None, dtype=object) if others.batch is None else others.batch.astype(str)
    groups = []
    for code, name in enumerate(names.names):
        near = np.flatnonzero(theirs == name)
        groups.append((np.flatnonzero(names.codes == code), near if len(near) else everybody))
    return groups


def _halves(table: CellTable, others: CellTable, group: Group, max_cells: int) -> list[NDArray[np.int64]]:  # noqa: ARG001  (as `_patches`)
    asked, near = group
    name = "" if table.batch is None else str(table.batch[asked[0]])
    parts = -(-len(asked) // (max_cells // 2))
    if parts > 1:
        asked = np.random.default_rng(keyed_seed(0, name)).permutation(asked)
    dealt = np.random.default_rng(keyed_seed(0, "context", name)).permutation(near)
    sentences, used = [], 0
    for part in np.array_split(asked, parts):
        room = min(max_cells - max_cells // 2, len(near))
        chosen = dealt[np.arange(used, used + room) % len(dealt)]  # all take their turn before one comes again
        used += room
        sentences.append(np.concatenate([np.sort(part), table.n_cells + np.sort(chosen)]))
    return sentences


def _patches(table: CellTable, others: CellTable, group: Group, max_cells: int) -> list[NDArray[np.int64]]:
    """Patches of the tissue that hold a cell asked about."""
    assert table.coordinates is not None
    assert others.coordinates is not None
    asked, near = group
    rows = np.concatenate([asked, table.n_cells + near])
    places = np.concatenate([table.coordinates, others.coordinates])
    return [np.sort(part) for part in patches_of(rows, places, max_cells) if (part < table.n_cells).any()]
