"""The demo on its real cells: a step that fails says which and how to go on, and a killed demo is simply started again."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cellplane import cluster
from cellplane.data.sources import column
from cellplane.demo import LABELS, bundled_cells
from cellplane.errors import DataError
from cellplane.processes import Member

DEMO = [sys.executable, "-m", "cellplane.cli.main", "demo"]
DEADLINE_S = 600


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """CELLPLANE_HOME of one demo; whatever it started is stopped, also when the test fails."""
    yield tmp_path / "home"
    cluster.down(tmp_path / "home")


def environment(home: Path) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    return {**plain, "CELLPLANE_HOME": str(home)}


def demo(home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A demo from beginning to end."""
    return subprocess.run([*DEMO, *options], capture_output=True, text=True, timeout=DEADLINE_S, env=environment(home), check=False)


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not path.exists():
        assert process.poll() is None, "the demo ended before it was killed"
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.1)


def families(home: Path) -> list[psutil.Process]:
    """Every process of the recorded stack."""
    state = json.loads((home / "stack.json").read_text())
    return [process for member in state["members"].values() for process in Member(**member).family()]


def test_scanpys_package_carries_the_700_labelled_cells():
    cells = bundled_cells()
    assert cells.shape == (700, 765)
    labels = column(cells, LABELS)
    assert len(set(labels)) == 10
    assert None not in labels


def test_a_scanpy_without_them_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="does not carry"):
        bundled_cells()


def test_a_port_in_use_names_the_step_the_port_and_the_way_on(home):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        done = demo(home, "-o", f"mlflow_port={port}")
    assert done.returncode == 4
    assert "[1/8] start Ray and MLflow failed" in done.stderr
    assert str(port) in done.stderr
    assert "run `cellplane demo` again to go on" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (home / "stack.json").exists()


def test_a_home_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    done = demo(tmp_path / "file" / "home")
    assert done.returncode == 1
    assert "set CELLPLANE_HOME" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_option_of_the_stack_names_the_nearest(home):
    done = demo(home, "-o", "mlflow_prot=0")
    assert done.returncode == 2
    assert "did you mean 'mlflow_port'" in done.stderr


@pytest.mark.chaos
@pytest.mark.cluster
def test_a_demo_killed_while_it_pre_trains_is_started_again_and_leaves_nothing_behind(home):
    with (home.parent / "killed.log").open("wb") as log:
        killed = subprocess.Popen(DEMO, stdout=log, stderr=log, env=environment(home))
        try:
            wait_for(home / "runs" / "demo-pretrain-seed0" / "checkpoints" / "step-00000050" / "manifest.json", killed)
        finally:
            killed.send_signal(signal.SIGKILL)
            killed.wait(timeout=30)
    left = families(home)
    assert left
    done = demo(home)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cleaning up" not in done.stderr  # the stack outlived its driver and was used again
    difference = re.search(r"served = offline +largest difference (\S+)", done.stdout)
    assert difference is not None
    assert float(difference[1]) <= 1e-5
    assert re.search(r"registered +models:/cellplm-annotate-pbmc68k@champion = version 1", done.stdout)
    assert not (home / "stack.json").exists()
    _, alive = psutil.wait_procs(left, timeout=30)
    assert not alive
    steps = [json.loads(line)["step"] for line in (home / "runs" / "demo-pretrain-seed0" / "journal.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 201))
    assert cluster.status(home) == []
