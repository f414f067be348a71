"""How the cells of one sentence look at one another. Every kernel takes packed cells and never crosses a sentence.

flowformer: linear attention with flow conservation (Wu et al., Flowformer, ICML 2022), as released with CellPLM.
softmax: exact attention, quadratic in the cells of a sentence.
"""

# C cells, H heads, K head width

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6  # added to both factors of each inner product, as released


def flowformer(q_CHK: Tensor, k_CHK: Tensor, v_CHK: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Linear attention within each sentence, [C, H, K]."""
    q_CHK, k_CHK = q_CHK.sigmoid(), k_CHK.sigmoid()
    return _per_sentence(_flow, q_CHK, k_CHK, v_CHK, cu_seqlens)


def softmax(q_CHK: Tensor, k_CHK: Tensor, v_CHK: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Scaled dot-product attention within each sentence, [C, H, K]."""
    return _per_sentence(_exact, q_CHK, k_CHK, v_CHK, cu_seqlens)


def _per_sentence(kernel: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    lengths = cu_seqlens.diff().tolist()
    parts = zip(torch.split(q, lengths), torch.split(k, lengths), torch.split(v, lengths), strict=True)
    return torch.cat([kernel(*part) for part in parts]) if lengths else v


def _flow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if len(q) == 0:
        return v
    e = EPSILON
    k_sum, q_sum = k.sum(0), q.sum(0)
    sink_in = 1 / ((q + e) * (k_sum + e)).sum(-1)  # I, [C, H]
    source_out = 1 / ((k + e) * (q_sum + e)).sum(-1)  # O
    conserved_in = ((q + e) * ((k * source_out[..., None]).sum(0) + e)).sum(-1)  # I'
    conserved_out = ((k + e) * ((q * sink_in[..., None]).sum(0) + e)).sum(-1).clamp(-1, 1)  # O'
    competition = torch.softmax(conserved_out, dim=0) * len(q)
    context = torch.einsum("chk,chv->hkv", k, v * competition[..., None])
    return torch.einsum("chk,hkv->chv", q * sink_in[..., None], context) * conserved_in.sigmoid()[..., None]


def _exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)).transpose(0, 1)


ATTENTION: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {"flowformer": flowformer, "softmax": softmax}
