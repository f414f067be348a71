"""Runs and models in PostgreSQL: many write at once, the server or its database dies in between, and nothing is lost or doubled."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cellplane.errors import ConfigError
from cellplane.tracking.journal import Journal
from cellplane.tracking.promotion import rollback
from cellplane.tracking.registry import aliases_of, history_of, list_models, promote, register
from cellplane.tracking.runs import MetricPump, RunSpec, TrackedRun, connect
from tests.backends.conftest import Postgres, Server, mlflow_server

WRITERS, STEPS = 8, 400
WRITER = Path(__file__).with_name("writers.py")


@pytest.fixture(scope="module")
def server(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """An MLflow server on PostgreSQL, and its address."""
    folder = tmp_path_factory.mktemp("mlflow")
    started, uri = mlflow_server(folder, postgres.uri, str(folder / "artifacts"))
    started.start()
    yield started, uri
    started.kill()


def steps_of(uri: str, run_id: str, key: str) -> list[int]:
    return sorted(metric.step for metric in connect(uri).get_metric_history(run_id, key))


def wait_for(condition: Callable[[], bool], limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_eight_processes_write_at_once_and_every_value_arrives(server, model_folder, tmp_path):
    uri = server[1]
    folders = [model_folder(f"w{number}") for number in range(WRITERS)]
    command = [sys.executable, str(WRITER), uri]
    environment = {**os.environ, "PYTHONPATH": f"{WRITER.parents[2] / 'platform'}{os.pathsep}{WRITER.parents[2]}", "OMP_NUM_THREADS": "1"}
    writers = [
        subprocess.Popen([*command, str(number), str(STEPS), str(folder)], stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)
        for number, folder in enumerate(folders)
    ]
    said = [writer.communicate(timeout=240)[0].split() for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * WRITERS
    assert sorted(int(version) for _, version in said) == list(range(1, WRITERS + 1))
    for run_id, _ in said:
        assert steps_of(uri, run_id, "train/loss") == list(range(1, STEPS + 1))
    assert len([version for version in list_models(uri) if version.name == "many"]) == WRITERS


@pytest.mark.parametrize("which", ["tracker", "database", "both"])
def test_what_dies_in_between_costs_no_value_and_doubles_none(server, postgres, tmp_path, which):
    mlflow, uri = server
    journal = Journal(tmp_path / "journal.jsonl")
    spec = RunSpec(run_key=f"killed-{which}", experiment="cellplane/pretrain", name="killed")
    pump = MetricPump(spec, uri, journal, interval_s=0.05).start()
    for step in range(1, 301):
        journal.append(step, {"train/loss": 1.0}, time_ms=1000 + step)
    wait_for(lambda: pump.run_id is not None and len(steps_of(uri, pump.run_id, "train/loss")) > 0)
    dying = {"tracker": [mlflow], "database": [postgres.server], "both": [mlflow, postgres.server]}[which]
    for one in dying:
        one.kill()
    for step in range(301, 1501):
        journal.append(step, {"train/loss": 1.0}, time_ms=1000 + step)
    time.sleep(1)  # some tries meet nobody
    for one in reversed(dying):
        one.start()
    assert pump.close("FINISHED", timeout_s=90)
    assert pump.run_id is not None
    assert steps_of(uri, pump.run_id, "train/loss") == list(range(1, 1501))
    assert TrackedRun.open(spec, uri).replay(journal) == 0


def test_versions_promotions_and_their_history_outlive_the_database(server, postgres, model_folder, logged_run, tmp_path):
    uri = server[1]
    versions = [register(folder, logged_run(uri, folder), "kept", uri) for folder in (model_folder("one"), model_folder("two"))]
    for version in versions:
        promote("kept", version, uri)
    postgres.server.kill()
    postgres.server.start()
    assert aliases_of("kept", uri) == {"champion": 2, "previous": 1}
    assert [entry["version"] for entry in history_of("kept", uri)] == [1, 2]
    assert rollback("kept", uri) == 1
    assert aliases_of("kept", uri)["champion"] == 1


def test_a_driver_that_is_not_installed_is_named(postgres):
    """SQLAlchemy 2.1 takes psycopg 3 where an address names no driver."""
    with pytest.raises(ConfigError, match=r"needs the Python package psycopg, .*psycopg2"):
        TrackedRun.open(RunSpec(run_key="direct", experiment="cellplane/direct", name="direct"), postgres.uri.replace("+psycopg2", ""))


def test_the_database_is_used_without_a_server_too(postgres, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = TrackedRun.open(RunSpec(run_key="direct", experiment="cellplane/direct", name="direct"), postgres.uri)
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(1, {"train/loss": 0.5}, time_ms=1001)
    assert run.replay(journal) == 1
    assert steps_of(postgres.uri, run.run_id, "train/loss") == [1]
