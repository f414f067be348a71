"""Flowformer attention for a GPU: any number of sentences at once, without a loop and without the host waiting.

Sentences are cut into tiles of equal length that never cross a sentence. Products run over all tiles together; what a
sentence needs as a whole is a sum over its tiles in float32, in a fixed order. The number of tiles is bounded by the
numbers of cells and sentences, so every shape is known before any length is.
"""

# C cells, S sentences, T tiles of L cells, H heads, K head width

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cellplane.model.attention import EPSILON
from cellplane.model.linear import compute_dtype

SHORTEST, LONGEST = 16, 128  # cells of a tile: a tensor core's side, and enough to fill one


@dataclass(frozen=True)
class Tiling:
    """Which cell lies in which place of which tile; tiles beyond the last sentence, and places beyond its end, are not real."""

    cell_TL: Tensor  # [T, L] int64, 0 where not real
    real_TL: Tensor  # [T, L] bool
    sentence_T: Tensor  # [T] int64
    edges: Tensor  # [S+1] int64, the first tile of every sentence
    place_C: Tensor  # [C] int64, where each cell lies among the T x L places
    lengths_S: Tensor  # [S] int64

    def of_tiles(self, x_S: Tensor) -> Tensor:
        """[T, ...] of [S, ...]."""
        return x_S.index_select(0, self.sentence_T)

    def total(self, x_T: Tensor) -> Tensor:
        """[T, ...] float32 of [T, ...]: every tile gets the sum over its sentence."""
        flat = x_T.float().flatten(1)
        total_S = torch.segment_reduce(flat, "sum", offsets=self.edges, axis=0, unsafe=True, initial=0)
        return self.of_tiles(total_S).view(x_T.shape)


def tiling(cu_seqlens: Tensor, n_cells: int) -> Tiling:
    """Tiles for these sentences; their length follows the mean length of a sentence, which the host knows."""
    n_sentences, device = len(cu_seqlens) - 1, cu_seqlens.device
    side = min(LONGEST, max(SHORTEST, 1 << (max(n_cells // max(n_sentences, 1), 1) - 1).bit_length()))
    n_tiles = n_cells // side + n_sentences
    cu_seqlens = cu_seqlens.long()
    lengths_S = cu_seqlens.diff()
    edges = F.pad((lengths_S + side - 1).div(side, rounding_mode="floor").cumsum(0), (1, 0))
    tile = torch.arange(n_tiles, device=device)
    sentence_T = torch.searchsorted(edges[1:], tile, right=True).clamp(max=n_sentences - 1)
    place_T = cu_seqlens[sentence_T] + (tile - edges[sentence_T]) * side
    cell_TL = place_T[:, None] + torch.arange(side, device=device)
    real_TL = cell_TL < cu_seqlens[sentence_T + 1][:, None]  # also false in tiles beyond the last sentence
    cell = torch.arange(n_cells, device=device)
    sentence_C = torch.searchsorted(cu_seqlens[1:], cell, right=True)
    place_C = edges[sentence_C] * side + cell - cu_seqlens[sentence_C]
    return Tiling(torch.where(real_TL, cell_TL, 0), real_TL, sentence_T, edges, place_C, lengths_S)


def flowformer_segments(q_CHK: Tensor, k_CHK: Tensor, v_CHK: Tensor, cu_seqlens: Tensor) -> Tensor:
    """What `attention.flowformer` gives, [C, H, K], in autocast's dtype (without it, the values'); all sums in float32."""
    if len(q_CHK) == 0:
        return v_CHK
    dtype = compute_dtype(v_CHK)
    with torch.autocast(v_CHK.device.type, enabled=False):
        return _attend(q_CHK, k_CHK, v_CHK.to(dtype), tiling(cu_seqlens, len(q_CHK)))


def _attend(q_CHK: Tensor, k_CHK: Tensor, v_CHK: Tensor, tiles: Tiling) -> Tensor:
    real = tiles.real_TL[:, :, None, None]
    q, k, v = (x.index_select(0, tiles.cell_TL.flatten()).view(*tiles.cell_TL.shape, *x.shape[1:]) for x in (q_CHK, k_CHK, v_CHK))
    q, k = q.float().sigmoid() * real, k.float().sigmoid() * real  # [T, L, H, K]
    sink_in = 1 / _dot(q, tiles.total(k.sum(1)))  # I, [T, L, H]
    source_out = 1 / _dot(k, tiles.total(q.sum(1)))  # O
    conserved_in = _dot(q, tiles.total((k * source_out[..., None]).sum(1)))  # I'
    conserved_out = _dot(k, tiles.total((q * sink_in[..., None]).sum(1))).clamp(-1, 1)  # O'
    weight = conserved_out.exp() * tiles.real_TL[:, :, None]  # no maximum to subtract: it lies in [1/e, e]
    cells_T = tiles.of_tiles(tiles.lengths_S)[:, None, None]
    competition = weight * (cells_T / tiles.total(weight.sum(1)).clamp(min=EPSILON)[:, None])
    dtype = v_CHK.dtype
    context = torch.einsum("tlhk,tlhv->thkv", k.to(dtype), v * competition[..., None].to(dtype))
    context = tiles.total(context).to(dtype)
    out = torch.einsum("tlhk,thkv->tlhv", (q * sink_in[..., None]).to(dtype), context)
    out = out * conserved_in.sigmoid()[..., None].to(dtype)
    return out.flatten(0, 1).index_select(0, tiles.place_C)


def _dot(x: Tensor, total: Tensor) -> Tensor:
    """<x + e, total + e> of every place [T, L, H]: x [T, L, H, K] with the sum of its sentence [T, H, K]."""
    total = total + EPSILON
    return torch.einsum("tlhk,thk->tlh", x, total) + EPSILON * total.sum(-1)[:, None]
