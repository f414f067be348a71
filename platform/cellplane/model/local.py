"""Attention to the nearest neighbours in the tissue, with a learned bias in distance.

Where a cell lies in an arbitrary slide frame means nothing on the next slide; what lies around it does. Only distances
enter, so moving, turning or mirroring a slide changes nothing. A neighbour fades out towards the distance of the first
cell that is no longer one of the k (and towards the radius), in the manner of the cutoffs of interatomic potentials: at
equal distances nobody is preferred by chance, and rounding cannot swap neighbours. A cell also sees itself.
"""

# C cells, D width, H heads, K head width, N neighbours and the cell itself, R distance functions; c the cells of one piece

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellplane.cells import CellBatch
from cellplane.model.config import ModelConfig
from cellplane.model.fused import remade
from cellplane.model.linear import Linear
from cellplane.model.noise import Noise, dropout
from cellplane.model.norms import LayerNorm

LENGTHS_UM = (5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)  # from half a cell to a tissue region
PAIRS_AT_ONCE = 1 << 22  # distances held at a time: 16 MB
VALUES_AT_ONCE = 1 << 21  # gathered keys, or values, held at a time: 8 MB in float32


@dataclass(frozen=True)
class Neighbours:
    """Whom each cell sees: itself first, then its nearest neighbours.

    ``index`` [C, N] int64 into the cells of the batch; ``distance_um`` [C, N]; ``weight`` [C, N] in [0, 1] is 1 for the
    cell itself and fades to 0 with distance, 0 where there is no neighbour. ``located`` [C] bool is False for cells
    without coordinates, which see nobody.
    """

    index: Tensor
    distance_um: Tensor
    weight: Tensor
    located: Tensor


@torch.no_grad()
def neighbours(batch: CellBatch, config: ModelConfig) -> Neighbours:
    """The nearest `local_neighbours` of every cell within its sentence, and within `local_radius_um` where that is set.

    Time is quadratic in the cells of a sentence, memory linear.
    """
    cells, k, device = batch.n_cells, config.local_neighbours, batch.coordinates.device
    located = batch.coordinates.isfinite().all(1)
    index = torch.arange(cells, device=device)[:, None].repeat(1, k + 1)
    squared, weight = (torch.zeros(cells, k + 1, device=device) for _ in range(2))
    weight[:, 0] = 1
    for start, end in batch.spans():
        members = start + located[start:end].nonzero()[:, 0]
        if len(members) < 2:
            continue
        near, at = _nearest(batch.coordinates[members].float(), min(k + 1, len(members) - 1))
        reach = torch.full_like(near[:, 0], torch.inf) if near.shape[1] <= k else near[:, k]
        if config.local_radius_um:
            reach = reach.clamp(max=config.local_radius_um**2)
        near, at = near[:, :k], at[:, :k]
        columns = slice(1, 1 + near.shape[1])
        index[members, columns], squared[members, columns] = members[at], near
        fading = (1 - near / reach[:, None]).nan_to_num(0.0).clamp(min=0)  # 0 / 0: more than k at one place, inf / inf: out of any range
        weight[members, columns] = torch.where(reach[:, None] > 0, fading, 0.0)
    return Neighbours(index, squared.sqrt(), weight, located)


