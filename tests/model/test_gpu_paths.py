"""What a GPU computes with plain PyTorch, on the CPU: dense gene sums equal gathered ones, in any pieces and dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cellplane.model import gpu
from cellplane.model.gpu import available, cell_of_entry, dense_gene_sum, densify
from cellplane.model.kernels import gene_sum
from tests.tiny import N_GENES, dense, random_batch

WIDTH = 6


def table() -> Tensor:
    return torch.randn(N_GENES, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cells_at_once", [1, 3, 100])
def test_values_and_gradient_equal_the_gathered_ones(monkeypatch, cells_at_once):
    monkeypatch.setattr(gpu, "DENSE_BYTES", cells_at_once * N_GENES * 4)
    batch = random_batch([4, 3])
    pull = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(1))
    found = []
    for function in (dense_gene_sum, gene_sum):
        leaf = table().requires_grad_()
        out = function(leaf, batch.gene, batch.crow, torch.log1p(batch.value))
        out.backward(pull)
        found.append((out.detach(), leaf.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cells_at_once", [2, 100])
def test_under_autocast_products_take_its_dtype_and_the_gradient_the_tables(monkeypatch, cells_at_once):
    monkeypatch.setattr(gpu, "DENSE_BYTES", cells_at_once * N_GENES * 2)
    batch, leaf = random_batch([4, 3]), table().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = dense_gene_sum(leaf, batch.gene, batch.crow, torch.log1p(batch.value))
    out.float().sum().backward()
    expected = torch.log1p(dense(batch))
    assert (out.dtype, leaf.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.float(), expected @ table(), rtol=2e-2, atol=5e-2)
    torch.testing.assert_close(leaf.grad, expected.sum(0)[:, None].expand(-1, WIDTH), rtol=1e-2, atol=1e-2)


def test_a_gene_that_is_stored_twice_counts_twice():
    crow, gene, weight = torch.tensor([0, 2, 2, 3]), torch.tensor([1, 1, 0]), torch.tensor([1.0, 2.0, 4.0])
    assert densify((gene, crow, weight), (0, 3), 2, torch.float32).tolist() == [[0, 3], [0, 0], [4, 0]]
    assert densify((gene, crow, weight), (1, 3), 2, torch.float32).tolist() == [[0, 0], [4, 0]]


def test_no_cells_give_nothing_and_a_gradient_of_zero():
    leaf = table().requires_grad_()
    out = dense_gene_sum(leaf, torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.zeros(0))
    out.sum().backward()
    assert out.shape == (0, WIDTH)
    assert not bool(leaf.grad.any())


def test_entries_know_their_cells_even_beside_empty_ones():
    assert cell_of_entry(torch.tensor([0, 0, 2, 2, 5, 5]), 5).tolist() == [1, 1, 3, 3, 3]


def test_a_processor_has_no_kernels():
    assert not available(torch.device("cpu"))
