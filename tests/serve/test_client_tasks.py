"""Every task through the client on a real port: the AnnData that the offline pipelines give, whole or cut into requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cellplane import wire as wire_module
from cellplane.artifact.folder import ModelFolder, load_model, save_model
from cellplane.client import Client
from cellplane.data.config import DataKeys, SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData
from cellplane.errors import ConfigError, DataError
from cellplane.genes import GeneVocabulary
from cellplane.model.cellplm import CellPLM
from cellplane.model.config import ModelConfig
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.config import PanelConfig
from cellplane.pipelines.denoising import DenoisingPipeline
from cellplane.pipelines.embedding import CellEmbeddingPipeline
from cellplane.pipelines.panel import with_panel
from serve.deployment import ServeConfig
from serve.front import Front
from serve.limits import Guard
from serve.native import NativePaths
from serve.replica import ModelReplica
from serve.routes import Model, Table, Version
from tests.serve.conftest import GENES, MAX_CELLS
from tests.serve.specialists import Specialist, imputer, perturber
from tests.serve.wire import listening

__all__ = ["imputer", "perturber"]

BATCHES = DataKeys(batch_key="batch")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Learned two batches by name."""
    torch.manual_seed(2)
    config = ModelConfig(n_genes=len(GENES), width=32, n_blocks=1, n_heads=2, latent="ae", latent_width=8, n_batches=2, gene_init_sd=0.5)
    model = ModelFolder(
        config=config,
        weights=CellPLM(config).state_dict(),
        vocabulary=GeneVocabulary.from_ids(GENES),
        task="denoise",
        max_cells=MAX_CELLS,
        lineage={"batches": json.dumps(["batch_0", "batch_1"])},
    )
    return save_model(model, tmp_path_factory.mktemp("model") / "denoiser")


@pytest.fixture(scope="module")
def carrying(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    training = simulate(SimulateConfig(n_cells=60, n_genes=60, n_types=3, seed=3))
    folder = with_panel(load_model(model_path), training, DataKeys(), PanelConfig(cells=5))
    return save_model(folder, tmp_path_factory.mktemp("model") / "carrying")


@pytest.fixture(scope="module")
def client(carrying: Path, denoiser: Path, imputer: Specialist, perturber: Specialist) -> Iterator[Client]:
    """An endpoint with a model of every kind, each as version 1."""
    paths = {"tiny": carrying, "denoiser": denoiser, "imputer": imputer.path, "perturber": perturber.path}
    version = {name: Version("1", str(path), run_id="r1", state="ready") for name, path in paths.items()}
    replicas = {name: ModelReplica(ServeConfig(name=name, model=str(path)), version[name]) for name, path in paths.items()}

    async def call(model: str, label: str, method: str, *arguments: object) -> object:
        return await getattr(replicas[model], method)(*arguments)

    table = Table({name: Model(name, {"1": version[name]}, {"champion": "1"}) for name in paths}, epoch=1)
    limits = ServeConfig(name="x", model="x").limits()
    app = Guard(NativePaths(Front(lambda: table, call), limits).app(), limits)
    with listening(app) as port, Client(f"http://127.0.0.1:{port}") as connected:
        yield connected


@pytest.fixture(params=[2048, 16], ids=["in one request", "cut into many"])
def _cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_module, "CELLS_PER_REQUEST", request.param)
    monkeypatch.setattr(wire_module, "NAMES_PER_REQUEST", 2 if request.param == 16 else 50)


