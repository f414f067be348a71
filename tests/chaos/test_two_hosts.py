"""Two hosts with a network between them, and one of them is lost: it dies, or its cable is pulled.

Everything is asked as on a real cluster: verbs of the command line on the head's host, Ray with a token, one shared folder,
callers that are on neither host. A host is lost at a known step or while requests are under way, never after a sleep.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from cellplane.client import Client
from cellplane.config import to_yaml
from cellplane.data.config import ConvertConfig, DataKeys, SimulateConfig
from cellplane.data.loader import ShardStore
from cellplane.data.simulate import simulate
from cellplane.data.sources import read_h5ad, write_h5ad
from cellplane.errors import ServiceError
from cellplane.processes import http_status
from cellplane.tracking.journal import Journal
from cellplane.train.config import PretrainConfig
from cellplane.train.run_folder import RunFolder
from serve.security import new_key
from tests.chaos.hosts import CELLPLANE, Host, Hosts, seen_from, wait_for, why_not

pytestmark = [pytest.mark.chaos, pytest.mark.own_cluster]

SOON = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000"}  # what docs/cluster.md recommends
FILES, CELLS = 4, 120
STEPS, KEPT, LOST_AFTER = 20, 5, 8
SAME = 1e-5  # as for any lost worker, see test_training_elastic
LOST_S = 15.0  # how long a host that is cut off may count as alive: five missed checks of 2 s and one of 1 s between them
CALLERS = 4
KEY, KEY_LINE = new_key("tests")
KEYS = DataKeys(batch_key="batch", labels_key="cell_type")


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Two hosts of one CPU each, Ray's head on the first one, and cells in the folder that both see."""
    if reason := why_not():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="cp-", dir="/tmp"))  # short: sockets lie there
    built = None
    try:
        built = Hosts(folder, SOON)
        for number in range(FILES):
            write_h5ad(simulate(SimulateConfig(n_cells=CELLS, n_genes=24, n_types=3, seed=number)), built.home / f"cells{number}.h5ad")
        built.start_ray()
        yield built
    finally:
        if built is not None:
            built.end()
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Loss:
    """A way to lose the second host, and to get it back."""

    lose: Callable[[Hosts], None]
    plugged: Callable[[Hosts], None] = lambda hosts: None

    def mend(self, hosts: Hosts) -> None:
        """The host is started anew; what ran on it is gone."""
        self.plugged(hosts)
        hosts.other.die()
        hosts.join()


LOSSES = {"dies": Loss(lambda hosts: hosts.other.die()), "is cut off": Loss(Hosts.unplug, Hosts.plug)}
either_way = pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))


def told(figures: Mapping[str, Any]) -> None:
    """What was measured, for whoever reads the tests' output."""
    print(json.dumps(figures))


def worked(host: Host, task: str) -> bool:
    """Whether a task of this name ran on the host, by the logs on its own disk."""
    return any(task in path.read_text(errors="replace") for path in host.folder.glob("session_2*/logs/worker-*.err"))


def stopped(host: Host) -> list[psutil.Process]:
    """Processes that stand still there."""
    found = []
    for pid in host.pids():
        with suppress(psutil.Error):
            if (process := psutil.Process(pid)).status() == psutil.STATUS_STOPPED:
                found.append(process)
    return found


class Released:
    """Lets what stops on a host go on, again and again, while the block lasts."""

    def __init__(self, host: Host) -> None:
        self._host, self._over = host, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._over.wait(0.2):
            for process in stopped(self._host):
                with suppress(psutil.Error):
                    process.send_signal(signal.SIGCONT)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def ended(process: subprocess.Popen[bytes], log: Path, timeout_s: float = 200) -> None:
    try:
        code = process.wait(timeout_s)
    finally:
        process.kill()
        process.wait()
    assert code == 0, log.read_text(encoding="utf-8")[-4000:]


def test_who_has_no_token_is_nobody(hosts):
    with seen_from(hosts.head.namespace):
        asked = {token: http_status("127.0.0.1", 8265, "/api/jobs/", token) for token in (None, "0" * 64, hosts.token)}
    assert list(asked.values()) == [401, 403, 200]


