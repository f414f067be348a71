"""Cells made for measuring: as many counts a cell as asked for, at random genes; the same on every side of a comparison."""

# C cells, G genes

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def random_cells(
    n_cells: int, nonzeros: int, n_genes: int, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """CSR: crow [C+1], gene [nnz] ascending within a cell, value [nnz]: geometric counts with mean 2, half of them 1."""
    rng = np.random.default_rng(seed)
    order = rng.random((n_cells, n_genes), dtype=np.float32).argpartition(nonzeros - 1, axis=1)[:, :nonzeros]
    gene = np.sort(order, axis=1).astype(np.int64).ravel()
    value = rng.geometric(0.5, len(gene)).astype(np.float32)
    return np.arange(n_cells + 1, dtype=np.int64) * nonzeros, gene, value
