"""The process that submitted a run dies, or the tracker is away: one run in MLflow, every step once, nothing waits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cellplane.config import to_yaml
from cellplane.pipelines.jobs import run_pretrain
from cellplane.tracking.journal import Journal
from cellplane.tracking.runs import MetricPump, local_uri
from cellplane.train.run_folder import RunFolder
from tests.chaos.test_training_elastic import wait_for
from tests.tracking.conftest import Server
from tests.train.conftest import STEPS

pytestmark = pytest.mark.chaos

DRIVER = "from cellplane.cli.main import run; run()"
EXPERIMENT = "cellplane/pretrain"


def tracked(uri: str) -> tuple[MlflowClient, list[str]]:
    """A client, and the runs of the experiment."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    return client, [run.info.run_id for run in client.search_runs([experiment.experiment_id])]


def times_logged(uri: str, key: str = "train/loss") -> Counter[int]:
    """How often the one run of the tracker has each step."""
    client, (run,) = tracked(uri)
    return Counter(metric.step for metric in client.get_metric_history(run, key))


def each_once(steps: int) -> Counter[int]:
    return Counter(range(1, steps + 1))


def test_a_killed_driver_is_submitted_again_and_the_same_run_goes_on(
    ray_cluster, run_config, cellplane_home, losses, run_workers, tmp_path_factory
):
    """kill -9 while both workers stand after a known step; they die with the driver, and --resume needs no configuration."""
    import ray

    changes = {"workers": {"count": 2, "collective_timeout_s": 60}, "tracking_uri": local_uri(cellplane_home)}
    config = run_config("r", changes)
    (cellplane_home / "run.yaml").write_text(to_yaml(config))
    flag = cellplane_home / "stopped"
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "CELLPLANE_HOME": str(cellplane_home)}
    environment |= {
        "FAULT_AT": f"step_rank0:4:{flag}",
        "FAULT_SIGNAL": "SIGSTOP",
        "RAY_AUTH_TOKEN_PATH": str(Path.home() / ".ray" / "auth_token"),
    }
    command = [sys.executable, "-c", DRIVER, "pretrain"]
    with (cellplane_home / "driver.log").open("ab") as log:
        first = subprocess.Popen([*command, "--config", str(cellplane_home / "run.yaml")], env=environment, stdout=log, stderr=log)
        wait_for(lambda: flag.exists() or first.poll() is not None)
        assert first.poll() is None, (cellplane_home / "driver.log").read_text()
        os.kill(first.pid, signal.SIGKILL)
        first.wait(30)
        again = subprocess.run([*command, "--resume", "r"], env=environment, stdout=log, stderr=log, timeout=300)
    assert again.returncode == 0, (cellplane_home / "driver.log").read_text()
    assert [start.step for start in RunFolder.of("r").starts()] == [0, 3]
    assert times_logged(local_uri(cellplane_home)) == each_once(STEPS)
    undisturbed = tmp_path_factory.mktemp("undisturbed")
    assert run_workers(config, undisturbed, 2) == [0, 0]
    assert losses(cellplane_home, "r") == losses(undisturbed, "r")


def test_a_tracker_that_is_away_for_the_whole_run_costs_nothing_and_hears_everything_later(
    ray_cluster, run_config, cellplane_home, monkeypatch, caplog
):
    tracker = cellplane_home / "tracker"
    tracker.mkdir()
    server = Server(tracker)
    server.start()
    spent = {}
    try:
        for name in ("warm", "near", "away"):  # the first one pays for what is cached later
            if name == "away":
                server.stop()
            began = time.monotonic()
            changes = {"engine": {"name": "torch"}, "workers": {"count": 1}, "optimizer": {"steps": 150}, "tracking_uri": server.uri}
            changes |= {"checkpoint": {"every_steps": 50}}
            report = run_pretrain(run_config(name, changes))
            assert report.steps == 150
            rows = Journal(RunFolder.of(name).journal).rows()
            spent[name] = (time.monotonic() - began, (rows[-1].time_ms - rows[0].time_ms) / 1000)
        assert report.run_id is None
        assert "the tracker has not heard of it" in caplog.text
        server.start()
        again = run_pretrain(run_config("away", changes))
        assert again.reused
        assert again.run_id is not None
        print({"seconds in all, between first and last step": spent})
        client, runs = tracked(server.uri)
        assert len(runs) == 3
        logged = Counter(metric.step for metric in client.get_metric_history(again.run_id, "train/loss"))
        assert logged == each_once(150)
        assert spent["away"][1] < 3 * spent["near"][1] + 1  # a dead tracker is never waited for while training
    finally:
        server.stop()


def test_a_pump_and_its_journal_agree_after_the_driver_died_between_two_batches(cellplane_home, tmp_path):
    """The journal is cut at the restored step; what the tracker has beyond it is not doubled when it is trained again."""
    from cellplane.tracking.runs import RunSpec

    journal = Journal(tmp_path / "journal.jsonl")
    spec = RunSpec(run_key="pretrain:r:1", experiment=EXPERIMENT, name="r")
    uri = local_uri(cellplane_home)
    for begin in (1, 4):  # steps 4 and 5 are done twice
        journal.cut(begin - 1)
        for step in range(begin, 6 if begin == 1 else 9):
            journal.append(step, {"train/loss": 1.0 / step})
        with MetricPump(spec, uri, journal):
            pass
    assert times_logged(uri) == each_once(8)
