"""Contexts change a cell's company and nothing else of it, and gains are paired by cell."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cellplane.cells import CellBatch
from cellplane.model.cellplm import new_model
from cellplane.model.masking import Mask, mask_of
from cellplane.train.contexts import CONTEXTS, paired_gain, reordered
from tests.tiny import TINY, dense, random_batch

each_context = pytest.mark.parametrize("name", CONTEXTS)


@pytest.fixture
def work() -> tuple[CellBatch, Mask]:
    """Three sentences of two data sets, half of the cells with genes hidden."""
    batch = random_batch([6, 4, 5])
    batch = replace(batch, dataset_index=torch.tensor([0] * 10 + [1] * 5), row=torch.arange(15) * 3 + 7)
    return batch, mask_of(batch, torch.rand(15, batch.n_genes, generator=torch.Generator().manual_seed(1)) < 0.3)


def by_cell(batch: CellBatch, mask: Mask) -> dict[int, tuple[list[float], list[bool], int]]:
    """Counts, what is hidden and the data set of every cell, under its row."""
    rows = zip(batch.row.tolist(), dense(batch).tolist(), mask.hidden_CG.tolist(), batch.dataset_index.tolist(), strict=True)
    return {row: (counts, hidden, dataset) for row, counts, hidden, dataset in rows}


@each_context
def test_a_cell_keeps_its_counts_what_is_hidden_of_them_and_its_data_set(work, name):
    placed, mask = CONTEXTS[name](*work, 0)
    assert by_cell(placed, mask) == by_cell(*work)
    assert torch.equal(mask.hidden_C, mask.hidden_CG.sum(1))
    hidden_entries = mask.hidden_CG[placed.cell_of_entry(), placed.gene]
    assert torch.equal(mask.entry, hidden_entries)


@each_context
def test_a_context_is_determined_by_its_seed_and_leaves_its_input_as_it_was(work, name):
    before = by_cell(*work), work[0].coordinates.clone()
    one, other = (CONTEXTS[name](*work, 5)[0] for _ in range(2))
    assert torch.equal(one.row, other.row)
    assert torch.equal(one.coordinates.nan_to_num(-1), other.coordinates.nan_to_num(-1))
    assert by_cell(*work) == before[0]
    assert torch.equal(work[0].coordinates.nan_to_num(-1), before[1].nan_to_num(-1))


def test_own_is_the_sentence_as_it_is(work):
    assert CONTEXTS["own"](*work, 0) == work


def test_self_is_a_sentence_for_each_cell_with_its_sentence_s_seed(work):
    placed, _ = CONTEXTS["self"](*work, 0)
    assert placed.cu_seqlens.tolist() == list(range(16))
    assert placed.sentence_seed.tolist() == [100] * 6 + [101] * 4 + [102] * 5


def test_shuffled_coordinates_stay_within_the_sentence_and_move_only_the_places(work):
    batch = work[0]
    placed, _ = CONTEXTS["shuffled_coordinates"](*work, 0)
    assert torch.equal(placed.row, batch.row)
    assert not torch.equal(placed.coordinates.nan_to_num(-1), batch.coordinates.nan_to_num(-1))
    for start, end in batch.spans():
        before, after = (sorted(map(tuple, x.coordinates[start:end].nan_to_num(-1).tolist())) for x in (batch, placed))
        assert after == before


def test_shuffled_neighbours_keep_the_places_and_stay_within_the_data_set(work):
    batch = work[0]
    placed, _ = CONTEXTS["shuffled_neighbours"](*work, 0)
    assert torch.equal(placed.cu_seqlens, batch.cu_seqlens)
    assert torch.equal(placed.coordinates.nan_to_num(-1), batch.coordinates.nan_to_num(-1))
    assert torch.equal(placed.dataset_index, batch.dataset_index)
    first = set(batch.row[:6].tolist())
    assert set(placed.row[:6].tolist()) - first, "nobody came from another sentence"


def test_reordered_cells_take_all_of_theirs_along(work):
    batch = work[0]
    order = torch.randperm(15, generator=torch.Generator().manual_seed(3))
    moved = reordered(batch, order)
    assert torch.equal(dense(moved), dense(batch)[order])
    assert torch.equal(moved.batch_index, batch.batch_index[order])
    back = reordered(moved, order.argsort())
    assert torch.equal(back.gene, batch.gene)
    assert torch.equal(back.value, batch.value)


def test_a_network_with_local_attention_notices_shuffled_coordinates_and_one_without_does_not(work):
    for blocks, notices in ((0, False), (1, True)):
        network = new_model(replace(TINY, local_blocks=blocks, local_neighbours=2), 0)
        for local in network.encoder.local:
            torch.nn.init.ones_(local.gate_D)
        with torch.no_grad():
            own, shuffled = (network(*CONTEXTS[name](*work, 0)).latent for name in ("own", "shuffled_coordinates"))
        assert torch.equal(own, shuffled) is not notices


def test_a_gain_is_the_difference_per_hidden_value_and_its_interval_holds_it():
    rng = np.random.default_rng(0)
    values = rng.integers(1, 20, 500).astype(np.float64)
    worse = rng.normal(3, 1, 500) * values
    better = worse - 0.25 * values + rng.normal(0, 0.5, 500)
    gain = paired_gain(worse, better, values)
    assert gain.mean == pytest.approx((worse - better).sum() / values.sum())
    assert gain.low < 0.25 < gain.high
    assert gain.high - gain.low < 0.02  # what is common to both does not widen it
    back = paired_gain(better, worse, values)
    assert (back.mean, back.low) == pytest.approx((-gain.mean, -gain.high))


def test_a_gain_of_noise_does_not_exclude_zero():
    rng = np.random.default_rng(1)
    worse = rng.normal(3, 1, 400)
    gain = paired_gain(worse, worse + rng.normal(0, 1, 400), np.ones(400))
    assert gain.low < 0 < gain.high


def test_a_bootstrap_covers_the_truth_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr("cellplane.train.contexts.RESAMPLES", 300)
    covered = 0
    for seed in range(60):
        saved = np.random.default_rng(seed).normal(1.0, 2.0, 150)
        gain = paired_gain(saved, np.zeros(150), np.ones(150), seed)
        covered += gain.low < 1.0 < gain.high
    assert 51 <= covered <= 60


def test_nothing_hidden_is_nothing_to_compare():
    with pytest.raises(ValueError, match="no value is hidden"):
        paired_gain(np.zeros(3), np.zeros(3), np.zeros(3))
