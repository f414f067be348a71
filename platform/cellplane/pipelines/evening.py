"""An embedding seen among the cells it is of: strong directions do not drown weak ones, samples share a middle.

A base spends most of its embedding's spread on what recovers most counts (depth, cell cycle), and its directions are those
of the cells it was trained on. Turning to the main directions of the cells at hand and taking a root of their spread costs
nothing, needs no label, and is a matter of these cells together: add cells, and all places move a little.
"""

# C cells, Z latent

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellplane.errors import DataError

FLOOR = 1e-6  # of the largest variance: directions below it are rounding


def evened(latent_CZ: NDArray[np.floating], power: float = 0.5, samples: ArrayLike | None = None) -> NDArray[np.float32]:
    """The embedding in its own main directions, each with ``1 - power`` of its log spread, [n, Z] float32, centred.

    ``power`` 0 only turns, 1 makes all directions alike; 0.5 (the default) takes the square root of each spread. With
    ``samples`` [n] each sample is centred by itself, which removes what shifts a whole sample, and also what a sample
    truly has more of. DataError for fewer than 2 cells.
    """
    centred_CZ = np.array(latent_CZ, dtype=np.float64)
    if len(centred_CZ) < 2:
        raise DataError(f"directions need two cells at least, found {len(centred_CZ)}")
    groups = np.zeros(len(centred_CZ)) if samples is None else np.unique(np.asarray(samples).astype(str), return_inverse=True)[1]
    for group in np.unique(groups):
        centred_CZ[groups == group] -= centred_CZ[groups == group].mean(axis=0)
    variance_Z, axes_ZZ = np.linalg.eigh(np.atleast_2d(np.cov(centred_CZ.T)))
    kept_Z = np.maximum(variance_Z[::-1], max(variance_Z[-1] * FLOOR, np.finfo(np.float64).tiny))
    placed: NDArray[np.float32] = (centred_CZ @ axes_ZZ[:, ::-1] * kept_Z ** (-power / 2)).astype(np.float32)
    return placed
