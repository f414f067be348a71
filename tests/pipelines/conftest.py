"""Cells that are easy to tell apart, a recipe that learns them in seconds, and an official checkpoint made here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cellplane.artifact import official as names
from cellplane.artifact.folder import ModelFolder, save_model
from cellplane.data.config import SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData, write_h5ad
from cellplane.genes import GeneVocabulary
from cellplane.model.cellplm import new_model
from cellplane.model.config import ModelConfig
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.config import FinetuneConfig
from cellplane.tracking.runs import RunSpec, TrackedRun, local_uri

RECIPE: dict[str, Any] = {
    "model": {"width": 32, "n_heads": 2, "n_blocks": 1, "latent_width": 16},
    "optimizer": {"steps": 200, "lr": 1e-2, "warmup_steps": 5},
    "max_cells": 100,
}
N_GENES = 150
BASE_MODEL: dict[str, Any] = {"width": 16, "n_heads": 2, "n_blocks": 1, "latent": "ae", "latent_width": 8, "decoder_width": 16}
NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there
STEPS = 30


@pytest.fixture(scope="session")
def cells() -> AnnData:
    """300 cells of four types and two samples; treat as read-only, or copy."""
    return simulate(SimulateConfig(n_cells=300, n_genes=N_GENES))


@pytest.fixture(scope="session")
def query(cells: AnnData) -> AnnData:
    """Every third cell."""
    return cells[::3].copy()


@pytest.fixture(scope="session")
def training(cells: AnnData) -> AnnData:
    """The other cells."""
    return cells[[row for row in range(cells.n_obs) if row % 3]].copy()


@pytest.fixture(scope="session")
def fitted(training: AnnData) -> CellTypeAnnotationPipeline:
    """A pipeline that learned the training cells; treat as read-only."""
    torch.set_num_threads(1)
    return CellTypeAnnotationPipeline(config=RECIPE).fit(training)


@pytest.fixture(scope="session")
def base_model(cells: AnnData) -> ModelFolder:
    """An untrained `pretrain` model over the cells' genes and some more."""
    genes = [*cells.var_names[:120], *(f"OTHER{n}" for n in range(10))]
    widths = {"width": 32, "n_heads": 2, "latent_width": 16, "cluster_width": 8, "decoder_width": 16}
    config = ModelConfig(n_genes=len(genes), n_blocks=1, n_clusters=3, **widths)
    weights = new_model(config, 0).state_dict()
    return ModelFolder(config=config, weights=weights, vocabulary=GeneVocabulary.from_ids(genes), task="pretrain", max_cells=64)


@pytest.fixture(scope="session")
def official(tmp_path_factory: pytest.TempPathFactory, cells: AnnData) -> Path:
    """A folder with `tiny.config.json` and `tiny.best.ckpt` as the released code writes them, of random weights."""
    folder = tmp_path_factory.mktemp("official")
    config = {
        "enc_hid": 16,
        "enc_layers": 1,
        "enc_mod": "flowformer",
        "latent_mod": "gmvae",
        "post_latent_dim": 8,
        "num_clusters": 3,
        "dec_hid": 16,
        "model_dropout": 0.2,
        "lamda": 5.0,
        "w_li": 5.0,
        "w_en": 5.0,
        "norm": "groupnorm",
        "cat_pe": False,
        "dec_mod": "nbmlp",
        "gene_list": list(cells.var_names),
    }
    (folder / "tiny.config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.save({"model_state_dict": official_weights()}, folder / "tiny.best.ckpt")
    return folder


def official_weights() -> dict[str, torch.Tensor]:
    """Random tensors under the released names."""
    generator = torch.Generator().manual_seed(0)
    widths = {"width": 16, "latent_width": 8, "cluster_width": 8, "decoder_width": 16, "decoder_bottleneck": 8}
    network = new_model(ModelConfig(n_genes=N_GENES, n_blocks=1, n_clusters=3, **widths), 0)
    layers = {ours: theirs for theirs, ours in names._LAYERS.items() if ".1.hid_" not in theirs and ".lat_2lat" not in theirs}
    exact = {ours: theirs for theirs, ours in names._EXACT.items()}
    blocks = {ours: theirs for theirs, ours in names._BLOCK.items()}
    weights: dict[str, torch.Tensor] = {}
    for key, tensor in network.state_dict().items():
        stem, _, leaf = key.rpartition(".")
        if key in exact:
            name = exact[key]
        elif stem in layers:
            name = f"{layers[stem]}.{leaf}"
        else:
            _, _, block, layer = stem.split(".")
            name = f"encoder.layers.{block}.{blocks[layer]}.{leaf}"
        weights[name] = tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
    return weights


@dataclass
class Place:
    """A home with cells in it."""

    home: Path
    train: Path
    test: Path

    def config(self, **changes: Any) -> FinetuneConfig:
        plain = {**RECIPE, "optimizer": {"steps": STEPS, "lr": 1e-2, "warmup_steps": 5}, "validate_every": 10}
        return FinetuneConfig.model_validate({**plain, "data": str(self.train), "test": str(self.test), "run": "types", **changes})


@pytest.fixture(scope="session")
def empty_tracker(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An sqlite file with MLflow's tables and nothing in them: making the tables takes seconds."""
    folder = tmp_path_factory.mktemp("tracker")
    TrackedRun.open(RunSpec(run_key="none", experiment="cellplane/none", name="none"), local_uri(folder)).finish()
    return (folder / "mlflow.db").read_bytes()


def make_place(home: Path, training: AnnData, query: AnnData) -> Place:
    torch.set_num_threads(1)
    for name, data in (("train", training), ("test", query)):
        write_h5ad(data, home / f"{name}.h5ad")
    return Place(home, home / "train.h5ad", home / "test.h5ad")


@pytest.fixture
def alone(tmp_path: Path, training: AnnData, query: AnnData, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A place without a tracker."""
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOBODY)
    return make_place(tmp_path, training, query)


def saved_base(genes: list[str], folder: Path) -> str:
    """A base with random weights that knows these genes, in a folder."""
    torch.manual_seed(0)
    config = ModelConfig(n_genes=len(genes), decoder_bottleneck=8, **BASE_MODEL)
    vocabulary = GeneVocabulary.from_ids(genes)
    base = ModelFolder(config=config, weights=new_model(config, 0).state_dict(), vocabulary=vocabulary, task="pretrain", max_cells=100)
    return str(save_model(base, folder))
