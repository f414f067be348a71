"""What must hold for every CellPLM, whatever its weights: order means nothing, sentences are walls, hidden is hidden."""

# C cells, G genes

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from cellplane.cells import CellBatch
from cellplane.model.attention import ATTENTION
from cellplane.model.cellplm import CellPLM, new_model
from cellplane.model.config import MaskingConfig, ModelConfig
from cellplane.model.losses import sentence_mean
from cellplane.model.masking import Mask, mask_genes, mask_of
from cellplane.model.noise import Noise
from tests.model.dense import negative_binomial, reconstruction
from tests.tiny import ANNOTATOR, N_GENES, TINY, dense, dense_batch, random_batch, random_counts

FULL = replace(TINY, n_batches=2, n_datasets=2, positions="continuous", hidden_fraction=True)


@pytest.fixture(params=sorted(ATTENTION))
def config(request: pytest.FixtureRequest) -> ModelConfig:
    """Everything switched on, with each attention kernel."""
    return replace(FULL, attention=request.param)


@pytest.fixture
def model(config: ModelConfig) -> CellPLM:
    return learned(config)


def learned(config: ModelConfig) -> CellPLM:
    """A network whose zero-initialised parameters are not zero, as after training."""
    network = new_model(config, seed=1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("missing_D", "hidden_D")):
                parameter.copy_(torch.linspace(-1, 1, len(parameter)))
    return network


def masked(batch: CellBatch) -> Mask:
    return mask_genes(batch, batch.cu_seqlens.diff().numpy(), MaskingConfig(drop_cell_rate=0))


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b)


