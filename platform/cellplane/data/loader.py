"""Sentences straight from shards: verified once, mapped into memory, decoded into buffers that are used again.

Fresh memory for every batch costs more than everything else together, because the system hands out each page anew. So
batches live in a few buffers, and a buffer is used again only when nothing refers to it any more.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from cellplane.cells import CellBatch
from cellplane.data.shards import Block, Manifest, RawBlock, ShardReader, check_shard, read_manifest, read_vocabulary
from cellplane.errors import DataError, IntegrityError
from cellplane.genes import GeneVocabulary

ItemT = TypeVar("ItemT")
PREFETCHED = 2
MAX_BUFFERS = 8  # of each type: what is being used, what is waiting, and some slack
SPARE = 1.25  # a little larger than asked for, so that the next batch fits too

_verified: dict[Path, tuple[tuple[int, int, int], str]] = {}  # of this process: (inode, size, mtime) and the sha256 found then


class ShardStore:
    """A SentenceStore over a folder of shards; a sentence is a row of its manifest.

    Every shard is checked against its sha256 when the store is made, once per process and file. ``row`` of a batch is
    the cell's position in the inputs laid end to end. Raises DataError, FileFormatError or IntegrityError.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder)
        self.vocabulary: GeneVocabulary = read_vocabulary(self.folder, self.manifest)
        self._readers = [self._open(number) for number in range(len(self.manifest.shards))]
        self.panels = torch.from_numpy(self.manifest.panels())
        self._first_row = np.concatenate([[0], np.cumsum([entry.cells for entry in self.manifest.datasets])])
        self._sizes = np.array([row.cells for row in self.manifest.sentences], dtype=np.int64)
        self._genes, self._values = _Buffers(np.int64), _Buffers(np.float32)

    def _open(self, number: int) -> ShardReader:
        entry = self.manifest.shards[number]
        path = (self.folder / entry.name).resolve()
        verify_once(path, lambda: check_shard(path, entry), entry.sha256)
        reader = ShardReader(path)
        if len(reader) != (promised := sum(row.shard == number for row in self.manifest.sentences)):
            raise IntegrityError(f"shard {entry.name} holds {len(reader)} sentences, the manifest says {promised}; convert again")
        return reader

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Cells of every sentence."""
        return self._sizes

    @property
    def n_batches(self) -> int:
        """Samples of all data sets."""
        return len(self.manifest.batch_names)

    @property
    def n_datasets(self) -> int:
        """Number of data sets."""
        return len(self.manifest.datasets)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels by position; empty when no label column was converted."""
        return self.manifest.label_names

    def read(self, sentences: Sequence[int]) -> CellBatch:
        """These sentences packed in the order asked for; ``sentence_seed`` is 0 throughout."""
        rows = [self.manifest.sentences[index] for index in sentences]
        edges = np.concatenate([[0], np.cumsum([row.nnz for row in rows])]).astype(np.int64)
        gene, value = self._genes.take(int(edges[-1])), self._values.take(int(edges[-1]))
        blocks = [
            self._readers[row.shard].block(row.index, into=(gene[start:end], value[start:end]))
            for row, start, end in zip(rows, edges[:-1], edges[1:], strict=True)
        ]
        return CellBatch(gene=torch.from_numpy(gene), value=torch.from_numpy(value), panels=self.panels, **self.columns(blocks))

    def raw(self, sentences: Sequence[int]) -> list[RawBlock]:
        """These sentences in the bytes of the mapped files."""
        rows = [self.manifest.sentences[index] for index in sentences]
        return [self._readers[row.shard].raw(row.index) for row in rows]

    def columns(self, blocks: Sequence[Block]) -> dict[str, torch.Tensor]:
        """All of a CellBatch but its genes, values and panels, from the blocks in this order."""
        cells = np.array([block.n_cells for block in blocks], dtype=np.int64)
        starts = np.cumsum([0, *(block.crow[-1] for block in blocks)])[:-1]
        dataset = np.repeat(np.array([block.dataset for block in blocks], dtype=np.int64), cells)
        columns = {
            "crow": _joined([[0], *(block.crow[1:] + start for block, start in zip(blocks, starts, strict=True))]),
            "panel_index": dataset,
            "cu_seqlens": _joined([[0], np.cumsum(cells)]),
            "sentence_seed": np.zeros(len(blocks), dtype=np.int64),
            "batch_index": _joined([block.batch for block in blocks]),
            "dataset_index": dataset.copy(),
            "platform_index": _joined([block.platform for block in blocks]),
            "coordinates": _coordinates(blocks),
            "row": _joined([block.cell for block in blocks]) + self._first_row[dataset],
        }
        if self.class_names:
            columns["labels"] = _joined([block.label for block in blocks])
        return {name: torch.from_numpy(column) for name, column in columns.items()}


def _joined(parts: Iterable[Any]) -> NDArray[np.int64]:
    arrays = [np.zeros(0, dtype=np.int64), *(np.asarray(part, dtype=np.int64) for part in parts)]
    return np.concatenate(arrays)


def _coordinates(blocks: Sequence[Block]) -> NDArray[np.float32]:
    missing = [np.full((block.n_cells, 2), np.nan, dtype=np.float32) if block.coord is None else block.coord for block in blocks]
    return np.concatenate([np.zeros((0, 2), dtype=np.float32), *missing])


def verify_once(path: Path, check: Any, sha256: str) -> None:
    """Run ``check`` unless this process did so for the same inode, size, time and checksum before."""
    if not path.is_file():
        check()
        raise DataError(f"{path} is missing; convert again")
    stat = path.stat()
    state = ((stat.st_ino, stat.st_size, stat.st_mtime_ns), sha256)
    if _verified.get(path) != state:
        check()
        _verified[path] = state


class _Buffers:
    """Arrays of one type that are handed out again once nothing refers to them any more."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self._dtype, self._lock = dtype, threading.Lock()
        self._arrays: list[NDArray[Any]] = []

    def take(self, size: int) -> NDArray[Any]:
        """An array [size] with arbitrary content."""
        with self._lock:
            for index in range(len(self._arrays)):
                # referred to by the list and by the call alone: no tensor or view of it lives
                if sys.getrefcount(self._arrays[index]) == 2 and len(self._arrays[index]) >= size:
                    return self._arrays[index][:size]
            self._arrays = sorted(self._arrays, key=len)[-(MAX_BUFFERS - 1) :]
            self._arrays.append(np.empty(int(size * SPARE), dtype=self._dtype))
            return self._arrays[-1][:size]


def prefetch(items: Iterable[ItemT]) -> Iterator[ItemT]:
    """The same items, produced by a thread up to two ahead; its exceptions appear here, and it ends when this generator does."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=PREFETCHED)
    stopped = threading.Event()

    def produce() -> None:
        try:
            for item in items:
                ready.put(("item", item))
                if stopped.is_set():
                    return
            ready.put(("end", None))
        except BaseException as error:  # carried to the consumer, who raises it
            ready.put(("error", error))

    thread = threading.Thread(target=produce, name="cellplane-prefetch", daemon=True)
    thread.start()
    try:
        while (got := ready.get())[0] == "item":
            yield got[1]
        if got[0] == "error":
            raise got[1]
    finally:
        stopped.set()
        while not ready.empty():  # makes room for the one item that may wait
            ready.get_nowait()
        thread.join()
