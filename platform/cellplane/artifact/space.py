"""Places of cells along axes through their log counts, and how such axes are kept: in 16 bits."""

# C cells, G genes, Z axes

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from cellplane.cells import CellBatch

HALF_FLOAT = 6e4  # largest value kept in 16 bits


@dataclass(frozen=True, eq=False)
class Space:
    """Main directions of the training cells' log counts: ``axes`` [G, Z], ``mean`` [G]; counts first scaled to ``total``, 0 = as they are.

    Made without labels, so that types which were never learned keep their distance: the network's own z was trained to
    see only what tells the known types apart.
    """

    axes: NDArray[np.float32]
    mean: NDArray[np.float32]
    total: float = 0.0

    def places(self, batch: CellBatch) -> NDArray[np.float32]:
        """Where cells lie, [C, Z]; a gene that was not measured counts as average."""
        crow, panels = batch.crow.numpy(), batch.panels.numpy()
        values = self.scaled(crow, batch.value.numpy())
        matrix = sparse.csr_matrix((values, batch.gene.numpy(), crow), shape=(batch.n_cells, len(self.mean)))
        average = (panels * self.mean) @ self.axes
        out: NDArray[np.float32] = (matrix @ self.axes - average[batch.panel_index.numpy()]).astype(np.float32)
        return out

    def scaled(self, crow: NDArray[np.int64], values: NDArray[np.float32]) -> NDArray[np.float32]:
        """log1p of counts, [nnz], each cell's scaled to the total."""
        if self.total:
            cell = np.repeat(np.arange(len(crow) - 1), np.diff(crow))
            totals = np.bincount(cell, weights=values, minlength=len(crow) - 1)
            values = values * (self.total / totals.clip(1e-9)).astype(np.float32)[cell]
        return np.log1p(values)


def rounded(values: NDArray[Any]) -> NDArray[np.float32]:
    """As they will be after saving: in 16 bits where these can hold them."""
    fits = np.abs(values).max(initial=0) < HALF_FLOAT
    return (values.astype(np.float16) if fits else values).astype(np.float32)


def nearest_columns(distance: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """Columns of the ``k`` smallest distances of every row [C, N], nearest first and the first ones among equals, [C, k].

    What a stable sort of whole rows begins with, without sorting them.
    """
    if not 0 < k < distance.shape[1]:
        return np.argsort(distance, axis=1, kind="stable")[:, :k]
    farthest = np.partition(distance, k - 1, axis=1)[:, k - 1, None]
    chosen = distance <= farthest
    if chosen.sum() != k * len(distance):  # some are as far as the k-th one
        nearer, equal = distance < farthest, distance == farthest
        chosen = nearer | (equal & (equal.cumsum(axis=1) <= k - nearer.sum(axis=1, keepdims=True)))
    if chosen.sum() != k * len(distance):  # NaN are neither nearer nor farther
        return np.argsort(distance, axis=1, kind="stable")[:, :k]
    columns = chosen.nonzero()[1].reshape(len(distance), k)
    return np.take_along_axis(columns, np.argsort(np.take_along_axis(distance, columns, axis=1), axis=1, kind="stable"), axis=1)


def sixteen_bits(values: NDArray[Any]) -> NDArray[Any]:
    """How values are kept in a file: in 16 bits where they were made to be such (see `rounded`), else as they are."""
    fits = np.abs(values).max(initial=0) < HALF_FLOAT and np.array_equal(rounded(values), values)
    return values.astype(np.float16) if fits else values
