"""Choosing which cells a step leaves out, which genes it may see at all, and which the model must recover.

Pre-training hides genes of a random share of the cells and asks the neighbours to fill them in (Wen et al., CellPLM,
ICLR 2024). Every choice is keyed by the sentence's seed, so a sentence is masked alike alone, packed or on any worker.
Nothing here knows about the network.
"""

# C cells, G genes, S sentences

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellplane.cells import CellBatch
from cellplane.model.config import MaskingConfig
from cellplane.seeds import keyed_seed

CELLS_AT_ONCE = 64  # random numbers are drawn for so many cells at a time: 2.5 MB at 19,374 genes


@dataclass(frozen=True)
class Mask:
    """Which measured values are hidden, zeros included, one bit each: 2.4 kB a cell at 19,374 genes.

    ``bits`` [C, ceil(G / 8)] uint8, the gene of lowest index in the highest bit; ``entry`` [nnz] bool the same for the
    stored entries; ``hidden_C`` [C] int64 the number of hidden genes of each cell.
    """

    bits: Tensor
    entry: Tensor
    hidden_C: Tensor
    n_genes: int

    @property
    def hidden_CG(self) -> Tensor:
        """All of it as [C, G] bool: for small batches and tests."""
        return self.rows(0, len(self.bits))

    def rows(self, start: int, end: int) -> Tensor:
        """[end - start, G] bool of these cells."""
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=self.bits.device)
        unpacked = (self.bits[start:end, :, None] >> shifts) & 1
        return unpacked.flatten(1)[:, : self.n_genes].bool()

    def to(self, device: torch.device) -> Mask:
        """The same mask on another device."""
        return Mask(self.bits.to(device), self.entry.to(device), self.hidden_C.to(device), self.n_genes)


def kept_cells(sizes: NDArray[np.int64], config: MaskingConfig) -> NDArray[np.int64]:
    """Cells of each sentence that a step keeps, from sizes alone; at least one of a sentence that has any."""
    kept: NDArray[np.int64] = np.minimum(sizes, np.maximum(1, np.rint(sizes * (1 - config.drop_cell_rate)).astype(np.int64)))
    return kept


def chosen_cells(sizes: NDArray[np.int64], config: MaskingConfig) -> NDArray[np.int64]:
    """Cells of each sentence that get genes hidden, from sizes alone: a sentence's weight in the loss.

    At least one of a sentence that has any, unless the rate is 0.
    """
    kept = kept_cells(sizes, config)
    if config.cell_mask_rate == 0:
        return np.zeros_like(kept)
    chosen: NDArray[np.int64] = np.minimum(kept, np.maximum(1, np.rint(kept * config.cell_mask_rate).astype(np.int64)))
    return chosen


def drop_cells(batch: CellBatch, config: MaskingConfig) -> CellBatch:
    """The batch with a random share of every sentence's cells left out."""
    if config.drop_cell_rate == 0:
        return batch
    kept = [np.zeros(0, dtype=np.int64)]
    for (start, end), seed in zip(batch.spans(), batch.sentence_seed.tolist(), strict=True):
        wanted = int(kept_cells(np.array([end - start]), config)[0])
        order = np.random.default_rng(keyed_seed(seed, "drop")).permutation(end - start)
        kept.append(start + np.sort(order[:wanted]))
    return batch.take(torch.from_numpy(np.concatenate(kept)).to(batch.crow.device))


def narrow_panels(batch: CellBatch, config: MaskingConfig) -> CellBatch:
    """The batch as if a random share of its sentences had been measured with small random panels.

    What is outside a panel is unknown afterwards, not zero: it is neither seen nor asked for. Sizes are log-uniform
    between `panel_min_genes` and the genes the sentence measured.
    """
    if config.panel_rate == 0:
        return batch
    panels, panel_index = batch.panels.cpu().numpy(), batch.panel_index.cpu().numpy().copy()
    added = [panels]
    for (start, end), seed in zip(batch.spans(), batch.sentence_seed.tolist(), strict=True):
        rng = np.random.default_rng(keyed_seed(seed, "panel"))
        if start == end or rng.random() >= config.panel_rate:
            continue
        before, place = np.unique(panel_index[start:end], return_inverse=True)
        measured = np.flatnonzero(panels[before].any(0))
        size = round(float(np.exp(rng.uniform(*np.log([config.panel_min_genes, max(config.panel_min_genes, len(measured), 1)])))))
        chosen = np.isin(np.arange(batch.n_genes), rng.permutation(measured)[:size])
        panel_index[start:end] = sum(map(len, added)) + place
        added.append(panels[before] & chosen)
    device = batch.panels.device
    narrowed = torch.from_numpy(np.concatenate(added)).to(device), torch.from_numpy(panel_index).to(device)
    return _measured_only(replace(batch, panels=narrowed[0], panel_index=narrowed[1]))


