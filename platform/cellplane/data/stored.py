"""A file's cells as a CellTable whose entries stay on disk, and rows of numbers that go there: memory does not grow with cells.

The counts are read once, range by range, and laid down over the vocabulary's genes, four bytes an entry, in a file without
a name that vanishes with the process. A sentence then reads its own rows. What stays in memory is some tens of bytes a cell.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import DTypeLike, NDArray

from cellplane.data.buffers import Buffers
from cellplane.data.columns import as_names, complete
from cellplane.data.config import DataKeys
from cellplane.data.counts import MAX_EXACT_COUNT
from cellplane.data.files import storage_errors
from cellplane.data.gene_mapping import GeneRules
from cellplane.data.loader import prefetch
from cellplane.data.looking import NotCountsError, counts_at, look
from cellplane.data.naming import best_naming, default_naming, gene_namings, to_vocabulary
from cellplane.data.reader import CellReader
from cellplane.data.sentences import CellTable
from cellplane.data.sources import count_share, known_keys
from cellplane.errors import about
from cellplane.genes import GeneAlignment, GeneVocabulary

WRITE_BYTES = 1 << 30  # of one system call, which writes 2 GiB at most
PIECE_BYTES, CALL_BYTES = 1 << 24, 1 << 13  # copying up to 8 KiB takes no longer than one more system call


class DiskRows:
    """An array [n, width] in a file without a name: rows are written and read in any order. StorageError when the disk is full."""

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike, folder: Path) -> None:
        self.shape, self.dtype, self.folder = shape, np.dtype(dtype), folder
        self.row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * self.dtype.itemsize
        with storage_errors(folder), tempfile.TemporaryFile(dir=folder) as file:
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return self.shape[0]

    def __setitem__(self, rows: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Writes ``values`` [r, width] into these rows; narrow ones that lie near one another in one piece, with what lies between."""
        block = np.ascontiguousarray(values, dtype=self.dtype)
        first = int(rows.min()) if len(rows) else 0
        between = int(rows.max()) + 1 - first if len(rows) else 0
        if len(rows) < 2 or between * self.row_bytes > min(PIECE_BYTES, len(rows) * CALL_BYTES):
            for row, low, high in _runs(rows):
                self._write(_bytes(block[low:high]), row * self.row_bytes)
            return
        piece = np.empty((between, *self.shape[1:]), dtype=self.dtype)
        self.read(first, piece)
        piece[rows - first] = block
        self._write(_bytes(piece), first * self.row_bytes)

    def append(self, values: NDArray[Any], at: int) -> None:
        """Writes rows from number ``at`` on."""
        self._write(_bytes(np.ascontiguousarray(values, dtype=self.dtype)), at * self.row_bytes)

    def _write(self, view: memoryview, at: int) -> None:
        with storage_errors(self.folder):
            done = 0
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done : done + WRITE_BYTES], at + done)

    def read(self, start: int, out: NDArray[Any]) -> None:
        """Fills ``out`` with the rows from ``start`` on; those never written are zeros."""
        view, at = _bytes(out), start * self.row_bytes
        done = 0
        while done < len(view):
            got = os.preadv(self._descriptor, [view[done:]], at + done)
            if got == 0:  # behind the last row that was written
                view[done:] = bytes(len(view) - done)
                return
            done += got

    def blocks(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """(first row, rows) of all of it, some MB at a time."""
        step = max(1, (16 << 20) // max(self.row_bytes, 1))
        for start in range(0, len(self), step):
            out = np.empty((min(step, len(self) - start), *self.shape[1:]), dtype=self.dtype)
            self.read(start, out)
            yield start, out


def _bytes(array: NDArray[Any]) -> memoryview:
    raw: Any = array.reshape(-1).view(np.uint8)
    return memoryview(raw)


def _runs(rows: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """(first row, from, to) of the stretches of consecutive rows."""
    edges = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    for low, high in itertools.pairwise(edges):
        if high > low:
            yield int(rows[low]), low, high


@dataclass(frozen=True)
class Entries:
    """CSR entries on disk: ``pairs`` [nnz, 2] of gene and count, in 16 bits each where the vocabulary allows it.

    Counts that 16 bits do not hold lie in memory: ``large`` [m] where they are, ascending, and ``counts`` [m] float32.
    """

    pairs: DiskRows
    large: NDArray[np.int64]
    counts: NDArray[np.float32]

    @cached_property
    def _buffers(self) -> tuple[Buffers, Buffers, Buffers]:
        return Buffers(self.pairs.dtype), Buffers(np.int64), Buffers(np.float32)

    def read(self, stretches: Sequence[tuple[int, int]], total: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Genes and counts of these stretches (from, to), laid end to end, [total] each."""
        raw, gene, value = (buffers.take(size) for buffers, size in zip(self._buffers, (2 * total, total, total), strict=True))
        pairs, at = raw.reshape(-1, 2), 0
        for low, high in stretches:
            self.pairs.read(low, pairs[at : at + high - low])
            at += high - low
        np.copyto(gene, pairs[:, 0])
        np.copyto(value, pairs[:, 1])
        if len(self.large):
            self._put_large(stretches, value)
        return gene, value

    def _put_large(self, stretches: Sequence[tuple[int, int]], value: NDArray[np.float32]) -> None:
        at = 0
        for low, high in stretches:
            own = slice(*np.searchsorted(self.large, (low, high)))
            value[at - low + self.large[own]] = self.counts[own]
            at += high - low


class _Laying:
    """Entries being laid down, block by block."""

    def __init__(self, n_genes: int, folder: Path) -> None:
        self._pairs = DiskRows((0, 2), np.uint16 if n_genes <= 1 << 16 else np.uint32, folder)
        self._large: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
        self._at = 0

    def append(self, gene: NDArray[np.integer], count: NDArray[np.float32]) -> None:
        """Further entries; counts are whole, none above MAX_EXACT_COUNT."""
        pairs = np.empty((len(gene), 2), dtype=self._pairs.dtype)
        np.copyto(pairs[:, 0], gene, casting="unsafe")
        np.copyto(pairs[:, 1], count, casting="unsafe")
        self._pairs.append(pairs, self._at)
        if len(count) and count.max() > np.iinfo(pairs.dtype).max:
            large = np.flatnonzero(count > np.iinfo(pairs.dtype).max)
            self._large.append((large + self._at, count[large]))
        self._at += len(gene)

    def done(self) -> Entries:
        """All of them."""
        large = np.concatenate([np.zeros(0, dtype=np.int64), *(at for at, _ in self._large)])
        counts = np.concatenate([np.zeros(0, dtype=np.float32), *(count for _, count in self._large)])
        return Entries(self._pairs, large, counts)


@dataclass(frozen=True)
class StoredTable(CellTable):
    """A CellTable that reads the rows it is asked for: ``gene`` and ``value`` are empty, ``sums`` [n] the cells' totals."""

    entries: Entries | None = None
    sums: NDArray[np.float64] | None = None

    def totals(self) -> NDArray[np.float64]:
        """Counts of each cell in the vocabulary's genes, [n]."""
        assert self.sums is not None
        return self.sums

    def rows(self, rows: NDArray[np.int64]) -> CellTable:
        """These cells, in memory, in this order."""
        assert self.entries is not None
        lengths = np.diff(self.crow)[rows]
        crow = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        stretches = [(int(self.crow[first]), int(self.crow[first + high - low])) for first, low, high in _runs(rows)]
        gene, value = self.entries.read(stretches, int(crow[-1]))
        names = ("batch", "coordinates", "empty")
        optional = {name: column[rows] for name in names if (column := getattr(self, name)) is not None}
        return CellTable(crow=crow, gene=gene, value=value, panel=self.panel, **optional)


@dataclass(frozen=True)
class Stored:
    """A file's cells, the report of reading them, and where each column of X lies in the vocabulary (-1: nowhere)."""

    table: StoredTable
    report: dict[str, object]
    columns: NDArray[np.int64]


def store_cells(path: Path, vocabulary: GeneVocabulary, keys: DataKeys, folder: Path) -> Stored:
    """The cells of an h5ad or zarr over a vocabulary, their entries in ``folder``: `sources.cell_table` at any size.

    The place of the counts is chosen by a sample and every cell is checked as it is read. Raises what `cell_table` raises,
    DataError for a cell whose values are no counts, StorageError when the disk is full.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".cellplane-") as scratch, CellReader(path, Path(scratch)) as reader:
        place, recovered, _ = look(reader, keys)
        namings = gene_namings(reader.var(place))
        default_naming(namings, keys.repeated_genes)
        rules = GeneRules(keys.repeated_genes, keys.ignore_gene_case)
        naming, alignment = best_naming(namings, vocabulary, rules)
        batch = None
        if keys.batch_key is not None:
            batch = complete(_shared_text(reader.obs(keys.batch_key)), keys.batch_key)
        try:
            with closing(prefetch(counts_at(reader, place, recovered), ahead=1)) as parts:  # read and checked by a thread, laid down here
                laid = _lay_down(parts, alignment, reader.n_cells, folder)
        except NotCountsError as error:
            raise NotCountsError(f"{path}: {error}; use raw counts") from None
        table = StoredTable(
            crow=laid.crow,
            gene=np.zeros(0, dtype=np.int64),
            value=np.zeros(0, dtype=np.float32),
            panel=alignment.panel(),
            batch=batch,
            coordinates=None if keys.spatial_key is None else reader.coordinates(keys.spatial_key),
            empty=laid.empty,
            entries=laid.entries,
            sums=laid.sums,
        )
        columns = alignment.positions if place != "raw.X" else _places_in_x(reader, alignment)
    counted = {"count_source": place, "recovered": recovered, "largest_deviation": laid.deviation}
    named = {"gene_naming": naming, "gene_table": alignment.table, **alignment.report()}
    return Stored(table, {**counted, **named, "count_share": count_share(float(laid.sums.sum()), laid.total)}, columns)


def check_answerable(path: Path, keys: DataKeys, vocabulary: GeneVocabulary) -> None:
    """Whether a model of these genes can read this file, as a sample of its cells tells; raises what reading all of it would."""
    with about(path), CellReader(path) as reader:
        place, _, _ = look(reader, known_keys(keys, reader.obs_columns, reader.obsm_keys))
        best_naming(gene_namings(reader.var(place)), vocabulary, GeneRules(keys.repeated_genes, keys.ignore_gene_case))


def _shared_text(values: Any) -> NDArray[np.object_]:
    """A text column as objects, one for each name and not for each cell; missing values as None."""
    names = as_names(values)
    return np.array([*names.names, None], dtype=object)[names.codes]


def _places_in_x(reader: CellReader, alignment: GeneAlignment) -> NDArray[np.int64]:
    """Vocabulary positions of the file's own genes where the counts lie in raw, which may have others."""
    place = dict(zip(map(str, reader.var("raw.X").index), alignment.positions.tolist(), strict=True))
    return np.array([place.get(name, -1) for name in reader.gene_names], dtype=np.int64)


@dataclass(frozen=True)
class _Laid:
    crow: NDArray[np.int64]
    empty: NDArray[np.bool_]
    sums: NDArray[np.float64]
    entries: Entries
    deviation: float
    total: float


def _lay_down(parts: Iterable[tuple[int, sp.csr_matrix, float]], alignment: GeneAlignment, n_cells: int, folder: Path) -> _Laid:
    entries, deviation = _Laying(alignment.n_vocabulary, folder), 0.0
    lengths, sums = np.zeros(n_cells + 1, dtype=np.int64), np.zeros(n_cells)
    empty, total = np.zeros(n_cells, dtype=bool), 0.0
    for row, matrix, off in parts:
        rows = to_vocabulary(matrix, alignment)
        there = slice(row, row + rows.shape[0])
        lengths[there.start + 1 : there.stop + 1] = np.diff(rows.indptr)
        empty[there] = np.diff(matrix.indptr) == 0
        sums[there] = _sums(rows)
        entries.append(rows.indices, rows.data.astype(np.float32, copy=False))
        deviation, total = max(deviation, off), total + float(matrix.data.sum(dtype=np.float64))
    return _Laid(np.cumsum(lengths), empty, sums, entries.done(), deviation, total)


def _sums(rows: sp.csr_matrix) -> NDArray[np.float64]:
    """Sum of each row of counts, [n]."""
    filled, sums = np.flatnonzero(np.diff(rows.indptr)), np.zeros(rows.shape[0])
    if len(filled) == 0:
        return sums
    quick = np.add.reduceat(rows.data, rows.indptr[filled]) if rows.dtype == np.float32 else np.full(1, np.inf)
    exact = quick.max() < MAX_EXACT_COUNT  # then nothing was rounded on the way either
    sums[filled] = quick if exact else np.add.reduceat(rows.data, rows.indptr[filled], dtype=np.float64)
    return sums
