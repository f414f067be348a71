"""The packed batch: its parts fit together, or it is refused; taking, splitting and joining lose nothing."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from cellplane.cells import CellBatch, single_panel_batch
from tests.tiny import dense, random_batch


def assert_same(a: CellBatch, b: CellBatch) -> None:
    for field in fields(CellBatch):
        torch.testing.assert_close(getattr(a, field.name), getattr(b, field.name), rtol=0, atol=0, equal_nan=True)


def labelled(batch: CellBatch) -> CellBatch:
    return replace(batch, labels=torch.arange(batch.n_cells))


def test_totals_are_the_sums_of_the_rows():
    batch = random_batch([4, 3])
    torch.testing.assert_close(batch.totals(), dense(batch).sum(1))


def test_a_cell_without_counts_has_total_zero():
    batch = single_panel_batch(torch.tensor([0, 0, 1]), torch.tensor([2]), torch.tensor([5.0]), torch.ones(4))
    assert batch.totals().tolist() == [0.0, 5.0]


@pytest.mark.parametrize("value", [[2.0, 3.0, 1.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
def test_cells_with_a_count_are_those_with_a_total(value):
    batch = single_panel_batch(torch.tensor([0, 1, 1, 3]), torch.tensor([0, 1, 2]), torch.tensor(value), torch.ones(3))
    assert batch.counted().tolist() == (batch.totals() > 0).tolist()


def test_no_cell_of_an_empty_batch_has_a_count():
    none = torch.zeros(0)
    assert single_panel_batch(torch.tensor([0, 0]), none, none, torch.ones(3)).counted().tolist() == [False]


def test_sizes_are_told():
    batch = random_batch([4, 0, 3])
    assert (batch.n_cells, batch.n_sentences, batch.n_genes) == (7, 3, 24)
    assert batch.spans() == [(0, 4), (4, 4), (4, 7)]
    assert batch.sentence_of_cell().tolist() == [0, 0, 0, 0, 2, 2, 2]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("value", torch.zeros(1)),
        ("panel_index", torch.zeros(3, dtype=torch.int64)),
        ("batch_index", torch.zeros(3, dtype=torch.int64)),
        ("row", torch.zeros(3, dtype=torch.int64)),
        ("coordinates", torch.zeros(4, 3)),
        ("sentence_seed", torch.zeros(2, dtype=torch.int64)),
        ("labels", torch.zeros(3, dtype=torch.int64)),
        ("perturbation", torch.zeros(4, 1, dtype=torch.int64)),
        ("perturbation_sign", torch.zeros(3, 2)),
        ("crow", torch.tensor([0, 1, 2, 3, 4])),
        ("cu_seqlens", torch.tensor([0, 3])),
        ("cu_seqlens", torch.tensor([1, 4])),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        replace(random_batch([4]), **{name: value})


def test_taking_all_cells_changes_nothing():
    batch = labelled(random_batch([4, 3]))
    assert_same(batch.take(torch.arange(7)), batch)


def test_taking_some_cells_keeps_their_rows_and_every_sentence():
    batch = labelled(random_batch([4, 3, 2]))
    part = batch.take(torch.tensor([1, 3, 8]))
    assert part.row.tolist() == [1, 3, 8]
    assert part.labels is not None
    assert part.labels.tolist() == [1, 3, 8]
    assert part.cu_seqlens.tolist() == [0, 2, 2, 3]
    assert part.sentence_seed.tolist() == batch.sentence_seed.tolist()
    torch.testing.assert_close(dense(part), dense(batch)[[1, 3, 8]])


def test_taking_no_cells_leaves_empty_sentences():
    part = random_batch([4, 3]).take(torch.zeros(0, dtype=torch.int64))
    assert (part.n_cells, part.n_sentences, len(part.gene)) == (0, 2, 0)


def test_splitting_into_sentences_and_joining_gives_the_batch_again():
    batch = labelled(random_batch([4, 0, 3]))
    assert_same(CellBatch.concat(list(batch.sentences())), batch)


def test_sentences_come_alone_with_their_own_seed():
    seeds = [part.sentence_seed.tolist() for part in random_batch([4, 3]).sentences()]
    assert seeds == [[100], [101]]


def test_batches_with_and_without_labels_cannot_be_joined():
    batch = random_batch([4])
    for pair in ([labelled(batch), batch], [batch, labelled(batch)]):
        with pytest.raises(ValueError, match="labels"):
            CellBatch.concat(pair)


def test_batches_of_different_panels_cannot_be_joined():
    batch = random_batch([4])
    other = replace(batch, panels=~batch.panels)
    with pytest.raises(ValueError, match="panel"):
        CellBatch.concat([batch, other])


def test_moving_to_a_device_keeps_every_part():
    batch = labelled(random_batch([4, 3]))
    assert_same(batch.to("cpu"), batch)
    assert batch.to("meta").labels.device.type == "meta"
