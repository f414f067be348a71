"""Without keys an endpoint's client reads cells as those that the model learned, and so does `predict --via`: as offline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cellplane.artifact.folder import load_model, save_model
from cellplane.cli.main import main
from cellplane.client import Client
from cellplane.data.config import DataKeys, SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData, read_h5ad, write_h5ad
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.denoising import DenoisingPipeline
from cellplane.pipelines.embedding import CellEmbeddingPipeline
from cellplane.pipelines.imputation import KNOWN, SpatialImputationPipeline
from serve.deployment import ServeConfig
from serve.front import Front
from serve.limits import Guard
from serve.native import NativePaths
from serve.replica import ModelReplica
from serve.routes import Model, Table, Version
from tests.serve.specialists import Specialist, imputer
from tests.serve.wire import listening

__all__ = ["imputer"]

KEYS = {"layer": "umi", "batch_key": "slide"}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
FIT = {"optimizer": {"steps": 5, "lr": 1e-2, "warmup_steps": 1}, "max_cells": 16, "device": "cpu"}
SMALL = {"width": 16, "n_heads": 2, "n_blocks": 1, "latent": "ae", "latent_width": 8, "gene_init_sd": 0.5}


@pytest.fixture(scope="module")
def tissue() -> AnnData:
    """Cells whose counts and slides lie under names of their own."""
    cells = simulate(SimulateConfig(n_cells=60, n_genes=60, n_types=3, n_batches=2, seed=1))
    cells.layers["umi"] = cells.X.copy()
    cells.X = cells.X[:, ::-1].copy()
    cells.obs = cells.obs.rename(columns={"batch": "slide"})
    return cells


@pytest.fixture(scope="module")
def models(tissue: AnnData, imputer: Specialist, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An annotator, a denoiser, and an imputation that cannot judge its first gene."""
    home = tmp_path_factory.mktemp("models")
    annotator = CellTypeAnnotationPipeline(config={**FIT, "model": SMALL, "keys": {**KEYS, "labels_key": "cell_type"}}).fit(tissue)
    denoiser = DenoisingPipeline(config={**FIT, "model": SMALL, "keys": KEYS, "smoothing": {"share": [0.0]}}).fit(tissue)
    folder = load_model(imputer.path)
    known = json.loads(folder.attachments[KNOWN])
    known["expected"][0] = None
    unsure = replace(folder, attachments={**folder.attachments, KNOWN: json.dumps(known).encode()})
    return {
        "annotator": annotator.save(home / "annotator"),
        "denoiser": denoiser.save(home / "denoiser"),
        "imputer": save_model(unsure, home / "imputer"),
    }


@pytest.fixture(scope="module")
def url(models: dict[str, Path]) -> Iterator[str]:
    version = {name: Version("1", str(path), run_id="r1", state="ready") for name, path in models.items()}
    replicas = {name: ModelReplica(ServeConfig(name=name, model=str(path)), version[name]) for name, path in models.items()}

    async def call(model: str, label: str, method: str, *arguments: object) -> object:
        return await getattr(replicas[model], method)(*arguments)

    table = Table({name: Model(name, {"1": version[name]}, {"champion": "1"}) for name in models}, epoch=1)
    limits = ServeConfig(name="x", model="x").limits()
    with listening(Guard(NativePaths(Front(lambda: table, call), limits).app(), limits)) as port:
        yield f"http://127.0.0.1:{port}"


def test_the_endpoint_tells_how_the_models_cells_lay(url: str, models: dict[str, Path]) -> None:
    with Client(url) as client:
        assert client.model("annotator")["keys"] == DataKeys(**KEYS, labels_key="cell_type").model_dump()
        assert client.model("denoiser")["keys"] == DataKeys(**KEYS).model_dump()


def test_a_client_without_keys_gets_what_the_loaded_pipelines_say(url: str, models: dict[str, Path], tissue: AnnData) -> None:
    with Client(url) as client:
        proba = client.annotate(tissue.copy(), "annotator").proba
        np.testing.assert_allclose(proba, CellTypeAnnotationPipeline.load(models["annotator"]).predict_proba(tissue), **CLOSE)
        assert not np.allclose(proba, client.annotate(tissue.copy(), "annotator", DataKeys()).proba, **CLOSE)
        latent = client.embed(tissue.copy(), "annotator")
        np.testing.assert_allclose(latent, CellEmbeddingPipeline(models["annotator"]).predict(tissue), **CLOSE)
        rates = client.denoise(tissue.copy(), "denoiser")
        np.testing.assert_allclose(rates, DenoisingPipeline.load(models["denoiser"]).predict(tissue), rtol=1e-3, atol=1e-2)


def test_files_sent_without_keys_too_and_one_key_leaves_the_others(url: str, models: dict[str, Path], tissue: AnnData, tmp_path: Path):
    cells = tissue.copy()
    cells.obs["donor"] = np.where(np.arange(cells.n_obs) % 3 == 0, "a", "b")
    write_h5ad(cells, tmp_path / "cells.h5ad")
    pipeline = CellTypeAnnotationPipeline.load(models["annotator"])
    for given, keys in (([], {}), (["-o", "keys.batch_key=donor"], {"keys": {"batch_key": "donor"}})):
        out = tmp_path / f"out{len(given)}"
        asked = ["predict", "annotate", str(tmp_path / "cells.h5ad"), "--model", "annotator", "--out", str(out), "--via", url]
        assert main([*asked, *given]) == 0
        found = read_h5ad(out / "cells.h5ad").obsm["cellplm_cell_type_proba"]
        np.testing.assert_allclose(found, pipeline.predict_proba(cells, keys), **CLOSE)


def test_a_gene_of_unknown_expectation_is_refused_there_too(url: str, models: dict[str, Path], imputer: Specialist) -> None:
    pipeline = SpatialImputationPipeline.load(models["imputer"])
    with Client(url) as client:
        found = client.impute(imputer.cells, "imputer", options={"min_correlation": -0.99})
        expected = pipeline.predict(imputer.cells, {"min_correlation": -0.99})
        assert found.var["refused"].tolist() == expected.var["refused"].tolist() == [True] + [False] * (found.n_vars - 1)
        np.testing.assert_allclose(found.X, expected.X, **CLOSE)
        before = imputer.cells.obsm["spatial"].copy()
        found.obsm["spatial"][:] = -1.0
        np.testing.assert_array_equal(imputer.cells.obsm["spatial"], before)
        assert not client.impute(imputer.cells, "imputer", options={"min_correlation": -1.0}).var["refused"].any()
