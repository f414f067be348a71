"""The local stack comes up once, is found again, is mended member by member, and goes without leaving anything."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cellplane import cluster
from cellplane.cluster import Stack, StackConfig
from cellplane.config import load_config
from cellplane.errors import ConfigError, PortInUseError, ServiceError
from cellplane.package import pack
from cellplane.processes import http_status
from cellplane.submission import Jobs, Order, target_of
from cellplane.tracking.registry import list_models
from cellplane.tracking.runs import RunSpec, TrackedRun

ANY_PORTS = StackConfig(num_cpus=2, mlflow_port=0, dashboard_port=0, serve_port=0)

START_AND_DIE = """
import os, sys
from pathlib import Path
from cellplane.cluster import StackConfig, up
up(StackConfig(num_cpus=2, mlflow_port=0, dashboard_port=0, serve_port=0), Path(sys.argv[1]))
os.kill(os.getpid(), 9)
"""

DRIVE = """
import json, os, sys
from pathlib import Path
import ray
from cellplane import cluster
stack = cluster.running(Path(sys.argv[1]))
cluster.connect(stack)

@ray.remote
def look():
    import cellplane
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MLFLOW_TRACKING_URI", "CELLPLANE_HOME")
    return {"file": cellplane.__file__, **{name: os.environ.get(name) for name in names}}

print(json.dumps(ray.get(look.remote(), timeout=60)))
cluster.disconnect()
"""

REFUSED = """
import os, sys
from pathlib import Path
from cellplane import cluster
from cellplane.errors import ServiceError
os.environ["RAY_AUTH_TOKEN"] = "0" * 64
try:
    cluster.connect(cluster.running(Path(sys.argv[1])))
except ServiceError as error:
    print(error)
"""

JOB = """
import glob, os, sys
from cellplane.cluster import local_ray
import ray
with local_ray(2):
    print(ray.get(ray.remote(lambda: os.environ["OMP_WAIT_POLICY"]).remote(), timeout=60))
    temp_dir = ray._private.worker.global_worker.node.get_temp_dir_path()
    with local_ray(1):
        pass
    print(ray.is_initialized(), ray.cluster_resources()["CPU"])
