"""What a denoiser adds to its network: the counts of similar cells, averaged over a short walk between neighbours.

A network squeezes a cell through a few numbers and forgets what is special in it; the average over neighbours keeps that
and is noisy. Mixed, they foretell counts better than either. The walk is that of MAGIC (van Dijk et al., Cell 2018). The
reference cells lie in the model folder, so that one cell alone is answered like many. Nothing here runs the network.
"""

# C cells, G genes, N reference cells, Z components

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial.distance import cdist

from cellplane.artifact.folder import SMOOTHING, SMOOTHING_CELLS, pack_tensors, unpack_tensors
from cellplane.artifact.space import Space, nearest_columns, sixteen_bits
from cellplane.cells import CellBatch
from cellplane.errors import FileFormatError

KERNEL_NEIGHBOUR = 5  # whose distance is a cell's own scale (MAGIC's default)
CELLS_AT_A_TIME = 512  # whose distances to all reference cells are in memory


@dataclass(frozen=True, eq=False)
class Smoothing:
    """Reference cells in ``space``: CSR counts ``crow`` [N+1], ``gene``, ``value``, all of them measured in ``panel`` [G].

    ``share`` of the answer is theirs, after ``steps`` of a walk between ``neighbours`` nearest ones.
    """

    space: Space
    crow: NDArray[np.int64]
    gene: NDArray[np.int64]
    value: NDArray[np.float32]
    panel: NDArray[np.bool_]
    neighbours: int
    steps: int
    share: float

    @classmethod
    def of(cls, attachments: Mapping[str, bytes]) -> Smoothing | None:
        """That of a model folder, None where it has none; FileFormatError when it is not readable."""
        if SMOOTHING not in attachments:
            return None
        try:
            plain = json.loads(attachments[SMOOTHING])
            cells = {name: tensor.numpy() for name, tensor in unpack_tensors(attachments[SMOOTHING_CELLS]).items()}
            return cls(
                space=Space(cells["axes"].astype(np.float32), cells["mean"], plain["total"]),
                crow=cells["crow"],
                gene=cells["gene"].astype(np.int64),
                value=cells["value"],
                panel=cells["panel"],
                **{name: plain[name] for name in ("neighbours", "steps", "share")},
            )
        except (ValueError, KeyError, TypeError) as error:
            raise FileFormatError(f"{SMOOTHING} is not readable: {error!r}; restore the model folder from where it came") from error

    def attachments(self) -> dict[str, bytes]:
        """The same as files of a model folder; axes in 16 bits, so they are made to be such before they are used."""
        plain = {"neighbours": self.neighbours, "steps": self.steps, "share": self.share, "total": self.space.total}
        columns = {
            "axes": sixteen_bits(self.space.axes),
            "mean": self.space.mean,
            "crow": self.crow,
            "gene": self.gene.astype(np.int32),
            "value": self.value,
            "panel": self.panel,
        }
        tensors = {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in columns.items()}
        return {SMOOTHING: (json.dumps(plain, indent=1, sort_keys=True) + "\n").encode(), SMOOTHING_CELLS: pack_tensors(tensors)}

    def mixed(self, batch: CellBatch, shares_CG: NDArray[np.float32], steps: int | None = None) -> NDArray[np.float32]:
        """The network's shares of each cell's counts with the neighbours' among them; genes the reference lacks stay as they are.

        ``steps`` replaces its own.
        """
        near = self.averages(batch, steps)
        both = self.panel & (shares_CG > 0)
        near, sizes = near * both, (shares_CG * both).sum(1, keepdims=True)
        found = near.sum(1, keepdims=True)
        near = np.where(found > 0, near * (sizes / np.maximum(found, 1e-12)), shares_CG * both)  # nobody to compare with
        out: NDArray[np.float32] = np.where(both, (1 - self.share) * shares_CG + self.share * near, shares_CG).astype(np.float32)
        return out

    def averages(self, batch: CellBatch, steps: int | None = None) -> NDArray[np.float32]:
        """Mean shares of the cells where walks from these cells end, [C, G]."""
        weights = self.arrivals(self.space.places(batch), steps or self.steps)
        out: NDArray[np.float32] = np.asarray(weights @ self._shares, dtype=np.float32)
        return out

    def arrivals(self, place_CZ: NDArray[np.float32], steps: int) -> NDArray[np.float64]:
        """Where walks of so many steps end, [C, N]: the first one goes to the nearest reference cells, the others between these."""
        ends: NDArray[np.float64] = nearest(place_CZ, self._place, self.neighbours).toarray()
        for _ in range(steps - 1):
            ends = np.asarray(ends @ self._walk)
        return ends

    @cached_property
    def _counts(self) -> Any:
        return sparse.csr_matrix((self.value, self.gene, self.crow), shape=(len(self.crow) - 1, len(self.panel)))

    @cached_property
    def _shares(self) -> Any:
        totals = np.asarray(self._counts.sum(1)).ravel()
        return sparse.csr_matrix(sparse.diags(1 / np.maximum(totals, 1e-12)) @ self._counts, dtype=np.float32)

    @cached_property
    def _place(self) -> NDArray[np.float32]:
        scaled = sparse.csr_matrix((self.space.scaled(self.crow, self.value), self.gene, self.crow), shape=self._counts.shape)
        out: NDArray[np.float32] = np.asarray(scaled @ self.space.axes - self.space.mean @ self.space.axes, dtype=np.float32)
        return out

    @cached_property
    def _walk(self) -> Any:
        """One step between reference cells, [N, N]: as far from one to the other as back."""
        graph = nearest(self._place, self._place, self.neighbours)
        both = graph + graph.T
        return sparse.csr_matrix(sparse.diags(1 / np.asarray(both.sum(1)).ravel()) @ both)


def nearest(place: NDArray[np.float32], among: NDArray[np.float32], neighbours: int) -> Any:
    """Gaussian weights of each cell's nearest ``among`` [N, Z], rows adding up to 1, CSR [C, N]; each cell at its own scale."""
    near = min(neighbours, len(among))
    columns, weights = [], []
    for start in range(0, len(place), CELLS_AT_A_TIME):
        distance = cdist(place[start : start + CELLS_AT_A_TIME], among)
        order = nearest_columns(distance, near)
        known = np.take_along_axis(distance, order, axis=1)
        scale = np.maximum(known[:, [min(KERNEL_NEIGHBOUR, near - 1)]], 1e-9)
        weight = np.exp(-((known / scale) ** 2))
        columns.append(order.ravel())
        weights.append((weight / weight.sum(1, keepdims=True)).ravel())
    crow = np.arange(0, len(place) * near + 1, near)
    shape = (len(place), len(among))
    return (
        sparse.csr_matrix((np.concatenate(weights), np.concatenate(columns), crow), shape=shape) if len(place) else sparse.csr_matrix(shape)
    )
