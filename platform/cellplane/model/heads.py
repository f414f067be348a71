"""What fine-tuning puts on top of the latent space."""

# C cells, Z latent

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cellplane.model.config import ModelConfig
from cellplane.model.noise import Noise, dropout


class AnnotationHead(nn.Module):
    """z -> one logit per cell type: linear as in the released recipe, or through one hidden layer of `head_width`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.head_dropout
        self.inner = nn.Linear(config.latent_width, config.head_width) if config.head_width else None
        self.linear = nn.Linear(config.head_width or config.latent_width, config.n_classes)

    def forward(self, z_CZ: Tensor, noise: Noise | None) -> Tensor:
        """[C, n_classes]."""
        h = dropout(z_CZ, self.dropout, noise, "head")
        if self.inner is not None:
            h = dropout(F.relu(self.inner(h)), self.dropout, noise, "head.inner")
        logits: Tensor = self.linear(h)
        return logits
