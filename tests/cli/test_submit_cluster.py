"""Jobs handed to a real Ray that asks for a token: every kind of job, their exit codes, and their end."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cellplane.data.config import SimulateConfig
from cellplane.data.simulate import simulate_to
from cellplane.processes import Member, end, http_status, port_for, short_temp_dir, spawn, tail
from cellplane.tracking.journal import Journal, JournalRow

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore:ssl=None is deprecated")]  # so Ray calls aiohttp
HOST = "127.0.0.1"
TINY = {"width": 16, "n_heads": 2, "n_blocks": 1, "latent_width": 8, "dropout": 0.0}
NETWORK = [part for key, value in TINY.items() for part in ("-o", f"model.{key}={value}")]


@dataclass(frozen=True)
class Cluster:
    """A head with a token: where its dashboard is, who it is, and the storage that all nodes (one) see."""

    address: str
    token: str
    member: Member
    storage: Path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """`ray start --head` with the dashboard on, as an administrator does it, without CELLPLANE_HOME; ended by its pid."""
    folder, temporary = tmp_path_factory.mktemp("cluster"), short_temp_dir()
    token = secrets.token_hex(32)
    (folder / "token").write_text(token)
    dashboard, port = port_for(HOST, 0, "dashboard"), port_for(HOST, 0, "port")
    options = {"node-ip-address": HOST, "port": port, "num-cpus": 2, "temp-dir": temporary, "include-dashboard": "true"}
    options |= {"dashboard-host": HOST, "dashboard-port": dashboard}
    options |= {"dashboard-agent-listen-port": port_for(HOST, 0, "agent"), "ray-client-server-port": port_for(HOST, 0, "client")}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "CELLPLANE_HOME": "", "PYTHONPATH": ""}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    member = spawn([*command, *(f"--{name}={value}" for name, value in options.items())], folder, environment, folder / "ray.log")
    try:
        until = time.monotonic() + 60
        while http_status(HOST, dashboard, "/api/jobs/", token) != 200:
            assert member.process(), tail(folder / "ray.log")
            assert time.monotonic() < until, tail(folder / "ray.log")
            time.sleep(0.2)
        yield Cluster(f"http://{HOST}:{dashboard}", token, member, folder)
    finally:
        for process in member.family():  # a polite end takes 20 s, and nothing here is kept
            with suppress(psutil.NoSuchProcess):
                process.kill()
        end([member])
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture(scope="module")
def cells(cluster: Cluster) -> Path:
    """A file of simulated cells that the cluster sees."""
    simulate_to(cluster.storage / "cells.h5ad", SimulateConfig(n_cells=200, n_genes=80), lambda _: None)
    return cluster.storage / "cells.h5ad"


@pytest.fixture
def submit(run, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Hands a job to the cluster with its token."""
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(cluster.storage / "token"))
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", cluster.address)
    return lambda job, *arguments: run("submit", job, "--home", cluster.storage / "home", *arguments)


def convert(cells: Path, out: Path) -> list[object]:
    return ["convert", "-o", f"inputs=[{cells}]", "-o", f"out={out}", "-o", "keys.batch_key=batch", "-o", "max_cells=50"]


def annotator(cells: Path, run: str, steps: int = 5) -> list[object]:
    course = {"data": cells, "run": run, "optimizer.steps": steps, "max_cells": 50, "patience": 10**6, "checkpoint.every_steps": 20}
    return ["finetune", *(part for key, value in course.items() for part in ("-o", f"{key}={value}")), *NETWORK]


def test_a_conversion_runs_on_the_workers_with_this_code_and_is_listed(submit, run, cluster, cells):
    said = submit(*convert(cells, cluster.storage / "shards"))
    assert said.code == 0, said.out + said.err
    assert re.search(r"cells +200", said.out)
    assert (cluster.storage / "shards" / "manifest.json").is_file()
    job_id = re.search(r"job (\S+) at", said.err)[1]
    (listed,) = [row for row in run("jobs", "list", "--json").json["jobs"] if row["job"] == job_id]
    assert (listed["status"], listed["exit_code"]) == ("SUCCEEDED", 0)
    assert run("jobs", "logs", job_id).out == said.out
    near = run("jobs", "logs", job_id[:-1] + "7")
    assert near.code == 2
    assert f"did you mean {job_id!r}" in near.err


def test_jobs_that_fail_end_with_their_own_codes(run, submit, cluster, cells):
    homeless = run("submit", *annotator(cells, "homeless"), "--detach", "--json").json["job"]
    said = submit(*convert(cluster.storage / "nowhere.h5ad", cluster.storage / "none"))
    assert said.code == 3
    assert "no such file" in said.out
    assert "exit code 3" in said.err
    followed = run("jobs", "logs", homeless, "--follow")
    assert followed.code == 2
    assert "CELLPLANE_HOME is not set on the cluster" in followed.out


@pytest.mark.chaos
def test_fine_tuning_keeps_its_model_on_the_cluster_and_reads_its_secrets_there(submit, run, cluster, cells, monkeypatch):
    secret = cluster.storage / "secrets"
    secret.write_text("MLFLOW_TRACKING_TOKEN=opensesame\n")
    away = ["-o", "tracking_uri=http://127.0.0.1:9"]  # a job is complete without a tracker, and begins sooner
    said = submit(*annotator(cells, "types"), *away, "--secrets", secret, "--json")
    assert said.code == 0, said.out + said.err
    assert said.json["status"] == "SUCCEEDED"
    assert (cluster.storage / "home" / "runs" / "types" / "model" / "manifest.json").is_file()
    shown = http_body(cluster, f"/api/jobs/{said.json['job']}")
    assert str(secret) in shown
    assert "opensesame" not in shown
    assert cluster.token not in shown


