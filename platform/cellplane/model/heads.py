"""What fine-tuning puts on top of the latent space."""

# C cells, Z latent

from __future__ import annotations

from torch import Tensor, nn

from cellplane.model.config import ModelConfig
from cellplane.model.noise import Noise, dropout


class AnnotationHead(nn.Module):
    """z -> one logit per cell type (linear, as in the released recipe)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.head_dropout
        self.linear = nn.Linear(config.latent_width, config.n_classes)

    def forward(self, z_CZ: Tensor, noise: Noise | None) -> Tensor:
        """[C, n_classes]."""
        logits: Tensor = self.linear(dropout(z_CZ, self.dropout, noise, "head"))
        return logits