def assert_same(found: AnnData, expected: AnnData) -> None:
    """The same cells, genes, columns and tables."""
    pd.testing.assert_frame_equal(found.obs, expected.obs, check_dtype=False, check_categorical=False, rtol=1e-4)
    pd.testing.assert_frame_equal(found.var, expected.var, check_dtype=False, rtol=1e-4)
    assert set(found.layers) == set(expected.layers)
    np.testing.assert_allclose(found.X, expected.X, **CLOSE)
    for name, table in expected.layers.items():
        np.testing.assert_allclose(found.layers[name], table, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("context", ["own", "self", "panel"])
@pytest.mark.usefixtures("_cut")
def test_annotation_and_embedding_write_what_the_pipelines_write(client: Client, carrying: Path, cells: AnnData, context: str) -> None:
    cells.X = cells.X.multiply(np.arange(40)[:, None] > 0).tocsr()  # the first cell shows the model nothing
    expected, found = cells.copy(), cells.copy()
    annotator = CellTypeAnnotationPipeline.load(carrying)
    annotator.config = annotator.config.model_copy(update={"keys": BATCHES})
    annotator.predict(expected, key_added="cellplm", context=context)
    client.annotate(found, "tiny", BATCHES, {"context": context})
    pd.testing.assert_frame_equal(found.obs, expected.obs, check_dtype=False, atol=1e-5)
    np.testing.assert_allclose(found.obsm["cellplm_cell_type_proba"], expected.obsm["cellplm_cell_type_proba"], **CLOSE)
    for name in ("context", "model_sha256", "count_source", "n_shared"):
        assert found.uns["cellplm"][name] == expected.uns["cellplm"][name]
    embedding = client.embed(found, "tiny", BATCHES, {"context": context})
    np.testing.assert_allclose(embedding, CellEmbeddingPipeline(carrying, BATCHES).predict(cells, context=context), **CLOSE)
    assert found.obsm["X_cellplm"] is embedding


@pytest.mark.parametrize("batches", [("batch_0", "batch_1"), ("batch_0", "batch_7")], ids=["all learned", "one unknown"])
@pytest.mark.usefixtures("_cut")
def test_denoised_rates_too(client: Client, denoiser: Path, cells: AnnData, batches: tuple[str, str]) -> None:
    cells.obs["batch"] = [batches[name == "batch_1"] for name in cells.obs["batch"]]
    expected, found = cells.copy(), cells.copy()
    pipeline = DenoisingPipeline(denoiser, {"keys": {"batch_key": "batch"}})
    pipeline.predict(expected, key_added="cellplm")
    rates = client.denoise(found, "denoiser", BATCHES)
    np.testing.assert_allclose(rates, expected.layers["cellplm_denoised"], rtol=1e-4, atol=1e-3)
    assert found.layers["cellplm_denoised"] is rates
    pd.testing.assert_frame_equal(found.obs, expected.obs)


@pytest.mark.usefixtures("_cut")
def test_imputed_genes_too(client: Client, imputer: Specialist) -> None:
    if wire_module.CELLS_PER_REQUEST == 16:
        wire_module.CELLS_PER_REQUEST = 32  # a patch's cells
    assert_same(client.impute(imputer.cells, "imputer"), imputer.pipeline.predict(imputer.cells))
    given = client.impute(imputer.cells, "imputer", reference=imputer.reference)
    assert_same(given, imputer.pipeline.predict(imputer.cells, reference=imputer.reference))
    assert given.uns["cellplm"]["warnings"] == []
    least = float(np.median(imputer.pipeline.expected_correlation_))
    careful = client.impute(imputer.cells, "imputer", options={"min_correlation": least})
    assert_same(careful, imputer.pipeline.predict(imputer.cells, {"min_correlation": least}))
    assert careful.uns["cellplm"]["refused"]


@pytest.mark.parametrize("by_group", [False, True])
@pytest.mark.usefixtures("_cut")
def test_perturbed_populations_too(client: Client, perturber: Specialist, by_group: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_module, "CELLS_PER_REQUEST", 2048 if wire_module.CELLS_PER_REQUEST == 2048 else 1)  # a group a request
    expected = perturber.pipeline.predict(perturber.cells, by_group=by_group)
    found = client.perturb(perturber.cells, "perturber", options={"by_group": by_group})
    assert_same(found, expected)
    names = [perturber.pipeline.perturbations_[0], "GENE0001+GENE0002"]
    some = client.perturb(perturber.cells, "perturber", names, options={"kind": "knockout", "by_group": by_group})
    assert_same(some, perturber.pipeline.predict(perturber.cells, names, {"kind": "knockout"}, by_group=by_group))


def test_only_controls_are_sent(client: Client, perturber: Specialist) -> None:
    mixed = perturber.cells.copy()
    mixed.obs["perturbation"] = ["control" if row % 2 else "GENE0001" for row in range(mixed.n_obs)]
    found = client.perturb(mixed, "perturber", ["GENE0001"])
    assert_same(found, perturber.pipeline.predict(mixed, ["GENE0001"]))
    assert found.obs["control_cells"].iloc[0] == mixed.n_obs // 2
    mixed.obs["perturbation"] = "GENE0001"
    with pytest.raises(DataError, match="control"):
        client.perturb(mixed, "perturber")


def test_progress_is_told_after_every_request(client: Client, cells: AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_module, "CELLS_PER_REQUEST", 16)
    told: list[tuple[int, int]] = []
    client.embed(cells, "tiny", BATCHES, progress=lambda done, total: told.append((done, total)))
    assert len(told) > 2
    assert told[-1] == (40, 40)
    assert told == sorted(told)


def test_what_the_client_cannot_do_is_said_before_anything_is_sent(client: Client, cells: AnnData, perturber: Specialist) -> None:
    with pytest.raises(ConfigError, match="top_k"):
        client.annotate(cells, "tiny", options={"top_k": 2})
    with pytest.raises(ConfigError, match="comma"):
        client.perturb(perturber.cells, "perturber", ["A,B"])
    with pytest.raises(ConfigError, match="slide"):
        client.embed(cells, "tiny", options={"context": "slide"})
