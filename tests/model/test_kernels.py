"""The chunked operations give the values and gradients of the plain ones, whatever the size of a piece."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cellplane.cells import CellBatch
from cellplane.model import kernels
from cellplane.model.cellplm import new_model
from cellplane.model.decoder import counts_of
from cellplane.model.kernels import DISPERSION_RANGE, MEAN_RANGE, chunked_reconstruction, gene_sum
from cellplane.model.masking import Mask, mask_of
from cellplane.model.noise import Noise
from tests.model.dense import reconstruction
from tests.tiny import N_GENES, TINY, dense, dense_batch, random_batch, random_counts

K = 5


def cells(n_cells: int = 9) -> tuple[CellBatch, Mask]:
    """Two panels, a cell without counts, a cell that hides nothing and one that hides all."""
    counts = random_counts(n_cells, seed=3) * 40
    counts[2] = 0
    batch = dense_batch(counts)
    panels = torch.ones(2, N_GENES, dtype=torch.bool)
    panels[1, ::3] = False
    index = torch.arange(n_cells) % 2
    batch = replace(dense_batch(counts * panels[index]), panels=panels, panel_index=index)
    hidden = torch.rand(n_cells, N_GENES, generator=torch.Generator().manual_seed(1)) < 0.4
    hidden[3], hidden[4] = False, True
    return batch, mask_of(batch, hidden)


def parameters(n_cells: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(n_cells, K, generator=generator)
    weight, bias = torch.randn(N_GENES, K, generator=generator), torch.randn(N_GENES, generator=generator)
    weight[0], bias[0] = 0, -20.0  # clamped from below
    dispersion = torch.randn(N_GENES, generator=generator)
    dispersion[1] = 12.0  # clamped from above
    return tuple(tensor.requires_grad_() for tensor in (u, weight, bias, dispersion))


def plain(batch: CellBatch, mask: Mask, given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    u, weight, bias, dispersion = given
    mean = F.linear(u, weight, bias).exp().clamp(*MEAN_RANGE)
    full, hidden = reconstruction(batch, mask, mean, dispersion.exp().clamp(*DISPERSION_RANGE))
    return full * (mask.hidden_C > 0), hidden


WEIGHTS = {
    "each cell its own": lambda n: torch.rand(2, n, generator=torch.Generator().manual_seed(5)),
    "all alike": lambda n: torch.full((2, n), 0.3),
    "the two likelihoods differ": lambda n: torch.tensor([[0.2], [0.9]]).repeat(1, n),
    "nothing weighs": lambda n: torch.zeros(2, n),
}


@pytest.mark.parametrize("weigh", WEIGHTS)
@pytest.mark.parametrize("piece", [1, 4 * N_GENES, 1 << 20])
def test_likelihoods_and_all_gradients_equal_the_dense_ones(monkeypatch, piece, weigh):
    monkeypatch.setattr(kernels, "PIECE_VALUES", piece)
    batch, mask = cells()
    weights = WEIGHTS[weigh](batch.n_cells)
    ours, theirs = parameters(batch.n_cells), parameters(batch.n_cells)
    found = chunked_reconstruction(*ours, counts_of(batch, mask))
    expected = plain(batch, mask, theirs)
    for likelihood, dense_one, weight in zip(found, expected, weights, strict=True):
        torch.testing.assert_close(likelihood, dense_one, rtol=1e-5, atol=1e-4)
        (likelihood * weight).sum().backward(retain_graph=True)
        (dense_one * weight).sum().backward(retain_graph=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-3)
        assert bool(one.grad.isfinite().all())


@pytest.mark.parametrize("weigh", ["all alike", "each cell its own"])
def test_only_unequal_weights_cost_a_second_computation(monkeypatch, weigh):
    batch, mask = cells()
    times = []
    computed = kernels._reconstruct
    monkeypatch.setattr(kernels, "_reconstruct", lambda *given: (times.append(1), computed(*given))[1])
    found = chunked_reconstruction(*parameters(batch.n_cells), counts_of(batch, mask))
    (torch.stack(found) * WEIGHTS[weigh](batch.n_cells)).sum().backward()
    assert len(times) == (1 if weigh == "all alike" else 2)


def test_listed_terms_of_counts_equal_the_gamma_functions():
    theta = torch.logspace(-4, 4, 40, dtype=torch.float64)
    terms = kernels.CountTerms(theta)
    x = torch.tensor([0.0, 1.0, 2.0, 3.0, 7.0, 15.0, 16.0, 400.0, 2.5], dtype=torch.float64)
    gene = torch.arange(40)[:, None].expand(40, len(x)).flatten()
    constant, by_theta = terms.of(gene, x.repeat(40))
    t, y = theta[gene].requires_grad_(), x.repeat(40)
    expected = torch.lgamma(t) + torch.lgamma(y + 1) - torch.lgamma(y + t) + y * t.log()
    torch.testing.assert_close(constant, expected.detach(), rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(expected.sum(), t)
    torch.testing.assert_close(by_theta, gradient, rtol=1e-5, atol=1e-6)


def test_nothing_as_large_as_cells_by_genes_is_kept_for_the_backward_pass(monkeypatch):
    monkeypatch.setattr(kernels, "PIECE_VALUES", N_GENES)
    batch, mask = cells(40)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor.numel()), tensor)[1], lambda tensor: tensor):
        chunked_reconstruction(*parameters(40), counts_of(batch, mask))
    assert kept
    assert max(kept) < 40 * N_GENES


@pytest.mark.parametrize("sliced", [False, True])
def test_the_gene_table_and_its_gradient_equal_the_dense_products(monkeypatch, sliced):
    if sliced:  # columns 64 at a time
        monkeypatch.setattr(kernels, "TABLE_BYTES", 1)
        monkeypatch.setattr(kernels, "ENTRIES_PER_GENE", 0)
    batch = random_batch([4, 3])
    table = torch.randn(N_GENES, 150, generator=torch.Generator().manual_seed(0)).requires_grad_()
    other = table.detach().clone().requires_grad_()
    pull = torch.randn(7, 150, generator=torch.Generator().manual_seed(1))
    weight = torch.log1p(batch.value)
    weight[::5] = 0  # hidden
    batch = replace(batch, value=weight)
    ours, theirs = gene_sum(table, batch.gene, batch.crow, weight), dense(batch) @ other
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    (ours * pull).sum().backward()
    (theirs * pull).sum().backward()
    torch.testing.assert_close(table.grad, other.grad, rtol=1e-5, atol=1e-5)


def test_computing_blocks_again_gives_the_same_loss_and_gradients():
    batch = replace(random_batch([5, 4]), batch_index=torch.zeros(9, dtype=torch.int64))
    hidden = torch.rand(9, N_GENES, generator=torch.Generator().manual_seed(2)) < 0.3
    gradients = []
    for recompute in (False, True):
        network = new_model(replace(TINY, n_batches=2, recompute=recompute, dropout=0.2), 0)
        loss = network(batch, mask_of(batch, hidden), Noise(7)).loss
        loss.total.sum().backward()
        gradients.append([loss.total.detach(), *(parameter.grad for parameter in network.parameters())])
    for kept, again in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, again, rtol=0, atol=0)


def test_bits_and_entries_of_a_mask_say_the_same():
    batch, mask = cells()
    hidden = mask.hidden_CG
    assert mask.bits.shape == (9, -(-N_GENES // 8))
    assert torch.equal(mask.hidden_C, hidden.sum(1))
    assert torch.equal(mask.entry, hidden[batch.cell_of_entry(), batch.gene])
    assert torch.equal(mask.rows(2, 5), hidden[2:5])
    assert not bool((hidden & ~batch.panels[batch.panel_index]).any())
