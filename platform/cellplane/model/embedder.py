"""Gene-expression embedder: the sum of the gene vectors of a cell, weighted by log counts, then one mixing layer.

Source: CellPLM (Wen et al., ICLR 2024), `OmicsEmbedder`. Raw counts enter; the only transform is log1p.
"""

# C cells, G genes, P panels, D width

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
        self.norm = nn.GroupNorm(NORM_GROUPS, config.width)
        self.hidden_D = nn.Parameter(torch.zeros(config.width)) if config.hidden_fraction else None

    def forward(self, batch: CellBatch, mask: Mask | None, noise: Noise | None) -> Tensor:
        """[C, D]; hidden values contribute nothing, exactly as if they were not stored."""
        h_CD = self.gene_sum(batch, mask)
        if self.positions is not None:
            h_CD = h_CD + self.positions(batch)
        if self.hidden_D is not None and mask is not None:
            measured_C = batch.panels.sum(1)[batch.panel_index].clamp(min=1)
            h_CD = h_CD + (mask.hidden_C / measured_C)[:, None] * self.hidden_D
        return spared(self._mixed, h_CD.to(self.linear.weight.dtype), noise)

    def _mixed(self, h_CD: Tensor, noise: Noise | None) -> Tensor:
        out_CD: Tensor = self.norm(dropout(F.relu(self.linear(h_CD)), self.dropout, noise, "embedder").float())
        return out_CD

    def gene_sum(self, batch: CellBatch, mask: Mask | None) -> Tensor:
        """Sum over visible genes of log1p(count) times the gene's vector, [C, D]."""
        weight = torch.log1p(batch.value)
        if mask is not None:
            weight = weight.masked_fill(mask.entry, 0.0)
        return gene_sum_of(batch.value.device)(self.genes_GD, batch.gene, batch.crow, weight)
