"""Row ranges of a stored matrix, whatever its layout, in memory that does not grow with the file.

Rows of a CSR matrix lie together and are read as they stand. A dense matrix gives its non-zeros. A CSC matrix has no
rows to read: it is turned once, some columns at a time, into CSR pieces on disk, whose rows are joined when asked for.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from cellplane.data.buffers import Buffers
from cellplane.data.counts import canonical, check_structure
from cellplane.data.files import atomic_file, storage_errors
from cellplane.errors import IntegrityError

READ_BYTES = 16 * 1024**2  # of values and column indices read at once
CSC_IN_MEMORY_BYTES = 64 * 1024**2  # a smaller CSC matrix is simply loaded


class RawRows(NamedTuple):
    """Rows as they are stored: CSR from 0, entries in the file's order. Not to be written into: they may lie in a matrix in memory."""

    indptr: NDArray[np.int64]
    indices: NDArray[Any]
    data: NDArray[Any]

    def matrix(self, n_columns: int, place: str) -> sp.csr_matrix:
        """These rows as canonical CSR; IntegrityError on column indices that do not exist."""
        shape = (len(self.indptr) - 1, n_columns)
        check_structure(self.indptr, self.indices, shape, place)
        data = self.data.astype(np.float32) if self.data.dtype == np.float16 else self.data  # SciPy knows no halves
        return canonical(sp.csr_matrix((data, self.indices, self.indptr), shape=shape, copy=False), place)


class StoredMatrix(Protocol):
    """A matrix that can be read by row ranges."""

    shape: tuple[int, int]
    layout: str  # csr, csc or dense
    dtype: np.dtype[Any]
    index_dtype: np.dtype[Any]

    def read(self, start: int, stop: int) -> RawRows:
        """Rows start to stop."""

    def lengths(self) -> NDArray[np.int64] | None:
        """Stored entries of each row [n], where the file tells them without reading the matrix."""

    def cuts(self, start: int, stop: int) -> list[int]:
        """Where to cut these rows so that each part is some tens of MB."""


def open_matrix(node: Any, place: str, n_cells: int, scratch: Path | None = None) -> StoredMatrix:
    """A dataset or group of HDF5 or zarr, or a matrix in memory. A large CSC matrix is turned into ``scratch`` on first use.

    Raises IntegrityError when its rows are not the cells or its structure is corrupt.
    """
    matrix = _open(node, place, scratch)
    if matrix.shape[0] != n_cells:
        raise IntegrityError(f"{place} has {matrix.shape[0]} rows for {n_cells} cells; write the file again from its source")
    return matrix


def _open(node: Any, place: str, scratch: Path | None) -> StoredMatrix:
    if sp.issparse(node):
        whole = node if node.format in ("csr", "csc") else node.tocsr()
        check_structure(whole.indptr, whole.indices, whole.shape if whole.format == "csr" else whole.shape[::-1], place)
        return (
            _Csr(_Arrays(whole.data, whole.indices, whole.indptr), whole.shape, place)
            if whole.format == "csr"
            else _small_csc(whole, place)
        )
    if not hasattr(node, "keys"):
        return _Dense(node)
    kind = str(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "")))
    rows, columns = (int(n) for n in node.attrs.get("shape", node.attrs.get("h5sparse_shape", (0, 0))))
    arrays = _Arrays(node["data"], node["indices"], node["indptr"])
    if not kind.startswith("csc"):
        return _Csr(arrays, (rows, columns), place)
    if scratch is None or _entry_bytes(arrays) * arrays.indices.shape[0] <= CSC_IN_MEMORY_BYTES:
        loaded = [array[:] for array in arrays]
        check_structure(loaded[2], loaded[1], (columns, rows), place)
        return _small_csc(sp.csc_matrix(tuple(loaded), shape=(rows, columns), copy=False), place)
    return _TurnedCsc(arrays, (rows, columns), place, scratch)


class _Arrays(NamedTuple):
    data: Any
    indices: Any
    indptr: Any


