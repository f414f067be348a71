"""A block's fused halves give what the formulas say, values and derivatives, and keep as little as they promise."""

# C cells, D width

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cellplane.model import fused
from cellplane.model.attention import ATTENTION
from cellplane.model.encoder import Block
from cellplane.model.memory import give_back
from cellplane.model.noise import Noise, drop_of, dropout
from tests.tiny import TINY

EDGES = torch.tensor([0, 5, 5, 12])


def block(rate: float) -> Block:
    torch.manual_seed(0)
    return Block(replace(TINY, dropout=rate), 1)


def factor(given: Block, site: str, shape: tuple[int, ...], noise: Noise | None, rate: float | None = None) -> Tensor:
    """What dropout multiplies values with at a place."""
    return dropout(torch.ones(shape), given.dropout if rate is None else rate, noise, f"block1.{site}")


def plain(given: Block, h_CD: Tensor, noise: Noise | None) -> Tensor:
    """The block written with PyTorch's own layers."""
    a = F.layer_norm(h_CD, (16,), given.norm1.weight, given.norm1.bias)
    q, k, v = (F.linear(a, layer.weight, layer.bias).unflatten(1, (2, -1)) for layer in (given.query, given.key, given.value))
    mixed = ATTENTION["flowformer"](q, k, v, EDGES).flatten(1)
    together = 1 - (1 - given.dropout) * 0.99
    y = F.linear(mixed, given.out.weight, given.out.bias)
    h_CD = h_CD + y * factor(given, "residual", (12, 16), noise, together)
    a = F.layer_norm(h_CD, (16,), given.norm2.weight, given.norm2.bias)
    inner = F.gelu(F.linear(a, given.up.weight, given.up.bias)) * factor(given, "inner", (12, 32), noise)
    return h_CD + F.linear(inner, given.down.weight, given.down.bias) * factor(given, "outer", (12, 16), noise)


@pytest.mark.parametrize("rows", [5, 1024])
@pytest.mark.parametrize("noise", [None, Noise(3)], ids=["sure", "dropped out"])
def test_a_block_is_its_formula_and_so_are_all_derivatives(monkeypatch, rows, noise):
    monkeypatch.setattr(fused, "ROWS", rows)
    ours, theirs = block(0.2), block(0.2)
    h = torch.randn(12, 16, generator=torch.Generator().manual_seed(1))
    inputs = [h.clone().requires_grad_(), h.clone().requires_grad_()]
    found, expected = ours(inputs[0], EDGES, noise), plain(theirs, inputs[1], noise)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    pull = torch.randn(12, 16, generator=torch.Generator().manual_seed(2))
    found.backward(pull)
    expected.backward(pull)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-5)
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_in_half_precision_the_residual_stream_stays_float32_and_near():
    given, h = block(0.0), torch.randn(12, 16).requires_grad_()
    exact = given(h, EDGES, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = given(h, EDGES, None)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0.05)
    half.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in given.parameters())


def test_a_block_keeps_nine_rows_of_its_width_a_cell():
    given, cells = block(0.2), 12
    weights = {parameter.data_ptr() for parameter in given.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights and tensor.is_floating_point():
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        given(torch.randn(cells, 16).requires_grad_(), EDGES, Noise(0))
    assert 0 < sum(kept.values()) <= 9 * cells * 16


@pytest.mark.parametrize("rate", [0.001, 0.2, 0.5, 0.999])
def test_dropout_keeps_the_mean_and_about_the_share_asked_for(rate):
    out = dropout(torch.ones(400, 100), rate, Noise(1), "here")
    kept = out[out > 0]
    share = len(kept) / out.numel()
    assert abs(share - (1 - max(rate, 1 / 256))) < 0.01
    assert len(kept.unique()) == 1
    assert abs(float(out.mean()) - 1) < (0.02 if rate < 0.9 else 0.2)


def test_dropout_is_the_same_backwards_and_another_elsewhere():
    x = torch.ones(50, 40, requires_grad=True)
    out = dropout(x, 0.3, Noise(1), "here")
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    assert torch.equal(dropout(x, 0.3, Noise(1), "here"), out)
    assert not torch.equal(dropout(x, 0.3, Noise(1), "there"), out)
    assert not torch.equal(dropout(x, 0.3, Noise(2), "here"), out)


def test_without_noise_or_rate_nothing_is_dropped():
    x = torch.randn(3, 4)
    assert dropout(x, 0.5, None, "here") is x
    assert dropout(x, 0.0, Noise(0), "here") is x
    assert drop_of((3, 4), 0.5, None, "here").threshold == 0


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 7)], ids=str)
def test_dropout_of_any_shape(shape):
    assert dropout(torch.ones(shape), 0.5, Noise(0), "here").shape == shape


def test_memory_can_be_given_back_at_any_time():
    kept = [torch.ones(100_000) for _ in range(50)]
    del kept[::2]
    give_back()
    assert all(bool(tensor.eq(1).all()) for tensor in kept)
