"""The three masks that every pipeline declares: what a model may read, what its loss asks for, what is scored.

A value is *visible* when the encoder may read it, a *target* when the loss asks for it, *scored* when an evaluation
compares it. Nothing scored may be visible: that is a leak, and refused here (PROTOCOLS 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cellplane.errors import DataError


@dataclass(frozen=True)
class Masks:
    """``visible``, ``target`` and ``scored``, bool of one shape: cells x genes, or platforms x genes where all cells are alike.

    Raises DataError when something scored is visible.
    """

    visible: NDArray[np.bool_]
    target: NDArray[np.bool_]
    scored: NDArray[np.bool_]

    def __post_init__(self) -> None:
        if not self.visible.shape == self.target.shape == self.scored.shape:
            raise DataError(f"the masks differ in shape: {self.visible.shape}, {self.target.shape}, {self.scored.shape}")
        if leaks := int((self.visible & self.scored).sum()):
            raise DataError(f"{leaks} scored values are visible to the model: hide them, or do not score them")


def imputation_masks(observed: NDArray[np.bool_], hidden: NDArray[np.bool_], recipe: str = "joint") -> Masks:
    """Masks of an imputation, [2, G]: the query's row, then the reference's, from ``observed`` and ``hidden`` genes [G].

    The query shows and learns what was observed and is scored on what is hidden; the reference learns both, and shows the
    hidden genes only in the official recipe (so that a model may copy them from its neighbours in training, and cannot later).
    """
    none = np.zeros_like(observed)
    shown = observed | hidden if recipe == "official" else observed
    return Masks(
        visible=np.stack([observed, shown]),
        target=np.stack([observed, observed | hidden]),
        scored=np.stack([hidden, none]),
    )
