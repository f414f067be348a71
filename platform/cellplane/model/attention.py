"""How the cells of one sentence look at one another. Every kernel takes packed cells and never crosses a sentence.

flowformer: linear attention with flow conservation (Wu et al., Flowformer, ICML 2022), as released with CellPLM.
softmax: exact attention, quadratic in the cells of a sentence.

Long sentences are computed one by one on views; short ones of similar length together, padded to the longest of them,
since a loop over hundreds of small sentences would cost more than their arithmetic.
"""

# C cells, H heads, K head width; S sentences of at most L cells that are computed together

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6  # added to both factors of each inner product, as released
SHORT = 128  # sentences up to this length are computed together

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # q, k, v [S, L, H, K], real [S, L] or None -> [S, L, H, K]


def flowformer(q_CHK: Tensor, k_CHK: Tensor, v_CHK: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Linear attention within each sentence, [C, H, K]."""
    return _per_sentence(_flow, (q_CHK, k_CHK, v_CHK), cu_seqlens)


def softmax(q_CHK: Tensor, k_CHK: Tensor, v_CHK: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Scaled dot-product attention within each sentence, [C, H, K]."""
    return _per_sentence(_exact, (q_CHK, k_CHK, v_CHK), cu_seqlens)


def _per_sentence(kernel: Kernel, qkv: tuple[Tensor, ...], cu_seqlens: Tensor) -> Tensor:
    spans = [(start, end) for start, end in pairwise(cu_seqlens.tolist()) if end > start]
    if not spans:
        return qkv[2]
    sizes = {end - start for start, end in spans}
    if len(sizes) == 1 and (len(spans) == 1 or max(sizes) <= SHORT):  # the usual cases: one sentence, or all alike
        q, k, v = (x.view(len(spans), *sizes, *x.shape[1:]) for x in qkv)
        return kernel(q, k, v, None).flatten(0, 1)
    parts, order = [], []
    for group in _groups(spans):
        if len(group) == 1:
            start, end = group[0]
            q, k, v = (x[None, start:end] for x in qkv)
            parts.append(kernel(q, k, v, None)[0])
            order.append(torch.arange(start, end))
        else:
            row_SL, real_SL = _padded(group)
            q, k, v = (x[row_SL] for x in qkv)
            parts.append(kernel(q, k, v, None if bool(real_SL.all()) else real_SL)[real_SL])
            order.append(row_SL[real_SL])
    return torch.cat(parts)[torch.cat(order).argsort()]


def _groups(spans: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Long sentences alone; short ones with those of up to twice their length, so that padding at most doubles the work."""
    short: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for start, end in spans:
        if end - start > SHORT:
            yield [(start, end)]
        else:
            short[(end - start - 1).bit_length()].append((start, end))
    yield from short.values()


def _padded(group: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Rows [S, L] of these sentences, the last cell repeated as padding, and which are real."""
    start, end = torch.tensor(group).unbind(1)
    place_L = torch.arange(int((end - start).max()))
    row_SL = start[:, None] + place_L
    return row_SL.clamp(max=end[:, None] - 1), row_SL < end[:, None]


def _flow(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    """Flow attention of S sentences at once; sums leave padding out."""
    q, k = q.sigmoid(), k.sigmoid()
    cells: Tensor | int = q.shape[1]
    if real is not None:
        q, k = q * real[..., None, None], k * real[..., None, None]
        cells = real.sum(1)[:, None, None]
    sink_in = 1 / _dot(q, k.sum(1))  # I, [S, L, H]
    source_out = 1 / _dot(k, q.sum(1))  # O
    conserved_in = _dot(q, _weighted_sum(k, source_out))  # I'
    conserved_out = _dot(k, _weighted_sum(q, sink_in)).clamp(-1, 1)  # O'
    if real is not None:
        conserved_out = conserved_out.masked_fill(~real[..., None], -torch.inf)
    competition = torch.softmax(conserved_out, dim=1) * cells
    v = v * competition[..., None].to(v.dtype)
    return _linear_attention(q, k, v) * (sink_in * conserved_in.sigmoid())[..., None].to(v.dtype)


def _dot(x: Tensor, total: Tensor) -> Tensor:
    """<x + e, total + e> of every cell, [S, L, H] float32: x [S, L, H, K] with its sentence's total [S, H, K]."""
    product = (x * (total + EPSILON)[:, None]).sum(-1).float()
    return product + EPSILON * (total.float() + EPSILON).sum(-1)[:, None]


def _weighted_sum(x: Tensor, weight: Tensor) -> Tensor:
    """Sum over the cells of a sentence of x times the cell's weight, [S, H, K]."""
    return (x * weight[..., None].to(x.dtype)).sum(1)


def _linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (k^T v), the cheaper product first: through [L, L] for short sentences, through [K, K] for long ones.

    In half precision a long sentence goes head by head: batched products would copy queries, keys and values first.
    """
    if q.shape[1] < q.shape[-1]:
        return torch.einsum("shij,sjhv->sihv", torch.einsum("sihk,sjhk->shij", q, k), v)
    if len(q) == 1 and q.dtype != torch.float32:
        heads = zip(*(x[0].unbind(1) for x in (q, k, v)), strict=True)
        return torch.stack([q_LK @ (k_LK.t() @ v_LK) for q_LK, k_LK, v_LK in heads], 1)[None]
    return torch.einsum("slhk,shkv->slhv", q, torch.einsum("slhk,slhv->shkv", k, v))


def _exact(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    where = None if real is None else real[:, None, None, :]
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=where).transpose(1, 2)


ATTENTION: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {"flowformer": flowformer, "softmax": softmax}
