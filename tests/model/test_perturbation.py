"""A perturbation enters through its gene's row, silences or raises that gene's counts, and at first changes nothing else."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch.distributions import NegativeBinomial

from cellplane.cells import CellBatch
from cellplane.model.cellplm import CellPLM, new_model
from cellplane.model.noise import Noise
from cellplane.model.perturbation import (
    KINDS,
    RAISED,
    SIGNS,
    PairedBatch,
    change_of,
    mean_log,
    perturbed_counts,
    population_likelihood,
    population_rates,
)
from tests.tiny import N_GENES, TINY, dense, dense_batch, random_batch, random_counts

PERTURBING = replace(TINY, latent="ae", decoder="residual", input_total=100.0, n_stimuli=1)
KNOCKOUT, CRISPRA = KINDS.index("knockout"), KINDS.index("crispra")


def perturbed(batch: CellBatch, *genes: int, kind: int = KNOCKOUT) -> CellBatch:
    """Every cell of the batch with these targets (none: controls)."""
    room = [*genes, *[-1] * (2 - len(genes))]
    there = [gene >= 0 for gene in room]
    cells = batch.n_cells
    return replace(
        batch,
        perturbation=torch.tensor(room).expand(cells, 2),
        perturbation_sign=torch.tensor([SIGNS[kind] * here for here in there]).expand(cells, 2),
        perturbation_kind=torch.tensor([kind if here else -1 for here in there]).expand(cells, 2),
    )


def learned(seed: int = 0) -> CellPLM:
    """A network whose last layer says something."""
    network = new_model(PERTURBING, seed)
    with torch.no_grad():
        network.decoder.mean.weight.normal_(generator=torch.Generator().manual_seed(seed))
        network.decoder.log_efficiency.copy_(torch.tensor([-2.0, -1.0, 1.0, 0.0]))
    return network


def paired(batch: CellBatch, seed: int = 1) -> PairedBatch:
    answers = random_batch([5, 3], seed=seed)
    control = torch.rand(batch.n_sentences, N_GENES, generator=torch.Generator().manual_seed(seed)) + 0.1
    change = torch.randn(batch.n_sentences, N_GENES, generator=torch.Generator().manual_seed(seed))
    given = {field.name: getattr(batch, field.name) for field in fields(CellBatch)}
    return PairedBatch(**given, answers=answers, control_SG=control / control.sum(1, keepdim=True), change_SG=change)


def test_a_silenced_genes_counts_are_gone_and_a_raised_ones_are_four_times_as_many():
    batch = random_batch([6, 4])
    before = dense(batch)
    for kind, factor in ((KNOCKOUT, 0.0), (CRISPRA, RAISED), (KINDS.index("stimulation"), 1.0)):
        asked = perturbed(batch, 3, 7, kind=kind)
        after = dense(replace(asked, value=perturbed_counts(asked)))
        torch.testing.assert_close(after[:, [3, 7]], before[:, [3, 7]] * factor)
        others = [gene for gene in range(N_GENES) if gene not in (3, 7)]
        assert torch.equal(after[:, others], before[:, others])


@torch.no_grad()
def test_the_target_counts_of_a_knock_out_cannot_reach_the_encoder():
    network, batch = learned(), random_batch([6])
    noisy = batch.value.clone()
    noisy[batch.gene == 3] = 50.0
    one, other = (network(perturbed(replace(batch, value=value), 3)).latent for value in (batch.value, noisy))
    assert torch.equal(one, other)
    assert not torch.equal(network(perturbed(batch)).latent, network(perturbed(replace(batch, value=noisy))).latent)


@torch.no_grad()
def test_a_new_network_says_that_nothing_changes_but_the_target():
    network, batch = new_model(PERTURBING, 0), random_batch([6])
    network.decoder.log_efficiency.fill_(-2.0)
    asked = perturbed(batch, 3)
    shift, _ = network.decoder(network(asked).latent, asked, None)
    assert torch.equal(shift[:, 3], torch.full((6,), -2.0))
    assert not shift[:, [gene for gene in range(N_GENES) if gene != 3]].any()


@torch.no_grad()
def test_cells_without_a_perturbation_are_shifted_by_exactly_nothing():
    network, batch = learned(), perturbed(random_batch([6]))
    shift, _ = network.decoder(network(batch).latent, batch, None)
    assert not shift.any()


@torch.no_grad()
def test_a_combination_is_the_sum_of_its_targets_in_any_order():
    embed, genes = learned().embedder.perturbation, torch.randn(N_GENES, PERTURBING.width, generator=torch.Generator().manual_seed(3))
    batch = random_batch([4])
    both, swapped = (embed(perturbed(batch, *order), genes) for order in ((2, 9), (9, 2)))
    torch.testing.assert_close(both, swapped)
    torch.testing.assert_close(both, embed(perturbed(batch, 2), genes) + embed(perturbed(batch, 9), genes))
    assert not embed(perturbed(batch), genes).any()


@torch.no_grad()
def test_kinds_genes_and_free_stimuli_are_told_apart():
    network, batch = learned(), random_batch([4])
    asked = [perturbed(batch, 2), perturbed(batch, 3), perturbed(batch, 2, kind=CRISPRA), perturbed(batch, N_GENES, kind=3)]
    assert len({tuple(network(one).latent.flatten().tolist()) for one in asked}) == 4


def test_the_gene_table_takes_no_gradient_from_being_perturbed():
    network = learned()
    genes = network.embedder.genes_GD
    network.embedder.perturbation(perturbed(random_batch([4]), 2), genes).sum().backward()
    assert genes.grad is None


def test_nothing_that_learns_is_without_gradient():
    network, batch = learned(), perturbed(random_batch([6, 4]), 2)
    second = perturbed(random_batch([6, 4]), N_GENES, kind=3)
    mixed = {name: torch.cat([getattr(batch, name)[:6], getattr(second, name)[6:]]) for name in PERTURBATION}
    network(paired(replace(batch, **mixed)), None, Noise(0)).loss.total.sum().backward()
    assert not [name for name, parameter in network.named_parameters() if parameter.grad is None]


PERTURBATION = ("perturbation", "perturbation_sign", "perturbation_kind")


def test_a_sentences_loss_does_not_depend_on_what_it_is_packed_with():
    network, batch = learned(), perturbed(random_batch([6, 4]), 2)
    together = network(paired(batch)).loss
    whole = paired(batch)
    for index, (part, answers) in enumerate(zip(batch.sentences(), whole.answers.sentences(), strict=True)):
        given = {field.name: getattr(part, field.name) for field in fields(CellBatch)}
        rows = slice(index, index + 1)
        alone = PairedBatch(**given, answers=answers, control_SG=whole.control_SG[rows], change_SG=whole.change_SG[rows])
        torch.testing.assert_close(network(alone).loss.total, together.total[rows])


def test_a_paired_batch_moves_with_its_answers():
    moved = paired(perturbed(random_batch([6, 4]), 2)).to(torch.device("cpu"))
    assert isinstance(moved, PairedBatch)
    assert torch.equal(moved.answers.value, random_batch([5, 3], seed=1).value)


@pytest.mark.parametrize("mean", [0.0, 0.01, 0.7, 5.0, 80.0])
@pytest.mark.parametrize("theta", [0.5, 10.0])
def test_the_mean_of_the_logarithm_is_that_of_the_distribution(mean: float, theta: float):
    counts = torch.arange(5000.0)
    odds = torch.tensor(max(mean, 1e-12) / theta).log()
    exact = (NegativeBinomial(torch.tensor(theta), logits=odds).log_prob(counts).exp() * counts.log1p()).sum()
    torch.testing.assert_close(mean_log(torch.tensor([mean]), torch.tensor([theta]))[0], exact, rtol=1e-3, atol=1e-4)


def test_no_shift_means_the_controls_own_rates_and_no_change():
    batch = perturbed(random_batch([6, 4]), 2)
    control = torch.rand(2, N_GENES, generator=torch.Generator().manual_seed(0)) + 0.1
    control = control / control.sum(1, keepdim=True)
    rates = population_rates(batch, control, torch.zeros(10, N_GENES))
    torch.testing.assert_close(rates, control)
    assert change_of(rates, control, torch.ones(N_GENES), 100.0).abs().max() < 1e-4


def test_rates_sum_to_one_over_the_measured_genes_alone():
    batch = random_batch([6, 4])
    panel = torch.ones(1, N_GENES, dtype=torch.bool)
    panel[0, :4] = False
    rates = population_rates(replace(batch, panels=panel), torch.full((2, N_GENES), 1 / N_GENES), torch.randn(10, N_GENES))
    assert not rates[:, :4].any()
    torch.testing.assert_close(rates.sum(1), torch.ones(2))


def test_the_likelihood_is_the_negative_binomials():
    answers = dense_batch(random_counts(4), [4])
    rates = torch.rand(1, N_GENES, generator=torch.Generator().manual_seed(0)) + 0.1
    rates, theta = rates / rates.sum(), torch.linspace(0.5, 4, N_GENES)
    mean = rates * answers.totals()[:, None]
    expected = -NegativeBinomial(theta, logits=(mean / theta).log()).log_prob(dense(answers)).sum(1).mean()
    torch.testing.assert_close(population_likelihood(rates, theta, answers)[0], expected, rtol=1e-4, atol=1e-3)


def test_a_perturbation_model_needs_to_be_told_of_perturbations():
    with pytest.raises(ValueError, match="a perturbation of every cell"):
        learned()(random_batch([4]))
    with pytest.raises(ValueError, match="residual needs latent ae"):
        replace(TINY, decoder="residual")
