"""The transformer over cells: pre-norm blocks whose dense layers run packed and whose attention stays inside a sentence."""

# C cells, D width, H heads, K head width

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cellplane.model.attention import ATTENTION
from cellplane.model.config import ModelConfig
from cellplane.model.noise import Noise, dropout

ATTENTION_DROPOUT = 0.01  # fixed in the released code, whatever its configuration says


class Block(nn.Module):
    """One encoder block, [C, D] -> [C, D]."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        width = config.width
        self.site, self.n_heads, self.dropout = f"block{index}", config.n_heads, config.dropout
        self.attend = ATTENTION[config.attention]
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, h_CD: Tensor, cu_seqlens: Tensor, noise: Noise | None) -> Tensor:
        """The cells after attention and feed-forward, each with its residual."""
        h_CD = h_CD + dropout(self.attention(self.norm1(h_CD), cu_seqlens, noise), self.dropout, noise, f"{self.site}.residual")
        inner = dropout(F.gelu(self.up(self.norm2(h_CD))), self.dropout, noise, f"{self.site}.inner")
        return h_CD + dropout(self.down(inner), self.dropout, noise, f"{self.site}.outer")

    def attention(self, a_CD: Tensor, cu_seqlens: Tensor, noise: Noise | None) -> Tensor:
        """Attention among the cells of each sentence, projected back to [C, D]."""
        q_CHK, k_CHK, v_CHK = (layer(a_CD).unflatten(1, (self.n_heads, -1)) for layer in (self.query, self.key, self.value))
        mixed_CD = self.attend(q_CHK, k_CHK, v_CHK, cu_seqlens).flatten(1)
        return dropout(self.out(mixed_CD), ATTENTION_DROPOUT, noise, f"{self.site}.attention")


class Encoder(nn.Module):
    """All blocks and the norm before the latent space."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.n_blocks))
        self.norm = nn.LayerNorm(config.width)
        self.recompute = config.recompute

    def forward(self, h_CD: Tensor, cu_seqlens: Tensor, noise: Noise | None) -> Tensor:
        """[C, D] -> [C, D]. With `recompute` only the input of each block is kept for the backward pass (noise is keyed)."""
        for block in self.blocks:
            if self.recompute and h_CD.requires_grad:
                h_CD = checkpoint(block, h_CD, cu_seqlens, noise, use_reentrant=False, preserve_rng_state=False)
            else:
                h_CD = block(h_CD, cu_seqlens, noise)
        out_CD: Tensor = self.norm(h_CD)
        return out_CD