def _nearest(xy_C2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Squared distances to the k nearest others, ascending, and who they are, each [C, k]."""
    everyone, step = torch.arange(len(xy_C2), device=xy_C2.device), max(1, PAIRS_AT_ONCE // len(xy_C2))
    distance_Ck = xy_C2.new_empty(len(xy_C2), k)  # filled in place: small results between large buffers would break up the heap
    place_Ck = torch.empty_like(distance_Ck, dtype=torch.int64)
    for start in range(0, len(xy_C2), step):
        piece = everyone[start : start + step]
        squared = (xy_C2[piece, None, 0] - xy_C2[:, 0]).square_()
        squared += (xy_C2[piece, None, 1] - xy_C2[:, 1]).square_()
        squared[everyone[: len(piece)], piece] = torch.inf
        distance_Ck[piece], place_Ck[piece] = squared.topk(k, largest=False)
    return distance_Ck, place_Ck


class LocalBlock(nn.Module):
    """Pre-norm attention to neighbours and feed-forward, [C, D] -> [C, D], behind a gate that begins at 0.

    A new block therefore changes nothing, and a trained network may be given one. Cells without coordinates pass
    unchanged.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        width = config.width
        self.site, self.n_heads, self.dropout = f"local{index}", config.n_heads, config.dropout
        self.recompute = config.recompute
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.query, self.key, self.value, self.out = (Linear(width, width) for _ in range(4))
        self.up, self.down = Linear(width, 2 * width), Linear(2 * width, width)
        self.distance_HR = nn.Parameter(torch.zeros(config.n_heads, len(LENGTHS_UM)))
        self.gate_D = nn.Parameter(torch.zeros(width))

    def forward(self, h_CD: Tensor, near: Neighbours, noise: Noise | None) -> Tensor:
        """The cells after attention to their neighbours and feed-forward, through the gate. With `recompute` only the input is kept."""
        return remade(self.recompute, self._answer, h_CD, near, noise)

    def _answer(self, h_CD: Tensor, near: Neighbours, noise: Noise | None) -> Tensor:
        mixed_CD = self.out(self.attention(self.norm1(h_CD), near))
        attended_CD = h_CD + dropout(mixed_CD, self.dropout, noise, f"{self.site}.residual")
        inner = dropout(F.gelu(self.up(self.norm2(attended_CD))), self.dropout, noise, f"{self.site}.inner")
        change_CD = attended_CD - h_CD + dropout(self.down(inner), self.dropout, noise, f"{self.site}.outer")
        return torch.where(near.located[:, None], h_CD + self.gate_D * change_CD, h_CD)

    def attention(self, a_CD: Tensor, near: Neighbours) -> Tensor:
        """[C, D]; keys and values of neighbours are gathered for some cells at a time, and again in the backward pass."""
        qkv = self.query(a_CD), self.key(a_CD), self.value(a_CD)
        mixed_CD: Tensor = _Attend.apply(*qkv, self.distance_HR, near)  # type: ignore[no-untyped-call]
        return mixed_CD


@dataclass(frozen=True)
class _Piece:
    """Some cells with the keys and values of whom they see, their attention and the distance functions it is biased by."""

    cells: slice
    places: Tensor
    k_cNHK: Tensor
    v_cNHK: Tensor
    share_cNH: Tensor
    functions_cNR: Tensor


def _pieces(q_CHK: Tensor, k_CD: Tensor, v_CD: Tensor, distance_HR: Tensor, near: Neighbours) -> Iterator[_Piece]:
    heads, width = q_CHK.shape[1:]
    step = max(1, VALUES_AT_ONCE // (near.index.shape[1] * k_CD.shape[1]))
    for start in range(0, len(k_CD), step):
        cells = slice(start, start + step)
        index_cN, distance_cN, weight_cN = near.index[cells], near.distance_um[cells], near.weight[cells]
        functions_cNR = torch.exp(-0.5 * (distance_cN[:, :, None] / distance_cN.new_tensor(LENGTHS_UM)).square())
        k_cNHK, v_cNHK = (x_CD[index_cN].view(*index_cN.shape, heads, width) for x_CD in (k_CD, v_CD))
        bias_cNH = (functions_cNR[:, :, None] * distance_HR).sum(-1) + weight_cN.log()[:, :, None]  # float32 whatever the autocast
        logits_cNH = torch.einsum("chk,cnhk->cnh", q_CHK[cells], k_cNHK).float() / width**0.5
        share_cNH = torch.softmax(logits_cNH + bias_cNH, dim=1)
        yield _Piece(cells, index_cN.flatten(), k_cNHK, v_cNHK, share_cNH, functions_cNR)


class _Attend(torch.autograd.Function):
    """Attention over neighbours, [C, D]. Kept for the backward pass: queries, keys, values; nothing of C x N x D."""

    @staticmethod
    def forward(ctx: Any, q_CD: Tensor, k_CD: Tensor, v_CD: Tensor, distance_HR: Tensor, near: Neighbours) -> Tensor:
        """The softmax over neighbours, weighted by how near they are."""
        ctx.save_for_backward(q_CD, k_CD, v_CD, distance_HR)
        ctx.near = near
        out_CD = torch.empty_like(v_CD)
        for piece in _pieces(q_CD.view(len(q_CD), len(distance_HR), q_CD.shape[1] // len(distance_HR)), k_CD, v_CD, distance_HR, near):
            out_CD[piece.cells] = torch.einsum("cnh,cnhk->chk", piece.share_cNH.to(v_CD.dtype), piece.v_cNHK).flatten(1)
        return out_CD

    @staticmethod
    def backward(ctx: Any, grad_CD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        """Derivatives by everything but the neighbours."""
        q_CD, k_CD, v_CD, distance_HR = ctx.saved_tensors
        heads, width = len(distance_HR), q_CD.shape[1] // len(distance_HR)
        q_CHK, grad_CHK = (x_CD.reshape(len(x_CD), heads, width) for x_CD in (q_CD, grad_CD))
        scale = width**-0.5
        by_q = torch.empty_like(q_CHK)
        by_k, by_v, by_distance = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k_CD, v_CD, distance_HR))
        for piece in _pieces(q_CHK, k_CD, v_CD, distance_HR, ctx.near):
            q_cHK, grad_cHK, share_cNH = q_CHK[piece.cells].float(), grad_CHK[piece.cells].float(), piece.share_cNH
            by_share = torch.einsum("chk,cnhk->cnh", grad_cHK, piece.v_cNHK.float())
            by_logit = share_cNH * (by_share - (share_cNH * by_share).sum(1, keepdim=True))
            by_q[piece.cells] = torch.einsum("cnh,cnhk->chk", by_logit, piece.k_cNHK.float()) * scale
            by_k.index_add_(0, piece.places, (by_logit[..., None] * (scale * q_cHK)[:, None]).flatten(2).flatten(0, 1))
            by_v.index_add_(0, piece.places, (share_cNH[..., None] * grad_cHK[:, None]).flatten(2).flatten(0, 1))
            by_distance += torch.einsum("cnh,cnr->hr", by_logit, piece.functions_cNR)
        return by_q.flatten(1), by_k.to(k_CD.dtype), by_v.to(v_CD.dtype), by_distance.to(distance_HR.dtype), None
