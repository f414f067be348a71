"""Commands say one clear thing, end with the right code, and leave out the traceback."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from cellplane.artifact.folder import load_model, save_model, verify_model
from cellplane.cli.main import app
from cellplane.data.sources import read_h5ad

ROOT = Path(__file__).resolve().parents[2]
NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there
JOBS = {
    "convert": ["data", "convert"],
    "pretrain": ["pretrain"],
    "finetune": ["finetune", "annotate"],
    "evaluate": ["evaluate", "annotate"],
    "predict": ["predict", "annotate"],
    "tune": ["tune", "annotate"],
}


def verbs() -> list[tuple[str, ...]]:
    """Every command and group, as it is typed."""
    found: list[tuple[str, ...]] = []
    todo = [((), typer.main.get_command(app))]
    while todo:
        path, command = todo.pop()
        found.append(path)
        todo.extend(((*path, name), child) for name, child in getattr(command, "commands", {}).items())
    return sorted(found)


def options(text: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z-]+", text)) - {"--help", "--config-name"}


@pytest.mark.parametrize("verb", verbs(), ids=lambda verb: " ".join(verb) or "cellplane")
def test_every_verb_helps(run, verb):
    said = run(*verb, "--help")
    assert said.code == 0
    assert "Usage:" in said.out
    assert not said.err


def test_every_verb_of_the_issue_is_there():
    named = {" ".join(verb) for verb in verbs()}
    assert {"data convert", "pretrain", "finetune annotate", "evaluate annotate", "predict annotate", "predict embed"} <= named
    assert {"finetune denoise", "finetune impute", "evaluate denoise", "predict denoise", "tune annotate", "tune denoise"} <= named
    assert {"models list", "models promote", "serve", "doctor", "demo", "up", "down", "status", "config show"} <= named


def test_the_version_is_the_packages(run):
    said = run("--version")
    assert (said.code, said.out) == (0, "cellplane 0.1.0\n")


def one_line(said) -> str:
    """The message of a command that failed: one line on standard error, nothing on standard output."""
    assert said.out == ""
    assert "Traceback" not in said.err
    (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "annotate", "-o", "optimizer.stpes=3"], "did you mean 'optimizer.steps'"),
        (["finetune", "annotate", "-o", "optimizer.steps=many"], r"optimizer\.steps: .*found 'many'"),
        (["finetune", "annotate", "-o", "optimizer.steps"], "not of the form key"),
        (["finetune", "annotate", "--config", "nowhere.yaml"], r"no config file 'nowhere\.yaml'.*annotate"),
        (["finetune", "annotate"], "data is empty"),
        (["finetune", "denoise"], "data is empty"),
        (["finetune", "impute"], "data is empty"),
        (["finetune", "denoise", "-o", "seen_weight=3"], "copying would be learned"),
        (["tune", "annotate"], "data is empty"),
        (["tune", "annotate", "--config", "denoise"], "cellplane tune denoise"),
        (["tune", "annotate", "-o", "space={optimizer.lr: {low: 1}}"], "low 1.0 must lie below high 0.02"),
        (["evaluate", "denoise"], "model is empty"),
        (["pretrain"], "shards is empty"),
        (["pretrain", "-o", "wrokers.count=1"], "did you mean 'workers'"),
        (["pretrain", "-o", "model=huge"], "none of that name is shipped for model: 10m, 300m, 85m, tiny"),
        (["predict", "annotate", "--model", "m", "--out", "o"], "inputs is empty"),
        (["predict", "embed"], "model is empty"),
        (["evaluate", "annotate"], "model is empty"),
        (["data", "convert", "--out", "o"], "inputs"),
        (["models", "show", "nowhere"], "no model folder"),
        (["models", "list", "--tracking-uri", "folder"], "is a folder, which MLflow refuses"),
        (["config", "show", "pretrain/nothing"], "none of that name is shipped for pretrain: "),
        (["config", "show", "nothing"], "KIND/NAME"),
        (["up", "-o", "host=0.0.0.0"], "loopback"),
    ],
)
def test_a_mistake_in_the_configuration_ends_with_2(run, arguments, message):
    said = run(*arguments)
    assert said.code == 2
    assert re.search(message, one_line(said))


@pytest.mark.parametrize("arguments", [["--nonsense"], ["finetune", "annotate", "--stpes", "3"], ["nonsense"], ["models", "promote", "x"]])
def test_a_mistake_in_the_command_ends_with_2(run, arguments):
    said = run(*arguments)
    assert said.code == 2
    assert "Traceback" not in said.err
    assert "Error" in said.err


def test_a_broken_config_file_says_where(run, tmp_path):
    (tmp_path / "broken.yaml").write_text("data: [unclosed")
    said = run("finetune", "annotate", "--config", "broken.yaml")
    assert said.code == 2
    assert "line 1" in one_line(said)


BAD_FILES = [
    ("nowhere.h5ad", "no such file"),
    ("text.h5ad", "not an HDF5 file but text"),
    ("empty.h5ad", "not an HDF5 file but empty"),
    ("truncated.h5ad", "truncated|damaged"),
    ("folder.h5ad", "is a folder"),
]


@pytest.mark.parametrize(("name", "message"), BAD_FILES)
@pytest.mark.parametrize("verb", ["data convert", "finetune annotate"])
def test_a_bad_file_ends_with_3_at_once(run, bad_files, verb, name, message):
    arguments = [name, "--out", "shards"] if verb == "data convert" else ["--data", name]
    said = run(*verb.split(), *arguments)
    assert said.code == 3
    assert re.search(f"{re.escape(name)}.*({message})", one_line(said))


def test_an_unknown_label_column_ends_with_3_and_names_the_nearest(run, h5ad):
    said = run("finetune", "annotate", "--data", h5ad, "--labels-key", "cell_typ")
    assert said.code == 3
    assert "did you mean 'cell_type'" in one_line(said)


def test_shards_that_are_not_there_end_with_3(run, tmp_path):
    for arguments in (["pretrain", "--shards", tmp_path], ["data", "info", tmp_path], ["data", "verify", tmp_path]):
        said = run(*arguments)
        assert said.code == 3
        assert "manifest" in one_line(said)


def test_nothing_to_resume_is_said_before_a_cluster_is_started(run):
    said = run("pretrain", "--resume", "never", "--shards", "nowhere")
    assert said.code == 1
    assert "there is nothing to resume" in one_line(said)


@pytest.mark.parametrize("arguments", [["list"], ["promote", "types", "1"], ["show", "models:/types@champion"]])
def test_an_unreachable_tracker_ends_with_4(run, arguments):
    said = run("models", *arguments, "--tracking-uri", NOBODY)
    assert said.code == 4
    assert "cannot be reached" in one_line(said)


def test_serving_without_ray_ends_with_4(run, tmp_path):
    said = run("serve", tmp_path)
    assert said.code == 4
    assert "cellplane up" in one_line(said)


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(run, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cellplane.cluster.status", interrupted)
    said = run("status")
    assert said.code == 130
    assert "run the same command again to go on" in said.err
    assert "Traceback" not in said.err


def test_a_polite_kill_ends_like_ctrl_c():
    """SIGTERM while a verb works: its own process, because the handler is the process's."""
    wait = "import time, cellplane.cluster as c; c.status = lambda *_: (print('working', flush=True), time.sleep(60))"
    code = f"import sys; {wait}; from cellplane.cli.main import main; sys.exit(main(['status']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "working\n"
        process.terminate()
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said == "stopped; run the same command again to go on from here\n"


