"""The transformer over cells: pre-norm blocks whose dense layers run packed and whose attention stays inside a sentence."""

# C cells, D width, H heads, K head width

from __future__ import annotations

from torch import Tensor, nn

from cellplane.cells import CellBatch
from cellplane.model.config import ModelConfig
from cellplane.model.dispatch import attention_of
from cellplane.model.fused import add_feed_forward, add_projection, norm_project, recomputed, remade
from cellplane.model.linear import Linear
from cellplane.model.local import LocalBlock, neighbours
from cellplane.model.noise import Drop, Noise, drop_of
from cellplane.model.norms import LayerNorm

ATTENTION_DROPOUT = 0.01  # fixed in the released code, whatever its configuration says


class Block(nn.Module):
    """One encoder block, [C, D] -> [C, D]."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        width = config.width
        self.site, self.n_heads, self.dropout = f"block{index}", config.n_heads, config.dropout
        self.kernel, self.recompute = config.attention, config.recompute
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.query, self.key, self.value, self.out = (Linear(width, width) for _ in range(4))
        self.up, self.down = Linear(width, 2 * width), Linear(2 * width, width)

    def forward(self, h_CD: Tensor, cu_seqlens: Tensor, noise: Noise | None) -> Tensor:
        """The cells after attention and feed-forward, each with its residual. With `recompute` only the input is kept."""
        return remade(self.recompute, self._answer, h_CD, cu_seqlens, noise)

    def _answer(self, h_CD: Tensor, cu_seqlens: Tensor, noise: Noise | None) -> Tensor:
        h_CD = add_projection(h_CD, self.attention(h_CD, cu_seqlens), self.out, self._drop(h_CD, noise))
        inner = (len(h_CD), self.up.out_features)
        drops = (
            drop_of(inner, self.dropout, noise, f"{self.site}.inner"),
            drop_of(h_CD.shape, self.dropout, noise, f"{self.site}.outer"),
        )
        return add_feed_forward(h_CD, self.norm2, self.up, self.down, drops)

    def attention(self, h_CD: Tensor, cu_seqlens: Tensor) -> Tensor:
        """What each cell takes from the cells of its sentence, [C, D], before the output layer."""
        q, k, v = norm_project(h_CD, self.norm1, (self.query, self.key, self.value))
        heads = len(h_CD), self.n_heads, h_CD.shape[1] // self.n_heads
        return recomputed(attention_of(self.kernel, h_CD.device), (q.view(heads), k.view(heads), v.view(heads)), cu_seqlens).flatten(1)

    def _drop(self, h_CD: Tensor, noise: Noise | None) -> Drop:
        """The output layer's own dropout and the residual's after it, which act as one."""
        kept = (1 - self.dropout) * (1 - ATTENTION_DROPOUT)
        return drop_of(h_CD.shape, 1 - kept, noise, f"{self.site}.residual")


class Encoder(nn.Module):
    """All blocks, the local ones last, and the norm before the latent space."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.n_blocks))
        self.local = nn.ModuleList(LocalBlock(config, index) for index in range(config.local_blocks))
        self.norm = LayerNorm(config.width)

    def forward(self, h_CD: Tensor, batch: CellBatch, noise: Noise | None) -> Tensor:
        """[C, D] -> [C, D]."""
        for block in self.blocks:
            h_CD = block(h_CD, batch.cu_seqlens, noise)
        if len(self.local):
            near = neighbours(batch, self.config)
            for block in self.local:
                h_CD = block(h_CD, near, noise)
        out_CD: Tensor = self.norm(h_CD)
        return out_CD
