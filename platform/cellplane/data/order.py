"""Which cells form a sentence, and in which order: decided for millions of cells at once.

Dissociated cells of a sample are shuffled once, seeded by the sample's name, so that a sentence is a random sample of
it. Spatial cells follow a space-filling curve instead (Hilbert, 1891): cells that are near on the curve are near in
the tissue, so a sentence is a patch and neighbours stay together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cellplane.seeds import keyed_seed

HILBERT_BITS = 16  # a grid of 65,536 x 65,536: a tenth of a micrometre on a slide of 6 mm


def sentence_rows(
    codes: NDArray[np.int32] | None, names: Sequence[str], n_cells: int, max_cells: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows of all sentences laid end to end [n_cells], and the edges between them: `sentences.contexts`, vectorised.

    ``codes`` [n_cells] are positions in ``names``; None makes all cells one sample.
    """
    rows, edges = [], [0]
    for name, own in _groups(codes, names, n_cells):
        parts = -(-len(own) // max_cells)
        dealt = np.random.default_rng(keyed_seed(seed, name)).permutation(own) if parts > 1 else own
        for part in np.array_split(dealt, parts):
            rows.append(np.sort(part))
            edges.append(edges[-1] + len(part))
    return np.concatenate(rows), np.array(edges, dtype=np.int64)


def sentence_patches(
    codes: NDArray[np.int32] | None, coordinates: NDArray[np.float32], max_cells: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """As `sentence_rows`, but each sample's cells in the order of the Hilbert curve through its ``coordinates`` [n, 2]."""
    return _cut([own[np.argsort(hilbert(coordinates[own]), kind="stable")] for _, own in _groups(codes, (), len(coordinates))], max_cells)


def sentence_runs(codes: NDArray[np.int32] | None, n_cells: int, max_cells: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """As `sentence_rows`, but each sample's cells in the order of the file."""
    return _cut([own for _, own in _groups(codes, (), n_cells)], max_cells)


def _cut(samples: Sequence[NDArray[np.int64]], max_cells: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    sizes = [len(part) for own in samples for part in np.array_split(own, -(-len(own) // max_cells))]
    return np.concatenate(samples), np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _groups(codes: NDArray[np.int32] | None, names: Sequence[str], n_cells: int) -> list[tuple[str, NDArray[np.int64]]]:
    """(name, ascending rows) of every sample, in the order of their first cells."""
    if codes is None:
        return [("", np.arange(n_cells, dtype=np.int64))]
    order = np.argsort(codes, kind="stable").astype(np.int64)
    starts = np.flatnonzero(np.concatenate([[True], np.diff(codes[order]) != 0]))
    groups = np.split(order, starts[1:])
    return [(names[codes[own[0]]] if len(names) else "", own) for own in sorted(groups, key=lambda own: int(own[0]))]


def hilbert(points: NDArray[np.float32]) -> NDArray[np.int64]:
    """Position of each point [n, 2] along a Hilbert curve through their bounding square, [n] int64."""
    low = points.min(axis=0)
    side = max(float((points - low).max()), 1e-12)
    grid = ((points - low).astype(np.float64) / side * (2**HILBERT_BITS - 1)).astype(np.int64)
    x, y = grid[:, 0].copy(), grid[:, 1].copy()
    place = np.zeros(len(points), dtype=np.int64)
    for bit in range(HILBERT_BITS - 1, -1, -1):
        step = 1 << bit
        right, up = (x & step) > 0, (y & step) > 0
        place += step * step * ((3 * right) ^ up)
        x, y = (
            np.where(~up & right, step - 1 - (x & (step - 1)), x & (step - 1)),
            np.where(~up & right, step - 1 - (y & (step - 1)), y & (step - 1)),
        )
        x, y = np.where(up, x, y), np.where(up, y, x)
    return place
