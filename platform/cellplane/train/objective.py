"""What a run learns: how a micro-batch is prepared for the network, and what each sentence weighs in the loss."""

# S sentences

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cellplane.cells import CellBatch
from cellplane.data.sentences import MicroBatch, SentenceStore
from cellplane.model.config import MaskingConfig
from cellplane.model.masking import Mask, chosen_cells, drop_cells, mask_genes, narrow_panels


@dataclass(frozen=True)
class Work:
    """One micro-batch ready for the network; ``weights`` [S] float32 are 0 where a rank only keeps the others company."""

    batch: CellBatch
    mask: Mask | None
    weights: torch.Tensor
    key: int

    def to(self, device: torch.device) -> Work:
        """The same work on another device."""
        mask = None if self.mask is None else self.mask.to(device)
        return Work(self.batch.to(device), mask, self.weights.to(device), self.key)


class Objective(Protocol):
    """Turns planned micro-batches into work."""

    def weights(self) -> NDArray[np.float64]:
        """Weight of every sentence of the store, [n_sentences], known before any forward."""

    def prepare(self, micro_batch: MicroBatch) -> tuple[CellBatch, Mask | None]:
        """The cells of a micro-batch and what is hidden, determined by its seeds alone."""


@dataclass(frozen=True)
class MaskedObjective:
    """Drops cells and hides genes; ``sentence_weights`` default to the number of cells chosen for masking."""

    store: SentenceStore
    masking: MaskingConfig
    sentence_weights: NDArray[np.float64] | None = None

    def weights(self) -> NDArray[np.float64]:
        """Cells chosen for masking, or the given weights."""
        if self.sentence_weights is not None:
            return self.sentence_weights
        return chosen_cells(self.store.sizes, self.masking).astype(np.float64)

    def prepare(self, micro_batch: MicroBatch) -> tuple[CellBatch, Mask | None]:
        """Reads, drops, narrows, hides."""
        batch = micro_batch.read(self.store)
        sizes = self.store.sizes[list(micro_batch.sentences)]
        kept = narrow_panels(drop_cells(batch, self.masking), self.masking)
        return kept, mask_genes(kept, sizes, self.masking)


def work_of(objective: Objective, planned: Sequence[MicroBatch], dealt: Sequence[MicroBatch | None]) -> tuple[list[Work], float]:
    """This rank's work of a step, and the weight of the whole step. A missing micro-batch repeats the first one at weight 0."""
    weights = objective.weights()
    total = float(sum(weights[list(micro_batch.sentences)].sum() for micro_batch in planned))
    works = []
    for micro_batch in dealt:
        used = planned[0] if micro_batch is None else micro_batch
        batch, mask = objective.prepare(used)
        share = weights[list(used.sentences)] * (micro_batch is not None)
        works.append(Work(batch, mask, torch.tensor(share, dtype=torch.float32), used.key))
    return works, total
