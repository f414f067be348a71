"""Gene-expression embedder: the sum of the gene vectors of a cell, weighted by log counts, then one mixing layer.

Source: CellPLM (Wen et al., ICLR 2024), `OmicsEmbedder`. Raw counts enter; the only transform is log1p, unless
`input_total` asks for counts that are scaled first, by what the cell shows: hidden counts enter no total.
"""

# C cells, G genes, P panels, D width, T platform tokens

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellplane.cells import CellBatch
from cellplane.model.config import ModelConfig
from cellplane.model.dispatch import gene_sum_of
from cellplane.model.fused import spared
from cellplane.model.linear import Linear
from cellplane.model.masking import Mask
from cellplane.model.noise import Noise, dropout
from cellplane.model.norms import GroupNorm
from cellplane.model.perturbation import PerturbationEmbedding, perturbed_counts
from cellplane.model.positions import POSITIONS

NORM_GROUPS = 4  # GroupNorm over 4 groups of channels, as released


class Embedder(nn.Module):
    """Counts of C cells -> [C, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.genes_GD = nn.Parameter(torch.randn(config.n_genes, config.width) * config.gene_init_sd)
        self.positions = POSITIONS[config.positions](config.width)
        self.linear = Linear(config.width, config.width)
        self.norm = GroupNorm(NORM_GROUPS, config.width)
        self.hidden_D = nn.Parameter(torch.zeros(config.width)) if config.hidden_fraction else None
        self.platform_TD = nn.Parameter(torch.zeros(config.platform_tokens, config.width)) if config.platform_tokens else None
        self.perturbation = PerturbationEmbedding(config) if config.decoder == "residual" else None
        self.input_total = config.input_total

    def forward(self, batch: CellBatch, mask: Mask | None, noise: Noise | None) -> Tensor:
        """[C, D]; hidden values contribute nothing, exactly as if they were not stored."""
        h_CD = self.gene_sum(batch, mask)
        if self.positions is not None:
            h_CD = h_CD + self.positions(batch)
        if self.hidden_D is not None and mask is not None:
            measured_C = batch.panels.sum(1)[batch.panel_index].clamp(min=1)
            h_CD = h_CD + (mask.hidden_C / measured_C)[:, None] * self.hidden_D
        if self.platform_TD is not None:
            h_CD = h_CD + platform_rows(batch, len(self.platform_TD)) @ self.platform_TD
        if self.perturbation is not None:
            h_CD = h_CD + self.perturbation(batch, self.genes_GD)
        return spared(self._mixed, self.linear(h_CD.to(self.linear.weight.dtype)), noise)

    def _mixed(self, h_CD: Tensor, noise: Noise | None) -> Tensor:
        kept_CD = dropout(F.relu(h_CD), self.dropout, noise, "embedder").float()
        return self.norm.forward(kept_CD)  # the function: a module must not be called again (see `remade`)

    def gene_sum(self, batch: CellBatch, mask: Mask | None) -> Tensor:
        """Sum over visible genes of log1p(count) times the gene's vector, [C, D]."""
        value = batch.value if self.perturbation is None else perturbed_counts(batch)
        if self.input_total:
            value = scaled(batch, value if mask is None else value.masked_fill(mask.entry, 0.0), self.input_total)
        weight = torch.log1p(value)
        if mask is not None:
            weight = weight.masked_fill(mask.entry, 0.0)
        return gene_sum_of(batch.value.device)(self.genes_GD, batch.gene, batch.crow, weight)


def scaled(batch: CellBatch, value: Tensor, total: float) -> Tensor:
    """The entries' values times what makes each cell's sum ``total``, [nnz]; a cell without any stays empty."""
    cell = batch.cell_of_entry()
    found_C = torch.zeros(batch.n_cells, device=value.device).index_add_(0, cell, value)
    return value * (total / found_C.clamp(min=torch.finfo(torch.float32).tiny))[cell]


def platform_rows(batch: CellBatch, platforms: int) -> Tensor:
    """One-hot rows [C, T] of the cells' platforms; all 0 for an unknown one (-1)."""
    return (batch.platform_index[:, None] == torch.arange(platforms, device=batch.platform_index.device)).float()
