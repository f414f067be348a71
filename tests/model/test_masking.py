"""What a step leaves out and hides: as many as promised, keyed by the sentence alone, and never what was not measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cellplane.cells import CellBatch
from cellplane.model.config import MaskingConfig
from cellplane.model.masking import chosen_cells, drop_cells, kept_cells, mask_genes, mask_of
from tests.tiny import N_GENES, dense_batch, random_batch

CONFIG = MaskingConfig()
SIZES = np.array([0, 1, 2, 3, 10, 57, 200])


def sizes_of(batch: CellBatch) -> np.ndarray:
    return batch.cu_seqlens.diff().numpy()


def wide(n_cells: int, n_genes: int = 2000, seed: int = 0) -> CellBatch:
    """Cells that measured many genes, so that rates can be told from the mask."""
    batch = dense_batch(torch.ones(n_cells, 1) * (torch.arange(n_genes) == 0))
    return replace(batch, sentence_seed=torch.tensor([seed]))


@pytest.mark.parametrize("drop", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("mask", [0.0, 0.2, 0.75, 1.0])
def test_as_many_cells_are_kept_and_chosen_as_the_sizes_promise(drop, mask):
    config = MaskingConfig(drop_cell_rate=drop, cell_mask_rate=mask, gene_mask_alpha=50, gene_mask_beta=10)
    batch = random_batch(SIZES.tolist())
    kept = drop_cells(batch, config)
    chosen = mask_genes(kept, SIZES, config).hidden_CG.any(1)
    assert sizes_of(kept).tolist() == kept_cells(SIZES, config).tolist()
    counted = torch.zeros(len(SIZES), dtype=torch.int64).index_add_(0, kept.sentence_of_cell(), chosen.long())
    assert counted.tolist() == chosen_cells(SIZES, config).tolist()


def test_a_sentence_with_cells_always_keeps_and_chooses_one():
    config = MaskingConfig(drop_cell_rate=0.99, cell_mask_rate=0.01)
    assert kept_cells(SIZES, config).tolist() == [0, 1, 1, 1, 1, 1, 2]
    assert chosen_cells(SIZES, config).tolist() == [0, 1, 1, 1, 1, 1, 1]


def test_a_rate_of_zero_hides_nothing():
    assert chosen_cells(SIZES, MaskingConfig(cell_mask_rate=0)).tolist() == [0] * len(SIZES)


def test_nobody_is_dropped_and_hidden_where_there_is_no_sentence():
    batch = drop_cells(random_batch([]), CONFIG)
    assert batch.n_cells == 0
    assert mask_genes(batch, np.zeros(0, dtype=np.int64), CONFIG).hidden_CG.shape == (0, N_GENES)


def test_a_sentence_is_dropped_and_hidden_alike_alone_packed_and_in_any_order():
    batch = random_batch([6, 9, 20])
    parts = list(batch.sentences())
    packed = CellBatch.concat([parts[2], parts[0]])
    for whole, order in ((batch, (0, 1, 2)), (packed, (2, 0))):
        kept = drop_cells(whole, CONFIG)
        mask = mask_genes(kept, sizes_of(whole), CONFIG)
        for (start, end), index in zip(kept.spans(), order, strict=True):
            alone = drop_cells(parts[index], CONFIG)
            assert kept.row[start:end].tolist() == alone.row.tolist()
            assert torch.equal(mask.hidden_CG[start:end], mask_genes(alone, sizes_of(parts[index]), CONFIG).hidden_CG)


def test_another_seed_hides_other_values():
    batch = random_batch([20])
    other = replace(batch, sentence_seed=batch.sentence_seed + 1)
    assert not torch.equal(mask_genes(batch, sizes_of(batch), CONFIG).hidden_CG, mask_genes(other, sizes_of(batch), CONFIG).hidden_CG)
    assert drop_cells(batch, CONFIG).row.tolist() != drop_cells(other, CONFIG).row.tolist()


def test_only_measured_genes_are_hidden_and_entries_follow_the_table():
    panel = torch.arange(N_GENES) % 2 == 0
    batch = replace(random_batch([12]), panels=panel[None])
    mask = mask_genes(batch, sizes_of(batch), replace(CONFIG, drop_cell_rate=0.0, cell_mask_rate=1.0, gene_mask_alpha=50))
    assert not bool(mask.hidden_CG[:, ~panel].any())
    assert bool(mask.hidden_CG[:, panel].any(1).all())
    assert torch.equal(mask.entry, mask.hidden_CG[batch.cell_of_entry(), batch.gene])


def test_zeros_are_hidden_as_readily_as_counts():
    batch = wide(400)
    hidden = mask_genes(batch, sizes_of(batch), CONFIG).hidden_CG.float().mean(0)
    assert abs(float(hidden[0]) - float(hidden[1:].mean())) < 0.06


@pytest.mark.parametrize(("alpha", "beta"), [(5.0, 13.0), (2.0, 2.0), (8.0, 2.0)])
def test_rates_follow_their_distribution(alpha, beta):
    batch = wide(800)
    config = MaskingConfig(drop_cell_rate=0.0, cell_mask_rate=1.0, gene_mask_alpha=alpha, gene_mask_beta=beta, gene_mask_cap=1.0)
    mask = mask_genes(batch, sizes_of(batch), config)
    rates = mask.hidden_CG.float().mean(1)
    variance = alpha * beta / ((alpha + beta) ** 2 * (alpha + beta + 1))
    assert abs(float(rates.mean()) - alpha / (alpha + beta)) < 0.025  # four standard errors of 800 draws
    assert abs(float(rates.var()) / variance - 1) < 0.25


@pytest.mark.parametrize("cap", [0.0, 0.1, 0.5])
def test_no_cell_hides_more_than_the_cap(cap):
    batch = wide(200)
    mask = mask_genes(
        batch, sizes_of(batch), replace(CONFIG, drop_cell_rate=0.0, cell_mask_rate=1.0, gene_mask_alpha=40.0, gene_mask_cap=cap)
    )
    rates = mask.hidden_CG.float().mean(1)
    assert float(rates.max()) <= cap + 5 * (cap * (1 - cap) / 2000) ** 0.5


def test_dropping_keeps_the_order_and_what_belongs_to_a_cell():
    batch = replace(random_batch([30, 20]), labels=torch.arange(50) * 2)
    kept = drop_cells(batch, CONFIG)
    assert (kept.row.diff() > 0).all()
    assert torch.equal(kept.labels, kept.row * 2)
    assert torch.equal(kept.totals(), batch.totals()[kept.row])
    assert torch.equal(kept.sentence_seed, batch.sentence_seed)


def test_dropping_at_rate_zero_changes_nothing():
    batch = random_batch([5, 4])
    assert drop_cells(batch, MaskingConfig(drop_cell_rate=0.0)) is batch


def test_every_cell_is_dropped_about_as_often_as_any_other():
    times = torch.zeros(10)
    for seed in range(400):
        times[drop_cells(replace(random_batch([10]), sentence_seed=torch.tensor([seed])), CONFIG).row] += 1
    assert 230 < float(times.min()) <= float(times.max()) < 330  # 280 expected, sd 9


def test_an_explicit_choice_is_restricted_to_the_panel():
    panel = torch.arange(N_GENES) < 3
    batch = dense_batch(torch.ones(2, N_GENES) * panel, panel_G=panel)
    mask = mask_of(batch, torch.ones(2, N_GENES, dtype=torch.bool))
    assert mask.hidden_CG.sum(1).tolist() == [3, 3]
    assert bool(mask.entry.all())


@pytest.mark.parametrize(
    "changes",
    [{"drop_cell_rate": 1.0}, {"cell_mask_rate": 1.1}, {"gene_mask_cap": -0.1}, {"gene_mask_alpha": 0.0}, {"gene_mask_beta": -1.0}],
    ids=str,
)
def test_rates_that_are_no_rates_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(CONFIG, **changes)
