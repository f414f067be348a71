"""What a run learns: how a micro-batch is prepared for the network, and what each sentence weighs in the loss."""

# S sentences

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
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
        """The same work on another device, for use on the current stream."""
        mask = None if self.mask is None else self.mask.to(device)
        moved = Work(self.batch.to(device), mask, self.weights.to(device), self.key)
        if device.type == "cuda":
            moved.hold(torch.cuda.current_stream(device))
        return moved

    def hold(self, stream: torch.cuda.Stream) -> None:
        """Keeps the memory of tensors that another stream made from being handed out again before this one is done."""
        for part in (self.batch, self.mask, self):
            for column in fields(part) if part is not None else ():
                if isinstance(tensor := getattr(part, column.name), torch.Tensor):
                    tensor.record_stream(stream)


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
        return self._chosen if self.sentence_weights is None else self.sentence_weights

    @cached_property
    def _chosen(self) -> NDArray[np.float64]:
        return chosen_cells(self.store.sizes, self.masking).astype(np.float64)

    def prepare(self, micro_batch: MicroBatch) -> tuple[CellBatch, Mask | None]:
        """Reads, drops, narrows, hides."""
        return self.masked(micro_batch, micro_batch.read(self.store))

    def masked(self, micro_batch: MicroBatch, batch: CellBatch) -> tuple[CellBatch, Mask]:
        """The same for cells that were read already, on any device."""
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
