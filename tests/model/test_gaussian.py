"""The Gaussian decoder: the plain formula's values and gradients in any piece, and nothing from genes that were not measured."""

# C cells, G genes

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cellplane.cells import CellBatch
from cellplane.model import gaussian
from cellplane.model.cellplm import new_model
from cellplane.model.gaussian import LOG_VARIANCE_RANGE, LogLayer, log_scaled
from cellplane.model.masking import Mask, mask_of
from cellplane.model.noise import Noise
from tests.model.test_invariants import learned, masked, same
from tests.model.test_kernels import cells
from tests.tiny import N_GENES, TINY, dense, dense_batch, random_batch

GAUSSIAN = replace(TINY, decoder="gaussian", n_batches=2)


def plain(batch: CellBatch, mask: Mask, mean_CG: Tensor, log_variance_G: Tensor) -> tuple[Tensor, Tensor]:
    """Both likelihoods, C x G at once, by torch's own distribution."""
    counts_CG = dense(batch)
    truth_CG = torch.log1p(counts_CG / counts_CG.sum(1, keepdim=True).clamp(min=1e-30) * 1e4)
    sd_G = torch.exp(0.5 * log_variance_G.clamp(*LOG_VARIANCE_RANGE))
    cost_CG = -torch.distributions.Normal(mean_CG, sd_G).log_prob(truth_CG)
    return (cost_CG * batch.panels[batch.panel_index]).sum(1), (cost_CG * mask.hidden_CG).sum(1)


def parameters(n_cells: int) -> tuple[Tensor, LogLayer, Tensor]:
    generator = torch.Generator().manual_seed(0)
    layer = LogLayer(5, N_GENES)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    log_variance = torch.randn(N_GENES, generator=generator)
    log_variance[:2] = torch.tensor([-20.0, 20.0])  # outside the range on both sides
    return torch.randn(n_cells, 5, generator=generator).requires_grad_(), layer, log_variance.requires_grad_()


@pytest.mark.parametrize("piece", [1, 4 * N_GENES, 1 << 20])
def test_likelihoods_and_all_gradients_equal_the_dense_ones(monkeypatch, piece):
    monkeypatch.setattr(gaussian, "PIECE_VALUES", piece)
    batch, mask = cells()
    pull = torch.rand(2, batch.n_cells, generator=torch.Generator().manual_seed(5))
    found = []
    for ours in (True, False):
        u, layer, log_variance = parameters(batch.n_cells)
        values = layer(u, log_variance, (batch, mask)) if ours else plain(batch, mask, layer(u), log_variance)
        (torch.stack(values) * pull).sum().backward()
        found.append([*values, u.grad, layer.weight.grad, layer.bias.grad, log_variance.grad])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-2)


def test_nothing_as_large_as_cells_by_genes_is_kept_for_the_backward_pass(monkeypatch):
    monkeypatch.setattr(gaussian, "PIECE_VALUES", N_GENES)
    batch, mask = cells(40)
    u, layer, log_variance = parameters(40)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor.numel()), tensor)[1], lambda tensor: tensor):
        layer(u, log_variance, (batch, mask))
    assert kept
    assert max(kept) < 40 * N_GENES


def test_what_is_compared_is_scanpys_log_normalisation_and_a_cell_without_counts_is_zero():
    counts = torch.tensor([[1.0, 3.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 5.0]])
    assert log_scaled(dense_batch(counts)).tolist() == pytest.approx([math.log(2501), math.log(7501), math.log(10001)])
    assert bool(log_scaled(dense_batch(torch.zeros(2, 3))).isfinite().all())


def test_unmeasured_genes_contribute_no_loss_and_get_no_gradient():
    model, panel = learned(GAUSSIAN), torch.arange(N_GENES) % 3 > 0
    batch = random_batch([6, 4])
    batch = replace(dense_batch(torch.where(panel, dense(batch), 0.0), [6, 4], panel), sentence_seed=batch.sentence_seed)
    mask, noise = masked(batch), Noise(0)
    loss = model(batch, mask, noise).loss.total
    loss.sum().backward()
    for parameter in (model.decoder.mean.weight, model.decoder.mean.bias, model.decoder.log_variance_G):
        assert float(parameter.grad[~panel].abs().max()) == 0.0
    with torch.no_grad():
        model.decoder.mean.bias[~panel] += 5
        model.decoder.log_variance_G[~panel] -= 3
        assert same(model(batch, mask, noise).loss.total, loss)


@pytest.mark.parametrize("latent", ["gmvae", "vae", "ae"])
def test_nothing_trainable_is_without_gradient(latent):
    network, batch = learned(replace(GAUSSIAN, latent=latent)), random_batch([6, 4])
    network(batch, masked(batch), Noise(0)).loss.total.sum().backward()
    assert not [name for name, parameter in network.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("sizes", [[], [0], [1], [3, 0, 2]], ids=str)
def test_loss_and_gradients_are_finite_without_cells_too(sizes):
    network, batch = learned(GAUSSIAN), random_batch(sizes)
    loss = network(batch, mask_of(batch, torch.ones(batch.n_cells, N_GENES, dtype=torch.bool)), Noise(0)).loss
    loss.total.sum().backward()
    assert bool(loss.total.isfinite().all())
    assert loss.names == ("gaussian", "gaussian_hidden", "kl", "cluster")
    assert all(bool(parameter.grad.isfinite().all()) for parameter in network.parameters() if parameter.grad is not None)


@torch.no_grad()
def test_without_a_mask_the_decoder_answers_mean_and_variance_in_its_range():
    network, batch = learned(GAUSSIAN), random_batch([6])
    network.decoder.log_variance_G.copy_(torch.linspace(-50, 50, N_GENES))
    mean, variance = network.decoder(network(batch).latent, batch, None)
    assert mean.shape == (6, N_GENES)
    assert variance.log().aminmax() == pytest.approx(LOG_VARIANCE_RANGE)


def test_a_few_steps_of_training_recover_more():
    network, batch = new_model(replace(GAUSSIAN, dropout=0.0), 0), random_batch([12, 9])
    mask, optimizer = masked(batch), torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        loss = network(batch, mask, Noise(step, step)).loss.total.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
