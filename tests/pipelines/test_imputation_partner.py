"""A network is not left alone where a simple method knows better, and that method reads observed genes alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cellplane.data.sentences import CellTable
from cellplane.pipelines.imputation_cells import MixedCells
from cellplane.pipelines.imputation_config import ImputationConfig
from cellplane.pipelines.imputation_partner import best_partner, partner_rates, partners_of

GENES, OBSERVED = 12, 8


def table(counts: np.ndarray) -> CellTable:
    crow = np.arange(0, counts.size + 1, counts.shape[1])
    gene = np.tile(np.arange(counts.shape[1]), len(counts))
    return CellTable(crow.astype(np.int64), gene.astype(np.int64), counts.ravel().astype(np.float32), np.ones(GENES, dtype=bool))


@pytest.fixture(scope="module")
def cells() -> MixedCells:
    """The first hidden gene follows the first observed one."""
    counts = np.random.default_rng(0).poisson(20, size=(400, GENES)).astype(float)
    counts[:, OBSERVED] = counts[:, 0] * 2
    return MixedCells(table(counts[:100]), table(counts[100:]))


def told(**changes) -> ImputationConfig:
    return ImputationConfig().model_copy(update=changes)


@pytest.mark.parametrize("ridge", [0.0, 50.0])
def test_a_partner_follows_the_gene_that_tells(cells, ridge):
    observed = np.arange(GENES) < OBSERVED
    rates = partner_rates(cells, observed, 160.0, np.array([OBSERVED, OBSERVED + 1]), told(ridge=ridge, neighbours=15))
    truth = cells.query.value.reshape(-1, GENES)
    assert np.corrcoef(rates[:, 0], truth[:, 0] / truth[:, :OBSERVED].sum(1))[0, 1] > (0.8 if ridge else 0.4)
    assert (rates >= 0).all()


@pytest.mark.parametrize("ridge", [0.0, 50.0])
def test_what_is_asked_of_the_query_changes_nothing(cells, ridge):
    observed, asked = np.arange(GENES) < OBSERVED, np.array([OBSERVED])
    noisy = cells.query.value.reshape(-1, GENES).copy()
    noisy[:, OBSERVED:] = np.random.default_rng(1).poisson(500, size=(100, GENES - OBSERVED))
    other = replace(cells, query=replace(cells.query, value=noisy.ravel()))
    first, second = (partner_rates(one, observed, 160.0, asked, told(ridge=ridge)) for one in (cells, other))
    np.testing.assert_array_equal(first, second)


def test_partners_are_those_that_are_asked_for():
    assert partners_of(told()) == (0.0, 1000.0, 3000.0, 10000.0)
    assert partners_of(told(neighbours=0)) == (1000.0, 3000.0, 10000.0)
    assert partners_of(told(neighbours=0, ridges=())) == ()
    assert best_partner({(0.0, 0.0): 0.2, (50.0, 0.5): 0.3, (0.0, 0.5): 0.3}) == (50.0, 0.5)
