"""A real, tiny, untrained model folder, cells for it, and the application in process; the Serve tests use the same folder."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch

from cellplane.artifact.folder import ModelFolder, save_model
from cellplane.client import ARROW_TYPE, WireCells
from cellplane.data.config import DataKeys, SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData
from cellplane.genes import GeneVocabulary
from cellplane.inference import Predictor
from cellplane.model.cellplm import CellPLM
from cellplane.model.config import ModelConfig
from serve.deployment import ServeConfig
from serve.front import Front
from serve.limits import Guard
from serve.native import NativePaths
from serve.replica import ModelReplica
from serve.routes import Model, Table, Version

GENES = [f"GENE{gene:04d}" for gene in range(1, 61)]
CLASSES = ("type_0", "type_1", "type_2")
MAX_CELLS = 16


@pytest.fixture(scope="module", autouse=True)
def home_of_the_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What an endpoint writes down (the router's table, fetched models) goes where the tests' files go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELLPLANE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An annotation model over 60 genes with random weights: what it says is noise, but always the same noise."""
    torch.manual_seed(0)
    config = ModelConfig(
        n_genes=len(GENES),
        width=32,
        n_blocks=2,
        n_heads=2,
        latent="ae",
        latent_width=8,
        decoder="none",
        n_classes=len(CLASSES),
        gene_init_sd=0.5,
    )
    model = ModelFolder(
        config=config,
        weights=CellPLM(config).state_dict(),
        vocabulary=GeneVocabulary.from_ids(GENES),
        task="annotate",
        max_cells=MAX_CELLS,
        classes=CLASSES,
        card="# A tiny model\n",
    )
    return save_model(model, tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def predictor(model_path: Path) -> Predictor:
    return Predictor.load(model_path)


@pytest.fixture
def cells() -> AnnData:
    """Forty cells of two batches; a third of their genes is unknown to the model."""
    return simulate(SimulateConfig(n_cells=40, n_genes=90, n_types=3, n_batches=2, seed=1))


@pytest.fixture
def arrow_body(cells: AnnData, predictor: Predictor) -> bytes:
    """All forty cells as the client sends them."""
    wire = WireCells.of(cells, DataKeys(batch_key="batch"), predictor.folder.vocabulary, MAX_CELLS)
    (part,) = wire.parts(1000)
    return wire.body(part)[0]


Ask = Callable[..., httpx.Response]


@pytest.fixture(scope="session")
def served(model_path: Path) -> ModelReplica:
    """The replica class itself, called directly."""
    return ModelReplica(ServeConfig(name="tiny", model=str(model_path)), Version("3", str(model_path), run_id="r1", state="ready"))


@pytest.fixture
def front(served: ModelReplica) -> Front:
    """What the ingress asks, with the replica in the same process as version 3 of `tiny`."""

    async def ask(model: str, label: str, method: str, *arguments: object) -> object:
        return await getattr(served, method)(*arguments)

    table = Table({"tiny": Model("tiny", {"3": served.version}, {"champion": "3"})}, epoch=1)
    return Front(lambda: table, ask)


@pytest.fixture
def ask(front: Front) -> Ask:
    """Sends one request through guard, paths, codec and the real model, without a server."""
    limits = ServeConfig(
        name="tiny", model="x", max_body_bytes=200_000, max_json_bytes=100_000, max_decoded_bytes=1_000_000, max_cells=100, max_genes=500
    )
    app = Guard(NativePaths(front, limits.limits()).app(), limits.limits())

    def send(method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> httpx.Response:
        async def once() -> httpx.Response:
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, content=body, headers={"content-type": ARROW_TYPE, **(headers or {})})

        return asyncio.run(once())

    return send
