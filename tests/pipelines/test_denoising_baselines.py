"""Tuned denoising baselines are chosen on the counts they are given, and better for it."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from cellplane.data.sentences import CellTable
from cellplane.pipelines.denoising_baselines import (
    Tuned,
    diffusion,
    gene_frequency,
    low_rank,
    split_counts,
    splitting_score,
    transitions,
    tuned_baselines,
)


@pytest.fixture(scope="module")
def table() -> CellTable:
    """240 cells of four kinds, Poisson around known rates."""
    rng = np.random.default_rng(0)
    rates = rng.gamma(0.5, 1.0, (4, 60))[rng.integers(4, size=240)]
    counts = sp.csr_matrix(rng.poisson(200 * rates / rates.sum(1, keepdims=True)).astype(np.float32))
    return CellTable(counts.indptr.astype(np.int64), counts.indices.astype(np.int64), counts.data, np.ones(60, dtype=bool))


@pytest.mark.parametrize("name", ["diffusion", "low_rank"])
def test_a_tuned_baseline_foretells_better_than_the_average_cell(table, name):
    kept, rest = split_counts(table, 0)
    method = tuned_baselines(0)[name]
    assert splitting_score(method(kept), kept, rest) < splitting_score(gene_frequency(kept), kept, rest)
    assert method.chosen in method.settings
    assert len(method.tried) == len(method.settings)


def test_the_setting_is_chosen_by_the_counts_that_it_is_given_alone(table):
    seen: list[CellTable] = []

    def method(given: CellTable):
        seen.append(given)
        return low_rank(given)

    Tuned(method, (2, 3))(table)
    tuned_on, answered = seen
    assert tuned_on.value.sum() < 0.95 * table.value.sum()
    assert answered is table


def test_a_step_goes_to_neighbours_alone_and_back_as_often_as_there():
    place = np.repeat([[0.0, 0.0], [9.0, 9.0]], 20, axis=0) + np.random.default_rng(0).normal(size=(40, 2))
    step = transitions(place, 6).toarray()
    np.testing.assert_allclose(step.sum(1), 1)
    assert step[:20, 20:].max() == step[20:, :20].max() == 0
    assert ((step > 0) == (step > 0).T).all()


@pytest.mark.parametrize("method", [lambda table: diffusion(table)((15, 2)), lambda table: low_rank(table)(5)])
def test_they_answer_every_cell_once_with_shares(table, method):
    rows, shares = zip(*method(table), strict=True)
    assert sorted(np.concatenate(rows).tolist()) == list(range(table.n_cells))
    np.testing.assert_allclose(np.concatenate(shares).sum(1), 1, rtol=1e-5)
