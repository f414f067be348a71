"""An h5ad with answers added, written without reading it: a copy, and what is new beside what it holds.

The matrix is copied byte by byte and never looked at, so memory does not grow with the file. Files written before
anndata 0.8 keep their tables in another form; `takes_answers` tells, and they are read whole instead.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import anndata
import h5py
import numpy as np

from cellplane.data.files import atomic_file
from cellplane.data.guard import quiet
from cellplane.data.sources import FileSink
from cellplane.data.stored import DiskRows

CHUNK_BYTES = 1 << 20


class Answers:
    """What is added to a file; what had the same name is replaced."""

    def __init__(self, open_copy: Callable[[], h5py.File]) -> None:
        self._open_copy = open_copy

    @cached_property
    def _file(self) -> h5py.File:
        return self._open_copy()

    def column(self, name: str, values: Any) -> None:
        """A column of obs, an array or Categorical [n]; None removes it."""
        obs = self._file["obs"]
        order = [str(key) for key in obs.attrs["column-order"]]
        self._replace(obs, name, values)
        kept = [key for key in order if key != name] + ([] if values is None else [name])
        obs.attrs["column-order"] = np.array(kept, dtype=h5py.string_dtype()) if kept else np.zeros(0, dtype=np.float64)

    def matrix(self, part: Literal["obsm", "layers"], name: str, rows: DiskRows) -> None:
        """An entry of obsm or layers, [n, width]."""
        group = self._group(part)
        if name in group:
            del group[name]
        chunk = (max(1, min(len(rows), CHUNK_BYTES // max(rows.row_bytes, 1))), *rows.shape[1:])
        dataset = group.create_dataset(name, rows.shape, dtype=rows.dtype, chunks=chunk if np.prod(rows.shape) else None)
        dataset.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        for start, block in rows.blocks():
            dataset[start : start + len(block)] = block

    def note(self, name: str, value: Any) -> None:
        """An entry of uns."""
        self._replace(self._group("uns"), name, value)

    def _group(self, part: str) -> h5py.Group:
        if part not in self._file:
            anndata.io.write_elem(self._file, part, {})
        return self._file[part]

    @staticmethod
    def _replace(group: h5py.Group, name: str, value: Any) -> None:
        if name in group:
            del group[name]
        if value is not None:
            anndata.io.write_elem(group, name, value)


def takes_answers(path: Path) -> bool:
    """Whether the file is an h5ad in the present form."""
    if not h5py.is_hdf5(path):
        return False
    with h5py.File(path, "r") as file:
        obs = file.get("obs")
        return isinstance(obs, h5py.Group) and "column-order" in obs.attrs and "__categories" not in obs


@contextmanager
def answered_copy(source: Path, target: Path) -> Iterator[Answers]:
    """``target`` becomes ``source`` with what the block adds, whole or not at all; StorageError when the disk is full.

    The copy is made beside what the block does, which waits for it when it adds something.
    """
    with atomic_file(target) as temporary, ExitStack() as stack:
        copying = stack.enter_context(ThreadPoolExecutor(1)).submit(_copy, source, temporary)

        def open_copy() -> h5py.File:
            copying.result()
            return stack.enter_context(h5py.File(stack.enter_context(FileSink(temporary, "r+b")), "r+"))

        stack.enter_context(quiet())
        yield Answers(open_copy)
        copying.result()


def _copy(source: Path, target: Path) -> None:
    """A copy on the disk: what is added later is little, and nobody waits long for it to be written."""
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
