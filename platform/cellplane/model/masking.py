"""Choosing which cells a step leaves out and which genes the model must recover.

Pre-training hides genes of a random share of the cells and asks the neighbours to fill them in (Wen et al., CellPLM,
ICLR 2024). Every choice is keyed by the sentence's seed, so a sentence is masked alike alone, packed or on any worker.
Nothing here knows about the network.
"""

# C cells, G genes, S sentences

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellplane.cells import CellBatch, keyed_seed
from cellplane.model.config import MaskingConfig


@dataclass(frozen=True)
class Mask:
    """Which measured values are hidden: ``hidden_CG`` [C, G] bool, zeros included; ``entry`` [nnz] the same for stored entries."""

    hidden_CG: Tensor
    entry: Tensor


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


def mask_genes(batch: CellBatch, full_sizes: NDArray[np.int64], config: MaskingConfig) -> Mask:
    """Hides genes of a random share of the cells; ``full_sizes`` [S] are the sentences' sizes before cells were dropped.

    The number of cells chosen is the one `chosen_cells` promised for the full size. Only measured genes are hidden.
    """
    hidden_CG = np.zeros((batch.n_cells, batch.n_genes), dtype=bool)
    for (start, end), seed, wanted in zip(
        batch.spans(), batch.sentence_seed.tolist(), chosen_cells(full_sizes, config).tolist(), strict=True
    ):
        rng = np.random.default_rng(keyed_seed(seed, "mask"))
        chosen = start + np.sort(rng.permutation(end - start)[:wanted])
        rates = np.minimum(rng.beta(config.gene_mask_alpha, config.gene_mask_beta, len(chosen)), config.gene_mask_cap)
        hidden_CG[chosen] = rng.random((len(chosen), batch.n_genes), dtype=np.float32) < rates[:, None]
    return mask_of(batch, torch.from_numpy(hidden_CG).to(batch.crow.device))


def mask_of(batch: CellBatch, hidden_CG: Tensor) -> Mask:
    """A Mask from explicit choices, restricted to measured genes."""
    hidden_CG = hidden_CG & batch.panels[batch.panel_index]
    return Mask(hidden_CG=hidden_CG, entry=hidden_CG[batch.cell_of_entry(), batch.gene])
