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
    if table.coordinates is None:
        return contexts(None if table.batch is None else [str(key) for key in table.batch], table.n_cells, size, seed)
    slides = np.zeros(table.n_cells, dtype=np.int64) if table.batch is None else np.unique(table.batch.astype(str), return_inverse=True)[1]
    located = np.isfinite(table.coordinates).all(1)
    found: list[Rows] = []
    for slide in np.unique(slides):
        rows = np.flatnonzero((slides == slide) & located)
        found.extend(_halved(rows, table.coordinates, size) if len(rows) else [])
        lost = np.flatnonzero((slides == slide) & ~located)
        found.extend(lost[part] for part in contexts(None, len(lost), size, seed) if len(lost))
    return found


def _halved(rows: Rows, coordinates: NDArray[np.float32], size: int) -> Iterator[Rows]:
    if len(rows) <= size:
        yield np.sort(rows)
        return
    xy = coordinates[rows]
    order = np.argsort(xy[:, int(np.argmax(np.ptp(xy, axis=0)))], kind="stable")
    half = len(rows) // 2
    for part in (order[:half], order[half:]):
        yield from _halved(rows[part], coordinates, size)
