"""The smaller choices of a network: the released grid, the single Gaussian's warm-up, platforms, heads; and what they default to."""

# C cells, D width

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cellplane.config import find_config, read_yaml, validate
from cellplane.model.cellplm import CellPLM
from cellplane.model.config import LATER, MaskingConfig, ModelConfig, identifying
from cellplane.model.heads import AnnotationHead
from cellplane.model.losses import kl_term
from cellplane.model.noise import Noise
from cellplane.model.positions import POSITIONS
from cellplane.train.config import ModelFile
from tests.model.test_invariants import learned, masked
from tests.tiny import ANNOTATOR, TINY, random_batch

GENES = 19_374  # of the released 85M checkpoint
VAE = replace(TINY, latent="vae", kl_warmup_steps=10, kl_drop_below=1.0)


def on_the_unit_square(rows: list[list[float]]):
    return replace(random_batch([len(rows)]), coordinates=torch.tensor(rows))


@torch.no_grad()
def test_the_grid_has_100_bins_a_side_and_its_edges_take_what_lies_outside():
    grid = POSITIONS["grid"](16)
    inside = grid(on_the_unit_square([[0.5, 0.5], [0.5001, 0.5001], [0.52, 0.5]]))
    assert torch.equal(inside[0], inside[1])
    assert not torch.equal(inside[0], inside[2])
    assert torch.equal(inside[0, :8], inside[2, :8]), "the first half of the width is y"
    outside = grid(on_the_unit_square([[0.0, 0.0], [-4.0, -0.1], [1.0, 1.0], [7.0, 300.0], [torch.inf, 1.0]]))
    assert torch.equal(outside[0], outside[1])
    assert torch.equal(outside[2], outside[3])
    assert torch.equal(outside[2], outside[4])
    assert torch.equal(outside[0], torch.tensor([0.0, 1.0] * 8))


@torch.no_grad()
def test_each_cell_without_coordinates_gets_the_grids_learned_vector():
    grid = POSITIONS["grid"](16)
    encoded = grid(on_the_unit_square([[torch.nan, torch.nan], [0.2, 0.3], [0.2, torch.nan]]))
    assert torch.equal(encoded[0], grid.missing_D)
    assert torch.equal(encoded[2], grid.missing_D)
    assert not torch.equal(encoded[1], grid.missing_D)
    assert list(grid.state_dict()) == ["missing_D"]


@torch.no_grad()
def test_coordinates_change_the_answer_when_the_grid_is_on():
    model, batch = learned(replace(TINY, positions="grid")), random_batch([6])
    batch = replace(batch, coordinates=batch.coordinates / 500)
    assert not torch.equal(model(batch).latent, model(replace(batch, coordinates=batch.coordinates / 2)).latent)


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": "grid"},
        {"n_platforms": 3},
        {"n_platforms": 3, "decoder": "gaussian", "n_datasets": 2},
        {"latent": "vae", "kl_warmup_steps": 5, "kl_drop_below": 1.0},
        {"kl_drop_below": 1e9},
    ],
    ids=str,
)
def test_nothing_trainable_is_without_gradient_with_any_option(changes):
    network, batch = learned(replace(TINY, **changes)), random_batch([6, 4])
    batch = replace(batch, platform_index=torch.arange(10) % 4 - 1)
    network(batch, masked(batch), Noise(0)).loss.total.sum().backward()
    assert not [name for name, parameter in network.named_parameters() if parameter.grad is None]


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["negative_binomial", "gaussian"])
def test_the_platform_changes_what_is_decoded_and_an_unknown_one_is_none_of_them(decoder):
    network, batch = learned(replace(TINY, n_platforms=3, decoder=decoder)), random_batch([6])
    latent = network(batch).latent
    known = [network.decoder(latent, replace(batch, platform_index=torch.full((6,), index)), None)[0] for index in (-1, 0, 1, 2)]
    assert len({tuple(mean.flatten().tolist()) for mean in known}) == 4


