"""Real servers of this suite alone, on free ports of 127.0.0.1: PostgreSQL, an S3 server behind a network that breaks, Redis.

Each is a child of the test process, in a folder of its own, and goes with it. A server whose program is not installed skips
the tests that need it and says which package has it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.backends.proxy import Proxy
from tests.data.conftest import cells, h5ad
from tests.tracking.conftest import logged_run, model_folder
from tests.train.conftest import cellplane_home, losses, run_config, run_workers, shards

__all__ = ["cellplane_home", "cells", "h5ad", "logged_run", "losses", "model_folder", "run_config", "run_workers", "shards"]

UNPRIVILEGED = "postgres"  # PostgreSQL refuses to run as root
QUIET = {
    "OMP_WAIT_POLICY": "passive",
    "OMP_NUM_THREADS": "1",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
# A store that hangs is given up after a second here; the defaults of s3fs (15 s, five times) would make the tests long
S3_OPTIONS = {"config_kwargs": {"connect_timeout": 1, "read_timeout": 1, "retries": {"max_attempts": 0}}}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs a server."""
    for item in items:
        if "tests/backends/" in item.path.as_posix():
            item.add_marker(pytest.mark.backends)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def needs(*packages: str) -> None:
    """Skips when a Python package of `make backends` is absent."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the Python package {package}: make backends installs it (requirements-backends.lock)")


WITH_US = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []  # a killed test leaves no server behind


@dataclass
class Server:
    """A process that can be started, killed with all it started, and started again on the same port and data."""

    name: str
    command: Sequence[str]
    folder: Path
    answers: Callable[[], bool]
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """What it said."""
        return self.folder / f"{self.name}.log"

    def start(self, wait_s: float = 120.0) -> None:
        with self.log.open("ab") as log:
            environment = {**os.environ, **QUIET, **self.environment}
            self.process = subprocess.Popen([*WITH_US, *self.command], stdout=log, stderr=log, env=environment, start_new_session=True)
        deadline = time.monotonic() + wait_s
        while not self.answers():
            assert self.process.poll() is None, f"{self.name} ended: {self.log.read_text(errors='replace')[-2000:]}"
            assert time.monotonic() < deadline, f"{self.name} does not answer: {self.log.read_text(errors='replace')[-2000:]}"
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL for its whole session, as a power cut."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Asked to end; PostgreSQL then does not wait for its clients."""
        self._end(signal.SIGINT)

    def _end(self, number: int) -> None:
        if self.process is None:
            return
        try:
            os.killpg(self.process.pid, number)
            self.process.wait(timeout=30)
        except ProcessLookupError:
            pass
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=30)
        self.process = None


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=0.5).close()
    except OSError:
        return False
    return True


# S3


@dataclass(frozen=True)
class S3:
    """A bucket store; clients reach it through ``network``, which can break."""

    network: Proxy
    direct: str

    def bucket(self) -> str:
        """A new bucket."""
        import boto3

        name = f"b{uuid.uuid4().hex[:12]}"
        boto3.client("s3", endpoint_url=self.direct).create_bucket(Bucket=name)
        return name

    def objects(self, url: str) -> dict[str, bytes]:
        """Bytes of every object below an s3:// URL by its key, past the network."""
        import boto3

        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        client = boto3.resource("s3", endpoint_url=self.direct).Bucket(bucket)
        return {item.key.removeprefix(f"{prefix}/"): item.get()["Body"].read() for item in client.objects.filter(Prefix=prefix)}

    def put(self, url: str, content: bytes) -> None:
        """Replaces an object, past the network."""
        import boto3

        bucket, _, key = url.removeprefix("s3://").partition("/")
        boto3.client("s3", endpoint_url=self.direct).put_object(Bucket=bucket, Key=key, Body=content)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """moto's S3 server, and the proxy that stands for the way to it."""
    needs("moto", "boto3", "s3fs")
    port = free_port()
    credentials = {"AWS_ACCESS_KEY_ID": "cellplane", "AWS_SECRET_ACCESS_KEY": "cellplane", "AWS_DEFAULT_REGION": "us-east-1"}
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    server = Server("s3", command, tmp_path_factory.mktemp("s3"), lambda: listens(port), credentials)
    network = Proxy(port)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**credentials, "AWS_ENDPOINT_URL": network.url, "MLFLOW_S3_ENDPOINT_URL": network.url}.items():
            patch.setenv(name, value)
        server.start()
        yield S3(network, f"http://127.0.0.1:{port}")
    server.kill()
    network.close()


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The store, with clients that lose patience soon."""
    import fsspec
    from s3fs import S3FileSystem

    from cellplane.data import remote

    monkeypatch.setitem(fsspec.config.conf, "s3", S3_OPTIONS)
    monkeypatch.setenv("FSSPEC_S3", json.dumps(S3_OPTIONS))  # for child processes
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    monkeypatch.setattr(remote, "WAITS_S", (0.0, 0.1))
    s3_server.network.count()
    return s3_server


@pytest.fixture
def bucket(s3: S3) -> str:
    """s3:// and the name of a bucket of this test alone."""
    return f"s3://{s3.bucket()}"


# PostgreSQL


def _programs() -> Path:
    """The folder of PostgreSQL's own programs."""
    found = [
        Path(path).resolve().parent
        for path in [shutil.which("initdb") or "", *map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
        if path
    ]
    if not found:
        pytest.skip("needs PostgreSQL's server: apt-get install postgresql")
    return found[-1]


def _as_postgres() -> list[str]:
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv (util-linux): PostgreSQL does not run as root")
    return ["setpriv", f"--reuid={UNPRIVILEGED}", f"--regid={UNPRIVILEGED}", "--init-groups", "--"]


@dataclass
class Postgres:
    """A database server; ``uri`` as MLflow takes it."""

    server: Server
    uri: str


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """PostgreSQL with an empty database, on a free port."""
    needs("psycopg2")
    programs, who, port = _programs(), _as_postgres(), free_port()
    folder = Path(tempfile.mkdtemp(prefix="cp-pg-"))  # not below pytest's own folder, which only root may enter
    try:
        if who:
            shutil.chown(folder, UNPRIVILEGED)
        data = str(folder / "data")
        made = [*who, str(programs / "initdb"), "-D", data, "-U", "cellplane", "--auth", "trust", "--encoding", "UTF8", "--no-sync"]
        subprocess.run(made, check=True, capture_output=True, timeout=120, cwd=folder)
        command = [*who, str(programs / "postgres"), "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", str(folder)]
        ready = [str(programs / "pg_isready"), "-h", "127.0.0.1", "-p", str(port)]
        server = Server("postgres", command, folder, lambda: subprocess.run(ready, capture_output=True).returncode == 0)
        server.start()
        subprocess.run(
            [str(programs / "createdb"), "-h", "127.0.0.1", "-p", str(port), "-U", "cellplane", "mlflow"], check=True, timeout=60
        )
        yield Postgres(server, f"postgresql+psycopg2://cellplane@127.0.0.1:{port}/mlflow")
        server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# MLflow


def mlflow_server(folder: Path, backend: str, artifacts: str) -> tuple[Server, str]:
    """An MLflow server that is not started yet, and its address."""
    import httpx

    port = free_port()
    uri = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            return httpx.get(f"{uri}/health", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", backend, "--artifacts-destination", artifacts]
    return Server("mlflow", command, folder, answers), uri
