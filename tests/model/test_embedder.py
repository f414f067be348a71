"""The embedder: a weighted sum of gene vectors, to which hidden values and absent counts add nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cellplane.model.embedder import Embedder
from cellplane.model.masking import mask_of
from cellplane.model.noise import Noise
from tests.tiny import N_GENES, TINY, dense, dense_batch, random_batch, random_counts


@pytest.fixture
def embedder() -> Embedder:
    torch.manual_seed(0)
    return Embedder(TINY)


@torch.no_grad()
def test_the_gene_sum_is_log_counts_times_gene_vectors(embedder):
    batch = random_batch([5, 3])
    torch.testing.assert_close(embedder.gene_sum(batch, None), torch.log1p(dense(batch)) @ embedder.genes_GD)


def test_gradients_of_the_gene_vectors_are_those_of_the_dense_product(embedder):
    batch, weights = random_batch([5, 3]), torch.randn(8, TINY.width)
    (embedder.gene_sum(batch, None) * weights).sum().backward()
    torch.testing.assert_close(embedder.genes_GD.grad, torch.log1p(dense(batch)).T @ weights)


@torch.no_grad()
def test_a_cell_without_counts_sums_to_zero_wherever_it_stands(embedder):
    counts = random_counts(4)
    counts[[0, 2, 3]] = 0
    sums = embedder.gene_sum(dense_batch(counts), None)
    assert sums.abs().sum(1).gt(0).tolist() == [False, True, False, False]


@torch.no_grad()
def test_no_cells_give_no_rows(embedder):
    assert embedder(random_batch([]), None, None).shape == (0, TINY.width)


@torch.no_grad()
def test_hidden_entries_add_nothing(embedder):
    batch = random_batch([6])
    hidden = torch.rand(6, N_GENES, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = torch.log1p(torch.where(hidden, 0.0, dense(batch))) @ embedder.genes_GD
    torch.testing.assert_close(embedder.gene_sum(batch, mask_of(batch, hidden)), expected)


@torch.no_grad()
def test_the_hidden_share_counts_measured_genes_only():
    torch.manual_seed(0)
    embedder = Embedder(replace(TINY, hidden_fraction=True))
    embedder.hidden_D.copy_(torch.randn(TINY.width))
    panel = torch.arange(N_GENES) < 8
    batch = dense_batch(random_counts(3) * panel, panel_G=panel)
    hidden = torch.zeros(3, N_GENES, dtype=torch.bool)
    hidden[1, :4], hidden[2, :] = True, True
    mask = mask_of(batch, hidden)
    expected = embedder.gene_sum(batch, mask) + torch.tensor([0.0, 0.5, 1.0])[:, None] * embedder.hidden_D
    expected = embedder.norm(torch.relu(embedder.linear(expected)))
    torch.testing.assert_close(embedder(batch, mask, None), expected)


@torch.no_grad()
def test_dropout_acts_with_noise_only_and_keeps_the_scale(embedder):
    batch = random_batch([200])
    plain = embedder(batch, None, None)
    assert torch.equal(plain, embedder(batch, None, None))
    assert not torch.equal(plain, embedder(batch, None, Noise(0)))


@torch.no_grad()
def test_there_are_parameters_only_for_what_is_used():
    names = {name for name, _ in Embedder(TINY).named_parameters()}
    more = {name for name, _ in Embedder(replace(TINY, hidden_fraction=True, positions="continuous")).named_parameters()}
    assert more - names == {"hidden_D", "positions.missing_D"}