def test_the_latent_term_warms_up_with_the_optimizers_steps_and_is_dropped_while_small():
    kl, config = torch.tensor([0.5, 3.0, 40.0]), VAE
    assert kl_term(kl, config, 0).tolist() == [0.0, 0.0, 0.0]
    assert kl_term(kl, config, 5).tolist() == [0.0, 1.5, 20.0]
    assert kl_term(kl, config, 10).tolist() == kl_term(kl, config, 999).tolist() == [0.0, 3.0, 40.0]
    assert kl_term(kl, replace(TINY, kl_floor=2.0, kl_weight=5.0), 0).tolist() == [10.0, 15.0, 200.0]


@torch.no_grad()
def test_the_loss_reads_the_step_from_the_noise_and_nothing_is_counted_inside():
    network, batch = learned(replace(VAE, kl_drop_below=0.0)), random_batch([6, 4])
    mask = masked(batch)

    def of(step: int) -> torch.Tensor:
        return network(batch, mask, Noise(7, step)).loss

    early, half, late = of(0), of(5), of(10)
    torch.testing.assert_close(half.total - early.total, 0.5 * early.parts[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(late.total - early.total, early.parts[2], rtol=1e-4, atol=1e-4)
    assert torch.equal(of(0).total, early.total)


def test_a_head_is_linear_or_has_one_hidden_layer():
    assert {name for name, _ in AnnotationHead(ANNOTATOR).named_parameters()} == {"linear.weight", "linear.bias"}
    network = learned(replace(ANNOTATOR, head_width=9))
    assert network.head.inner.weight.shape == (9, TINY.latent_width)
    assert network.head.linear.weight.shape == (3, 9)
    batch = replace(random_batch([6, 4]), labels=torch.arange(10) % 4 - 1)
    network(batch, None, Noise(0)).loss.total.sum().backward()
    assert not [name for name, parameter in network.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("changes", [{"n_platforms": -1}, {"head_width": -2}, {"kl_warmup_steps": -1}, {"kl_drop_below": -0.5}], ids=str)
def test_numbers_that_mean_nothing_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(TINY, **changes)


def test_what_came_later_does_not_change_the_identity_of_what_was_there():
    for config in (ModelConfig(), TINY, ANNOTATOR):
        assert identifying(config.as_dict()).keys() == config.as_dict().keys() - LATER.keys()
    assert identifying(replace(TINY, head_width=4).as_dict())["head_width"] == 4
    assert "panel_rate" not in identifying(vars(MaskingConfig()))
    assert identifying(vars(MaskingConfig(panel_rate=0.5)))["panel_rate"] == 0.5


def test_an_older_stored_configuration_still_means_what_it_did():
    old = identifying(TINY.as_dict())
    assert ModelConfig(**old) == TINY


def shipped(name: str, **changes: int) -> CellPLM:
    """A shipped network at the released number of genes, without memory for its weights."""
    values = validate(ModelFile, read_yaml(find_config(name, "model")), name).model_dump()
    with torch.device("meta"):
        return CellPLM(replace(ModelConfig(**values), n_genes=GENES, **changes))


def test_the_85m_configuration_has_the_official_sizes():
    official, unused = 82_402_543, 10_240_000 + 1024 + 2 * 1024  # the sinusoid, missing_pe and norm0 are no parameters of ours
    rows, left = divmod(official - unused - shipped("85m").n_parameters() - 2 * (1 + 2 * 1024), 1024)
    assert (rows, left) == (13_080, 0)  # 13.4 M parameters of batch and data set tables, PReLU and GroupNorm each
    assert shipped("85m", n_batches=rows - 30, n_datasets=30).n_parameters() == official - unused


@pytest.mark.parametrize(("name", "millions"), [("10m", 10), ("300m", 300)])
def test_the_other_configurations_are_as_large_as_their_names_and_files_say(name, millions):
    network = shipped(name)
    assert abs(network.n_parameters() / (millions * 1e6) - 1) < 0.05
    assert f"{network.n_parameters():,}" in find_config(name, "model").read_text(encoding="utf-8")
    assert network.config.width // network.config.n_heads % 16 == 0
