"""The linear probe: what a frozen encoder says of each cell is computed once, and only the layers on top of it learn.

A step then costs two small products instead of a pass through the network, forward and back: hundreds of times less.
"""

# C cells, D width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cellplane.cells import CellBatch
from cellplane.data.sentences import MemoryStore, MicroBatch
from cellplane.inference import CELLS_PER_FORWARD, packs
from cellplane.model.cellplm import CellPLM, CellPLMOutput
from cellplane.model.linear import in_precision
from cellplane.model.losses import annotation_loss
from cellplane.model.masking import Mask
from cellplane.model.noise import Noise


class Probe(nn.Module):
    """The latent projection and the head of an annotator, on features that stand still; `row` says whose are a cell's."""

    features_CD: Tensor

    def __init__(self, network: CellPLM, features_CD: Tensor) -> None:
        super().__init__()
        assert network.head is not None
        self.latent, self.head, self.precision = network.latent, network.head, network.config.precision
        self.register_buffer("features_CD", features_CD, persistent=False)

    def forward(self, batch: CellBatch, mask: Mask | None = None, noise: Noise | None = None) -> CellPLMOutput:  # noqa: ARG002
        """As the whole network answers, without dropout below the latent space."""
        with in_precision(self.precision, batch.row.device):
            z_CZ = self.latent(self.features_CD[batch.row], noise).z_CZ
            logits = self.head(z_CZ, noise)
            return CellPLMOutput(z_CZ, logits, annotation_loss(batch, logits) if batch.labels is not None else None)


def encoded(network: CellPLM, store: MemoryStore, device: torch.device) -> Tensor:
    """What the encoder says of every cell in its sentence, nothing hidden, [C, D] in the order of the table, on the device."""
    network.to(device)
    out = torch.zeros(store.table.n_cells, network.config.width, device=device)
    for sentences in packs(store.sizes, CELLS_PER_FORWARD):
        batch = store.read(sentences).to(device)
        with torch.no_grad(), in_precision(network.config.precision, device):
            out[batch.row] = network.encoder(network.embedder(batch, None, None), batch, None).float()
    return out


def without_counts(store: MemoryStore) -> MemoryStore:
    """The same cells, labels and sentences for whoever needs no counts any more: reading costs next to nothing."""
    table = store.table
    empty = replace(table, crow=np.zeros_like(table.crow), gene=table.gene[:0], value=table.value[:0])
    return MemoryStore(empty, store.sentences)


@dataclass(frozen=True)
class ProbeObjective:
    """All cells of a sentence, nothing dropped and nothing hidden; a sentence weighs as many cells as it has."""

    store: MemoryStore

    def weights(self) -> NDArray[np.float64]:
        """See Objective."""
        return self.store.sizes.astype(np.float64)

    def prepare(self, micro_batch: MicroBatch) -> tuple[CellBatch, Mask | None]:
        """See Objective."""
        return micro_batch.read(self.store), None


def shifted(batch: CellBatch, rows: int) -> CellBatch:
    """The batch, its rows counted from behind ``rows`` others: for features of two tables one after the other."""
    return replace(batch, row=batch.row + rows)


def stacked(network: CellPLM, stores: Sequence[MemoryStore], device: torch.device) -> Tensor:
    """Features of several stores' cells, one store after the other."""
    return torch.cat([encoded(network, store, device) for store in stores])
