"""A linear classifier that answers together with an annotator's network: logistic regression on log counts.

A few hundred cells say little to a network and much to a convex fit, and the two are wrong about different cells. Their
answers are pooled by logarithms (Hinton, "Training products of experts by minimizing contrastive divergence", Neural
Computation 14, 2002): where both are sure the answer is, where one doubts the other decides.
"""

# C cells, G genes, K classes

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellplane.artifact.space import Space, sixteen_bits
from cellplane.cells import CellBatch


@dataclass(frozen=True, eq=False)
class Linear:
    """Logits of cells: their place along ``space``'s axes, one for each class [G, K], plus ``bias`` [K], those of an average cell.

    ``share`` of the answer that is its own, the rest is the network's. A gene that was not measured counts as average.
    """

    space: Space
    bias: NDArray[np.float32]
    share: float

    def logits(self, batch: CellBatch) -> NDArray[np.float32]:
        """What it says of the cells by itself, [C, K]."""
        return self.space.places(batch) + self.bias

    def mixed(self, logits: NDArray[np.float32], batch: CellBatch) -> NDArray[np.float32]:
        """The network's logits [C, K] together with its own."""
        return pooled(logits, self.logits(batch), self.share)

    def plain(self) -> dict[str, float]:
        """What of it is plain text."""
        return {"share": self.share, "total": self.space.total}

    def columns(self) -> dict[str, NDArray[Any]]:
        """What of it are tensors; axes that were rounded before they were used are kept in 16 bits."""
        return {"linear.axes": sixteen_bits(self.space.axes), "linear.mean": self.space.mean, "linear.bias": self.bias}

    @classmethod
    def of(cls, plain: Mapping[str, float], columns: Mapping[str, NDArray[Any]]) -> Linear:
        """The same again; KeyError where something is missing."""
        axes, mean, bias = (columns[f"linear.{name}"] for name in ("axes", "mean", "bias"))
        return cls(Space(axes.astype(np.float32), mean, plain["total"]), bias, plain["share"])


def pooled(network: NDArray[np.float32], linear: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    """Weighted mean of the logarithms of two answers' probabilities, [C, K]; logits of the pool, not yet normalized."""
    first, second = (_log_probabilities(one) for one in (network, linear))
    out: NDArray[np.float32] = ((1 - share) * first + share * second).numpy()
    return out


def _log_probabilities(logits: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(logits, dtype=np.float32)).log_softmax(-1)