def _entry_bytes(arrays: _Arrays) -> int:
    return int(arrays.data.dtype.itemsize + arrays.indices.dtype.itemsize)


def _small_csc(matrix: Any, place: str) -> StoredMatrix:
    turned = sp.csr_matrix(matrix)  # entries of a row ascend by column, explicit zeros stay
    rows = _Csr(_Arrays(turned.data, turned.indices, turned.indptr), matrix.shape, place)
    rows.layout, rows.index_dtype = "csc", matrix.indices.dtype
    return rows


class _Csr:
    """Rows that lie together."""

    def __init__(self, arrays: _Arrays, shape: tuple[int, int], place: str) -> None:
        self.shape, self.layout, self._place = (int(shape[0]), int(shape[1])), "csr", place
        self._arrays = arrays
        self.dtype, self.index_dtype = np.dtype(arrays.data.dtype), np.dtype(arrays.indices.dtype)
        self._buffers = {name: Buffers(getattr(arrays, name).dtype.newbyteorder("=")) for name in ("indices", "data")}
        self._entries = int(arrays.indices.shape[0])
        if int(arrays.indptr.shape[0]) != self.shape[0] + 1:
            raise IntegrityError(f"{place} is a corrupt sparse matrix: {arrays.indptr.shape[0] - 1} row starts for {shape[0]} rows")

    def lengths(self) -> NDArray[np.int64]:
        indptr = np.asarray(self._arrays.indptr[:]).astype(np.int64)
        check_structure(indptr, np.zeros(0, dtype=np.int64), self.shape, self._place, n_entries=self._entries)
        return np.diff(indptr)

    def _starts(self, start: int, stop: int) -> NDArray[np.int64]:
        starts = np.asarray(self._arrays.indptr[start : stop + 1]).astype(np.int64)
        if (np.diff(starts) < 0).any() or starts[0] < 0 or starts[-1] > self._entries:
            found = "row starts that do not ascend from 0 to the number of entries"
            raise IntegrityError(f"{self._place} is a corrupt sparse matrix: {found}; write the file again from its source")
        return starts

    def cuts(self, start: int, stop: int) -> list[int]:
        return _cut(self._starts(start, stop), start, READ_BYTES // _entry_bytes(self._arrays))

    def read(self, start: int, stop: int) -> RawRows:
        starts = self._starts(start, stop)
        low, high = int(starts[0]), int(starts[-1])
        return RawRows(starts - low, self._take("indices", low, high), self._take("data", low, high))

    def _take(self, name: str, low: int, high: int) -> NDArray[Any]:
        stored = getattr(self._arrays, name)
        if not hasattr(stored, "read_direct"):
            return np.asarray(stored[low:high])
        held = self._buffers[name].take(high - low)
        if high > low:
            stored.read_direct(held, np.s_[low:high])
        return held


def _cut(starts: NDArray[np.int64], first: int, budget: int) -> list[int]:
    """Row numbers from ``first`` on that cut rows with these starts into parts of ``budget`` entries, one row at least."""
    cuts, at = [first], 0
    while at < len(starts) - 1:
        at = max(at + 1, int(np.searchsorted(starts, starts[at] + budget, side="right")) - 1)
        cuts.append(first + at)
    return cuts


class _Dense:
    """A matrix that stores every zero."""

    layout = "dense"

    def __init__(self, node: Any) -> None:
        self._node = node
        self.shape = (int(node.shape[0]), int(node.shape[1]))
        self.dtype, self.index_dtype = np.dtype(node.dtype), np.dtype(np.int32)

    def lengths(self) -> None:
        return None

    def cuts(self, start: int, stop: int) -> list[int]:
        step = max(1, READ_BYTES // max(1, self.shape[1] * (self.dtype.itemsize + 8)))
        return [*range(start, stop, step), stop]

    def read(self, start: int, stop: int) -> RawRows:
        dense = np.asarray(self._node[start:stop])
        entry = np.flatnonzero(dense)
        indptr = np.concatenate([[0], np.cumsum(np.count_nonzero(dense, axis=1))]).astype(np.int64)
        row = np.repeat(np.arange(len(dense)), np.diff(indptr))
        return RawRows(indptr, (entry - row * self.shape[1]).astype(np.int32), dense.ravel()[entry])


class _TurnedCsc:
    """A CSC matrix turned into CSR pieces of some columns each."""

    layout = "csc"

    def __init__(self, arrays: _Arrays, shape: tuple[int, int], place: str, scratch: Path) -> None:
        self.shape, self._place = shape, place
        self.dtype, self.index_dtype = np.dtype(arrays.data.dtype), np.dtype(arrays.indices.dtype)
        self._folder = scratch / hashlib.sha256(place.encode()).hexdigest()[:8]
        self._entry_bytes = _entry_bytes(arrays)
        done = self._folder / "done.json"
        if not done.is_file():
            with storage_errors(self._folder):
                pieces = sum(1 for _ in self._turn(arrays))
            with atomic_file(done) as temporary:
                temporary.write_text(json.dumps(pieces), encoding="utf-8")
        self._pieces = [
            _Arrays(*(np.load(self._folder / f"{name}-{number}.npy", mmap_mode="r") for name in _Arrays._fields))
            for number in range(json.loads(done.read_bytes()))
        ]

    def _turn(self, arrays: _Arrays) -> Iterator[None]:
        self._folder.mkdir(parents=True, exist_ok=True)
        starts = np.asarray(arrays.indptr[:]).astype(np.int64)
        check_structure(starts, np.zeros(0, np.int64), self.shape[::-1], self._place, n_entries=int(arrays.indices.shape[0]))
        cuts = _cut(starts, 0, READ_BYTES // self._entry_bytes)
        for number, (left, right) in enumerate(itertools.pairwise(cuts)):
            low, high = int(starts[left]), int(starts[right])
            indices = arrays.indices[low:high]
            check_structure(starts[left : right + 1] - low, indices, (right - left, self.shape[0]), self._place)
            columns = sp.csc_matrix((arrays.data[low:high], indices, starts[left : right + 1] - low), shape=(self.shape[0], right - left))
            rows = sp.csr_matrix(columns)
            for name, array in (
                ("data", rows.data),
                ("indices", rows.indices.astype(np.int32) + left),
                ("indptr", rows.indptr.astype(np.int64)),
            ):
                np.save(self._folder / f"{name}-{number}.npy", array, allow_pickle=False)
            yield

    def lengths(self) -> NDArray[np.int64]:
        total = np.zeros(self.shape[0], dtype=np.int64)
        for piece in self._pieces:
            total += np.diff(piece.indptr)
        return total

    def cuts(self, start: int, stop: int) -> list[int]:
        starts = sum((np.asarray(piece.indptr[start : stop + 1]) for piece in self._pieces), np.zeros(stop - start + 1, dtype=np.int64))
        return _cut(starts, start, READ_BYTES // self._entry_bytes)

    def read(self, start: int, stop: int) -> RawRows:
        starts = [np.asarray(piece.indptr[start : stop + 1]) for piece in self._pieces]
        lengths = [np.diff(own) for own in starts]
        indptr = np.concatenate([[0], np.cumsum(sum(lengths, np.zeros(stop - start, dtype=np.int64)))]).astype(np.int64)
        indices, data = np.empty(indptr[-1], dtype=np.int32), np.empty(indptr[-1], dtype=self.dtype)
        filled = indptr[:-1].copy()
        for piece, own, length in zip(self._pieces, starts, lengths, strict=True):
            target = np.repeat(filled - (own[:-1] - own[0]), length) + np.arange(own[-1] - own[0])
            indices[target], data[target] = piece.indices[own[0] : own[-1]], piece.data[own[0] : own[-1]]
            filled += length
        return RawRows(indptr, indices, data)