print(ray.is_initialized(), os.path.exists(temp_dir))
print(os.environ.get("TMPDIR"), os.listdir(os.environ["TMPDIR"]))
"""


def run_python(code: str, *arguments: str, home: Path | None = None, temporary: Path | None = None) -> list[str]:
    """The lines a fresh interpreter prints: Ray can join one cluster per process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"CELLPLANE_HOME": str(home)} if home else {}
    environment |= {"TMPDIR": str(temporary)} if temporary else {}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack whose starter was killed right after; it is taken down even when tests fail."""
    home = tmp_path_factory.mktemp("home")
    try:
        run_python(START_AND_DIE, str(home))
        found = cluster.running(home)
        assert found is not None
        yield found
    finally:
        cluster.down(home)


@pytest.mark.cluster
def test_the_stack_outlives_its_starter_and_is_reused(stack: Stack) -> None:
    assert cluster.up(ANY_PORTS, stack.home) == stack
    members = cluster.status(stack.home)
    assert [member.name for member in members] == ["mlflow", "ray"]
    assert all(member.answers and member.processes > 1 and member.rss_bytes > 0 for member in members)


@pytest.mark.cluster
def test_state_and_token_are_private_and_the_dashboard_asks_for_it(stack: Stack) -> None:
    assert stat.S_IMODE(stack.token_path.stat().st_mode) == 0o600
    assert stat.S_IMODE((stack.home / "stack.json").stat().st_mode) == 0o600
    token = stack.token_path.read_text()
    assert token not in (stack.home / "stack.json").read_text() + (stack.home / "logs" / "ray.log").read_text()
    assert http_status(stack.host, stack.dashboard_port, "/api/jobs/") == 401
    assert http_status(stack.host, stack.dashboard_port, "/api/jobs/", token) == 200


@pytest.mark.cluster
def test_workers_run_this_code_with_threads_that_wait_quietly(stack: Stack) -> None:
    seen = json.loads(run_python(DRIVE, str(stack.home))[-1])
    assert Path(seen["file"]) == Path(cluster.__file__).parent / "__init__.py"
    assert (seen["OMP_WAIT_POLICY"], seen["GOMP_SPINCOUNT"]) == ("passive", "0")
    assert (seen["MLFLOW_TRACKING_URI"], seen["CELLPLANE_HOME"]) == (stack.mlflow_uri, str(stack.home))


@pytest.mark.cluster
def test_a_wrong_token_is_refused_at_once_with_the_way_out(stack: Stack) -> None:
    message = run_python(REFUSED, str(stack.home))[-1]
    assert "refused the token" in message
    assert "0" * 64 not in message


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore:ssl=None is deprecated")  # so Ray calls aiohttp
def test_a_job_is_handed_to_the_running_stack_without_an_address_or_a_token(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)  # of another cluster
    jobs = Jobs(target_of(None, stack.home))
    order = Order("look", "look", ("cellplane.cli.arrival", "status", "--json"), pack(stack.home, ""), {})
    said: list[str] = []
    job = jobs.follow(jobs.submit(order)[0], said.append)
    assert job.exit_code == 0, "".join(said)
    assert '"name": "mlflow"' in "".join(said)


@pytest.mark.cluster
def test_server_and_file_see_the_same_runs_and_models(stack: Stack) -> None:
    spec = RunSpec(run_key="shared", experiment="cellplane/pretrain", name="shared")
    through_server = TrackedRun.open(spec, stack.mlflow_uri)
    through_server.log_text("here", "note.txt")
    through_file = TrackedRun.open(spec, f"sqlite:///{stack.home}/mlflow.db")
    assert through_file.run_id == through_server.run_id
    through_file.log_text("there", "second.txt")
    assert {item.path for item in through_server.client.list_artifacts(through_server.run_id)} == {"note.txt", "second.txt"}
    assert list_models(stack.mlflow_uri) == []


@pytest.mark.cluster
def test_a_dead_member_is_started_again_and_the_other_kept(stack: Stack) -> None:
    os.kill(stack.members["mlflow"].pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while stack.members["mlflow"].process():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert cluster.running(stack.home) is None
    mended = cluster.up(ANY_PORTS, stack.home)
    assert mended.members["ray"] == stack.members["ray"]
    assert mended.members["mlflow"] != stack.members["mlflow"]
    assert all(member.answers for member in cluster.status(stack.home))


@pytest.mark.cluster
def test_down_leaves_no_process_no_temp_dir_and_no_state(stack: Stack) -> None:
    now = cluster.running(stack.home)
    assert now is not None
    family = [process for member in now.members.values() for process in member.family()]
    assert len(family) > 10
    assert cluster.down(stack.home)
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)
    assert not now.temp_dir.exists()
    assert not (stack.home / "stack.json").exists()
    assert cluster.status(stack.home) == []
    assert not cluster.down(stack.home)
    with pytest.raises(ServiceError, match="cellplane up"):
        cluster.connect(now)


@pytest.mark.cluster
def test_a_job_without_a_stack_gets_a_cluster_for_its_own_time(tmp_path: Path) -> None:
    (home := tmp_path / "home").mkdir()
    (temporary := tmp_path / "tmp").mkdir()
    lines = run_python(JOB, home=home, temporary=temporary)
    assert lines[-4:] == ["passive", "True 2.0", "False False", f"{temporary} []"]
    assert [path.name for path in home.iterdir()] == ["ray_token"]


def test_a_member_that_dies_is_reported_with_its_log_and_nothing_stays(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"this is not a database, whatever its name says" * 100)
    with pytest.raises(ServiceError, match=r"(?s)mlflow ended while starting.*logs/mlflow\.log.*database"):
        cluster.up(ANY_PORTS, tmp_path)
    assert not (tmp_path / "stack.json").exists()
    assert cluster.status(tmp_path) == []


def test_a_port_in_use_stops_before_anything_is_started(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        config = ANY_PORTS.model_copy(update={"dashboard_port": holder.getsockname()[1]})
        with pytest.raises(PortInUseError, match="-o dashboard_port=0"):
            cluster.up(config, tmp_path)
    assert not (tmp_path / "logs").exists()
    assert not (tmp_path / "stack.json").exists()


def test_down_is_safe_when_nothing_runs_and_makes_nothing(tmp_path: Path) -> None:
    assert not cluster.down(tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_state_file_of_dead_processes_is_cleaned_up(tmp_path: Path) -> None:
    temp_dir = tmp_path / "temp"
    temp_dir.mkdir()
    member = {"pid": 2**22 - 1, "create_time": 1.0}
    ports = {"mlflow_port": 1, "dashboard_port": 2, "ray_port": 3, "serve_port": 4}
    state = {"home": str(tmp_path), "host": "127.0.0.1", **ports, "temp_dir": str(temp_dir), "members": {"mlflow": member, "ray": member}}
    (tmp_path / "stack.json").write_text(json.dumps(state))
    assert cluster.running(tmp_path) is None
    assert [status.processes for status in cluster.status(tmp_path)] == [0, 0]
    assert cluster.down(tmp_path)
    assert not temp_dir.exists()


def test_a_state_file_that_is_something_else_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text('{"members": 3}')
    with pytest.raises(ConfigError, match=r"stack\.json"):
        cluster.up(ANY_PORTS, tmp_path)


def test_the_shipped_file_is_the_defaults_and_only_loopback_is_allowed() -> None:
    assert load_config(StackConfig, "local", "cluster") == StackConfig()
    with pytest.raises(ConfigError, match="loopback"):
        load_config(StackConfig, "local", "cluster", ["host=0.0.0.0"])
