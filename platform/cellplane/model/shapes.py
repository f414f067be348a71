"""Batches of few different sizes: a compiled network or a CUDA graph is made once per shape, not once per batch.

What is added is one sentence of cells without counts, and beyond it sentences without cells. No real cell attends to
them, nothing of theirs is hidden, so the answers and losses of real cells and sentences stay what they were. Stored
entries are filled up with counts of 0, which mean nothing anywhere.
"""

# C cells, G genes, S sentences

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cellplane.cells import CellBatch
from cellplane.model.masking import Mask

STEPS = 4  # sizes between a power of two and the next: at most a quarter of a batch is padding
UNKNOWN = ("batch_index", "dataset_index", "platform_index", "row", "labels", "perturbation", "perturbation_kind")  # -1: nothing


@dataclass(frozen=True)
class Shape:
    """Cells, stored entries and sentences of a padded batch."""

    cells: int
    entries: int
    sentences: int


def bucket(size: int) -> int:
    """The least number of at least ``size`` that is 1, 1.25, 1.5 or 1.75 times a power of two."""
    step = max(1, (1 << max(size - 1, 0).bit_length()) // (2 * STEPS))
    return -(-size // step) * step


def bucket_of(batch: CellBatch) -> Shape:
    """The shape this batch is padded to: room for one more cell and sentence, each size rounded up to a bucket."""
    return Shape(bucket(batch.n_cells + 1), bucket(int(batch.gene.numel())), bucket(batch.n_sentences + 1))


def pad_to(batch: CellBatch, cells: int, entries: int, sentences: int | None = None) -> CellBatch:
    """The batch with these numbers of cells and stored entries; its last sentences (one, unless a number is given) are not real.

    ``row`` and every index of an added cell are -1. Raises ValueError when there is no room.
    """
    sentences = batch.n_sentences + 1 if sentences is None else sentences
    more, fill, n_more = cells - batch.n_cells, entries - int(batch.gene.numel()), sentences - batch.n_sentences
    if more < (fill > 0) or fill < 0 or n_more < 1:
        raise ValueError(
            f"a batch of {batch.n_cells} cells, {int(batch.gene.numel())} entries and {batch.n_sentences} sentences does not fit into "
            f"{cells} cells, {entries} entries and {sentences} sentences; entries need a cell more, cells a sentence more"
        )
    device = batch.crow.device
    ends = torch.arange(1, more + 1, device=device) * fill // max(more, 1)  # the added cells share the added entries
    last = torch.full((n_more,), cells, dtype=batch.cu_seqlens.dtype, device=device)
    columns = {name: column for name in UNKNOWN if (column := getattr(batch, name)) is not None}
    return replace(
        batch,
        crow=torch.cat([batch.crow, ends.to(batch.crow.dtype) + (entries - fill)]),
        gene=torch.cat([batch.gene, torch.arange(fill, dtype=batch.gene.dtype, device=device) % batch.n_genes]),
        value=_longer(batch.value, fill, 0),
        panel_index=_longer(batch.panel_index, more, 0),
        coordinates=_longer(batch.coordinates, more, torch.nan),
        perturbation_sign=None if batch.perturbation_sign is None else _longer(batch.perturbation_sign, more, 0),
        cu_seqlens=torch.cat([batch.cu_seqlens, last]),
        sentence_seed=_longer(batch.sentence_seed, n_more, 0),
        **{name: _longer(column, more, -1) for name, column in columns.items()},
    )


def pad_mask(mask: Mask, cells: int, entries: int) -> Mask:
    """The mask of a batch padded to these numbers: nothing of what was added is hidden."""
    more, fill = cells - len(mask.hidden_C), entries - len(mask.entry)
    return replace(mask, bits=_longer(mask.bits, more, 0), entry=_longer(mask.entry, fill, 0), hidden_C=_longer(mask.hidden_C, more, 0))


def _longer(column: Tensor, more: int, value: float) -> Tensor:
    """``more`` rows of this value behind the column."""
    return F.pad(column, (*(0, 0) * (column.dim() - 1), 0, more), value=value)
