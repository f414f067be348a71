"""Runs: encoded cells of one row range of a file, laid on disk in the order in which the sentences want them.

The first pass of a conversion reads a file once, range by range, and writes a run of each. In a run the cells of one
sentence lie together, so the second pass takes a slice of every run and has the sentence: a sample that is spread over
the whole file costs no second reading of it, and memory is bounded by a range or a few sentences.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellplane.data.encode import Encoded, gathered
from cellplane.data.files import atomic_file
from cellplane.errors import IntegrityError

ALIGNED = 64
COLUMNS = ("position", "crow", "over", "gene", "x", "exact")


def write_run(path: Path, cells: Encoded, positions: NDArray[np.int64]) -> None:
    """Write the cells ordered by their ``positions`` [n] among the rows of all sentences, atomically. Raises StorageError."""
    order = np.argsort(positions, kind="stable")
    cells = cells.take(order)
    over = np.searchsorted(cells.escaped(), cells.crow)
    arrays: tuple[NDArray[Any], ...] = (positions[order].astype(np.int64), cells.crow, over, cells.gene, cells.x, cells.exact)
    parts: dict[str, list[Any]] = {}
    at = 0
    for name, array in zip(COLUMNS, arrays, strict=True):
        parts[name] = [str(array.dtype), at, len(array)]
        at += -(-array.nbytes // ALIGNED) * ALIGNED
    head = json.dumps({"columns": parts, "bytes": at}).encode()
    with atomic_file(path) as temporary, temporary.open("wb", buffering=0) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for array in arrays:
            file.write(np.ascontiguousarray(array).data.cast("B"))
            file.write(bytes(-array.nbytes % ALIGNED))


class Run:
    """A run on disk, for the cells of the positions ``low`` to ``high``: `span` gives those of a part of them."""

    def __init__(self, path: Path, low: int = 0, high: int = 0) -> None:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            head = json.loads(file.read(size))
        self._path, self._start, self._columns = path, 8 + size, head["columns"]
        if path.stat().st_size != self._start + head["bytes"]:
            raise IntegrityError(f"{path} is not a whole run; convert again")
        first, end = self._find(low, high)
        with self._path.open("rb", buffering=0) as file:
            self._position = self._read(file, "position", first, end)
            self._crow, self._over = (self._read(file, name, first, end + 1) for name in ("crow", "over"))

    def _find(self, low: int, high: int) -> tuple[int, int]:
        dtype, at, length = self._place("position")
        if not length:
            return 0, 0
        mapped = np.memmap(self._path, dtype=dtype, mode="r", offset=at, shape=(length,))
        first, end = np.searchsorted(mapped, [low, high]).tolist()
        return first, end

    def _place(self, name: str) -> tuple[np.dtype[Any], int, int]:
        dtype, at, length = self._columns[name]
        return np.dtype(dtype), self._start + at, length

    def _read(self, file: FileIO, name: str, low: int, high: int) -> NDArray[Any]:
        dtype, at, _ = self._place(name)
        found = np.empty(high - low, dtype=dtype)
        view, done = found.data.cast("B"), 0
        while done < len(view):
            got = os.preadv(file.fileno(), [view[done:]], at + low * dtype.itemsize + done)
            if got == 0:
                raise IntegrityError(f"{self._path} is not a whole run; convert again")
            done += got
        return found

    def span(self, low: int, high: int) -> tuple[NDArray[np.int64], Encoded]:
        """(positions, cells) of the positions low to high, ascending."""
        first, end = np.searchsorted(self._position, [low, high]).tolist()
        crow, over = self._crow[first : end + 1], self._over[first : end + 1]
        with self._path.open("rb", buffering=0) as file:  # opened for each slice: a large source has thousands of runs
            gene, x = (self._read(file, name, int(crow[0]), int(crow[-1])) for name in ("gene", "x"))
            exact = self._read(file, "exact", int(over[0]), int(over[-1]))
        return self._position[first:end], Encoded(crow - crow[0], gene, x, exact)


def gather(runs: Sequence[Run], low: int, high: int) -> Encoded:
    """The cells at positions low to high from all runs, in the order of their positions. IntegrityError when one is missing."""
    found = [(positions, cells) for positions, cells in (run.span(low, high) for run in runs) if len(positions)]
    positions = np.concatenate([part for part, _ in found]) if found else np.zeros(0, dtype=np.int64)
    if len(positions) != high - low:
        raise IntegrityError(f"the runs hold {len(positions)} of the {high - low} cells from {low}; convert again")
    parts = [part for _, part in found]
    found.clear()
    return gathered(parts, np.argsort(positions, kind="stable"))
