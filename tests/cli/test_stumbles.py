"""What a new user stumbles over is told at once: files that cannot be used, faults of ours, what runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import typer
from typer.testing import CliRunner

from cellplane.cli.main import app
from cellplane.data.sources import read_h5ad, write_h5ad
from tests.cli.test_main import one_line
from tests.pipelines.conftest import NOBODY


def no_cluster(*_: object, **__: object) -> None:
    raise AssertionError("a cluster was asked")


def test_missing_shards_are_told_before_torch_and_ray_are_loaded(tmp_path):
    heavy = "[m for m in ('torch', 'ray', 'mlflow', 'matplotlib') if m in sys.modules]"
    code = f"import sys; from cellplane.cli.main import main; code = main(['pretrain', '--shards', 'nowhere']); print(code, {heavy})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "3 []\n"
    assert done.stderr == "error: nowhere: no such folder; expected a folder written by data convert\n"


@pytest.mark.parametrize("via", [[], ["--via", NOBODY]])
@pytest.mark.parametrize("task", ["annotate", "impute"])
def test_files_that_do_not_open_end_with_3_before_anything_is_loaded_or_asked(run, bad_files, task, via):
    said = run("predict", task, "text.h5ad", "truncated.h5ad", "nowhere.h5ad", "--model", "unread", "--out", "answers", *via)
    assert said.code == 3
    found = one_line(said)
    assert "none of the 3 files can be used" in found
    for name, reason in (("text.h5ad", "not an HDF5 file but text"), ("truncated.h5ad", "truncated|damaged"), ("nowhere.h5ad", "no such")):
        assert re.search(f"{re.escape(name)}.*({reason})", found)
    assert not Path("answers").exists()


def test_files_a_model_cannot_read_end_with_3_before_a_cluster_is_started(run, bad_files, fitted, monkeypatch):
    monkeypatch.setattr("cellplane.cluster.local_ray", no_cluster)
    model = fitted.save(Path("model"))
    strange = read_h5ad(Path("train.h5ad"))
    strange.var_names = [f"NOBODY{number}" for number in range(strange.n_vars)]
    write_h5ad(strange, Path("strange.h5ad"))
    said = run("predict", "annotate", "scaled.h5ad", "strange.h5ad", "--model", model, "--out", "answers")
    assert said.code == 3
    found = one_line(said)
    assert re.search(r"scaled\.h5ad: no raw counts found", found)
    assert re.search(r"strange\.h5ad: .*vocabulary", found)
    one_good = run("predict", "annotate", "scaled.h5ad", "train.h5ad", "--model", model, "--out", "answers")
    assert "a cluster was asked" in one_good.err


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verb with a defect."""

    def defect(*_: object) -> None:
        return 1 // 0

    monkeypatch.setattr("cellplane.cluster.status", defect)


def test_a_defect_is_shown_whole_and_called_a_fault_of_ours_with_what_to_report(broken, run):
    said = run("status", "--json")
    assert (said.code, said.out) == (1, "")
    trace, _, message = said.err.partition("error: ")
    assert trace.startswith("Traceback")
    assert trace.endswith("ZeroDivisionError: integer division or modulo by zero\n")
    assert "fault of cellplane" in message
    assert "command  cellplane status --json\n  version  cellplane 0.1.0, Python 3" in message


def test_where_log_lines_are_json_a_defect_is_one_of_them(broken, run, monkeypatch, caplog):
    monkeypatch.setenv("CELLPLANE_LOG_FORMAT", "json")
    said = run("status")
    assert said.code == 1
    assert "Traceback" not in said.err
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]


def test_a_defect_is_raised_when_debugging(broken, run, monkeypatch):
    monkeypatch.setenv("CELLPLANE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run("status")


def test_the_members_of_a_stack_are_shown_in_units_that_people_read(run, home):
    me = psutil.Process()
    members = {"mlflow": {"pid": me.pid, "create_time": me.create_time()}, "ray": {"pid": 2**22 - 1, "create_time": 1.0}}
    ports = {"mlflow_port": 1, "dashboard_port": 2, "ray_port": 3, "serve_port": 4}
    home.mkdir(exist_ok=True)
    state = {"home": str(home), "host": "127.0.0.1", **ports, "temp_dir": str(home / "temp"), "members": members}
    (home / "stack.json").write_text(json.dumps(state))
    out = run("status").out
    assert re.search(r"^mlflow +\d+ +http://127\.0\.0\.1:1 +\d+ +[\d.]+ [MG]iB +NO$", out, re.MULTILINE)
    assert re.search(r"^ray .* 0 +0 B +NO$", out, re.MULTILINE)
    assert "no model is served" in out
    (mlflow, ray) = run("status", "--json").json["members"]
    assert (mlflow["rss_bytes"] > 10_000_000, ray["rss_bytes"]) == (True, 0)


def groups() -> list[list[str]]:
    """The command itself and every verb that has verbs of its own."""
    found, open_ = [[]], [([], typer.main.get_command(app))]
    while open_:
        words, command = open_.pop()
        for name, child in command.commands.items():
            if hasattr(child, "commands"):
                found.append([*words, name])
                open_.append(([*words, name], child))
    return found


@pytest.mark.parametrize("words", groups(), ids=lambda words: " ".join(words) or "cellplane")
def test_no_list_of_commands_cuts_a_sentence_in_the_middle(words, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(app, [*words, "--help"]).output
    listed = shown[shown.index("Commands:") :]
    assert not [line for line in listed.splitlines() if line.endswith("...")]
