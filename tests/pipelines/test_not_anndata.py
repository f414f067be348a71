"""What is no AnnData is told so, by every call of every pipeline: the name of a file, its path, a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cellplane
from cellplane.data.config import KnockoutConfig, SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.errors import DataError

STEPS = {"optimizer": {"steps": 2, "lr": 1e-3, "warmup_steps": 1}}
CALLS = ("fit", "predict", "score")


@pytest.fixture(scope="module")
def pipelines(fitted, base_model, training) -> dict[str, Any]:
    """One pipeline of each task that answers; how well does not matter here."""
    torch.set_num_threads(1)
    tissue = simulate(SimulateConfig(n_cells=120, n_genes=60, spatial=True, n_batches=1, mean_counts=300))
    knockouts = KnockoutConfig(n_genes=3, n_pairs=0)
    screen = simulate(SimulateConfig(n_cells=200, n_genes=40, n_types=1, n_batches=1, knockouts=knockouts, mean_counts=300))
    imputation = {**STEPS, "query_cells": 40, "reference_cells": 40, "kept_reference": 60}
    return {
        "annotate": fitted,
        "embed": cellplane.CellEmbeddingPipeline(base_model),
        "denoise": cellplane.DenoisingPipeline(config=STEPS).fit(training),
        "impute": cellplane.SpatialImputationPipeline(config=imputation).fit(tissue[:60, :-10].copy(), tissue[60:].copy()),
        "perturb": cellplane.PerturbationPipeline(config=STEPS).fit(screen),
    }


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("task", ["annotate", "embed", "denoise", "impute", "perturb"])
@pytest.mark.parametrize("given", ["cells.h5ad", Path("cells.h5ad")])
def test_the_name_of_a_file_is_answered_with_how_to_read_it(pipelines, training, task, call, given):
    beside = {("impute", "fit"): (training,), ("embed", "score"): (["cell_type"],)}.get((task, call), ())
    with pytest.raises(DataError, match=r"expected an AnnData, got \w+; read it with anndata\.read_h5ad\('cells\.h5ad'\)"):
        getattr(pipelines[task], call)(given, *beside)


def test_a_reference_that_is_a_path_is_told_as_well(pipelines, training):
    with pytest.raises(DataError, match="expected an AnnData, got str"):
        cellplane.SpatialImputationPipeline().fit(training, "atlas.h5ad")
    with pytest.raises(DataError, match="expected an AnnData, got str"):
        pipelines["impute"].predict(training, reference="atlas.h5ad")


def test_a_table_is_to_be_made_one(pipelines):
    with pytest.raises(DataError, match="expected an AnnData, got ndarray; make one"):
        pipelines["annotate"].predict(np.ones((3, 4)))