@torch.no_grad()
def test_permuting_the_cells_of_a_sentence_permutes_the_answers(model):
    batch = random_batch([9])
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(batch.take(order)).latent, model(batch).latent[order], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_permuting_the_vocabulary_with_its_rows_changes_nothing(model):
    batch = random_batch([6, 4])
    mask = masked(batch)
    order = torch.randperm(N_GENES, generator=torch.Generator().manual_seed(0))
    other = learned(model.config)
    state = model.state_dict()
    for name in ("embedder.genes_GD", "decoder.mean.weight", "decoder.mean.bias", "decoder.log_dispersion_G"):
        state[name] = state[name][order]
    other.load_state_dict(state)
    renamed = replace(batch, gene=order.argsort()[batch.gene], panels=batch.panels[:, order])
    before, after = model(batch, mask), other(renamed, mask_of(renamed, mask.hidden_CG[:, order]))
    torch.testing.assert_close(after.latent, before.latent, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after.loss.total, before.loss.total, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_hidden_values_cannot_reach_the_encoder(model):
    batch = random_batch([6, 4])
    mask = masked(batch)
    assert 0 < int(mask.entry.sum()) < len(mask.entry)
    noise = torch.randint(1, 1000, batch.value.shape, generator=torch.Generator().manual_seed(0)).float()
    changed = replace(batch, value=torch.where(mask.entry, noise, batch.value))
    assert same(model(changed, mask).latent, model(batch, mask).latent)
    assert same(model(changed, mask, Noise(3)).latent, model(batch, mask, Noise(3)).latent)
    assert not same(model(changed).latent, model(batch).latent)


@torch.no_grad()
def test_a_hidden_value_is_as_if_it_were_not_stored():
    model, batch = learned(TINY), random_batch([6])
    mask = masked(batch)
    without = dense_batch(torch.where(mask.hidden_CG, 0.0, dense(batch)))
    torch.testing.assert_close(model(without).latent, model(batch, mask).latent, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_hidden_value_is_not_a_zero_when_the_network_is_told():
    model, batch = learned(replace(TINY, hidden_fraction=True)), random_batch([6])
    hidden_zeros = mask_of(batch, dense(batch) == 0)
    assert not same(model(batch, hidden_zeros).latent, model(batch).latent)


@torch.no_grad()
def test_a_sentence_packed_with_others_answers_as_it_does_alone(model):
    batch = random_batch([5, 1, 0, 7])
    packed = model(batch).latent
    for (start, end), part in zip(batch.spans(), batch.sentences(), strict=True):
        torch.testing.assert_close(packed[start:end], model(part).latent, rtol=0, atol=1e-6)


@torch.no_grad()
def test_no_sentence_leaks_into_another(model):
    batch = random_batch([5, 7])
    second = batch.cell_of_entry() >= 5
    changed = replace(batch, value=torch.where(second, batch.value * 3 + 1, batch.value), coordinates=batch.coordinates.clone())
    changed.coordinates[5:] *= 3
    before, after = model(batch).latent, model(changed).latent
    assert same(before[:5], after[:5])
    assert not torch.isclose(before[5:], after[5:]).all(1).any()


@torch.no_grad()
def test_cells_do_see_their_own_sentence(model):
    batch = random_batch([5])
    first = batch.cell_of_entry() == 0
    changed = replace(batch, value=torch.where(first, batch.value * 50 + 1, batch.value))
    assert not torch.isclose(model(batch).latent[1:], model(changed).latent[1:], rtol=0, atol=1e-7).all(1).any()


@torch.no_grad()
@pytest.mark.parametrize("kernel", sorted(ATTENTION))
def test_a_kernel_alone_keeps_sentences_apart_and_cells_in_any_order(kernel):
    q, k, v = torch.randn(3, 12, 2, 4, generator=torch.Generator().manual_seed(0))
    edges = torch.tensor([0, 5, 5, 12])
    attend = ATTENTION[kernel]
    out = attend(q, k, v, edges)
    alone = attend(q[5:], k[5:], v[5:], torch.tensor([0, 7]))
    torch.testing.assert_close(out[5:], alone, rtol=0, atol=1e-6)
    order = torch.tensor([3, 1, 0, 4, 2, *range(5, 12)])
    torch.testing.assert_close(attend(q[order], k[order], v[order], edges), out[order], rtol=1e-5, atol=1e-6)
    nobody = q[:0]
    assert (
        attend(nobody, nobody, nobody, torch.tensor([0])).shape == attend(nobody, nobody, nobody, torch.tensor([0, 0])).shape == (0, 2, 4)
    )


def test_unmeasured_genes_contribute_no_loss_and_get_no_gradient(model):
    batch, panel = random_batch([6, 4]), torch.arange(N_GENES) % 3 > 0
    counts = torch.where(panel, dense(batch), 0.0)
    batch = replace(dense_batch(counts, [6, 4], panel), sentence_seed=batch.sentence_seed)
    mask, noise = masked(batch), Noise(0)
    loss = model(batch, mask, noise).loss.total
    loss.sum().backward()
    assert float(model.decoder.mean.weight.grad[~panel].abs().max()) == 0.0
    assert float(model.decoder.log_dispersion_G.grad[~panel].abs().max()) == 0.0
    with torch.no_grad():
        model.decoder.mean.bias[~panel] += 5
        model.decoder.log_dispersion_G[~panel] -= 3
        assert same(model(batch, mask, noise).loss.total, loss)


@torch.no_grad()
def test_two_panels_may_meet_in_one_sentence():
    model, wide = learned(TINY), torch.ones(N_GENES, dtype=torch.bool)
    narrow = torch.arange(N_GENES) < 8
    counts = random_counts(6)
    counts[3:, 8:] = 0
    batch = replace(dense_batch(counts), panels=torch.stack([wide, narrow]), panel_index=torch.tensor([0, 0, 0, 1, 1, 1]))
    mask = mask_of(batch, torch.ones(6, N_GENES, dtype=torch.bool))
    assert mask.hidden_CG.sum(1).tolist() == [24, 24, 24, 8, 8, 8]
    assert bool(model(batch, mask).loss.total.isfinite().all())


def moved(batch: CellBatch, change: Callable[[Tensor], Tensor]) -> CellBatch:
    return replace(batch, coordinates=change(batch.coordinates))


@torch.no_grad()
def test_translating_a_slide_changes_nothing(model):
    batch = random_batch([6, 5])
    far = moved(batch, lambda xy: xy + torch.tensor([3000.0, -800.0]))
    torch.testing.assert_close(model(far).latent, model(batch).latent, rtol=1e-4, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["none", "continuous"])
def test_coordinates_change_the_answer_exactly_when_positions_are_on(positions):
    model, batch = learned(replace(TINY, positions=positions)), random_batch([6])
    answers = [model(given).latent for given in (batch, moved(batch, lambda xy: xy * 2), moved(batch, lambda xy: xy * torch.nan))]
    assert all(same(answers[0], other) for other in answers[1:]) == (positions == "none")
    assert len({tuple(answer.flatten().tolist()) for answer in answers}) == (1 if positions == "none" else 3)


@torch.no_grad()
def test_a_cell_without_coordinates_gets_the_learned_vector_and_does_not_move_the_centre():
    positions, batch = learned(FULL).embedder.positions, random_batch([6])
    encoded = positions(batch)
    assert same(encoded[2], positions.missing_D)
    assert not torch.isclose(encoded[[0, 1, 3, 4, 5]], positions.missing_D).all(1).any()
    known = torch.tensor([0, 1, 3, 4, 5])
    torch.testing.assert_close(positions(batch.take(known)), encoded[known])
    half = moved(batch, lambda xy: torch.where(torch.arange(6)[:, None] == 2, torch.tensor([1.0, torch.nan]), xy))
    assert same(positions(half), encoded)


@torch.no_grad()
def test_the_same_input_gives_the_same_answer_whatever_the_global_random_state(model):
    batch = random_batch([6, 4])
    torch.manual_seed(0)
    first, state = model(batch).latent, torch.get_rng_state()
    second = model.train()(batch, masked(batch), Noise(1))
    assert same(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert same(model(batch).latent, first)
    assert same(model.eval()(batch, masked(batch), Noise(1)).latent, second.latent)


@torch.no_grad()
def test_the_same_noise_key_gives_the_same_numbers_and_another_key_others(model):
    batch = random_batch([6, 4])
    mask = masked(batch)
    first, again, other = (model(batch, mask, Noise(key)) for key in (7, 7, 8))
    assert same(first.latent, again.latent)
    assert same(first.loss.total, again.loss.total)
    assert not torch.isclose(first.latent, other.latent).all(1).any()


def test_noise_of_two_places_is_not_the_same():
    like = torch.empty(50)
    one = Noise(1)
    assert not same(one.normal(like, "a"), one.normal(like, "b"))
    assert 0 <= float(one.uniform(like, "a").min()) <= float(one.uniform(like, "a").max()) < 1


def test_a_new_network_depends_on_its_seed_alone_and_leaves_the_callers_state():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = new_model(FULL, 3).state_dict()
    assert same(torch.get_rng_state(), state)
    torch.rand(3)
    again, other = new_model(FULL, 3).state_dict(), new_model(FULL, 4).state_dict()
    assert all(same(first[name], again[name]) for name in first)
    assert not same(first["embedder.genes_GD"], other["embedder.genes_GD"])


PLAIN = {"n_batches": 0, "n_datasets": 0, "positions": "none", "hidden_fraction": False}


@pytest.mark.parametrize("latent", ["gmvae", "vae", "ae"])
@pytest.mark.parametrize("changes", [{}, PLAIN, *({name: value} for name, value in PLAIN.items())], ids=str)
def test_nothing_trainable_is_without_gradient_in_pretraining(latent, changes):
    network, batch = learned(replace(FULL, latent=latent, **changes)), random_batch([6, 4])
    network(batch, masked(batch), Noise(0)).loss.total.sum().backward()
    assert not [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert all(bool(parameter.grad.isfinite().all()) for parameter in network.parameters())


@pytest.mark.parametrize("changes", [{}, {"positions": "continuous", "hidden_fraction": True}], ids=str)
def test_nothing_trainable_is_without_gradient_in_annotation(changes):
    network, batch = learned(replace(ANNOTATOR, **changes)), random_batch([6, 4])
    batch = replace(batch, labels=torch.arange(10) % 4 - 1)
    network(batch, masked(batch), Noise(0)).loss.total.sum().backward()
    assert not [name for name, parameter in network.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("changes", [{"decoder": "negative_binomial"}, {"latent": "gmvae"}, {"latent": "vae"}], ids=str)
def test_a_head_with_parts_it_would_never_train_is_refused(changes):
    with pytest.raises(ValueError, match="head"):
        replace(ANNOTATOR, **changes)


@torch.no_grad()
@pytest.mark.parametrize("latent", ["gmvae", "vae", "ae"])
def test_without_noise_the_latent_is_the_mean(latent):
    network, batch = learned(replace(TINY, latent=latent)), random_batch([6])
    hidden = network.encoder(network.embedder(batch, None, None), batch, None)
    if latent == "gmvae":
        chosen = torch.nn.functional.one_hot(network.latent.cluster(hidden).argmax(1), TINY.n_clusters).float()
        expected = network.latent.posterior(hidden, chosen)[0]
    else:
        expected = (network.latent.mean if latent == "vae" else network.latent.linear)(hidden)
    torch.testing.assert_close(network(batch).latent, expected)


EMPTY = torch.zeros(0, dtype=torch.int64)
HARD = {
    "no sentence": lambda: random_batch([]),
    "a sentence without cells": lambda: random_batch([0]),
    "cells beside an empty sentence": lambda: random_batch([3, 0, 2]),
    "one cell": lambda: random_batch([1]),
    "a cell with total 0": lambda: dense_batch(random_counts(4) * torch.tensor([1.0, 0.0, 1.0, 1.0])[:, None]),
    "only cells with total 0": lambda: dense_batch(torch.zeros(3, N_GENES)),
    "huge counts": lambda: dense_batch(random_counts(4) * 1e5),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0], ids=["nothing hidden", "some hidden", "all hidden"])
@pytest.mark.parametrize("latent", ["gmvae", "vae"])
def test_loss_and_gradients_are_finite(config, name, share, latent):
    network, batch = learned(replace(config, latent=latent)), HARD[name]()
    hidden = torch.rand(batch.n_cells, N_GENES, generator=torch.Generator().manual_seed(0)) < share
    loss = network(batch, mask_of(batch, hidden), Noise(0)).loss
    assert loss.total.shape == (batch.n_sentences,)
    assert bool(loss.total.isfinite().all())
    assert bool(loss.parts.isfinite().all())
    loss.total.sum().backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_the_loss_is_computed_in_float32_under_autocast():
    network, batch = learned(FULL), random_batch([6, 4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = network(batch, masked(batch), Noise(0)).loss
    plain = network(batch, masked(batch), Noise(0)).loss
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.total, plain.total, rtol=0.05, atol=0.5)


@torch.no_grad()
def test_the_loss_of_a_sentence_does_not_depend_on_what_it_is_packed_with():
    network, batch = learned(replace(FULL, kl_floor=0.7)), random_batch([6, 4, 5])
    mask = masked(batch)
    packed = network(batch, mask).loss.total
    for index, ((start, end), part) in enumerate(zip(batch.spans(), batch.sentences(), strict=True)):
        alone = network(part, mask_of(part, mask.hidden_CG[start:end])).loss.total
        torch.testing.assert_close(packed[index], alone[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_only_cells_with_hidden_values_are_scored():
    network, batch = learned(TINY), random_batch([6])
    hidden = torch.zeros(6, N_GENES, dtype=torch.bool)
    hidden[1:4, ::3] = True
    mask = mask_of(batch, hidden)
    full, alone = reconstruction(batch, mask, *network.decoder(network(batch, mask).latent, batch, None))
    nb, nb_hidden = network(batch, mask).loss.parts[:2, 0]
    torch.testing.assert_close((nb, nb_hidden), (full[1:4].mean(), alone[1:4].mean()))
    assert alone.gt(0).tolist() == [False, True, True, True, False, False]


def test_an_unlabelled_sentence_costs_nothing_and_unlabelled_cells_are_left_out():
    network, batch = learned(ANNOTATOR), random_batch([3, 4])
    batch = replace(batch, labels=torch.tensor([0, 1, -1, -1, -1, -1, -1]))
    output = network(batch)
    expected = torch.nn.functional.cross_entropy(output.logits[:2], batch.labels[:2])
    torch.testing.assert_close(output.loss.total, torch.stack([expected, torch.tensor(0.0)]))


def logpmf(x_CG: Tensor, mean_CG: Tensor, theta_G: Tensor) -> Tensor:
    theta = theta_G.double().numpy()
    return torch.from_numpy(scipy.stats.nbinom.logpmf(x_CG.double().numpy(), theta, theta / (theta + mean_CG.double().numpy())))


@pytest.fixture
def distribution() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts, means, dispersions and a choice of places."""
    rng = np.random.default_rng(0)
    mean = torch.from_numpy(rng.lognormal(0, 2, (30, N_GENES))).float()
    theta = torch.from_numpy(rng.lognormal(0, 1.5, N_GENES)).float()
    return random_counts(30, seed=2) ** 2, mean, theta, torch.from_numpy(rng.random((30, N_GENES)) < 0.6)


def test_the_negative_binomial_is_the_one_of_scipy(distribution):
    x, mean, theta, where = distribution
    expected = -(logpmf(x, mean, theta) * where).sum(1)
    ours = negative_binomial(dense_batch(x), mean, theta, where)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-4)
    precise = negative_binomial(replace(dense_batch(x), value=dense_batch(x).value.double()), mean.double(), theta.double(), where)
    torch.testing.assert_close(precise, expected, rtol=1e-7, atol=1e-7)


def test_the_sparse_form_and_its_gradients_equal_the_dense_formula(distribution):
    x, mean, theta, where = (tensor.double() if tensor.is_floating_point() else tensor for tensor in distribution)
    batch = dense_batch(x.float())
    batch = replace(batch, value=batch.value.double())
    gradients = []
    for formula in (lambda m, t: negative_binomial(batch, m, t, where), lambda m, t: _dense_formula(x, m, t, where)):
        m, t = mean.clone().requires_grad_(), theta.clone().requires_grad_()
        value = formula(m, t)
        value.sum().backward()
        gradients.append((value.detach(), m.grad, t.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-7, atol=1e-9)


def _dense_formula(x: Tensor, mean: Tensor, theta: Tensor, where: Tensor) -> Tensor:
    """As the released code writes it, all genes of all cells."""
    e = 1e-10
    fixed = torch.lgamma(theta + e) + torch.lgamma(x + 1) - torch.lgamma(x + theta + e)
    value = fixed + (theta + x) * torch.log1p(mean / (theta + e)) + x * (torch.log(theta + e) - torch.log(mean + e))
    return (value * where).sum(1)


def test_a_sentence_mean_is_over_the_chosen_cells_only():
    batch = random_batch([3, 0, 2])
    value = torch.tensor([1.0, 2.0, 30.0, 4.0, 5.0])
    where = torch.tensor([True, True, False, False, False])
    assert sentence_mean(value, batch, where).tolist() == [1.5, 0.0, 0.0]


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 18},
        {"width": 20, "n_heads": 3},
        {"n_heads": 0},
        {"latent_width": 0},
        {"n_blocks": -1},
        {"dropout": 1.0},
        {"decoder_width": 6},
    ],
    ids=str,
)
def test_numbers_that_cannot_make_a_network_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(TINY, **changes)


def test_a_network_needs_the_size_of_its_vocabulary():
    with pytest.raises(ValueError, match="n_genes"):
        CellPLM(replace(TINY, n_genes=0))
