"""Ray's head dies and comes back: what it knew is in Redis, what is served goes on being served, what was training goes on.

Two hosts (network namespaces) with one shared folder, as in tests/chaos; Redis stands outside of both.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cellplane.artifact.folder import save_model
from cellplane.client import Client
from cellplane.config import to_yaml
from cellplane.data.config import DataKeys, SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.errors import ServiceError
from cellplane.train.run_folder import RunFolder
from serve.security import new_key
from tests.backends.conftest import Server
from tests.chaos.hosts import CELLPLANE, RAY, RAY_PORT, Host, Hosts, seen_from, wait_for, why_not
from tests.tiny import tiny_folder

REDIS_PORT = 6390
OUTSIDE = "10.77.0.254"
SOON = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "5000"}  # for machines that are busy
AWAY_S, STARTS = 20.0, 4
STEPS, KEPT, LOST_AFTER = 20, 5, 8
KEY, KEY_LINE = new_key("tests")
CELLS, KEYS = simulate(SimulateConfig(n_cells=8, n_genes=24, n_types=3, seed=0)), DataKeys(batch_key="batch")


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Two hosts whose Ray keeps its state in a Redis outside of both."""
    if shutil.which("redis-server") is None:
        pytest.skip("needs Redis: apt-get install redis-server")
    if reason := why_not():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="cp-", dir="/tmp"))  # short: sockets lie there
    state = {"RAY_REDIS_ADDRESS": f"{OUTSIDE}:{REDIS_PORT}", "RAY_external_storage_namespace": "cellplane"}
    waits = {"RAY_gcs_rpc_server_reconnect_timeout_s": "300"}  # how long the other nodes wait for a head
    made = Hosts(folder, {**state, **waits, **SOON}, cpus=(1, 2))
    command = ["ip", "netns", "exec", made.outside, "redis-server", "--port", str(REDIS_PORT), "--bind", OUTSIDE]
    command += ["--protected-mode", "no", "--save", "", "--dir", str(folder)]
    asked = ["ip", "netns", "exec", made.outside, "redis-cli", "-h", OUTSIDE, "-p", str(REDIS_PORT), "ping"]
    redis = Server("redis", command, folder, lambda: b"PONG" in subprocess.run(asked, capture_output=True).stdout)
    try:
        redis.start()
        made.start_ray()
        yield made
    finally:
        made.end()
        redis.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def endpoint(hosts: Hosts) -> None:
    """A tiny model, one copy and one process that receives on each host, behind a key."""
    model = save_model(tiny_folder(), hosts.home / "tiny")
    (hosts.home / "keys").write_text(KEY_LINE)
    changes = (f"api_keys_file={hosts.home / 'keys'}", "num_cpus=0.2", "max_replicas_per_node=1", "requests_per_minute=null")
    chosen = [word for change in changes for word in ("-o", change)]
    hosts.head.run([*CELLPLANE, "serve", str(model), "--name", "tiny", "--config", "team", *chosen], hosts.folder / "serve.log")
    wait_for(lambda: all(answers(hosts, host) for host in hosts.hosts), 60)


def test_the_other_host_goes_on_answering_while_the_head_is_away(hosts, endpoint):
    """The head's state server is killed, the head falls with it, and comes back with all it knew."""
    with Callers(hosts.other.address, hosts) as callers:
        wait_for(lambda: len(callers.asked) > 10, 60)
        lost = time.time()
        kill_head(hosts)
        wait_for(lambda: time.time() > lost + AWAY_S, 2 * AWAY_S)
        away = time.time()
        start_head(hosts)
        wait_for(lambda: statuses(hosts) == {"RUNNING"}, 240)
        healthy = time.time()
        wait_for(lambda: answers(hosts, hosts.head), 120)
        settled = len(callers.asked)
        wait_for(lambda: len(callers.asked) > settled + 10, 60)
    meanwhile = [one for one in callers.asked if lost < one[0] < away]
    failed = [error for *_, error in callers.asked if error]
    longest = max(took for began, took, _ in callers.asked if began > lost)
    told(asked=len(callers.asked), while_away=len(meanwhile), failed=len(failed), longest_s=longest, healthy_after_s=healthy - away)
    assert len(meanwhile) > 20
    assert not failed


