"""Small fitted models that answer about a whole request at once, the cells they are asked about, and a replica of each."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cellplane.artifact.folder import load_model, save_model
from cellplane.data.config import KnockoutConfig, SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData
from cellplane.pipelines.golden import with_golden
from cellplane.pipelines.imputation import KNOWN, SpatialImputationPipeline
from cellplane.pipelines.perturbation import PerturbationPipeline
from serve.deployment import ServeConfig
from serve.replica import ModelReplica
from serve.routes import Version

NETWORK = {"width": 32, "n_heads": 2, "latent_width": 16, "decoder_width": 32, "decoder_bottleneck": 16, "dropout": 0.0}
SHORT: dict[str, Any] = {"model": NETWORK, "optimizer": {"steps": 6, "lr": 1e-2, "warmup_steps": 2}, "validate_every": 3, "device": "cpu"}
N_HIDDEN = 12


@dataclass(frozen=True)
class Specialist:
    """A saved model, the estimator that holds it, cells to ask about, and for an imputation another reference."""

    path: Path
    pipeline: Any
    cells: AnnData
    reference: AnnData | None = None

    def replica(self, name: str) -> ModelReplica:
        """The replica class itself, called directly."""
        config = ServeConfig(name=name, model=str(self.path))
        return ModelReplica(config, Version("1", str(self.path), run_id="r1", state="ready"))


@pytest.fixture(scope="session")
def imputer(tmp_path_factory: pytest.TempPathFactory) -> Specialist:
    """Imputes twelve genes of tissue cells on two slides from a reference; patches of at most 32 cells."""
    torch.set_num_threads(1)
    cells = simulate(SimulateConfig(n_cells=400, n_genes=60, spatial=True, n_batches=2, mean_counts=300, batch_sigma=0.0))
    tissue, reference, other = cells[::4].copy(), cells[1::4].copy(), cells[2::4].copy()
    query = tissue[:, :-N_HIDDEN].copy()
    recipe = {**SHORT, "query_cells": 32, "reference_cells": 48, "folds": 2, "neighbours": 15, "min_correlation": -1.0}
    recipe["keys"] = {"batch_key": "batch", "spatial_key": "spatial"}
    pipeline = SpatialImputationPipeline(config=recipe).fit(query, reference)
    known = json.loads(pipeline.folder_.attachments[KNOWN]) | {"share": 0.5}  # of a barely trained network's and the neighbours' answer
    folder = replace(pipeline.folder_, attachments={**pipeline.folder_.attachments, KNOWN: json.dumps(known).encode()})
    path = save_model(with_golden(folder), tmp_path_factory.mktemp("model") / "imputer")
    pipeline.adopt(load_model(path))
    del other.obsm["spatial"]
    return Specialist(path, pipeline, query, other)


@pytest.fixture(scope="session")
def perturber(tmp_path_factory: pytest.TempPathFactory) -> Specialist:
    """Foretells five knock-outs and one pair of them, called CRISPRi, in two batches."""
    torch.set_num_threads(1)
    knockouts = KnockoutConfig(n_genes=5, n_pairs=1, effect_sigma=1.0)
    screen = simulate(SimulateConfig(n_cells=500, n_genes=60, n_types=1, n_batches=2, knockouts=knockouts, mean_counts=400))
    recipe = {**SHORT, "keys": {"batch_key": "batch"}, "control_cells": 32, "perturbed_cells": 32, "folds": 0, "kind": "crispri"}
    pipeline = PerturbationPipeline(config=recipe).fit(screen)
    path = save_model(with_golden(pipeline.folder_), tmp_path_factory.mktemp("model") / "perturber")
    pipeline.adopt(load_model(path))
    return Specialist(path, pipeline, screen[(screen.obs["perturbation"] == "control").to_numpy()].copy())