def test_both_hosts_convert(hosts):
    shards = hosts.home / "shards"
    inputs = tuple(str(hosts.home / f"cells{number}.h5ad") for number in range(FILES))
    (hosts.home / "convert.yaml").write_text(to_yaml(ConvertConfig(inputs=inputs, out=str(shards), keys=KEYS, max_cells=12)))
    hosts.head.run([*CELLPLANE, "data", "convert", "--config", str(hosts.home / "convert.yaml")], hosts.folder / "convert.log")
    assert ShardStore(shards).manifest.cells == FILES * CELLS
    assert all(worked(host, "write_row") for host in hosts.hosts)


@pytest.fixture
def run_on_both(hosts, run_config) -> Callable[[str], PretrainConfig]:
    """A run with a worker on each host, which may go on with one."""

    def make(run: str) -> PretrainConfig:
        workers = {"count": 2, "min": 1, "max": 2, "max_failures": 1, "collective_timeout_s": 30}
        changes = {
            "shards": str(hosts.home / "shards"),
            "workers": workers,
            "optimizer": {"steps": STEPS},
            "checkpoint": {"every_steps": KEPT},
        }
        return run_config(run, changes)

    return make


@pytest.fixture(scope="module")
def undisturbed(hosts: Hosts) -> dict[str, list[float]]:
    """Losses of a run that nothing happened to, once known."""
    return {}


