"""What a step leaves out and hides: as many as promised, keyed by the sentence alone, and never what was not measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cellplane.cells import CellBatch
from cellplane.model.config import MaskingConfig
from cellplane.model.masking import chosen_cells, drop_cells, kept_cells, mask_genes, mask_of, narrow_panels
from tests.tiny import N_GENES, dense, dense_batch, random_batch

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
    [
        {"drop_cell_rate": 1.0},
        {"cell_mask_rate": 1.1},
        {"gene_mask_cap": -0.1},
        {"gene_mask_alpha": 0.0},
        {"gene_mask_beta": -1.0},
        {"gene_mask_rate": 1.5},
        {"panel_rate": -0.1},
        {"panel_min_genes": 0},
        {"targeted_genes": -1},
        {"targeted_mask_scale": 2.0},
    ],
    ids=str,
)
def test_rates_that_are_no_rates_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(CONFIG, **changes)


@pytest.mark.parametrize(("rate", "cap"), [(0.0, 0.9), (0.25, 0.9), (0.95, 0.9), (1.0, 1.0)])
def test_a_fixed_rate_is_the_same_for_every_cell_and_capped(rate, cap):
    batch, config = wide(300), replace(HIDE_ALL, gene_mask="fixed", gene_mask_rate=rate, gene_mask_cap=cap)
    rates = mask_genes(batch, sizes_of(batch), config).hidden_CG.float().mean(1)
    expected = min(rate, cap)
    assert abs(float(rates.mean()) - expected) <= 4 * (expected * (1 - expected) / 600_000) ** 0.5
    assert abs(float(rates.var()) - expected * (1 - expected) / 2000) <= 0.3 * expected * (1 - expected) / 2000


def test_genes_of_one_64_bit_number_are_hidden_independently():
    batch = wide(2000, n_genes=16)
    hidden = mask_genes(batch, sizes_of(batch), replace(HIDE_ALL, gene_mask="fixed", gene_mask_rate=0.3)).hidden_CG.double()
    correlation = torch.corrcoef(hidden.T) - torch.eye(16)
    assert float(correlation.abs().max()) < 5 / 2000**0.5


def test_targeted_panels_hide_fewer_of_their_genes():
    panels = torch.ones(2, 2000, dtype=torch.bool)
    panels[1, 100:] = False
    batch = replace(wide(400), panels=panels, panel_index=torch.arange(400) % 2)
    config = replace(HIDE_ALL, gene_mask="fixed", gene_mask_rate=0.5, targeted_genes=100, targeted_mask_scale=0.4)
    hidden = mask_genes(batch, sizes_of(batch), config).hidden_CG
    assert abs(float(hidden[::2].float().mean()) - 0.5) < 0.01
    assert abs(float(hidden[1::2, :100].float().mean()) - 0.2) < 0.012
    off = mask_genes(batch, sizes_of(batch), replace(config, targeted_genes=99)).hidden_CG
    assert abs(float(off[1::2, :100].float().mean()) - 0.5) < 0.015


NARROW = MaskingConfig(panel_rate=1.0, panel_min_genes=3)
HIDE_ALL = MaskingConfig(drop_cell_rate=0.0, cell_mask_rate=1.0)


def test_without_random_panels_nothing_changes():
    batch = random_batch([5, 4])
    assert narrow_panels(batch, CONFIG) is batch


def test_a_random_panel_leaves_its_own_genes_as_they_were_and_makes_the_others_unknown():
    batch = random_batch([5, 0, 4, 7])
    narrow = narrow_panels(batch, NARROW)
    measured = narrow.panels[narrow.panel_index]
    assert torch.equal(dense(narrow), torch.where(measured, dense(batch), 0.0))
    for start, end in ((0, 5), (5, 9), (9, 16)):
        assert bool((measured[start:end] == measured[start]).all()), "one panel for a sentence"
        assert 3 <= int(measured[start].sum()) <= N_GENES
    assert len({tuple(row.tolist()) for row in measured}) == 3
    assert not bool((mask_genes(narrow, sizes_of(narrow), HIDE_ALL).hidden_CG & ~measured).any())


def test_a_random_panel_is_part_of_what_a_cells_data_set_measured():
    panels = torch.stack([torch.arange(N_GENES) < 10, torch.arange(N_GENES) >= 6])
    index = torch.arange(12) % 2
    batch = dense_batch(torch.ones(12, N_GENES) * panels[index])
    narrow = narrow_panels(replace(batch, panels=panels, panel_index=index), NARROW)
    measured = narrow.panels[narrow.panel_index]
    assert not bool((measured & ~panels[index]).any())
    chosen = measured.any(0)
    assert torch.equal(measured, panels[index] & chosen)


def test_a_sentence_sees_the_same_panel_alone_and_packed():
    batch = random_batch([6, 9, 20])
    narrow = narrow_panels(batch, NARROW)
    for (start, end), part in zip(batch.spans(), batch.sentences(), strict=True):
        alone = narrow_panels(part, NARROW)
        assert torch.equal(narrow.panels[narrow.panel_index[start:end]], alone.panels[alone.panel_index])


def test_panel_sizes_are_log_uniform_and_as_many_sentences_are_narrowed_as_asked():
    batch = dense_batch(torch.ones(600, 1000), [1] * 600)
    batch = replace(batch, sentence_seed=torch.arange(600) * 7)
    sizes = narrow_panels(batch, replace(NARROW, panel_rate=0.5, panel_min_genes=10)).crow.diff()
    narrowed = sizes[sizes < 1000].double()
    assert abs(len(narrowed) / 600 - 0.5) < 0.09
    assert 10 <= int(narrowed.min()) < 13
    assert abs(float(narrowed.log().mean()) - np.log([10, 1000]).mean()) < 0.3  # four standard errors
    assert abs(float(narrowed.log().std()) - np.log(100) / 12**0.5) < 0.2


def test_a_sentence_with_fewer_genes_than_the_smallest_panel_keeps_them_all():
    batch = random_batch([4])
    narrow = narrow_panels(batch, replace(NARROW, panel_min_genes=N_GENES + 5))
    assert torch.equal(narrow.panels[narrow.panel_index], batch.panels[batch.panel_index])
    assert torch.equal(narrow.value, batch.value)
