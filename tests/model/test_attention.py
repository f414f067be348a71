"""Sentences computed together give what each gives alone, whatever lengths meet; halves of precision stay near."""

from __future__ import annotations

import pytest
import torch

from cellplane.model import attention
from cellplane.model.attention import ATTENTION

PACKS = {
    "one long": [300],
    "one short": [7],
    "all alike": [20] * 6,
    "single cells": [1] * 9,
    "short ones of many lengths": [1, 3, 20, 64, 2, 20, 128, 0, 5],
    "short and long": [5, 200, 0, 17, 129, 5, 1],
    "nobody": [0, 0],
    "none at all": [],
}


def given(lengths: list[int], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), 2, 40, generator=generator).to(dtype) for _ in range(3))
    return q, k, v, torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])


@pytest.mark.parametrize("kernel", sorted(ATTENTION))
@pytest.mark.parametrize("pack", PACKS)
def test_sentences_together_are_each_alone_and_so_are_derivatives(kernel, pack):
    *qkv, edges = given(PACKS[pack])
    attend = ATTENTION[kernel]
    together = [tensor.clone().requires_grad_() for tensor in qkv]
    found = attend(*together, edges)
    assert found.shape == qkv[0].shape
    pull = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    found.backward(pull)
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        alone = [tensor[start:end].clone().requires_grad_() for tensor in qkv]
        expected = attend(*alone, torch.tensor([0, end - start]))
        torch.testing.assert_close(found[start:end], expected, rtol=1e-4, atol=1e-6)
        expected.backward(pull[start:end])
        for one, other in zip(together, alone, strict=True):
            if end > start and other.grad is not None:
                torch.testing.assert_close(one.grad[start:end], other.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("pack", ["one long", "short and long", "all alike"])
def test_flowformer_in_half_precision_stays_near(pack):
    *qkv, edges = given(PACKS[pack])
    exact = ATTENTION["flowformer"](*qkv, edges)
    half = ATTENTION["flowformer"](*(tensor.bfloat16() for tensor in qkv), edges)
    assert half.dtype == torch.bfloat16
    assert float(torch.nn.functional.cosine_similarity(half.float().flatten(1), exact.flatten(1)).min()) > 0.999


def test_padding_at_most_doubles_the_work():
    lengths = list(range(1, 129)) * 2
    edges = torch.tensor(lengths).cumsum(0).tolist()
    spans = list(zip([0, *edges[:-1]], edges, strict=True))
    for group in attention._groups(spans):
        assert max(end - start for start, end in group) <= 2 * min(end - start for start, end in group)
    assert sorted(span for group in attention._groups(spans) for span in group) == spans
