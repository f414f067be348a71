"""Trying an imputation begins only when every part of the genes can be hidden."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cellplane.data.config import SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData, write_h5ad
from cellplane.errors import ConfigError, DataError
from cellplane.genes import MINIMUM_SHARED_GENES
from cellplane.pipelines.imputation_config import ImputationConfig
from cellplane.pipelines.imputation_reading import read_pair
from cellplane.pipelines.try_config import TryImputation
from cellplane.pipelines.try_imputation import _simple_answer, fewest_shared
from cellplane.pipelines.trying import run_try
from tests.pipelines.test_trying import IMPUTE


@pytest.fixture(scope="module")
def cells() -> AnnData:
    return simulate(SimulateConfig(n_cells=120, n_genes=60, spatial=True, n_batches=1, mean_counts=300))


def asked(place: Path, cells: AnnData, shared: int, folds: int) -> TryImputation:
    """A file and a reference that share so many genes."""
    tissue, reference = cells[::2, :shared].copy(), cells[1::2].copy()
    del reference.obsm["spatial"]
    write_h5ad(tissue, place / "tissue.h5ad")
    write_h5ad(reference, place / "reference.h5ad")
    plain = {"data": str(place / "tissue.h5ad"), "reference": str(place / "reference.h5ad"), "out": str(place / "out")}
    recipe = {**IMPUTE, "optimizer": {"steps": 1, "warmup_steps": 0}, "validate_every": 1}
    return TryImputation.model_validate({**plain, "folds": folds, "recipe": recipe})


@pytest.mark.parametrize("most", [2, 7, 300])
def test_enough_genes_stay_whatever_part_is_hidden(most):
    for folds in range(2, 30):
        fewest = fewest_shared(folds, most)
        parts = np.array_split(np.arange(min(fewest, most)), folds)
        assert fewest - max(map(len, parts)) >= MINIMUM_SHARED_GENES
        less = fewest - 1
        parts = np.array_split(np.arange(min(less, most)), folds)
        assert less < 2 * folds or less - max(map(len, parts)) < MINIMUM_SHARED_GENES


@pytest.mark.parametrize(("folds", "fewest"), [(2, 20), (4, 14), (5, 13)])
def test_one_gene_less_is_told_before_any_fit_and_as_many_are_enough(cells, tmp_path, folds, fewest):
    with pytest.raises(DataError, match=f"share {fewest - 1} genes, at least {fewest} are needed to hide some in {folds} parts"):
        run_try(asked(tmp_path, cells, fewest - 1, folds))
    assert not (tmp_path / "out").exists()
    run_try(asked(tmp_path, cells, fewest, folds))


def test_a_fold_hides_one_gene_at_least(cells, tmp_path):
    with pytest.raises(ConfigError, match="hidden_genes 2 are too few for 3 folds"):
        run_try(asked(tmp_path, cells, 40, 3).model_copy(update={"hidden_genes": 2}))


def test_a_simple_answer_shares_nothing_with_the_file(cells):
    tissue, reference = cells[::2, :40].copy(), cells[1::2].copy()
    pair = read_pair(tissue, reference, ImputationConfig(), None)
    found = _simple_answer(tissue, pair.problem, pair.names.call(pair.problem.wanted), ("ridge", 0))
    before = tissue.obsm["spatial"].copy()
    found.obsm["spatial"][:] = -1.0
    np.testing.assert_array_equal(tissue.obsm["spatial"], before)