def _measured_only(batch: CellBatch) -> CellBatch:
    """Without the stored entries outside the cells' panels."""
    cell = batch.cell_of_entry()
    kept = batch.panels[batch.panel_index[cell], batch.gene]
    lengths = torch.bincount(cell[kept], minlength=batch.n_cells)
    crow = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return replace(batch, crow=crow, gene=batch.gene[kept], value=batch.value[kept])


def mask_genes(batch: CellBatch, full_sizes: NDArray[np.int64], config: MaskingConfig) -> Mask:
    """Hides genes of a random share of the cells; ``full_sizes`` [S] are the sentences' sizes before cells were dropped.

    The number of cells chosen is the one `chosen_cells` promised for the full size. Only measured genes are hidden.
    """
    panels, panel_index = batch.panels.cpu().numpy(), batch.panel_index.cpu().numpy()
    measured = np.packbits(panels, axis=1)
    scale = np.where(panels.sum(1) <= config.targeted_genes, config.targeted_mask_scale, 1.0)
    bits = np.zeros((batch.n_cells, measured.shape[1]), dtype=np.uint8)
    for (start, end), seed, wanted in zip(
        batch.spans(), batch.sentence_seed.tolist(), chosen_cells(full_sizes, config).tolist(), strict=True
    ):
        rng = np.random.default_rng(keyed_seed(seed, "mask"))
        chosen = start + np.sort(rng.permutation(end - start)[:wanted])
        rates = RATES[config.gene_mask](len(chosen), config, rng) * scale[panel_index[chosen]]
        for at in range(0, len(chosen), CELLS_AT_ONCE):
            cells = slice(at, at + CELLS_AT_ONCE)
            bits[chosen[cells]] = _random_bits(rates[cells], batch.n_genes, rng) & measured[panel_index[chosen[cells]]]
    return _mask(batch, bits)


def _beta_rates(cells: int, config: MaskingConfig, rng: np.random.Generator) -> NDArray[np.float64]:
    return np.minimum(rng.beta(config.gene_mask_alpha, config.gene_mask_beta, cells), config.gene_mask_cap)


def _fixed_rates(cells: int, config: MaskingConfig, rng: np.random.Generator) -> NDArray[np.float64]:  # noqa: ARG001  (same call)
    return np.full(cells, min(config.gene_mask_rate, config.gene_mask_cap))


RATES: dict[str, Callable[[int, MaskingConfig, np.random.Generator], NDArray[np.float64]]] = {
    "beta": _beta_rates,
    "fixed": _fixed_rates,
}


def _random_bits(rates: NDArray[np.float64], n_genes: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Bits that are set at each cell's rate, [c, ceil(G / 8)]; rates count in steps of 1/65,536.

    Four genes share one 64-bit number of the generator: three times faster than a float for each.
    """
    words = rng.bit_generator.random_raw((len(rates), -(-n_genes // 4))).astype("<u8", copy=False).view("<u2")[:, :n_genes]
    thresholds = np.rint(rates * 65_536)
    hidden = words < np.minimum(thresholds, 65_535).astype(np.uint16)[:, None]
    hidden[thresholds == 65_536] = True
    return np.packbits(hidden, axis=1)


def mask_of(batch: CellBatch, hidden_CG: Tensor) -> Mask:
    """A Mask from explicit choices [C, G] bool, restricted to measured genes."""
    hidden = (hidden_CG & batch.panels[batch.panel_index]).cpu().numpy()
    return _mask(batch, np.packbits(hidden, axis=1))


def _mask(batch: CellBatch, packed: NDArray[np.uint8]) -> Mask:
    device = batch.crow.device
    bits, hidden_C = torch.from_numpy(packed).to(device), torch.from_numpy(np.bitwise_count(packed).sum(1, dtype=np.int64)).to(device)
    entry = ((bits[batch.cell_of_entry(), batch.gene >> 3] >> (7 - (batch.gene & 7)).to(torch.uint8)) & 1).bool()
    return Mask(bits, entry, hidden_C, batch.n_genes)
