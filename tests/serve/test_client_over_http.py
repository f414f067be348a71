"""Our client against the whole application on a real port, without a cluster: same answers as offline, one version to an AnnData."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import uvicorn

from cellplane import client as client_module
from cellplane import wire as wire_module
from cellplane.cli.ops import _show_endpoint, endpoint_at
from cellplane.client import Client
from cellplane.data.config import DataKeys
from cellplane.data.sentences import memory_store
from cellplane.data.sources import AnnData, cell_table
from cellplane.errors import ServiceError
from cellplane.inference import Predictor
from serve.front import Front
from serve.limits import Guard, Limits
from serve.native import NativePaths
from serve.replica import ModelReplica
from serve.routes import Model, Table

BATCHES = DataKeys(batch_key="batch")


class Versions:
    """Two versions of one model, which may change places at any time; the second is the first under another number."""

    def __init__(self, replica: ModelReplica) -> None:
        self.replica, self.asked, self.before = replica, list[tuple[str, str]](), lambda: None
        versions = {label: replace(replica.version, label=label) for label in ("3", "4")}
        self.table = Table({"tiny": Model("tiny", versions, {"champion": "3"})}, epoch=1)

    def promote(self, label: str) -> None:
        self.table = self.table.with_model(replace(self.table.models["tiny"], aliases={"champion": label}))

    async def __call__(self, model: str, label: str, method: str, *arguments: object) -> object:
        self.asked.append((label, method))
        if method == "predict":
            self.before()
        answer = await getattr(self.replica, method)(*arguments)
        return {**answer, "version": label} if method == "describe" else answer


@pytest.fixture
def versions(served: ModelReplica) -> Versions:
    return Versions(served)


@pytest.fixture
def listen(versions: Versions) -> Iterator[Callable[..., str]]:
    """Starts the application with these limits and says where."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(**limits: int) -> str:
        chosen = Limits(**limits)
        app = Guard(NativePaths(Front(lambda: versions.table, versions), chosen).app(), chosen)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run)
        thread.start()
        servers.append((server, thread))
        deadline = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join()


def test_the_client_gets_the_offline_answer(listen: Callable[..., str], predictor: Predictor, cells: AnnData) -> None:
    store = memory_store(cell_table(cells, predictor.vocabulary, BATCHES)[0], predictor.max_cells)
    with Client(listen()) as client:
        assert client.ready()
        answer = client.annotate(cells, "tiny", BATCHES)
        np.testing.assert_allclose(answer.proba, predictor.annotate(store).proba, atol=1e-5)
        np.testing.assert_allclose(client.embed(cells, "tiny@champion", BATCHES), predictor.embed(store), atol=1e-5)
        assert (answer.about["alias"], cells.uns["cellplm"]["model"]) == ("champion", "tiny")
        assert [row["version"] for row in client.versions("tiny")] == ["3", "4"]
        assert client.versions("other") == []
        assert "cellplane_cells_total" in client.metrics()


def test_the_status_of_the_stack_lists_what_is_served(listen: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    url = listen()
    found = endpoint_at("127.0.0.1", int(url.rsplit(":", 1)[1]))
    assert found is not None
    assert (found["url"], [row["version"] for row in found["models"]]) == (url, ["3", "4"])
    _show_endpoint(found)
    said = capsys.readouterr().out
    assert f"endpoint {url}, its paths explained at {url}/docs" in said
    assert re.search(r"^tiny +3 +champion +ready +100%$", said, re.MULTILINE)
    assert re.search(r"^tiny +4 +- +ready +0%$", said, re.MULTILINE)
    assert endpoint_at("127.0.0.1", 9) is None
    _show_endpoint(None)
    assert "no model is served" in capsys.readouterr().out


def test_all_parts_of_one_anndata_go_to_the_version_that_answered_first(
    listen: Callable[..., str], versions: Versions, cells: AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire_module, "CELLS_PER_REQUEST", 16)
    versions.before = lambda: versions.promote("4")
    with Client(listen()) as client:
        client.embed(cells, "tiny", BATCHES)
        first = [label for label, method in versions.asked if method == "predict"]
        assert len(first) > 1
        assert set(first) == {"3"}
        versions.asked.clear()
        client.embed(cells, "tiny", BATCHES)
    assert {label for label, method in versions.asked if method == "predict"} == {"4"}


def test_a_version_that_is_not_there_is_the_callers_error(listen: Callable[..., str], cells: AnnData) -> None:
    with Client(listen()) as client, pytest.raises(ServiceError, match="tiny:3") as refused:
        client.embed(cells, "tiny:9", BATCHES)
    assert refused.value.status == 404


def test_a_client_that_asks_too_often_waits_as_it_is_told(
    listen: Callable[..., str], cells: AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)

    with Client(listen(requests_per_minute=1), retries=1) as client:
        client.embed(cells, "tiny", BATCHES)
        monkeypatch.setattr(client_module.time, "sleep", sleep)
        with pytest.raises(ServiceError, match="requests in a minute") as refused:
            client.embed(cells, "tiny", BATCHES)
    assert refused.value.status == 429
    assert 20 <= waited[0] <= 30, "Retry-After, at most half a minute"
