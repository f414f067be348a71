"""The decoder: within its ranges, told the batch, and honest about a batch it never saw."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cellplane.model.decoder import DISPERSION_RANGE, MEAN_RANGE, Covariate, NegativeBinomialDecoder
from cellplane.model.noise import Noise
from tests.tiny import N_GENES, TINY, random_batch

CONFIG = replace(TINY, n_batches=3, n_datasets=2)


@pytest.fixture
def decoder() -> NegativeBinomialDecoder:
    torch.manual_seed(0)
    return NegativeBinomialDecoder(CONFIG)


@pytest.fixture
def z() -> torch.Tensor:
    return torch.randn(6, TINY.latent_width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize(("unseen", "together"), [("mean", torch.mean), ("sum", torch.sum)])
def test_an_unseen_batch_is_the_mean_of_the_rows_or_as_released_their_sum(unseen, together):
    torch.manual_seed(0)
    covariate = Covariate(3, 8, unseen)
    expected = covariate.norm(covariate.activation(together(covariate.table, 0)[None]))
    torch.testing.assert_close(covariate(torch.tensor([-1])), expected)


@torch.no_grad()
def test_a_known_batch_is_its_own_row_whatever_stands_beside_it():
    torch.manual_seed(0)
    covariate = Covariate(3, 8, "mean")
    out = covariate(torch.tensor([2, -1, 0, 2]))
    expected = covariate.norm(covariate.activation(covariate.table))
    torch.testing.assert_close(out[[0, 2, 3]], expected[[2, 0, 2]])
    assert not torch.isclose(out[1], expected).all(1).any()


def test_rows_of_batches_that_were_not_there_get_no_gradient():
    torch.manual_seed(0)
    covariate = Covariate(3, 8, "mean")
    (covariate(torch.tensor([2, 0, 2])) * torch.randn(3, 8)).sum().backward()
    assert covariate.table.grad.abs().sum(1).gt(0).tolist() == [True, False, True]


@torch.no_grad()
def test_a_batch_index_beyond_the_table_is_an_error():
    with pytest.raises(IndexError):
        Covariate(3, 8, "mean")(torch.tensor([3]))


@torch.no_grad()
def test_batch_and_data_set_each_change_the_counts_foreseen(decoder, z):
    batch = random_batch([6])
    known = replace(batch, batch_index=torch.zeros(6, dtype=torch.int64), dataset_index=torch.zeros(6, dtype=torch.int64))
    other_batch = replace(known, batch_index=torch.ones(6, dtype=torch.int64))
    other_dataset = replace(known, dataset_index=torch.ones(6, dtype=torch.int64))
    means = [decoder(z, given, None)[0] for given in (known, other_batch, other_dataset)]
    assert not torch.isclose(means[0], means[1]).all(1).any()
    assert not torch.isclose(means[0], means[2]).all(1).any()


@torch.no_grad()
def test_a_decoder_without_tables_knows_no_batches(z):
    decoder, batch = NegativeBinomialDecoder(TINY), random_batch([6])
    other = replace(batch, batch_index=batch.batch_index + 1)
    assert torch.equal(decoder(z, batch, None)[0], decoder(z, other, None)[0])
    assert {name.split(".")[0] for name, _ in decoder.named_parameters()}.isdisjoint({"batch", "dataset"})


@torch.no_grad()
def test_means_and_dispersions_stay_in_the_released_ranges(decoder, z):
    decoder.mean.bias.copy_(torch.linspace(-100, 100, N_GENES))
    decoder.log_dispersion_G.copy_(torch.linspace(-100, 100, N_GENES))
    mean, dispersion = decoder(z, random_batch([6]), None)
    assert mean.shape == (6, N_GENES)
    assert (float(mean.min()), float(mean.max())) == pytest.approx(MEAN_RANGE)
    assert (float(dispersion.min()), float(dispersion.max())) == pytest.approx(DISPERSION_RANGE)


@torch.no_grad()
def test_every_cell_is_decoded_by_itself(decoder, z):
    batch = random_batch([6])
    part = batch.take(torch.tensor([1, 4]))
    torch.testing.assert_close(decoder(z[[1, 4]], part, None)[0], decoder(z, batch, None)[0][[1, 4]])


@torch.no_grad()
def test_dropout_acts_with_noise_only(decoder, z):
    batch = random_batch([6])
    assert torch.equal(decoder(z, batch, None)[0], decoder(z, batch, None)[0])
    assert not torch.equal(decoder(z, batch, None)[0], decoder(z, batch, Noise(0))[0])
