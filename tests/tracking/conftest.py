"""Real trackers for this room: an sqlite file, a server process that can be stopped and started, and model folders."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from cellplane.tracking.runs import RunSpec, TrackedRun, local_uri


@pytest.fixture(scope="session")
def empty_tracker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sqlite file with MLflow's tables and nothing in them: making the tables takes seconds."""
    folder = tmp_path_factory.mktemp("tracker")
    TrackedRun.open(RunSpec(run_key="none", experiment="cellplane/none", name="none"), local_uri(folder)).finish()
    return folder / "mlflow.db"


@pytest.fixture
def tracker(tmp_path: Path, empty_tracker: Path) -> str:
    """The address of a tracker of this test alone."""
    (tmp_path / "mlflow.db").write_bytes(empty_tracker.read_bytes())
    return local_uri(tmp_path)


class Server:
    """A real MLflow server on a free port of 127.0.0.1."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", local_uri(self.folder), "--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert self.process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
            try:
                if httpx.get(f"{self.uri}/health", timeout=2).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.1)
        raise AssertionError("the MLflow server did not come up")

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, 9)
            self.process.wait(timeout=30)
            self.process = None


@pytest.fixture
def server(tmp_path: Path, empty_tracker: Path) -> Iterator[Server]:
    """A server that is not started yet, on a database of this test alone."""
    (tmp_path / "mlflow.db").write_bytes(empty_tracker.read_bytes())
    server = Server(tmp_path)
    yield server
    server.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def model_folder(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a folder with weights, a card and the manifest that describes them; another text gives another model."""

    def make(content: str) -> Path:
        folder = tmp_path / f"model-{content}"
        folder.mkdir()
        (folder / "README.md").write_text(f"# Card of {content}\n", encoding="utf-8")
        (folder / "model.safetensors").write_bytes(content.encode() * 1000)
        digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
        files = {name: {"bytes": (folder / name).stat().st_size, "sha256": digest} for name, digest in digests.items()}
        manifest = {"format_version": 1, "model_sha256": hashlib.sha256(json.dumps(digests).encode()).hexdigest(), "files": files}
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        return folder

    return make


@pytest.fixture
def logged_run() -> Callable[[str, Path], str]:
    """Opens a run and logs the folder as its "model"; returns the run id."""

    def log(uri: str, folder: Path) -> str:
        run = TrackedRun.open(RunSpec(run_key=folder.name, experiment="cellplane/finetune/annotate", name="run"), uri)
        run.log_artifacts(folder, "model")
        return run.run_id

    return log