def test_an_error_of_ours_is_shown_whole_when_debugging(monkeypatch, run):
    monkeypatch.setenv("CELLPLANE_DEBUG", "1")
    with pytest.raises(Exception, match="shards is empty"):
        run("pretrain")


@pytest.mark.parametrize("name", JOBS)
def test_a_job_takes_the_options_of_its_verb(run, name):
    done = subprocess.run(
        [sys.executable, "-m", f"jobs.{name}", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert options(done.stdout) == options(run(*JOBS[name], "--help").out)


@pytest.mark.parametrize(("name", "task"), [("finetune", "denoise"), ("evaluate", "impute"), ("predict", "perturb")])
def test_a_job_takes_another_task_by_its_name(run, name, task):
    command = [sys.executable, "-m", f"jobs.{name}", task, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert options(done.stdout) == options(run(name, task, "--help").out)


def test_a_job_ends_with_the_code_of_its_verb(tmp_path):
    command = [sys.executable, "-m", "jobs.finetune", "--data", str(tmp_path / "nowhere.h5ad")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "no such file" in done.stderr


def test_a_configuration_is_shown_as_it_resolves(run):
    said = run("config", "show", "pretrain/demo", "-o", "optimizer.steps=7", "-o", "plan.seed=3")
    assert said.code == 0
    assert re.search(r"optimizer:\n  steps: 7\n", said.out)
    assert "width: 128" in said.out  # of the model file it names
    (Path.cwd() / "again.yaml").write_text(said.out)
    assert run("config", "show", "again.yaml").out == said.out


def test_the_shipped_configurations_are_listed(run):
    listed = [line.split()[0] for line in run("config", "list").out.splitlines()]
    shipped = sorted(f"{path.parent.name}/{path.stem}" for path in (ROOT / "configs").glob("*/*.yaml"))
    assert listed == shipped
    assert all(run("config", "show", name).code == 0 for name in listed)


def test_nothing_runs_at_first(run, home):
    assert run("status", "--json").json == {"members": [], "endpoint": None}
    assert run("down").out == "nothing was running\n"
    assert "cellplane up" in run("status").out


def test_the_doctor_gives_a_fix_for_everything_that_is_wrong(run):
    said = run("doctor", "--json")
    checks = said.json["checks"]
    assert said.code == int(not all(check["ok"] for check in checks))
    assert all(check["fix"] for check in checks if not check["ok"])
    assert [line[4:].split()[0] for line in run("doctor").out.splitlines() if line[:3] in ("ok ", "NO ")]


def test_models_are_listed_promoted_and_shown(run, registered):
    uri, folder = registered
    assert run("models", "promote", "types", "1", "--tracking-uri", uri, "--json").json["champion"] == 1
    promoted = run("models", "promote", "types", "2", "--tracking-uri", uri)
    assert promoted.code == 0
    assert re.search(r"previous +1", promoted.out)
    listed = run("models", "list", "--tracking-uri", uri, "--json").json["models"]
    assert [(item["version"], item["aliases"]) for item in listed] == [(2, ["champion"]), (1, ["previous"])]
    assert "champion" in run("models", "list", "--tracking-uri", uri).out
    shown = run("models", "show", "models:/types@previous", "--tracking-uri", uri, "--json").json
    assert shown["model_sha256"] == verify_model(folder)["model_sha256"]
    assert shown["classes"] == ["type_0", "type_1", "type_2", "type_3"]
    wrong = run("models", "promote", "types", "7", "--tracking-uri", uri)
    assert wrong.code == 2
    assert "7" in one_line(wrong)


def test_a_folder_is_verified_byte_by_byte(run, fitted, tmp_path):
    path = fitted.save(tmp_path / "model")
    others = [file for file in path.iterdir() if file.name != "manifest.json"]
    assert run("models", "verify", path, "--json").json["files"] == len(others) == 6
    (path / "vocabulary.json").write_bytes((path / "vocabulary.json").read_bytes() + b" ")
    said = run("models", "verify", path)
    assert said.code == 3
    assert "vocabulary.json" in one_line(said)


def test_an_official_checkpoint_becomes_a_model_folder(run, official, tmp_path):
    said = run("models", "import", official, "tiny", "--out", tmp_path / "ours", "--json")
    assert (said.code, said.json["genes"]) == (0, 150)
    model = load_model(tmp_path / "ours")
    assert (model.task, model.lineage["source"]) == ("pretrain", "official checkpoint tiny")
    assert model.card.startswith("# CellPLM 16 x 1")
    missing = run("models", "import", official, "large", "--out", tmp_path / "x")
    assert missing.code == 3
    assert "no official checkpoint 'large'" in one_line(missing)


def test_fine_tuning_and_evaluating_print_scores(run, h5ad, heldout, recipe, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOBODY)
    arguments = ["finetune", "annotate", "--data", h5ad, "--test", heldout, *recipe]
    first = run(*arguments, "--json")
    assert first.code == 0
    assert (first.json["steps"], first.json["reused"], first.json["run_id"]) == (20, False, "not tracked")
    assert list(first.json["scores"]) == ["cellplm", "majority", "pca_knn", "logistic_regression"]
    again = run(*arguments)
    assert re.search(r"reused +True", again.out)
    assert re.search(r"pca_knn +\d\.\d{3}", again.out)
    evaluated = run("evaluate", "annotate", "--model", first.json["model"], "--train", h5ad, "--test", heldout, "--json")
    assert evaluated.json["scores"] == first.json["scores"]


@pytest.mark.cluster
def test_cells_become_shards_that_can_be_looked_at_and_verified(ray_cluster, run, h5ad, bad_files):
    arguments = ["data", "convert", h5ad, "--out", "shards", "--batch-key", "batch", "--labels-key", "cell_type", "-o", "max_cells=40"]
    first = run(*arguments, "--json")
    assert first.code == 0
    assert (first.json["cells"], first.json["genes"], first.json["new"], first.json["reused"]) == (200, 150, 1, 0)
    assert run(*arguments, "--json").json["reused"] == 1
    info = run("data", "info", "shards", "--json").json
    assert (info["cells"], info["genes"], info["labels"]) == (200, 150, "type_0, type_1, type_2, type_3")
    assert run("data", "verify", "shards").code == 0
    assert run("data", "export", "shards", "--out", "back").code == 0
    assert (read_h5ad(Path("back") / Path(h5ad).name).X != read_h5ad(h5ad).X).nnz == 0
    (shard,) = Path("shards").glob("*.arrow")
    shard.write_bytes(shard.read_bytes()[:-8])
    damaged = run("data", "verify", "shards")
    assert damaged.code == 3
    assert shard.name in one_line(damaged)


@pytest.mark.cluster
def test_files_without_counts_end_with_3_and_a_list_of_places(ray_cluster, run, bad_files, fitted):
    converted = run("data", "convert", "scaled.h5ad", "--out", "shards")
    assert converted.code == 3
    assert re.search(r"no raw counts found: .*X: non-integer", one_line(converted))
    assert not Path("shards/manifest.json").exists()
    model = fitted.save(Path("model"))
    said = run("predict", "annotate", "scaled.h5ad", "train.h5ad", "--model", model, "--out", "answers", "--json")
    assert said.code == 3
    assert said.json["new"] == 1
    assert re.search(r"1 of the files could not be done.*scaled\.h5ad.*no raw counts", said.err)
    assert read_h5ad(Path("answers/train.h5ad")).obs["cellplm_cell_type"].notna().all()


@pytest.mark.cluster
def test_files_are_embedded(ray_cluster, run, h5ad, base_model):
    model = save_model(base_model, Path("base"))
    said = run("predict", "embed", h5ad, "--model", model, "--out", "answers")
    assert said.code == 0
    assert read_h5ad(Path("answers/train.h5ad")).obsm["X_cellplm"].shape == (200, 16)
    cannot = run("predict", "annotate", h5ad, "--model", model, "--out", "others")
    assert cannot.code == 2
    assert "fine-tuned for it" in cannot.err


def test_json_is_one_object_on_one_line(run):
    for arguments in (["status", "--json"], ["doctor", "--json"]):
        out = run(*arguments).out
        assert out.count("\n") == 1
        assert isinstance(json.loads(out), dict)
