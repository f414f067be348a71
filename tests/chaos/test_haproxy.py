"""`cellplane up` with HAProxy: the same answers, nothing open to others, and away again with `down`, killed or not."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from cellplane.benchmark.serve_kills import PROXIES
from cellplane.benchmark.serve_stack import Endpoint, command
from cellplane.client import Client
from cellplane.data.config import DataKeys
from cellplane.data.sentences import memory_store
from cellplane.data.sources import AnnData, cell_table
from cellplane.errors import ServiceError
from cellplane.inference import Predictor
from tests.serve.conftest import cells, model_path

__all__ = ["cells", "model_path"]
pytestmark = [pytest.mark.chaos, pytest.mark.cluster]

KEYS = DataKeys(batch_key="batch")
WAIT_S = 90.0


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Iterator[Endpoint]:
    """A stack of its own behind HAProxy, with one model."""
    home = tmp_path_factory.mktemp("home")
    ports = (word for name in ("mlflow_port", "dashboard_port", "ray_port", "serve_port") for word in ("-o", f"{name}=0"))
    try:
        command(home, "up", "-o", "num_cpus=2", "-o", "proxy=haproxy", *ports)
        yield Endpoint(home, command(home, "serve", str(model_path), "--name", "tiny", "-o", "num_cpus=0")["url"])
    finally:
        command(home, "down")


def programs() -> list[psutil.Process]:
    """Every HAProxy of this machine."""
    return [one for one in psutil.process_iter() if one.name() == "haproxy"]


def answer(endpoint: Endpoint, cells: AnnData, retries: int = 3) -> np.ndarray:
    with Client(endpoint.url, retries=retries, timeout_s=20) as client:
        return client.embed(cells, "tiny", KEYS)


def test_answers_are_the_offline_ones(endpoint: Endpoint, model_path: Path, cells: AnnData) -> None:
    predictor = Predictor.load(model_path)
    expected = predictor.embed(memory_store(cell_table(cells, predictor.vocabulary, KEYS)[0], predictor.max_cells))
    assert np.abs(answer(endpoint, cells) - expected).max() < 1e-5


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    """(address, port) of everything a process listens on."""
    return {(one.laddr.ip, one.laddr.port) for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN}


def test_http_is_answered_on_loopback_alone(endpoint: Endpoint) -> None:
    """Ray's workers have ports on every interface too, but they speak gRPC and ask for the token."""
    (program,) = programs()
    assert {address for address, _ in listening(program)} == {"127.0.0.1"}
    assert int(endpoint.url.rsplit(":", 1)[1]) in {port for _, port in listening(program)}
    own = [psutil.Process(pid) for name in (*PROXIES, "ray::ServeReplica") for pid in endpoint.processes(name)]
    elsewhere = {port for process in own for address, port in listening(process) if not address.startswith("127.")}
    for port in elsewhere:
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=5)


def test_it_comes_back_when_it_is_killed_and_nothing_stays_after_down(endpoint: Endpoint, cells: AnnData) -> None:
    for name in PROXIES:
        for pid in endpoint.processes(name):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            assert answer(endpoint, cells, retries=0).shape[0] == cells.n_obs
            break
        except ServiceError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    running = {one.pid for one in programs()}
    command(endpoint.home, "down")
    assert not running & {one.pid for one in programs()}
