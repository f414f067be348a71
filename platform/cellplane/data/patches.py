"""Tissue cut into compact patches: cells that lie together are read together, and no patch crosses a slide."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from cellplane.data.sentences import CellTable, contexts

Rows = NDArray[np.int64]


def patches(table: CellTable, size: int, seed: int = 0) -> list[Rows]:
    """The cells of every patch: halved along the longer side until none has more than ``size``; no patch crosses a slide.

    Cells without coordinates are dealt at random. The same cells give the same patches, always.
    """
    if table.coordinates is None or table.n_cells == 0:
        return contexts(None if table.batch is None else [str(key) for key in table.batch], table.n_cells, size, seed)
    slides = np.zeros(table.n_cells, dtype=np.int64) if table.batch is None else np.unique(table.batch.astype(str), return_inverse=True)[1]
    return [part for slide in np.unique(slides) for part in patches_of(np.flatnonzero(slides == slide), table.coordinates, size, seed)]


def patches_of(rows: Rows, coordinates: NDArray[np.float32], size: int, seed: int = 0) -> list[Rows]:
    """The same of one slide: its ``rows`` of ``coordinates`` [n, 2]."""
    located = np.isfinite(coordinates[rows]).all(1)
    found = list(_halved(rows[located], coordinates, size)) if located.any() else []
    lost = rows[~located]
    return [*found, *(lost[part] for part in contexts(None, len(lost), size, seed) if len(lost))]


def _halved(rows: Rows, coordinates: NDArray[np.float32], size: int) -> Iterator[Rows]:
    if len(rows) <= size:
        yield np.sort(rows)
        return
    xy = coordinates[rows]
    order = np.argsort(xy[:, int(np.argmax(np.ptp(xy, axis=0)))], kind="stable")
    half = len(rows) // 2
    for part in (order[:half], order[half:]):
        yield from _halved(rows[part], coordinates, size)
