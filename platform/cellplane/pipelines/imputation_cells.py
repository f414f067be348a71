"""Query and reference cells side by side: sentences that mix both, and what a step hides of them.

Platform 0 is the query, 1 the reference. The query's own counts of genes to impute, should its file hold any, are
dropped when it is read: neither a total nor a scale nor the network can see them.
"""

# C cells, G genes; P = 2 platforms

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from cellplane.cells import CellBatch
from cellplane.data.patches import patches as patches
from cellplane.data.sentences import CellTable, MemoryStore, MicroBatch
from cellplane.model.masking import Mask, mask_of
from cellplane.pipelines.imputation_config import ImputationConfig
from cellplane.pipelines.masks import Masks
from cellplane.seeds import keyed_seed

QUERY, REFERENCE = 0, 1
Rows = NDArray[np.int64]


def limited(table: CellTable, panel: NDArray[np.bool_]) -> CellTable:
    """The table as if only the genes of ``panel`` [G] had been measured: other counts are gone, not hidden."""
    kept = panel[table.gene]
    cell = np.repeat(np.arange(table.n_cells), np.diff(table.crow))[kept]
    crow = np.concatenate([[0], np.cumsum(np.bincount(cell, minlength=table.n_cells))]).astype(np.int64)
    return replace(table, crow=crow, gene=table.gene[kept], value=table.value[kept], panel=table.panel & panel)


def renumbered(table: CellTable, genes: Rows) -> CellTable:
    """The table over a vocabulary of these of its genes, in this order; counts of others are gone."""
    place = np.full(len(table.panel), -1, dtype=np.int64)
    place[genes] = np.arange(len(genes))
    inside = np.zeros(len(table.panel), dtype=bool)
    inside[genes] = True
    part = limited(table, inside)
    return replace(part, gene=place[part.gene], panel=table.panel[genes])


def dense(table: CellTable, genes: Rows) -> NDArray[np.float64]:
    """Counts [n, len(genes)] of some genes."""
    matrix = sp.csr_matrix((table.value, table.gene, table.crow), shape=(table.n_cells, len(table.panel)))
    counts: NDArray[np.float64] = np.asarray(matrix[:, genes].toarray(), dtype=np.float64)
    return counts


def scaled_log(counts: NDArray[np.float64], totals: NDArray[np.float64], total: float) -> NDArray[np.float64]:
    """log1p of counts scaled by ``total`` / ``totals`` [n]; a cell without counts stays 0."""
    return np.asarray(np.log1p(counts * (total / np.maximum(totals, 1e-12))[:, None] * (totals > 0)[:, None]))


@dataclass(frozen=True)
class MixedCells:
    """Query and reference over one vocabulary; a reference cell's row stands behind all the query's."""

    query: CellTable
    reference: CellTable

    @cached_property
    def _joined(self) -> CellTable:
        parts = (self.query, self.reference)
        located = self.query.coordinates
        missing = np.full((self.reference.n_cells, 2), np.nan, dtype=np.float32)
        crow = np.concatenate([self.query.crow, self.query.crow[-1] + self.reference.crow[1:]])
        gene, value = (np.concatenate([getattr(part, name) for part in parts]) for name in ("gene", "value"))
        coordinates = None if located is None else np.concatenate([located, missing])
        return CellTable(crow=crow, gene=gene, value=value, panel=self.query.panel | self.reference.panel, coordinates=coordinates)

    @cached_property
    def _panels(self) -> torch.Tensor:
        return torch.from_numpy(np.stack([self.query.panel, self.reference.panel]))

    def batch(self, sentences: Sequence[tuple[Rows, Rows]]) -> CellBatch:
        """Sentences of (query rows, reference rows); ``row`` is a query cell's row, and n_query + row for a reference cell."""
        joined = [np.concatenate([query, self.query.n_cells + reference]) for query, reference in sentences]
        batch = MemoryStore(self._joined, joined).read(range(len(joined)))
        platform = (batch.row >= self.query.n_cells).to(torch.int64)
        return replace(batch, panels=self._panels, panel_index=platform, platform_index=platform)

    def drawn(self, cells: int, seed: int) -> Rows:
        """Some reference rows, ascending, by the seed."""
        rows = np.random.default_rng(seed).permutation(self.reference.n_cells)[:cells]
        return np.sort(rows)


@dataclass(frozen=True)
class ImputationObjective:
    """A patch of the query and a fresh draw of reference cells, of which genes are hidden by the masks and at random."""

    cells: MixedCells
    patches: Sequence[Rows]
    masks: Masks
    config: ImputationConfig

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Cells of every sentence."""
        reference = min(self.config.reference_cells, self.cells.reference.n_cells)
        return np.array([len(rows) + reference for rows in self.patches], dtype=np.int64)

    def weights(self) -> NDArray[np.float64]:
        """Query cells of every patch."""
        return np.array([len(rows) for rows in self.patches], dtype=np.float64)

    def prepare(self, micro_batch: MicroBatch) -> tuple[CellBatch, Mask]:
        """Reads, draws, hides; determined by the sentences' seeds alone."""
        pairs = list(zip(micro_batch.sentences, micro_batch.seeds, strict=True))
        drawn = [
            (self.patches[index], self.cells.drawn(self.config.reference_cells, keyed_seed(seed, "reference"))) for index, seed in pairs
        ]
        batch = replace(self.cells.batch(drawn), sentence_seed=torch.tensor(micro_batch.seeds, dtype=torch.int64))
        return batch, mask_of(batch, self.hidden(batch))

    def hidden(self, batch: CellBatch) -> torch.Tensor:
        """[C, G] bool: what no cell of its platform shows, and a random part of what some cells would."""
        shown_CG = torch.from_numpy(self.masks.visible)[batch.platform_index]
        hidden_CG = ~shown_CG
        low, high = self.config.masked_genes
        for (start, end), seed in zip(batch.spans(), batch.sentence_seed.tolist(), strict=True):
            rng = np.random.default_rng(keyed_seed(seed, "impute"))
            rates = rng.uniform(low, high, end - start) * (rng.random(end - start) < self.config.masked_cells)
            hidden_CG[start:end] |= torch.from_numpy(rng.random((end - start, batch.n_genes)) < rates[:, None])
        return hidden_CG


def shown(batch: CellBatch, masks: Masks) -> CellBatch:
    """The batch with nothing but what the masks let its cells show: the rest is not in it any more."""
    visible_PG = torch.from_numpy(masks.visible)
    kept = visible_PG[batch.platform_index[batch.cell_of_entry()], batch.gene]
    lengths = torch.bincount(batch.cell_of_entry()[kept], minlength=batch.n_cells)
    crow = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return replace(batch, crow=crow, gene=batch.gene[kept], value=batch.value[kept], panels=batch.panels & visible_PG)
