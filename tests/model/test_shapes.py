"""A padded batch gives real cells the same answers and real sentences the same losses, whatever it is padded to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cellplane.cells import CellBatch
from cellplane.model.cellplm import CellPLM, new_model
from cellplane.model.config import ModelConfig
from cellplane.model.masking import mask_of
from cellplane.model.shapes import Shape, bucket, bucket_of, pad_mask, pad_to
from tests.tiny import ANNOTATOR, N_GENES, TINY, random_batch

CONFIGS = {
    "released": replace(TINY, n_batches=2, n_datasets=2),
    "positions": replace(TINY, positions="continuous", hidden_fraction=True),
    "exact attention": replace(TINY, attention="softmax"),
    "annotator": ANNOTATOR,
}


def batch_of(sizes: tuple[int, ...] = (4, 1, 6)) -> CellBatch:
    batch = random_batch(sizes)
    cells = batch.n_cells
    return replace(batch, batch_index=torch.arange(cells) % 3 - 1, labels=torch.arange(cells) % 3, dataset_index=torch.arange(cells) % 2)


def answers(network: CellPLM, batch: CellBatch, hidden: torch.Tensor, shape: Shape | None) -> tuple[torch.Tensor, torch.Tensor, dict]:
    network.zero_grad()
    mask = mask_of(batch, hidden)
    padded = batch if shape is None else pad_to(batch, shape.cells, shape.entries, shape.sentences)
    out = network(padded, mask if shape is None else pad_mask(mask, shape.cells, shape.entries))
    loss = out.loss.total[: batch.n_sentences]
    loss.sum().backward()
    return out.latent[: batch.n_cells], loss, {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("more", [Shape(1, 1, 1), Shape(5, 0, 3), Shape(0, 0, 1), Shape(3, 50, 2)])
def test_answers_losses_and_gradients_of_real_cells_stay(config: ModelConfig, more):
    network, batch = new_model(config, 0), batch_of()
    hidden = torch.rand(batch.n_cells, N_GENES, generator=torch.Generator().manual_seed(2)) < 0.3
    shape = Shape(batch.n_cells + more.cells, batch.gene.numel() + more.entries, batch.n_sentences + more.sentences)
    bare, padded = answers(network, batch, hidden, None), answers(network, batch, hidden, shape)
    torch.testing.assert_close(padded[0], bare[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(padded[1], bare[1], rtol=1e-5, atol=1e-5)
    for name, gradient in bare[2].items():
        torch.testing.assert_close(padded[2][name], gradient, rtol=1e-4, atol=1e-4, msg=name)


def test_what_is_added_is_marked_as_nothing():
    batch = batch_of()
    padded = pad_to(batch, 16, batch.gene.numel() + 30, 6)
    assert (padded.n_cells, padded.gene.numel(), padded.n_sentences) == (16, batch.gene.numel() + 30, 6)
    assert padded.cu_seqlens.tolist() == [0, 4, 5, 11, 16, 16, 16]
    for name in ("row", "batch_index", "dataset_index", "platform_index", "labels"):
        assert set(getattr(padded, name)[11:].tolist()) == {-1}, name
    assert padded.crow.diff()[11:].tolist() == [6] * 5  # shared, so that no cell becomes a long one
    assert not bool(padded.value[batch.gene.numel() :].any())
    assert bool(padded.coordinates[11:].isnan().all())


def test_optional_columns_are_padded_too():
    batch = replace(batch_of(), perturbation=torch.zeros(11, 2, dtype=torch.int64), perturbation_sign=torch.ones(11, 2))
    padded = pad_to(batch, 13, batch.gene.numel())
    assert padded.perturbation[11:].tolist() == [[-1, -1]] * 2
    assert padded.perturbation_sign[11:].tolist() == [[0, 0]] * 2
    assert padded.n_sentences == 4


@pytest.mark.parametrize("shape", [(10, 200, 9), (11, 9_999, 9), (20, 3, 9), (20, 9_999, 3)])
def test_a_shape_without_room_is_refused(shape):
    with pytest.raises(ValueError, match="does not fit into"):
        pad_to(batch_of(), *shape)


def test_buckets_are_few_and_waste_at_most_a_quarter():
    sizes = range(1, 5000)
    assert all(size <= bucket(size) <= max(1.25 * size, size + 1) for size in sizes)
    assert [bucket(size) for size in (1, 5, 9, 17, 33, 1000, 1025, 2048)] == [1, 5, 10, 20, 40, 1024, 1280, 2048]
    assert len({bucket(size) for size in sizes}) < 50
    assert all(bucket(bucket(size)) == bucket(size) for size in sizes)


def test_every_batch_fits_into_its_bucket():
    for sizes in ((1,), (4, 1, 6), (16, 16), (3, 0, 2)):
        batch = batch_of(sizes)
        shape = bucket_of(batch)
        assert pad_to(batch, shape.cells, shape.entries, shape.sentences).n_cells == shape.cells
