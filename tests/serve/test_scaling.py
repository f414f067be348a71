"""Copies of a model come under load and go when it is over; several processes receive; nothing fails meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from cellplane.client import ARROW_TYPE
from serve.app import Deployed, deploy, undeploy
from serve.deployment import ServeConfig

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def endpoint(ray_cluster: None, model_path: Path) -> Iterator[Deployed]:
    yield deploy(
        ServeConfig(
            name="tiny",
            model=str(model_path),
            port=0,
            num_cpus=0.1,
            max_replicas=2,
            target_ongoing_requests=1,
            upscale_delay_s=1,
            downscale_delay_s=2,
            ingress_replicas=2,
            startup_timeout_s=120,
        )
    )
    undeploy()


def processes(name: str) -> int:
    """Processes of this test's own cluster that hold this deployment."""
    found = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it may end while we look
            found += name in " ".join(process.cmdline())
    return found


def until(what: Callable[[], bool], seconds: float = 120.0) -> float:
    """Seconds until it is so."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < seconds
        time.sleep(0.2)
    return time.monotonic() - began


def test_a_second_copy_comes_and_goes(endpoint: Deployed, arrow_body: bytes) -> None:
    assert (processes("ServeReplica:tiny--v"), processes("ServeReplica:cellplane")) == (1, 2)
    stop, statuses = threading.Event(), list[int]()

    def ask() -> None:
        with httpx.Client(base_url=endpoint.url, timeout=60, trust_env=False) as http:
            while not stop.is_set():
                statuses.append(http.post("/v1/models/tiny/embed", content=arrow_body, headers={"content-type": ARROW_TYPE}).status_code)

    with ThreadPoolExecutor(6) as threads:
        callers = [threads.submit(ask) for _ in range(6)]
        up_s = until(lambda: processes("ServeReplica:tiny--v") == 2)
        stop.set()
        for caller in callers:
            caller.result()
    down_s = until(lambda: processes("ServeReplica:tiny--v") == 1)
    assert set(statuses) == {200}
    print(f"second copy after {up_s:.0f} s of load, gone {down_s:.0f} s after it; {len(statuses)} requests, none failed")
