"""What `cellplane submit` refuses before a cluster is asked, and how a cluster that says no is told of."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from threading import Thread

import pytest

from cellplane.cli import arrival
from cellplane.cli.submit import JOBS, command_of, load_job
from cellplane.errors import CellplaneError
from cellplane.package import CONFIG

ROOT = Path(__file__).resolve().parents[2]
NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there
PATHS = {  # what each job must be told, as the cluster sees it
    "convert": ["-o", "inputs=[/d/a.h5ad]", "-o", "out=/d/shards"],
    "pretrain": ["-o", "shards=/d/shards"],
    "finetune": ["-o", "data=/d/a.h5ad"],
    "evaluate": ["-o", "model=/d/m", "-o", "train=/d/a.h5ad", "-o", "test=/d/b.h5ad"],
    "predict": ["-o", "model=models:/m@champion", "-o", "inputs=[s3://b/a.h5ad]", "-o", "out=/d/answers"],
    "tune": ["-o", "fixed.data=/d/a.h5ad"],
}
TOKEN = "f" * 64


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing in the environment names a cluster or holds a token."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "CELLPLANE_SECRETS_FILE", "MLFLOW_TRACKING_TOKEN")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)


def one_line(said) -> str:
    assert "Traceback" not in said.err
    (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    return line


def test_every_job_can_be_submitted_but_the_benchmark():
    shipped = {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"__init__", "benchmark"}
    assert set(JOBS) == set(PATHS) == shipped


@pytest.mark.parametrize("job", JOBS)
def test_a_job_that_is_told_enough_is_stopped_by_the_cluster_alone(run, job):
    said = run("submit", job, *PATHS[job], "--address", NOBODY)
    assert said.code == 4
    assert f"no Ray dashboard answers at {NOBODY}" in one_line(said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "-o", "wrokers.count=1"], "did you mean 'workers'"),
        (["pretrain", "-o", "optimizer.steps=many"], r"optimizer\.steps: .*found 'many'"),
        (["pretrain", "--config", "nowhere.yaml"], r"no config file 'nowhere\.yaml'"),
        (["pretrain"], "shards is empty"),
        (["finetune", "--config", "impute", "-o", "data=/d/a.h5ad"], "reference is empty"),
        (["finetune", "-o", "data=cells.h5ad"], "'cells.h5ad' lies here, and data stay here"),
        (["finetune", "-o", "data=others.h5ad"], "nothing of that name goes along"),
        (["tune"], r"fixed\.data is empty"),
        (["tune", "-o", "task=perturb", "-o", "fixed.data=/d"], "does not know the task 'perturb'; it knows: annotate, denoise"),
        (["predict", "-o", "model=/m", "-o", "out=/o"], "inputs is empty"),
        (["convert", "-o", "inputs=[/d/a.h5ad]", "-o", "out=shards"], "would be written into the job's folder"),
        (["convert", "--config", "mine.yaml"], "cellplane submit finetune"),
        (["nonsense"], "no job 'nonsense'; there are: convert, "),
        (["pretrain", *PATHS["pretrain"], "--home", "here"], "path on the cluster"),
        (["pretrain", *PATHS["pretrain"], "--working-dir", "nowhere"], "is no folder"),
        (["pretrain", *PATHS["pretrain"], "--address", "head:6379"], "not the address of Ray's dashboard"),
    ],
)
def test_a_mistake_is_told_before_the_cluster_is_asked(run, tmp_path, arguments, message):
    (tmp_path / "cells.h5ad").touch()
    (tmp_path / "mine.yaml").write_text("kind: finetune\ntask: annotate\n")
    where = [] if "--address" in arguments else ["--address", NOBODY]
    said = run("submit", *arguments, *where)
    assert said.code == 2
    assert re.search(message, one_line(said))


@pytest.mark.parametrize("job", [job for job in JOBS if job != "predict"])  # its settings lie in a room that imports Ray
def test_a_mistake_takes_less_than_five_seconds_and_no_ray(job, tmp_path):
    words = f"['submit', {job!r}, '-o', 'nosuch=1']"
    code = f"import sys; from cellplane.cli.main import main; code = main({words}); sys.exit(50 * ('ray' in sys.modules) + code)"
    before = cpu_s()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert "unknown key 'nosuch'" in done.stderr
    assert cpu_s() - before < 5


def cpu_s() -> float:
    """Seconds that ended children computed: nothing is waited for, and what else runs on this machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    ("job", "config", "overrides", "words"),
    [
        ("finetune", "denoise", ["data=/d/a"], "finetune denoise --config"),
        ("predict", None, ["task=embed"], "predict embed --config"),
        ("evaluate", "cpu_impute", [], "evaluate impute --protocol"),
        ("convert", None, ["inputs=[/a]", "out=/b"], "data convert --config"),
    ],
)
def test_the_task_of_the_configuration_says_which_verb_runs(job, config, overrides, words):
    assert " ".join(command_of(job, load_job(job, config, overrides))) == f"cellplane.cli.arrival {words} {CONFIG}"


