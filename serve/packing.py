"""Requests that wait for the model together go through it together: packed by cells, each in sentences of its own.

Sentences never attend to one another, so a packed answer is the lone one. Nobody waits for company: the model takes
whatever has queued up while it was busy, up to so many cells.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cellplane.cells import CellBatch
from cellplane.data.company import READ_ONLY, SharedStore
from cellplane.data.sentences import CellTable, MemoryStore

Answers = dict[str, NDArray[Any]]
Ask = Callable[[Any, "PackedStore"], Answers]


@dataclass(frozen=True)
class PackedStore:
    """A SentenceStore over several requests: their sentences one after another, rows counted through."""

    parts: Sequence[MemoryStore | SharedStore]

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Cells of every sentence."""
        return np.concatenate([part.sizes for part in self.parts])

    @property
    def n_asked(self) -> int:
        """Cells that are answered."""
        return int(self.firsts[-1])

    @property
    def table(self) -> CellTable:
        """The only request's cells; of several there is no one table."""
        (only,) = self.parts
        return only.table

    @cached_property
    def firsts(self) -> NDArray[np.int64]:
        """The first row of every request and the end of the last, [parts + 1]."""
        return np.cumsum([0, *(part.table.n_cells for part in self.parts)])

    def read(self, sentences: Sequence[int]) -> CellBatch:
        """These sentences packed; each cell knows the genes its own request measured."""
        edges = np.cumsum([0, *(len(part.sentences) for part in self.parts)])
        owner = np.searchsorted(edges, np.asarray(sentences), side="right") - 1
        asked = {
            index: [sentence - int(edges[index]) for sentence, of in zip(sentences, owner, strict=True) if of == index]
            for index in dict.fromkeys(owner.tolist())
        }
        batches = {index: self.parts[index].read(own) for index, own in asked.items()}
        panels = torch.cat([batch.panels for batch in batches.values()])
        firsts = np.cumsum([0, *(len(batch.panels) for batch in batches.values())])
        read = []
        for first, (index, batch) in zip(firsts.tolist(), batches.items(), strict=False):
            row = torch.where(batch.row == READ_ONLY, batch.row, batch.row + int(self.firsts[index]))
            read.append(replace(batch, panels=panels, panel_index=batch.panel_index + first, row=row))
        return CellBatch.concat(read)

    def split(self, answers: Answers) -> list[Answers]:
        """Each request's own rows; of the only request all there are."""
        if len(self.parts) == 1:
            return [answers]
        spans = zip(self.firsts[:-1], self.firsts[1:], strict=True)
        return [{name: values[first:end] for name, values in answers.items()} for first, end in spans]


@dataclass
class _Waiting:
    task: Hashable
    store: MemoryStore | SharedStore
    answer: asyncio.Future[Answers]


@dataclass
class Packer:
    """Takes requests one by one and asks the model about many at a time, never about more than ``max_cells`` cells.

    ``forwards`` and ``requests`` count what was asked and for how many. When asking about several fails, each is asked
    about alone, so that one request's trouble is its own.
    """

    ask: Ask
    max_cells: int
    forwards: int = 0
    requests: int = 0
    cells: int = 0
    _queue: deque[_Waiting] = field(default_factory=deque)
    _running: asyncio.Task[None] | None = None

    async def __call__(self, task: Hashable, store: MemoryStore | SharedStore) -> Answers:
        """The answer for the cells of one request; requests of equal ``task`` may be asked about together."""
        waiting = _Waiting(task, store, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        if self._running is None or self._running.done():
            self._running = asyncio.get_running_loop().create_task(self._run())
        return await waiting.answer

    async def _run(self) -> None:
        while self._queue:
            pack = self._take()
            if pack:
                await self._answer(pack)

    def _take(self) -> list[_Waiting]:
        """The longest waiting request, and those of the same task behind it that fit; callers who left are forgotten."""
        pack: list[_Waiting] = []
        left: deque[_Waiting] = deque()
        cells = 0
        for waiting in self._queue:
            if waiting.answer.done():
                continue
            size = int(waiting.store.sizes.sum())
            if not pack or (waiting.task == pack[0].task and cells + size <= self.max_cells):
                pack.append(waiting)
                cells += size
            else:
                left.append(waiting)
        self._queue = left
        return pack

    async def _answer(self, pack: Sequence[_Waiting]) -> None:
        store = PackedStore([waiting.store for waiting in pack])
        self.forwards += 1
        try:
            answers = store.split(await asyncio.to_thread(self.ask, pack[0].task, store))
        except Exception as error:  # it goes to whoever asked, below
            if len(pack) > 1:
                for waiting in pack:
                    await self._answer([waiting])
                return
            if not pack[0].answer.done():
                pack[0].answer.set_exception(error)
            return
        self.requests += len(pack)
        self.cells += sum(waiting.store.table.n_cells for waiting in pack)
        for waiting, answer in zip(pack, answers, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(answer)
