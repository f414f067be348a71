"""Sentences straight from shards: verified once, mapped into memory, decoded into buffers that are used again.

Fresh memory for every batch costs more than everything else together, because the system hands out each page anew. So
batches live in a few buffers: a buffer is used again once no batch, tensor or view refers to it any more, so in training
three sets go round (one in use, one waiting, one being filled) and nothing that is looked at is ever overwritten.
"""

from __future__ import annotations

import fcntl
import hashlib
import platform
import queue
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from cellplane.cells import CellBatch
from cellplane.config import home
from cellplane.data.buffers import Buffers
from cellplane.data.sentences import SentenceWeights, draw_weights
from cellplane.data.shards import Block, Manifest, RawBlock, ShardEntry, ShardReader, check_shard, read_manifest, read_vocabulary
from cellplane.errors import DataError, IntegrityError
from cellplane.genes import GeneVocabulary

ItemT = TypeVar("ItemT")
PREFETCHED = 2
REMEMBERED_S = 86_400.0  # a node checks a shard again after a day: disks rot

PER_CELL = ("dataset_index", "batch_index", "platform_index", "labels", "row")

_verified: dict[Path, tuple[tuple[int, int, int], str]] = {}  # of this process: (inode, size, mtime) and the sha256 found then


class ShardStore:
    """A SentenceStore over a folder of shards; a sentence is a row of its manifest.

    Every shard is checked against its sha256 when the store is made, once per node and file (see `verify_once`). ``row``
    of a batch is the cell's position in the inputs laid end to end. Batches may be read from several threads. Raises
    DataError, FileFormatError or IntegrityError.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder)
        self.vocabulary: GeneVocabulary = read_vocabulary(self.folder, self.manifest)
        promised = np.bincount([row.shard for row in self.manifest.sentences], minlength=len(self.manifest.shards)).tolist()
        self._readers = [self._open(entry, sentences) for entry, sentences in zip(self.manifest.shards, promised, strict=True)]
        self.panels = torch.from_numpy(self.manifest.panels())
        self._start_of = [0, *accumulate(entry.cells for entry in self.manifest.datasets)]  # row of a data set's first cell
        self._sizes = np.array([row.cells for row in self.manifest.sentences], dtype=np.int64)
        self._genes, self._values = Buffers(np.int64), Buffers(np.float32)
        self._reading = threading.Lock()

    def _open(self, entry: ShardEntry, promised: int) -> ShardReader:
        path = (self.folder / entry.name).resolve()
        verify_once(path, lambda: check_shard(path, entry), entry.sha256)
        reader = ShardReader(path)
        if len(reader) != promised:
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
        with self._reading:
            return self._read(sentences)

    def _read(self, sentences: Sequence[int]) -> CellBatch:
        rows = [self.manifest.sentences[index] for index in sentences]
        entries = sum(row.nnz for row in rows)
        gene, value = torch.from_numpy(self._genes.take(entries)), torch.from_numpy(self._values.take(entries))
        blocks, start = [], 0
        for row in rows:
            block, at, exact = self._readers[row.shard].raw(row.index)
            end = start + len(block.gene)
            gene[start:end].copy_(from_dlpack(block.gene))  # PyTorch widens an eighth faster than NumPy, on all its threads
            value[start:end].copy_(from_dlpack(block.value))
            if len(at):
                value.numpy()[start + at] = exact
            blocks.append(block)
            start = end
        return CellBatch(gene=gene, value=value, panels=self.panels, **self.columns(blocks))

    def raw(self, sentences: Sequence[int]) -> list[RawBlock]:
        """These sentences in the bytes of the mapped files."""
        rows = [self.manifest.sentences[index] for index in sentences]
        with self._reading:
            return [self._readers[row.shard].raw(row.index) for row in rows]

    def draw_weights(self, config: SentenceWeights | None) -> NDArray[np.float64] | None:
        """Weight of every sentence for a StepPlan, [n_sentences]; None draws each once an epoch. ConfigError for an unknown name."""
        if config is None:
            return None
        names = {"dataset": [entry.name for entry in self.manifest.datasets], "batch": self.manifest.batch_names}[config.column]
        column = np.array([getattr(row, config.column) for row in self.manifest.sentences], dtype=np.int64)
        return draw_weights(config, column, names)

    def columns(self, blocks: Sequence[Block]) -> dict[str, torch.Tensor]:
        """All of a CellBatch but its genes, values and panels, from the blocks in this order."""
        edges = [0, *accumulate(block.n_cells for block in blocks)]
        table = np.empty((len(PER_CELL), edges[-1]), dtype=np.int64)  # one piece of memory, and few calls: this is done for every batch
        coordinates = np.empty((edges[-1], 2), dtype=np.float32)
        for block, start, end in zip(blocks, edges, edges[1:], strict=False):
            part = table[:, start:end]
            part[0], part[1], part[3] = block.dataset, block.batch, block.label
            part[2] = -1 if block.platform is None else block.platform
            np.add(block.cell, self._start_of[block.dataset], out=part[4])
            coordinates[start:end] = np.nan if block.coord is None else block.coord
        columns = dict(zip(PER_CELL, torch.from_numpy(table), strict=True))
        if not self.class_names:
            del columns["labels"]
        return columns | {
            "panel_index": columns["dataset_index"],  # a data set's panel is its own
            "crow": torch.from_numpy(blocks[0].crow if len(blocks) == 1 else _joined([block.crow for block in blocks])),
            "cu_seqlens": torch.from_numpy(np.array(edges, dtype=np.int64)),
            "sentence_seed": torch.from_numpy(np.zeros(len(blocks), dtype=np.int64)),
            "coordinates": torch.from_numpy(coordinates),
        }


def _joined(rows: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The row starts of several CSR matrices laid below one another."""
    starts = [0, *accumulate(int(own[-1]) for own in rows)]
    return np.concatenate([[0], *(own[1:] + start for own, start in zip(rows, starts, strict=False))]).astype(np.int64, copy=False)


