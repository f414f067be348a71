"""The attention without a loop gives what the loop over sentences gives, values and gradients, and never asks the host."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cellplane.model import segments
from cellplane.model.attention import flowformer
from cellplane.model.segments import flowformer_segments, tiling

H, K = 2, 6


def edges(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def qkv(n_cells: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n_cells)
    return tuple((torch.randn(n_cells, H, K, generator=generator) * scale).to(dtype) for _ in range(3))


SENTENCES = [[1], [7], [40], [3, 1, 5], [20, 20, 20], [0, 4, 0, 9, 0], [150, 2, 33], [300]]


@pytest.mark.parametrize("lengths", SENTENCES, ids=str)
def test_values_and_gradients_equal_those_of_the_loop(lengths):
    given = qkv(sum(lengths))
    pull = torch.randn(sum(lengths), H, K, generator=torch.Generator().manual_seed(9))
    found = []
    for function in (flowformer_segments, flowformer):
        leaves = [x.clone().requires_grad_() for x in given]
        out = function(*leaves, edges(lengths))
        out.backward(pull)
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


def test_saturated_attention_stays_finite_and_equal():
    lengths = [60, 5]
    given = [x.requires_grad_() for x in qkv(65, scale=40.0)]
    out = flowformer_segments(*given, edges(lengths))
    out.sum().backward()
    torch.testing.assert_close(out, flowformer(*given, edges(lengths)), rtol=1e-4, atol=1e-4)
    assert all(bool(x.grad.isfinite().all()) for x in given)


def test_half_width_stays_near_the_exact_answer():
    given = qkv(500, dtype=torch.bfloat16)
    out = flowformer_segments(*given, edges([400, 90, 10]))
    exact = flowformer(*(x.double() for x in given), edges([400, 90, 10]))
    assert out.dtype == torch.bfloat16
    assert float((out.detach().double() - exact).norm() / exact.norm()) < 5e-3


def test_under_autocast_products_take_its_dtype_and_sums_stay_exact():
    given = [x.requires_grad_() for x in qkv(3000)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flowformer_segments(*given, edges([2900, 100]))
    out.float().sum().backward()
    exact = flowformer(*(x.detach().double() for x in given), edges([2900, 100]))
    assert (out.dtype, given[0].grad.dtype) == (torch.bfloat16, torch.float32)
    assert float((out.detach().double() - exact).norm() / exact.norm()) < 5e-3


def test_a_sentence_answers_alike_alone_and_packed():
    q, k, v = qkv(30)
    packed = flowformer_segments(q, k, v, edges([12, 18]))
    alone = flowformer_segments(q[12:], k[12:], v[12:], edges([18]))
    torch.testing.assert_close(packed[12:], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lengths", SENTENCES, ids=str)
def test_every_cell_has_one_place_in_a_tile_of_its_own_sentence(lengths):
    tiles = tiling(edges(lengths), sum(lengths))
    assert sorted(tiles.cell_TL[tiles.real_TL].tolist()) == list(range(sum(lengths)))
    assert torch.equal(tiles.cell_TL.flatten()[tiles.place_C], torch.arange(sum(lengths)))
    sentence_C = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    assert torch.equal(tiles.sentence_T.repeat_interleave(tiles.cell_TL.shape[1])[tiles.place_C], sentence_C)


def test_no_value_is_looked_at_on_the_host(monkeypatch):
    def refused(*_: object) -> None:
        raise AssertionError("the host looked at a value")

    given, cu_seqlens = qkv(30), edges([12, 18])
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "nonzero"):
        monkeypatch.setattr(Tensor, name, refused)
    segments.flowformer_segments(*given, cu_seqlens)


def test_no_cells_give_nothing():
    assert flowformer_segments(*qkv(0), edges([0])).shape == (0, H, K)
