"""Two platforms in one sentence: a token and an output bias for each, counts scaled by what is visible, the query weighing less."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cellplane.cells import CellBatch
from cellplane.model.cellplm import CellPLM, new_model
from cellplane.model.embedder import scaled
from cellplane.model.masking import Mask, mask_of
from cellplane.model.noise import Noise
from tests.tiny import N_GENES, TINY, random_batch

JOINT = replace(TINY, latent="ae", platform_tokens=2, query_weight=0.3, input_total=50.0)


def learned(**changes: object) -> CellPLM:
    network = new_model(replace(JOINT, **changes), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        network.embedder.platform_TD.normal_(generator=generator)
        network.decoder.mean.weight.normal_(generator=generator)
    return network


def mixed(sizes: tuple[int, ...] = (6, 4)) -> tuple[CellBatch, Mask]:
    """Cells of both platforms in turn, a third of all values hidden in every cell."""
    batch = random_batch(sizes)
    batch = replace(batch, platform_index=torch.arange(batch.n_cells) % 2)
    hidden = (torch.arange(batch.n_cells)[:, None] + torch.arange(N_GENES)) % 3 == 0
    return batch, mask_of(batch, hidden)


def test_without_the_options_there_is_nothing_new_in_a_network():
    names = set(new_model(TINY, 0).state_dict())
    assert not {name for name in names if "platform" in name or "perturbation" in name}
    plain, unscaled = (new_model(replace(TINY, input_total=total), 0).state_dict() for total in (0.0, 7.0))
    assert all(torch.equal(plain[name], unscaled[name]) for name in names)


@torch.no_grad()
def test_new_tokens_say_nothing_yet():
    network, (batch, mask) = new_model(JOINT, 0), mixed()
    other = replace(batch, platform_index=1 - batch.platform_index)
    assert torch.equal(network(batch, mask).latent, network(other, mask).latent)
    one, two = (network.decoder(network(batch).latent, told, None)[0] for told in (batch, other))
    assert torch.equal(one, two)


@torch.no_grad()
def test_the_platform_changes_embedding_and_decoding_and_an_unknown_one_is_none_of_them():
    network, (batch, _) = learned(), mixed()
    asked = [replace(batch, platform_index=torch.full_like(batch.platform_index, index)) for index in (-1, 0, 1)]
    assert len({tuple(network(one).latent.flatten().tolist()) for one in asked}) == 3
    latent = network(batch).latent
    means = [network.decoder(latent, one, None)[0] for one in asked]
    ratio = (means[1] / means[0]).log()
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=1e-3)  # a bias per gene, the same for every cell
    assert len({tuple(mean.flatten().tolist()) for mean in means}) == 3


def test_counts_are_scaled_by_what_a_cell_shows():
    batch, mask = mixed()
    value = scaled(batch, batch.value.masked_fill(mask.entry, 0.0), 50.0)
    totals = torch.zeros(batch.n_cells).index_add_(0, batch.cell_of_entry(), value)
    torch.testing.assert_close(totals, torch.full((batch.n_cells,), 50.0))


@torch.no_grad()
def test_hidden_counts_reach_neither_the_total_nor_the_network():
    network, (batch, mask) = learned(), mixed()
    noisy = replace(batch, value=torch.where(mask.entry, batch.value * 37 + 5, batch.value))
    assert torch.equal(network(batch, mask).latent, network(noisy, mask).latent)


@torch.no_grad()
def test_the_depth_of_a_cell_does_not_matter_when_counts_are_scaled():
    network, (batch, mask) = learned(), mixed()
    torch.testing.assert_close(network(batch, mask).latent, network(replace(batch, value=batch.value * 3), mask).latent)


@torch.no_grad()
def test_the_query_weighs_what_the_configuration_says():
    batch, mask = mixed()
    losses = {weight: learned(query_weight=weight)(batch, mask).loss for weight in (0.0, 0.3)}
    reference, query = losses[0.3].parts[:2]
    assert losses[0.3].names[:2] == ("nb_reference", "nb_query")
    torch.testing.assert_close(losses[0.0].total, reference)
    torch.testing.assert_close(losses[0.3].total, reference + 0.3 * query)


def test_nothing_that_learns_is_without_gradient():
    network, (batch, mask) = learned(), mixed()
    network(batch, mask, Noise(0)).loss.total.sum().backward()
    assert not [name for name, parameter in network.named_parameters() if parameter.grad is None]


def test_numbers_that_mean_nothing_are_refused():
    for changes in ({"platform_tokens": -1}, {"query_weight": -0.1}, {"input_total": -1.0}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            replace(TINY, **changes)
    with pytest.raises(ValueError, match="platform_tokens needs a decoder of counts"):
        replace(TINY, platform_tokens=2, decoder="gaussian")