@either_way
def test_a_host_lost_in_training_costs_at_most_one_interval(
    hosts, loss, run_on_both, run_workers, losses, undisturbed, tmp_path, monkeypatch, request
):
    run = f"lost-{list(LOSSES.values()).index(loss)}"
    config, flag, log = run_on_both(run), hosts.home / f"{run}.stopped", hosts.folder / f"{run}.log"
    (hosts.home / f"{run}.yaml").write_text(to_yaml(config))
    fault = {"FAULT_AT": f"step_rank1:{LOST_AFTER - 1}:{flag}", "FAULT_SIGNAL": "SIGSTOP"}
    process = hosts.head.started([*CELLPLANE, "pretrain", "--config", str(hosts.home / f"{run}.yaml")], log, fault)
    wait_for(lambda: flag.exists() or process.poll() is not None, 120)
    assert process.poll() is None, log.read_text()[-4000:]
    lost = time.time()
    loss.lose(hosts)
    with Released(hosts.head):  # rank 1 is on either host
        ended(process, log)
    loss.mend(hosts)
    monkeypatch.setenv("CELLPLANE_HOME", str(hosts.home))
    folder = RunFolder.of(run)
    first, second = folder.starts()
    assert (first.workers, second.workers, second.step) == (2, 1, LOST_AFTER // KEPT * KEPT)
    rows = {row.step: row.time_ms / 1000 for row in Journal(folder.journal).rows()}
    told({"lost": request.node.callspec.id, "noticed_s": second.time_ms / 1000 - lost, "trains_again_s": rows[second.step + 1] - lost})
    learned = losses(hosts.home, run)
    if not undisturbed:
        assert run_workers(config, tmp_path, 2) == [0, 0]
        undisturbed["losses"] = losses(tmp_path, run)
    assert learned == pytest.approx(undisturbed["losses"], rel=SAME)


@pytest.fixture(scope="module")
def model(hosts: Hosts, run_config: Callable[..., PretrainConfig]) -> Path:
    """What was trained above, or a model that is trained now when those tests were left out."""
    found = hosts.home / "runs" / "lost-0" / "model"
    if not found.exists():
        found = hosts.home / "runs" / "alone" / "model"
        (hosts.home / "alone.yaml").write_text(to_yaml(run_config("alone", {"workers": {"count": 1}, "optimizer": {"steps": 1}})))
        hosts.head.run([*CELLPLANE, "pretrain", "--config", str(hosts.home / "alone.yaml")], hosts.folder / "alone.log")
    return found


def test_files_are_answered_although_a_host_dies(hosts, model):
    """Both hosts are reading a file when one of them dies; its file is read again by the other.

    One that is cut off is not tested: Ray 2.60 asks after a silent task every five minutes only (docs/cluster.md).
    """
    out, log = hosts.home / "answers", hosts.folder / "predict.log"
    inputs = [str(hosts.home / f"cells{number}.h5ad") for number in range(FILES)]
    faults = {"FAULT_AT": "cells_read:0", "FAULT_SIGNAL": "SIGSTOP"}
    workers = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": faults}})}
    command = [*CELLPLANE, "predict", "embed", *inputs, "--model", str(model), "--out", str(out)]
    process = hosts.head.started(command, log, workers)
    wait_for(lambda: all(map(stopped, hosts.hosts)) or process.poll() is not None, 120)
    assert process.poll() is None, log.read_text()[-4000:]
    lost = time.time()
    LOSSES["dies"].lose(hosts)
    with Released(hosts.head):
        ended(process, log)
    told({"lost": "dies", "all_answered_s": time.time() - lost})
    LOSSES["dies"].mend(hosts)
    for number in range(FILES):
        answer = read_h5ad(out / f"cells{number}.h5ad")
        assert answer.obsm["X_cellplm"].shape[0] == CELLS
        assert np.isfinite(answer.obsm["X_cellplm"]).all()


@dataclass
class Callers:
    """Threads outside of both hosts that ask the head's host for embeddings: (began, seconds, error) of every request."""

    hosts: Hosts
    asked: list[tuple[float, float, str]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Callers:
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(CALLERS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self._threads:
            thread.join(120)

    def _ask(self) -> None:
        cells = simulate(SimulateConfig(n_cells=8, n_genes=24, n_types=3, seed=0))
        with seen_from(self.hosts.outside), Client(f"http://{self.hosts.head.address}:8000", KEY) as client:
            while not self.over.is_set():
                began, error = time.time(), ""
                try:
                    client.embed(cells, "tiny", KEYS)
                except ServiceError as refused:
                    error = str(refused)
                self.asked.append((began, time.time() - began, error))

    def since(self, when: float) -> list[tuple[float, float, str]]:
        """Requests that ended after a time."""
        return [one for one in list(self.asked) if one[0] + one[1] > when]


def copies(host: Host) -> int:
    """Processes of the endpoint on a host that receive or answer."""
    found = 0
    for pid in host.pids():
        with suppress(psutil.Error):
            found += "".join(psutil.Process(pid).cmdline()).startswith("ray::ServeReplica:")
    return found


@pytest.fixture(scope="module")
def endpoint(hosts: Hosts, model: Path) -> None:
    """The trained model, one copy and one process that receives on each host, behind a key."""
    (hosts.home / "keys").write_text(KEY_LINE)
    changes = (f"api_keys_file={hosts.home / 'keys'}", "num_cpus=0.2", "max_replicas_per_node=1", "requests_per_minute=null")
    chosen = [word for change in changes for word in ("-o", change)]
    hosts.head.run([*CELLPLANE, "serve", str(model), "--name", "tiny", "--config", "team", *chosen], hosts.folder / "serve.log")
    wait_for(lambda: all(copies(host) == 2 for host in hosts.hosts), 60)


def test_every_host_answers(hosts, endpoint):
    cells = simulate(SimulateConfig(n_cells=8, n_genes=24, n_types=3, seed=0))
    with seen_from(hosts.outside):
        for host in hosts.hosts:
            with Client(f"http://{host.address}:8000", KEY) as client:
                assert client.embed(cells, "tiny", KEYS).shape[0] == 8
        with Client(f"http://{hosts.other.address}:8000") as stranger, pytest.raises(ServiceError, match="401"):
            stranger.models()


@either_way
def test_a_host_lost_in_serving_costs_no_request(hosts, endpoint, loss, request):
    """Requests that its processes had in hand wait until it counts as lost, and are asked again: none fails."""
    with Callers(hosts) as callers:
        wait_for(lambda: len(callers.asked) > 20 * CALLERS, 60)
        lost = time.time()
        loss.lose(hosts)
        wait_for(lambda: time.time() > lost + LOST_S + 5, 60)
        settled = len(callers.asked)
        wait_for(lambda: len(callers.asked) > settled + 20 * CALLERS, 60)
    answered = callers.since(lost)
    waited = [began + took - lost for began, took, _ in answered if took > 2]
    figures = {"asked": len(answered), "failed": sum(bool(error) for *_, error in answered), "last_that_waited_s": max(waited, default=0)}
    told({"lost": request.node.callspec.id, **figures, "longest_s": max(took for _, took, _ in answered)})
    assert not [error for *_, error in answered if error]
    loss.mend(hosts)
    wait_for(lambda: all(copies(host) == 2 for host in hosts.hosts), 60)  # a host that comes back takes its part again