def http_body(cluster: Cluster, path: str) -> str:
    from urllib.request import Request, urlopen

    with urlopen(Request(cluster.address + path, headers={"Authorization": f"Bearer {cluster.token}"}), timeout=10) as answer:
        return answer.read().decode()


@pytest.mark.chaos
def test_a_running_job_is_not_started_twice_and_stops_without_leaving_a_process(submit, run, cluster, cells):
    endless = annotator(cells, "endless", steps=200_000)
    first = submit(*endless, "--detach", "--json").json["job"]
    wait_until((cluster.storage / "home" / "runs" / "endless").is_dir)
    again = submit(*endless, "--detach", "--json")
    assert again.json["job"] == first
    assert "runs already" in again.err
    other = submit(*annotator(cells, "endless", steps=300_000), "--detach")
    assert other.code == 4
    assert f"cellplane jobs stop {first}" in other.err
    working = entry_points(cluster)
    assert working
    stopped = run("jobs", "stop", first, "--json").json
    assert (stopped["status"], stopped["stopped"]) == ("STOPPED", "now")
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in working)
    assert run("jobs", "stop", first, "--json").json["stopped"] == "had ended before"
    followed = run("jobs", "logs", first, "--follow")
    assert followed.code == 130


def entry_points(cluster: Cluster) -> list[psutil.Process]:
    """Processes of submitted jobs among the cluster's own."""
    found = []
    for process in psutil.Process(cluster.member.pid).children(recursive=True):
        try:
            if "cellplane.cli.arrival" in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.chaos
def test_ctrl_c_leaves_the_job_running_and_says_so(submit, run, cluster, cells):
    words = ["submit", "--home", cluster.storage / "home", *annotator(cells, "left", steps=200_000)]
    command = [sys.executable, "-m", "cellplane.cli.main", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert line
    job_id = re.search(r"job (\S+) goes on", err)[1]
    assert next(row for row in run("jobs", "list", "--json").json["jobs"] if row["job"] == job_id)["exit_code"] is None
    run("jobs", "stop", job_id)


@pytest.mark.parametrize("token", [None, "0" * 64], ids=["missing", "wrong"])
def test_a_missing_or_wrong_token_is_refused_before_anything_is_sent(run, submit, cells, monkeypatch, tmp_path, token):
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    if token:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    said = run("submit", *annotator(cells, "refused"))
    assert said.code == 4
    assert ("refused the token" if token else "asks for a token and none was found") in said.err


@pytest.mark.chaos
def test_a_job_that_was_stopped_goes_on_when_it_is_handed_in_again(submit, run, cluster, cells):
    order = annotator(cells, "halves", steps=200_000)
    folder = cluster.storage / "home" / "runs" / "halves"
    first = submit(*order, "--detach", "--json").json["job"]
    wait_until(lambda: kept(folder) >= 40)
    run("jobs", "stop", first)
    before, earlier = kept(folder), learned(folder)
    second = submit(*order, "--detach", "--json").json["job"]
    assert second == f"{first[:-1]}2"
    wait_until(lambda: kept(folder) > before)
    run("jobs", "stop", second)
    after = learned(folder)
    assert [row.step for row in after] == list(range(1, len(after) + 1))
    assert after[:before] == earlier[:before]  # with the times of day: nothing was learned anew


def learned(folder: Path) -> list[JournalRow]:
    """What the run wrote down of every step."""
    return [row for row in Journal(folder / "journal.jsonl").rows() if "train/loss" in row.metrics]


def kept(folder: Path) -> int:
    """The newest step that a checkpoint was written at."""
    return max((int(path.name.rpartition("-")[2]) for path in (folder / "checkpoints").glob("step-*") if path.is_dir()), default=0)


def wait_until(condition: Callable[[], bool], seconds: float = 90.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.2)


@pytest.mark.chaos
def test_pretraining_evaluation_prediction_and_a_search_run_too(submit, cluster, cells):
    shards, home = cluster.storage / "all", cluster.storage / "home" / "runs"
    steps = ["-o", "optimizer.steps=4"]
    workers = ["-o", "workers.count=1", "-o", "model=tiny"]
    orders = [
        convert(cells, shards),
        ["pretrain", "-o", f"shards={shards}", "-o", "run=base", *steps, *workers, *NETWORK],
        annotator(cells, "scored"),
        ["evaluate", "-o", f"model={home}/scored/model", "-o", f"train={cells}", "-o", f"test={cells}"],
        ["predict", "-o", f"model={home}/scored/model", "-o", f"inputs=[{cells}]", "-o", f"out={cluster.storage}/answers"],
        [
            "tune",
            "-o",
            f"fixed.data={cells}",
            "-o",
            "trials=2",
            "-o",
            "fixed.optimizer.steps=4",
            "-o",
            "fixed.max_cells=50",
            "-o",
            "run=search",
        ],
    ]
    for order in orders:
        said = submit(*order)
        assert said.code == 0, f"{order[0]}: {said.out[-3000:]}{said.err}"
    assert (cluster.storage / "answers" / cells.name).is_file()
