"""A file's cells as a CellTable whose entries stay on disk, and rows of numbers that go there: memory does not grow with cells.

The counts are read once, range by range, and laid down over the vocabulary's genes, eight bytes an entry, in files without
a name that vanish with the process. A sentence then reads its own rows. What stays in memory is some tens of bytes a cell.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import DTypeLike, NDArray

from cellplane.data.columns import as_names, complete
from cellplane.data.config import DataKeys
from cellplane.data.files import storage_errors
from cellplane.data.gene_mapping import GeneRules
from cellplane.data.loader import prefetch
from cellplane.data.looking import NotCountsError, counts_at, look
from cellplane.data.naming import best_naming, default_naming, gene_namings, to_vocabulary
from cellplane.data.reader import CellReader
from cellplane.data.sentences import CellTable
from cellplane.genes import GeneAlignment, GeneVocabulary

WRITE_BYTES = 1 << 30  # of one system call, which writes 2 GiB at most


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
        """Writes ``values`` [r, width] into these rows."""
        block = np.ascontiguousarray(values, dtype=self.dtype)
        for first, low, high in _runs(rows):
            self._write(_bytes(block[low:high]), first * self.row_bytes)

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
class StoredTable(CellTable):
    """A CellTable that reads the rows it is asked for: ``gene`` and ``value`` are empty, ``sums`` [n] the cells' totals."""

    entries: tuple[DiskRows, DiskRows] | None = None
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
        gene, value = (np.empty(int(crow[-1]), dtype=part.dtype) for part in self.entries)
        for first, low, high in _runs(rows):
            part = slice(int(crow[low]), int(crow[high]))
            for disk, out in zip(self.entries, (gene, value), strict=True):
                disk.read(int(self.crow[first]), out[part])
        names = ("batch", "coordinates", "empty")
        optional = {name: column[rows] for name in names if (column := getattr(self, name)) is not None}
        return CellTable(crow=crow, gene=gene.astype(np.int64), value=value, panel=self.panel, **optional)


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
    return Stored(table, {**counted, "gene_naming": naming, "gene_table": alignment.table, **alignment.report()}, columns)


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
    entries: tuple[DiskRows, DiskRows]
    deviation: float


def _lay_down(parts: Iterable[tuple[int, sp.csr_matrix, float]], alignment: GeneAlignment, n_cells: int, folder: Path) -> _Laid:
    genes, values = (DiskRows((0,), kind, folder) for kind in (np.int32, np.float32))
    lengths, sums = np.zeros(n_cells + 1, dtype=np.int64), np.zeros(n_cells)
    empty = np.zeros(n_cells, dtype=bool)
    at, deviation = 0, 0.0
    for row, matrix, off in parts:
        rows = to_vocabulary(matrix, alignment)
        there = slice(row, row + rows.shape[0])
        lengths[there.start + 1 : there.stop + 1] = np.diff(rows.indptr)
        empty[there] = np.diff(matrix.indptr) == 0
        value = rows.data.astype(np.float32, copy=False)
        sums[there] = rows @ np.ones(rows.shape[1])
        genes.append(rows.indices, at)
        values.append(value, at)
        at, deviation = at + len(value), max(deviation, off)
    return _Laid(np.cumsum(lengths), empty, sums, (genes, values), deviation)