class Dashboard(BaseHTTPRequestHandler):
    """Answers as Ray's dashboard does to a version and to a token, for versions and tokens that no Ray here has."""

    version = metadata.version("ray")

    def do_GET(self) -> None:
        given = self.headers.get("Authorization")
        body = json.dumps({"ray_version": self.version}).encode()
        self.send_response(200 if self.path == "/api/version" or given == f"Bearer {TOKEN}" else 403 if given else 401)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("token", "message"), [(None, "asks for a token and none was found"), ("0" * 64, "refused the token")], ids=["missing", "wrong"]
)
def test_a_missing_or_wrong_token_ends_with_4_and_is_not_repeated(run, dashboard, monkeypatch, token, message):
    if token:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    said = run("submit", "pretrain", *PATHS["pretrain"], "--address", dashboard)
    assert said.code == 4
    assert message in one_line(said)
    assert "RAY_AUTH_TOKEN_PATH" in said.err
    assert "0" * 64 not in said.err


def test_another_ray_than_ours_is_refused(run, dashboard, monkeypatch):
    monkeypatch.setattr(Dashboard, "version", "2.9.1")
    said = run("jobs", "list", "--address", dashboard)
    assert said.code == 4
    assert "runs Ray 2.9.1, this is Ray" in one_line(said)


def test_a_token_file_that_is_not_there_is_named(run, dashboard, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nowhere"))
    said = run("jobs", "list", "--address", dashboard)
    assert said.code == 4
    assert str(tmp_path / "nowhere") in one_line(said)


def test_no_cluster_at_all_is_said_with_the_ways_out(run):
    said = run("jobs", "list")
    assert said.code == 4
    assert "--address" in one_line(said)
    assert "cellplane up" in said.err


def test_what_is_secret_stays_here_and_that_is_said(run, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "word")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:word@mlflow.internal")
    said = run("submit", "pretrain", *PATHS["pretrain"], "--address", NOBODY)
    assert "MLFLOW_TRACKING_TOKEN stays here: put it into a file on the cluster, --secrets PATH" in said.err
    assert "MLFLOW_TRACKING_URI stays here" in said.err
    assert "word" not in said.err


def test_a_job_arrives_with_its_home_and_its_secrets(tmp_path, monkeypatch):
    (tmp_path / "secrets").write_text("# of the team\nSUBMITTED_WORD = opensesame\n\n")
    monkeypatch.setenv("CELLPLANE_SECRETS_FILE", str(tmp_path / "secrets"))
    monkeypatch.setenv("SUBMITTED_WORD", "")
    arrival.arrive()
    assert os.environ["SUBMITTED_WORD"] == "opensesame"
    assert (tmp_path / "home").is_dir()


@pytest.mark.parametrize(
    ("variables", "code", "message"),
    [
        ({"CELLPLANE_HOME": ""}, 2, "CELLPLANE_HOME is not set on the cluster.*--home"),
        ({"CELLPLANE_HOME": "here"}, 2, "CELLPLANE_HOME is 'here'"),
        ({"CELLPLANE_HOME": "/proc/nowhere"}, 1, "cannot write /proc/nowhere"),
        ({"CELLPLANE_SECRETS_FILE": "/nowhere"}, 2, "cannot read /nowhere on the cluster"),
        ({"CELLPLANE_SECRETS_FILE": __file__}, 2, "line 1 of .* is not of the form NAME=VALUE"),
    ],
)
def test_what_the_cluster_lacks_is_told(variables, code, message, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CellplaneError, match=message) as raised:
        arrival.arrive()
    assert raised.value.exit_code == code
