"""From rows as a file stores them to rows as a shard stores them: checked, mapped into the vocabulary, narrowed.

Everything happens in pieces that stay in the processor's cache, which is several times faster than whole arrays one
operation after another. Entries keep their order and explicit zeros stay, so that a matrix can be given back exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from cellplane.data.counts import MAX_EXACT_COUNT, describe, summable
from cellplane.data.matrices import RawRows
from cellplane.data.naming import to_vocabulary
from cellplane.data.shards import ESCAPES, MAX_UINT16_GENES
from cellplane.errors import DataError, IntegrityError
from cellplane.genes import GeneAlignment

PIECE = 1 << 16  # entries worked on at once: all arrays of a piece fit into a megabyte
MAX_ESCAPED = 2**32 - 1
MAX_EXACT_FLOAT64 = 2**53


class NotWholeError(DataError):
    """Values that an encoding for whole numbers cannot hold."""


@dataclass(frozen=True)
class Encoded:
    """n cells as a shard stores them: ``crow`` [n+1], ``gene`` and ``x`` [nnz], and the ``exact`` values of escaped entries, in order."""

    crow: NDArray[np.int64]
    gene: NDArray[Any]
    x: NDArray[Any]
    exact: NDArray[np.uint32]

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.crow) - 1

    def escaped(self) -> NDArray[np.int64]:
        """Positions of the entries that stand for ``exact`` ones."""
        return escaped_entries(self.x)

    def take(self, rows: NDArray[np.int64]) -> Encoded:
        """These cells, in this order."""
        if len(rows) == self.n_cells and (rows == np.arange(len(rows))).all():
            return self
        over = np.searchsorted(self.escaped(), self.crow)
        crow = np.concatenate([[0], np.cumsum(np.diff(self.crow)[rows])])
        return Encoded(crow, _pick(self.gene, self.crow, rows), _pick(self.x, self.crow, rows), _pick(self.exact, over, rows))

    @staticmethod
    def join(parts: list[Encoded]) -> Encoded:
        """All cells one after another; the argument is emptied, to free its memory."""
        if len(parts) == 1:
            return parts.pop()
        lengths = np.concatenate([np.diff(part.crow) for part in parts])
        gene, x, exact = (np.concatenate([getattr(part, name) for part in parts]) for name in ("gene", "x", "exact"))
        parts.clear()
        return Encoded(np.concatenate([[0], np.cumsum(lengths)]), gene, x, exact)


def gathered(parts: list[Encoded], rows: NDArray[np.int64]) -> Encoded:
    """The cells ``rows`` of the parts laid end to end, in this order, copied once; the argument is emptied, to free its memory."""
    if len(parts) == 1:
        return parts.pop().take(rows)
    edges = np.cumsum([0, *(part.n_cells for part in parts)])
    of = np.searchsorted(edges, rows, side="right") - 1
    own = rows - edges[of]
    overs = [np.searchsorted(part.escaped(), part.crow) for part in parts]
    columns = {
        "gene": ([part.gene for part in parts], [part.crow for part in parts]),
        "x": ([part.x for part in parts], [part.crow for part in parts]),
        "exact": ([part.exact for part in parts], overs),
    }
    lengths = np.concatenate([np.diff(part.crow) for part in parts])[rows]
    found = {name: _pick_of(*column, of, own) for name, column in columns.items()}
    parts.clear()
    return Encoded(np.concatenate([[0], np.cumsum(lengths)]), **found)


def _pick_of(entries: list[NDArray[Any]], edges: list[NDArray[np.int64]], of: NDArray[np.int64], own: NDArray[np.int64]) -> NDArray[Any]:
    """The entries of row ``own`` of part ``of``, for every pair of them, one after another."""
    if not len(own):
        return entries[0][:0]
    starts, ends = np.empty(len(own), dtype=np.int64), np.empty(len(own), dtype=np.int64)
    for part, edge in enumerate(edges):
        mine = of == part
        starts[mine], ends[mine] = edge[own[mine]], edge[own[mine] + 1]
    places = zip(of.tolist(), starts.tolist(), ends.tolist(), strict=True)
    return np.concatenate([entries[part][start:end] for part, start, end in places])


def escaped_entries(x: NDArray[Any]) -> NDArray[np.int64]:
    """Positions of the escape among stored values, [k]; none in float encodings."""
    escape = ESCAPES.get(x.dtype.name)
    return np.zeros(0, dtype=np.int64) if escape is None else np.flatnonzero(x == escape)


def _pick(entries: NDArray[Any], edges: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[Any]:
    """The entries of these rows one after another: whole rows are copied, which no index of single entries can match."""
    if len(rows) == 0 or len(entries) == 0:
        return entries[:0]
    starts, ends = edges[rows].tolist(), edges[rows + 1].tolist()
    return np.concatenate([entries[start:end] for start, end in zip(starts, ends, strict=True)])


@dataclass(frozen=True)
class Encoder:
    """How the rows of one source are stored.

    ``positions`` [n_var] is each column's place in a vocabulary of ``n_genes``, -1 = left out. ``encoding`` is that of
    shards; ``counts`` says that everything must be a raw count, else whole encodings raise NotWholeError on what they
    cannot hold. ``where`` begins error messages.
    """

    positions: NDArray[np.int64]
    n_genes: int
    encoding: str
    counts: bool
    where: str

    def __call__(self, raw: RawRows, first: int) -> Encoded:
        """The rows, the first of which is cell ``first``. Raises DataError for values, IntegrityError for structure."""
        raw = self._unique(raw)
        x, at, exact = self._narrow(raw, first)
        if self._summing:
            return self._summed(raw, first)
        gene = self._genes(raw.indices)
        if self._complete:
            return Encoded(raw.indptr, gene, x, exact)
        keep = _lookup(self.positions >= 0, raw.indices)
        crow = np.concatenate([[0], np.cumsum(keep, dtype=np.int64)])[raw.indptr]
        return Encoded(crow, gene[keep], x[keep], exact[keep[at]])

    @cached_property
    def _complete(self) -> bool:
        return bool((self.positions >= 0).all())

    @cached_property
    def _identity(self) -> bool:
        return np.array_equal(self.positions, np.arange(len(self.positions)))

    @cached_property
    def _summing(self) -> bool:
        known = self.positions[self.positions >= 0]
        return len(np.unique(known)) < len(known)

    def _summed(self, raw: RawRows, first: int) -> Encoded:
        """Rows whose columns of one gene are added up: slower, and only for sources that need it."""
        alignment = GeneAlignment(self.positions, self.n_genes, "")
        rows = to_vocabulary(raw.matrix(len(self.positions), self.where), alignment)
        straight = replace(self, positions=np.arange(self.n_genes))
        return straight(RawRows(rows.indptr.astype(np.int64), rows.indices, rows.data), first)

    def _unique(self, raw: RawRows) -> RawRows:
        """The rows with repeated entries summed; all others stay as they are, sorted or not."""
        columns = len(self.positions)
        indices = raw.indices
        unsigned = indices.view(f"u{indices.dtype.itemsize}")
        if len(indices) and max(int(unsigned[at : at + PIECE].max()) for at in range(0, len(indices), PIECE)) >= columns:
            found = f"column indices outside 0 to {columns - 1}"
            raise IntegrityError(f"{self.where} is a corrupt sparse matrix: {found}; write the file again from its source")
        edges = range(0, len(indices), PIECE)
        down = [
            np.flatnonzero(indices[at + 1 : at + PIECE + 1] <= indices[at : min(at + PIECE, len(indices) - 1)]) + at + 1 for at in edges
        ]
        falls = np.concatenate(down) if down else np.zeros(0, dtype=np.int64)
        if (raw.indptr[np.searchsorted(raw.indptr, falls)] == falls).all():  # only from one row to the next
            return raw
        ordered = sp.csr_matrix((summable(raw.data), raw.indices, raw.indptr), shape=(len(raw.indptr) - 1, columns), copy=True)
        ordered.sum_duplicates()
        return raw if ordered.nnz == len(indices) else RawRows(ordered.indptr.astype(np.int64), ordered.indices, ordered.data)

    def _genes(self, indices: NDArray[Any]) -> NDArray[Any]:
        dtype = np.uint16 if self.n_genes <= MAX_UINT16_GENES else np.uint32
        return indices.astype(dtype) if self._identity else _lookup(self.positions.astype(dtype), indices)

    def _narrow(self, raw: RawRows, first: int) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.uint32]]:
        """Values in the encoding, where the escape stands, and what it stands for."""
        if self.encoding not in ESCAPES:
            return self._float(raw.data), np.zeros(0, np.int64), np.zeros(0, np.uint32)
        data = raw.data.view(np.uint8) if raw.data.dtype == bool and not self.counts else raw.data
        if data.dtype.kind not in "iuf":
            self._refuse(raw, first)
        if data.dtype.kind == "i" and data.dtype.itemsize <= np.dtype(self.encoding).itemsize:
            data = data.astype(np.int64)  # else -2 would come back from an unsigned byte as -2, and pass for 254
        if data.dtype == np.float16:
            data = data.astype(np.float32)  # in which the limits below are not infinite
        x, at = _round_trip(data, np.dtype(self.encoding))
        exact = data[at]
        limit = MAX_EXACT_COUNT if self.counts else MAX_ESCAPED
        with np.errstate(invalid="ignore"):
            whole = (exact >= 0) & (exact <= limit) & (exact == np.rint(exact))
        if not whole.all():
            self._refuse(raw, first)
        x[at] = ESCAPES[self.encoding]
        return x, at, exact.astype(np.uint32)

    def _float(self, data: NDArray[Any]) -> NDArray[Any]:
        x = data.astype(self.encoding)
        if data.dtype.kind not in "biuf" or (data.dtype.kind in "iu" and len(data) and int(np.abs(x).max()) > MAX_EXACT_FLOAT64):
            raise DataError(f"{self.where} holds {data.dtype} values that no 64-bit float holds exactly; they cannot be stored")
        return x

    def _refuse(self, raw: RawRows, first: int) -> None:
        if not self.counts:
            raise NotWholeError(f"{self.where} is not whole numbers only")
        found = describe(raw.matrix(len(self.positions), self.where), self.where, first)
        cells = f"cells {first} to {first + len(raw.indptr) - 2}"
        raise DataError(f"{self.where} looked like counts, but {cells} hold {found}; use raw counts")


def _round_trip(data: NDArray[Any], dtype: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The values cast to a narrow type, and the positions of those it does not hold or that equal its escape."""
    x = np.empty(len(data), dtype=dtype)
    back, same = np.empty(PIECE, dtype=data.dtype), np.empty(PIECE, dtype=bool)
    escape, odd = ESCAPES[dtype.name], []
    with np.errstate(invalid="ignore"):  # what does not fit comes back changed
        for at in range(0, len(data), PIECE):
            part, target = data[at : at + PIECE], x[at : at + PIECE]
            np.copyto(target, part, casting="unsafe")
            np.copyto(back[: len(part)], target, casting="unsafe")
            np.equal(back[: len(part)], part, out=same[: len(part)])
            same[: len(part)] &= target != escape
            if not same[: len(part)].all():
                odd.append(np.flatnonzero(~same[: len(part)]) + at)
    return x, np.concatenate(odd) if odd else np.zeros(0, dtype=np.int64)


def _lookup(table: NDArray[Any], indices: NDArray[Any]) -> NDArray[Any]:
    """table[indices], for indices known to be in range."""
    found = np.empty(len(indices), dtype=table.dtype)
    for at in range(0, len(indices), PIECE):
        np.take(table, indices[at : at + PIECE], out=found[at : at + PIECE], mode="clip")
    return found
