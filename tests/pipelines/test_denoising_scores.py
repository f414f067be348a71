"""What is taken out is really gone, both protocols reward what they should, and the baselines are what they say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from cellplane.data.config import DataKeys
from cellplane.data.sentences import CellTable
from cellplane.data.sources import AnnData, cell_table, read_h5ad
from cellplane.errors import DataError
from cellplane.genes import GeneVocabulary
from cellplane.pipelines.denoising import DenoisingPipeline
from cellplane.pipelines.denoising_baselines import BASELINES, gene_frequency, knn15, nonzero_mean, split_counts, splitting_score
from cellplane.pipelines.denoising_scores import FLIPPED, evaluate, flip, masking_scores

METRICS = {"mask_rmse", "mask_mae", "mask_pearson", "split_nll"}


def dense(table: CellTable) -> np.ndarray:
    return sp.csr_matrix((table.value, table.gene, table.crow), shape=(table.n_cells, len(table.panel))).toarray()


@pytest.fixture(scope="module")
def table(cells: AnnData) -> CellTable:
    """All simulated cells."""
    return cell_table(cells, GeneVocabulary.from_ids(cells.var_names), DataKeys())[0]


def told(shares: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Known shares as an answer, in two pieces, the later cells first."""
    half = len(shares) // 2
    for rows in (np.arange(half, len(shares)), np.arange(half)):
        yield rows, shares[rows]


def test_a_tenth_of_the_non_zeros_becomes_zero_and_nothing_else_changes(table):
    flipped, entries = flip(table, 0)
    before, after = dense(table), dense(flipped)
    gone = (before > 0) & (after == 0)
    assert gone.sum() == len(entries)
    np.testing.assert_array_equal(before[~gone], after[~gone])
    shares = gone.sum(1) / (before > 0).sum(1)
    assert abs(shares - FLIPPED).max() < 0.02
    assert before[gone].mean() < before[before > 0].mean()  # small counts first


def test_another_seed_takes_other_entries_and_the_same_seed_the_same(table):
    assert np.array_equal(flip(table, 1)[1], flip(table, 1)[1])
    assert not np.array_equal(flip(table, 1)[1], flip(table, 2)[1])


def test_a_cell_with_few_non_zeros_loses_none():
    few = CellTable(np.array([0, 5, 12]), np.r_[np.arange(5), np.arange(7)], np.ones(12, dtype=np.float32), np.ones(20, dtype=bool))
    assert (flip(few, 0)[1] >= 5).all()
    with pytest.raises(DataError, match="nothing to hide"):
        flip(few.rows(np.array([0, 0])), 0)


def test_split_counts_add_up_to_the_whole_and_keep_nine_tenths(table):
    kept, rest = split_counts(table, 0)
    np.testing.assert_array_equal(dense(kept) + dense(rest), dense(table))
    assert 0.88 < kept.value.sum() / table.value.sum() < 0.92
    assert (kept.value > 0).all()
    assert (rest.value > 0).all()


def test_an_empty_cell_stays_empty_when_counts_are_taken_out(table):
    empty = CellTable(np.r_[0, 0, table.crow[1:]], table.gene, table.value, table.panel)
    kept, rest = split_counts(empty, 0)
    assert kept.crow[1] == rest.crow[1] == flip(empty, 0)[0].crow[1] == 0
    assert kept.n_cells == empty.n_cells


def test_the_truth_itself_has_no_error_by_masking(table):
    _, entries = flip(table, 0)
    shares = dense(table) / table.totals()[:, None]
    scores = masking_scores(told(shares), table, entries)
    assert scores["mask_rmse"] == pytest.approx(0, abs=1e-6)
    assert scores["mask_pearson"] == pytest.approx(1)
    worse = masking_scores(told(np.roll(shares, 1, axis=0)), table, entries)
    assert worse["mask_rmse"] > 0.1
    assert worse["mask_mae"] <= worse["mask_rmse"]


def test_splitting_prefers_the_rates_that_made_the_counts():
    """Counts are Poisson around known rates; flat rates, and the counts themselves, foretell the rest worse."""
    rng = np.random.default_rng(0)
    rates = rng.gamma(0.5, 1.0, (4, 40))[rng.integers(4, size=200)]
    rates = rates / rates.sum(1, keepdims=True)
    matrix = sp.csr_matrix(rng.poisson(200 * rates).astype(np.float32))
    table = CellTable(matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64), matrix.data, np.ones(40, dtype=bool))
    kept, rest = split_counts(table, 0)
    truth = splitting_score(told(rates), kept, rest)
    assert truth < splitting_score(told(dense(kept) / kept.totals()[:, None]), kept, rest)
    assert truth < splitting_score(gene_frequency(kept), kept, rest)
    assert truth < splitting_score(knn15(kept), kept, rest) < splitting_score(gene_frequency(kept), kept, rest)


def test_the_means_of_non_zeros_win_masking_and_lose_splitting(table):
    """Why masking alone must not decide: this row denoises nothing."""
    flipped, entries = flip(table, 0)
    kept, rest = split_counts(table, 0)
    masked = {name: masking_scores(method(flipped), table, entries)["mask_rmse"] for name, method in BASELINES.items()}
    foretold = {name: splitting_score(method(kept), kept, rest) for name, method in BASELINES.items()}
    assert min(masked, key=masked.get) == max(foretold, key=foretold.get) == "nonzero_mean"


@pytest.mark.parametrize("method", [gene_frequency, knn15, nonzero_mean])
def test_baselines_answer_every_cell_once_with_rates_of_measured_genes(table, method):
    rows, shares = zip(*method(table), strict=True)
    assert sorted(np.concatenate(rows).tolist()) == list(range(table.n_cells))
    assert all(piece.shape[1] == len(table.panel) and np.isfinite(piece).all() and (piece >= 0).all() for piece in shares)


def test_whoever_is_asked_sees_thinned_cells_only(table):
    seen: list[CellTable] = []

    def ask(thinned: CellTable) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        seen.append(thinned)
        return gene_frequency(thinned)

    scores = evaluate(ask, table, 0)
    assert [part.value.sum() < table.value.sum() for part in seen] == [True, True]
    assert all(row.keys() == METRICS for row in scores.values())
    assert scores["cellplm"] == scores["gene_frequency"]


def test_a_pipeline_scores_its_recipe_on_cells_it_was_fitted_on_anew(training):
    small = {"width": 16, "n_heads": 2, "n_blocks": 1, "latent": "ae", "latent_width": 8, "decoder_width": 16, "decoder_bottleneck": 8}
    recipe = {"model": small, "optimizer": {"steps": 60, "lr": 1e-2}, "max_cells": 100}
    scores = DenoisingPipeline(config=recipe).score(training)
    assert list(scores) == ["cellplm", *BASELINES]
    assert scores["cellplm"]["split_nll"] < scores["gene_frequency"]["split_nll"]


def test_on_real_cells_too_the_mean_of_non_zeros_wins_masking_and_loses_splitting(shared: Path):
    data = read_h5ad(shared / "data" / "pbmc3k.h5ad")[:800].copy()
    table, _ = cell_table(data, GeneVocabulary.from_ids(data.var_names), DataKeys())
    scores = evaluate(gene_frequency, table, 0)
    assert min(scores, key=lambda name: scores[name]["mask_rmse"]) == "nonzero_mean"
    assert max(scores, key=lambda name: scores[name]["split_nll"]) == "nonzero_mean"
