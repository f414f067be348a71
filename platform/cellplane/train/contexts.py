"""The same cells, with the same values hidden, in other company: what a cell's neighbours are worth to the model.

own: the sentence as it is. self: each cell a sentence of its own. shuffled_coordinates: the same cells, each at another
one's place, so that who is whose neighbour is lost and who is there is not. shuffled_neighbours: the cells of each data
set dealt anew to its sentences, so that neither holds. A cell keeps its counts and what is hidden of them throughout,
so that contexts compare cell by cell.
"""

# C cells, S sentences

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellplane.cells import OPTIONAL_PER_CELL, PER_CELL, CellBatch
from cellplane.model.masking import Mask
from cellplane.seeds import keyed_seed

Context = Callable[[CellBatch, Mask, int], tuple[CellBatch, Mask]]  # (cells, what is hidden, seed) -> the same in this context
RESAMPLES = 2000  # of the bootstrap
INTERVAL = (2.5, 97.5)  # percentiles of its confidence interval


def _own(batch: CellBatch, mask: Mask, seed: int) -> tuple[CellBatch, Mask]:  # noqa: ARG001  (same call for every context)
    return batch, mask


def _self(batch: CellBatch, mask: Mask, seed: int) -> tuple[CellBatch, Mask]:  # noqa: ARG001
    seeds = batch.sentence_seed[batch.sentence_of_cell()]
    return replace(batch, cu_seqlens=torch.arange(batch.n_cells + 1), sentence_seed=seeds), mask


def _shuffled_coordinates(batch: CellBatch, mask: Mask, seed: int) -> tuple[CellBatch, Mask]:
    order = torch.arange(batch.n_cells)
    for start, end in batch.spans():
        order[start:end] = start + _permutation(end - start, seed, start)
    return replace(batch, coordinates=batch.coordinates[order]), mask


def _shuffled_neighbours(batch: CellBatch, mask: Mask, seed: int) -> tuple[CellBatch, Mask]:
    """Cells move, places stay: coordinates, sentences and the sentences' sizes are as they were."""
    order = torch.arange(batch.n_cells)
    for dataset in sorted(set(batch.dataset_index.tolist())):
        members = (batch.dataset_index == dataset).nonzero()[:, 0]
        order[members] = members[_permutation(len(members), seed, dataset)]
    moved = reordered(batch, order)
    return replace(moved, coordinates=batch.coordinates), Mask(
        mask.bits[order], _entries(mask.entry, batch, order), mask.hidden_C[order], mask.n_genes
    )


CONTEXTS: dict[str, Context] = {
    "own": _own,
    "self": _self,
    "shuffled_coordinates": _shuffled_coordinates,
    "shuffled_neighbours": _shuffled_neighbours,
}


def reordered(batch: CellBatch, order: Tensor) -> CellBatch:
    """The cells in this order [C], in the sentences' places as they were; all of a cell moves, its coordinates too."""
    lengths = batch.crow.diff()[order]
    columns = {
        name: column[order] for name in (*PER_CELL, *OPTIONAL_PER_CELL, "coordinates") if (column := getattr(batch, name)) is not None
    }
    crow = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return replace(batch, crow=crow, gene=_entries(batch.gene, batch, order), value=_entries(batch.value, batch, order), **columns)


def _entries(column: Tensor, batch: CellBatch, order: Tensor) -> Tensor:
    """A column of stored entries [nnz], the cells' pieces of it in this order."""
    lengths = batch.crow.diff()[order]
    ends = lengths.cumsum(0)
    shift = torch.repeat_interleave(batch.crow[:-1][order] - (ends - lengths), lengths)
    return column[shift + torch.arange(len(column))]


def _permutation(count: int, seed: int, part: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(keyed_seed("context", seed, part)).permutation(count))


@dataclass(frozen=True)
class Gain:
    """How many nats per hidden value one context is better than another, with its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def paired_gain(worse: NDArray[np.float64], better: NDArray[np.float64], values: NDArray[np.float64], seed: int = 0) -> Gain:
    """What ``better`` saves over ``worse``: both [n] nats of the same cells, which hide ``values`` [n] each.

    The interval is a bootstrap over cells: it says how sure the figure is for these sentences, not for other tissue.
    Raises ValueError when there is no hidden value.
    """
    if values.sum() <= 0:
        raise ValueError("no value is hidden in these cells, so there is nothing to compare")
    saved, rng = worse - better, np.random.default_rng(keyed_seed("bootstrap", seed))
    again = np.array([_ratio(saved, values, rng.integers(len(saved), size=len(saved))) for _ in range(RESAMPLES)])
    low, high = np.percentile(again, INTERVAL)
    return Gain(float(saved.sum() / values.sum()), float(low), float(high))


def _ratio(saved: NDArray[np.float64], values: NDArray[np.float64], chosen: NDArray[np.int64]) -> float:
    return float(saved[chosen].sum() / max(values[chosen].sum(), 1.0))