def verify_once(path: Path, check: Callable[[], None], sha256: str) -> None:
    """Run ``check`` unless this node did so for the same file (inode, size, time) and checksum, at most a day ago.

    The memory is a folder under $CELLPLANE_HOME/cache that a restart of the machine forgets; where it cannot be written
    every process checks for itself. Of several workers that start together one checks and the others wait for it.
    """
    if not path.is_file():
        check()
        raise DataError(f"{path} is missing; convert again")
    stat = path.stat()
    state = ((stat.st_ino, stat.st_size, stat.st_mtime_ns), sha256)
    if _verified.get(path) == state:
        return
    mark = _remembered() / hashlib.sha256(repr((path, stat.st_dev, state)).encode()).hexdigest()[:32]
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        file = mark.open("a+b")
    except OSError:
        check()
    else:
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if mark.stat().st_size == 0 or time.time() - mark.stat().st_mtime > REMEMBERED_S:
                file.truncate(0)
                check()
                with suppress(OSError):  # a full disk: then it is checked again next time
                    file.write(b"verified")
    _verified[path] = state


def _remembered() -> Path:
    """The folder of this start of this machine; those of earlier starts are removed."""
    node = home() / "cache" / "verified" / (platform.node() or "node")
    folder = node / _boot()
    if node.is_dir() and not folder.exists():
        shutil.rmtree(node, ignore_errors=True)
    return folder


def _boot() -> str:
    """A name of this start of the machine."""
    identifier = Path("/proc/sys/kernel/random/boot_id")
    return identifier.read_text().strip() if identifier.is_file() else "boot"


def prefetch(items: Iterable[ItemT], ahead: int = PREFETCHED) -> Generator[ItemT, None, None]:
    """The same items in the same order, produced by a thread up to ``ahead`` before they are asked for.

    What the producer raises appears here, in its place; the thread ends, and the producer is closed, when this generator is.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=ahead)
    stopped = threading.Event()

    def produce() -> None:
        source = iter(items)
        try:
            for item in source:
                ready.put(("item", item))
                if stopped.is_set():
                    return
                del item  # else its buffers would be in use until the next one is made
            ready.put(("end", None))
        except BaseException as error:  # carried to the consumer, who raises it
            ready.put(("error", error))
        finally:
            if isinstance(source, Generator):
                source.close()

    thread = threading.Thread(target=produce, name="cellplane-prefetch", daemon=True)
    thread.start()
    try:
        while (got := ready.get())[0] == "item":
            item = got[1]
            del got
            yield item
            del item
        if got[0] == "error":
            raise got[1]
    finally:
        stopped.set()
        while not ready.empty():  # makes room for the one item that may wait
            ready.get_nowait()
        thread.join()