def test_training_goes_on_after_the_head_is_back(hosts, endpoint, run_config, run_workers, losses, tmp_path, monkeypatch, shards):
    """The run's driver falls with the head; the same command again ends where nothing happened."""
    shutil.copytree(shards, hosts.home / "shards")
    changes = {"shards": str(hosts.home / "shards"), "workers": {"count": 1, "max_failures": 1}, "optimizer": {"steps": STEPS}}
    config = run_config("r", {**changes, "checkpoint": {"every_steps": KEPT}})
    (hosts.home / "r.yaml").write_text(to_yaml(config))
    command, log = [*CELLPLANE, "pretrain", "--config", str(hosts.home / "r.yaml")], hosts.folder / "r.log"
    flag = hosts.home / "stopped"
    process = hosts.head.started(command, log, {"FAULT_AT": f"step_rank0:{LOST_AFTER - 1}:{flag}", "FAULT_SIGNAL": "SIGSTOP"})
    try:
        wait_for(lambda: flag.exists() or process.poll() is not None, 120)
        assert process.poll() is None, log.read_text()[-4000:]
        kill_head(hosts)
    finally:
        process.kill()
        process.wait()
    start_head(hosts)
    wait_for(lambda: statuses(hosts) == {"RUNNING"}, 240)
    began = time.time()
    hosts.head.run(command, hosts.folder / "again.log", timeout_s=300)
    told(trained_again_s=time.time() - began)
    assert run_workers(config, tmp_path, 1) == [0]
    first, second = RunFolder(hosts.home / "runs" / "r").starts()
    assert (first.step, second.step) == (0, LOST_AFTER // KEPT * KEPT)
    assert losses(hosts.home, "r") == losses(tmp_path, "r")


def told(**figures: float) -> None:
    """Shown by `make backends ARGS=-s`."""
    print(json.dumps({name: round(value, 1) for name, value in figures.items()}))


class Callers:
    """A thread outside of both hosts that asks one of them for embeddings: (began, seconds, error) of every request."""

    def __init__(self, address: str, hosts: Hosts) -> None:
        self.asked: list[tuple[float, float, str]] = []
        self._address, self._hosts, self._over = address, hosts, threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> Callers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(120)

    def _ask(self) -> None:
        with seen_from(self._hosts.outside), Client(f"http://{self._address}:8000", KEY) as client:
            while not self._over.is_set():
                began, error = time.time(), ""
                try:
                    client.embed(CELLS, "tiny", KEYS)
                except ServiceError as refused:
                    error = str(refused)
                self.asked.append((began, time.time() - began, error))
                self._over.wait(0.1)


def answers(hosts: Hosts, host: Host) -> bool:
    """Whether the endpoint answers at this host's address."""
    try:
        with seen_from(hosts.outside), Client(f"http://{host.address}:8000", KEY) as client:
            return client.embed(CELLS, "tiny", KEYS).shape[0] == CELLS.n_obs
    except ServiceError:
        return False


def kill_head(hosts: Hosts) -> None:
    """SIGKILL for the head's state server; what stands on it falls, and what is left of the host goes too."""
    (server,) = [pid for pid in hosts.head.pids() if name_of(pid) == "gcs_server"]
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: "raylet" not in map(name_of, hosts.head.pids()), 60)
    hosts.head.die()


def name_of(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return ""


def start_head(hosts: Hosts) -> None:
    """The head's command again, with Redis where it was, as often as a supervisor would: Ray gives a start half a minute."""
    log = hosts.folder / f"head-{time.monotonic_ns()}.log"
    for _ in range(STARTS):
        if head_starts(hosts, log):
            return
        hosts.head.die()
    raise AssertionError(log.read_text(encoding="utf-8")[-6000:])


def head_starts(hosts: Hosts, log: Path) -> bool:
    """Whether one start succeeds, on a disk that knows nothing: the hosts share their process table, in which Ray would take
    the other host's node for a head that still runs.
    """
    (hosts.head.folder / "ray_current_cluster").unlink(missing_ok=True)
    place = [f"--port={RAY_PORT}", f"--temp-dir={hosts.head.ray_folder}", "--dashboard-host=127.0.0.1"]
    shown = ["--block", "--disable-usage-stats", f"--num-cpus={hosts.cpus[0]}", f"--node-ip-address={hosts.head.address}"]
    process = hosts.head.started([*RAY, "start", "--head", *place, *shown], log)
    wait_for(lambda: b"Ray runtime started" in log.read_bytes() or process.poll() is not None, 120)
    return process.poll() is None


def statuses(hosts: Hosts) -> set[str]:
    """What Serve says of its applications; empty while nobody can be asked."""
    command = [sys.executable, "-m", "ray.serve.scripts", "status", "--address", "http://127.0.0.1:8265"]
    log = hosts.folder / f"status-{time.monotonic_ns()}.log"
    process = hosts.head.started(command, log)
    try:
        process.wait(60)
    finally:
        process.kill()
        process.wait()
    text = log.read_text(encoding="utf-8")
    return set(re.findall(r"^    status: (\w+)$", text, re.MULTILINE))
