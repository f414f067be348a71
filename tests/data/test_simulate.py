"""Simulated cells have the structure their name promises."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from cellplane.data.config import SimulateConfig
from cellplane.data.simulate import simulate


def test_the_same_seed_gives_the_same_cells_and_another_gives_others():
    first, again, other = (simulate(SimulateConfig(seed=seed)) for seed in (1, 1, 2))
    assert (first.X != again.X).nnz == 0
    assert first.obs.equals(again.obs)
    assert (first.X != other.X).nnz > 0


def test_counts_are_whole_float32_csr_over_named_genes():
    cells = simulate(SimulateConfig(n_cells=50, n_genes=30))
    assert sp.issparse(cells.X)
    assert cells.X.format == "csr"
    assert cells.X.dtype == np.float32
    assert (cells.X.data == np.rint(cells.X.data)).all()
    assert list(cells.var_names[:2]) == ["GENE0001", "GENE0002"]
    assert cells.shape == (50, 30)


def test_every_type_and_batch_is_there_and_markers_tell_types_apart():
    cells = simulate(SimulateConfig())
    assert set(cells.obs["cell_type"]) == {f"type_{t}" for t in range(4)}
    assert set(cells.obs["batch"]) == {"batch_0", "batch_1"}
    logged = np.log1p(cells.X.toarray())
    means = np.stack([logged[(cells.obs["cell_type"] == f"type_{t}").to_numpy()].mean(axis=0) for t in range(4)])
    nearest = ((logged[:, None] - means[None]) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == cells.obs["cell_type"].cat.codes.to_numpy()).mean() > 0.9


def test_counts_vary_more_than_poisson_and_depths_differ():
    cells = simulate(SimulateConfig(n_cells=2000, n_types=1, n_batches=1))
    dense = cells.X.toarray()
    assert (dense.var(axis=0) > dense.mean(axis=0)).mean() > 0.9
    totals = dense.sum(axis=1)
    assert np.percentile(totals, 95) > 2 * np.percentile(totals, 5)


def test_positions_lie_on_the_slide_only_when_asked_for():
    assert "spatial" not in simulate(SimulateConfig()).obsm
    spatial = simulate(SimulateConfig(spatial=True)).obsm["spatial"]
    assert spatial.shape == (300, 2)
    assert spatial.min() >= 0
    assert spatial.max() <= 1000


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1)])
def test_the_smallest_sizes_work(shape):
    cells = simulate(SimulateConfig(n_cells=shape[0], n_genes=shape[1], n_types=3, n_batches=5))
    assert cells.shape == shape
