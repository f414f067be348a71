"""Fine-tuning jobs leave a model folder, a run with everything in it and a version; killed they go on, finished they are reused."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cellplane.artifact.folder import load_model, save_model, verify_model
from cellplane.config import load_config, to_yaml
from cellplane.data.sources import AnnData, read_h5ad, write_h5ad
from cellplane.errors import CheckpointError, ColumnError, ConfigError, DataError, FileFormatError, ServiceError
from cellplane.pipelines import finetuning
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.baselines import BASELINES
from cellplane.pipelines.config import DenoiseJobConfig, EvaluateConfig, FinetuneConfig
from cellplane.pipelines.denoising import DenoisingPipeline
from cellplane.pipelines.evaluation import run_evaluate
from cellplane.pipelines.finetuning import identity_of, resumed_job, run_finetune
from cellplane.pipelines.job import JobReport
from cellplane.processes import locked
from cellplane.tracking.journal import Journal
from cellplane.tracking.registry import list_models, resolve_model
from cellplane.tracking.runs import connect, local_uri
from cellplane.train.run_folder import RunFolder
from tests.house.source import PLATFORM, ROOT
from tests.pipelines.conftest import NOBODY, STEPS, Place, make_place

METHODS = ["cellplm", *BASELINES]
SMALL = {"width": 16, "n_heads": 2, "n_blocks": 1, "latent": "ae", "latent_width": 8, "decoder_width": 16, "decoder_bottleneck": 8}


@pytest.fixture(scope="module")
def first(
    tmp_path_factory: pytest.TempPathFactory, empty_tracker: bytes, training: AnnData, query: AnnData
) -> tuple[Place, JobReport, list[int]]:
    """A finished job: its place, its report and the steps its progress showed."""
    place = make_place(tmp_path_factory.mktemp("home"), training, query)
    (place.home / "mlflow.db").write_bytes(empty_tracker)
    shown: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELLPLANE_HOME", str(place.home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        report = run_finetune(place.config(register_as="types"), lambda done, total, metrics: shown.append(done))
    return place, report, shown


@pytest.fixture
def at_home(first: tuple[Place, JobReport, list[int]], monkeypatch: pytest.MonkeyPatch) -> Place:
    """The place of the finished job, as CELLPLANE_HOME."""
    monkeypatch.setenv("CELLPLANE_HOME", str(first[0].home))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return first[0]


def test_fine_tuning_reports_what_it_did(first):
    place, report, shown = first
    assert (report.model, report.reused, report.steps, report.version) == (place.home / "runs" / "types" / "model", False, STEPS, 1)
    assert report.seconds > 0
    assert shown == list(range(1, STEPS + 1))
    assert list(report.scores) == METHODS
    assert report.scores["cellplm"]["macro_f1"] > report.scores["majority"]["macro_f1"]


def test_the_model_folder_is_the_estimator_that_was_scored(first, query):
    _, report, _ = first
    pipeline = CellTypeAnnotationPipeline.load(report.model)
    assert pipeline.score(query)["macro_f1"] == pytest.approx(report.scores["cellplm"]["macro_f1"])
    card = load_model(report.model).card
    assert all(f"| {method} |" in card for method in METHODS)


def test_the_run_holds_configuration_metrics_plots_and_the_model(first, at_home):
    _, report, _ = first
    client = connect()
    run = client.get_run(report.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.steps"] == str(STEPS)
    assert run.data.tags["cellplane.run_key"].startswith("finetune:types:")
    assert {"cellplane.config_sha256", "cellplane.git_commit", "cellplane.data_sha256"} <= run.data.tags.keys()
    history = client.get_metric_history(report.run_id, "train/loss")
    assert sorted(point.step for point in history) == list(range(1, STEPS + 1))
    for method in METHODS:
        assert run.data.metrics[f"test/{method}/macro_f1"] == pytest.approx(report.scores[method]["macro_f1"])
    found = {item.path for folder in ("", "plots", "model") for item in client.list_artifacts(report.run_id, folder)}
    assert {"config.yaml", "scores.json", "plots/loss.png", "plots/confusion.png", "plots/umap.png", "plots/reliability.png"} <= found
    assert {"model/manifest.json", "model/weights.safetensors", "model/README.md"} <= found


def test_the_logged_configuration_reproduces_the_job(first, at_home):
    config = load_config(FinetuneConfig, RunFolder.of("types").artifacts / "config.yaml", "finetune")
    assert config == at_home.config(register_as="types")


def test_the_registered_version_is_the_model(first, at_home, tmp_path):
    _, report, _ = first
    (version,) = list_models()
    assert (version.name, version.version, version.run_id) == ("types", 1, report.run_id)
    resolved = resolve_model("models:/types/1", None, tmp_path)
    assert verify_model(resolved.path)["model_sha256"] == verify_model(report.model)["model_sha256"]


def test_a_second_time_reuses_model_run_and_version(first, at_home):
    _, report, _ = first
    before = verify_model(report.model)["model_sha256"]
    again = run_finetune(at_home.config(register_as="types"))
    assert again.reused
    assert (again.steps, again.run_id, again.version) == (STEPS, report.run_id, 1)
    assert again.scores == report.scores
    assert verify_model(report.model)["model_sha256"] == before
    assert len(list_models()) == 1
    assert len(connect().get_metric_history(report.run_id, "train/loss")) == STEPS


def test_other_settings_are_another_model(first, at_home):
    identity = identity_of(at_home.config())
    indifferent = {"test": None, "register_as": "other", "tracking_uri": NOBODY, "device": "cpu", "checkpoint": {"every_steps": 7}}
    assert identity == identity_of(at_home.config(**indifferent))
    changes = ({"seed": 1}, {"data": str(at_home.test)}, {"transfer": {"block_lr_decay": 0.9}}, {"guard": {"max_skips": 1}})
    assert len({identity, *(identity_of(at_home.config(**change)) for change in changes)}) == 1 + len(changes)


def test_an_input_is_hashed_once_until_it_changes(at_home, tmp_path, monkeypatch):
    read: list[Path] = []
    monkeypatch.setattr(finetuning, "file_sha256", lambda path: read.append(path) or f"{len(read):064d}")
    copy = tmp_path / "cells.h5ad"
    copy.write_bytes(at_home.test.read_bytes())
    config = at_home.config(data=str(copy), test=None)
    assert identity_of(config) == identity_of(config)
    assert read == [copy]
    copy.write_bytes(copy.read_bytes() + b" ")
    identity_of(config)
    assert read == [copy, copy]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "a17756faa2bfc15fe58f88c5b9bdfbbf2e515c5be2edbe56d54e19d6e192cdc8"),
        ({"base_model": "base", "seed": 3}, "ae660cb661ceddaff69f225c802fd07c1f4a3d630e24c86b28a983ebac4833ee"),
    ],
)
def test_a_run_of_an_earlier_version_keeps_its_identity(monkeypatch, tmp_path, changes, expected):
    """Both were computed by the version before this one, which knew no transfer, guard, device or checkpoints."""
    monkeypatch.setattr(finetuning, "_input_hashes", lambda config: {"data": "0" * 64})
    monkeypatch.setattr(finetuning, "verify_model", lambda path: {"model_sha256": "1" * 64})
    monkeypatch.setattr(finetuning, "_base", lambda config: tmp_path)
    assert identity_of(FinetuneConfig(data="cells.h5ad", **changes)) == expected


def test_a_damaged_finished_model_is_made_again(alone):
    report = run_finetune(alone.config(test=None))
    weights = report.model / "weights.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1])
    again = run_finetune(alone.config(test=None))
    assert not again.reused
    assert weights.read_bytes() == good


def test_without_a_tracker_the_model_is_complete_and_that_is_said(alone, caplog):
    with caplog.at_level(logging.WARNING):
        report = run_finetune(alone.config())
    assert (report.run_id, report.version) == (None, None)
    assert list(report.scores) == METHODS
    assert verify_model(report.model)
    assert "the tracker has not heard of it" in caplog.text
    assert (RunFolder.of("types").artifacts / "scores.json").is_file()


def test_without_a_tracker_nothing_can_be_registered_but_the_model_is_kept(alone):
    with pytest.raises(ServiceError, match=r"the model is complete in .*could not be registered.*cannot be reached"):
        run_finetune(alone.config(test=None, register_as="types"))
    assert verify_model(RunFolder.of("types").model)
    assert run_finetune(alone.config(test=None)).reused


def test_a_tracker_that_comes_later_gets_the_whole_history(alone, empty_tracker):
    run_finetune(alone.config(test=None))
    (alone.home / "mlflow.db").write_bytes(empty_tracker)
    report = run_finetune(alone.config(test=None, tracking_uri=local_uri(alone.home), register_as="late"))
    assert report.reused
    assert report.version == 1
    history = connect(local_uri(alone.home)).get_metric_history(report.run_id, "train/loss")
    assert [point.step for point in history] == list(range(1, STEPS + 1))


def test_training_is_not_lost_when_scoring_fails(alone, empty_tracker, monkeypatch):
    (alone.home / "mlflow.db").write_bytes(empty_tracker)
    config = alone.config(tracking_uri=local_uri(alone.home))

    def fail(*_: object) -> None:
        raise DataError("scoring failed")

    monkeypatch.setattr(finetuning, "evaluate_annotation", fail)
    with pytest.raises(DataError, match="scoring failed"):
        run_finetune(config)
    assert run_finetune(config.model_copy(update={"test": None})).reused


@pytest.mark.parametrize("which", ["data", "test"])
def test_bad_files_are_refused_before_any_work(alone, which):
    broken = alone.home / "broken.h5ad"
    broken.write_bytes(alone.train.read_bytes()[:5000])
    with pytest.raises(FileFormatError, match=r"broken\.h5ad"):
        run_finetune(alone.config(**{which: str(broken)}))
    with pytest.raises(DataError, match="no such file"):
        run_finetune(alone.config(**{which: str(alone.home / "nowhere.h5ad")}))
    with pytest.raises(ColumnError, match="did you mean 'cell_type'"):
        run_finetune(alone.config(keys={"labels_key": "celltype"}))
    assert not (alone.home / "runs").exists()


def test_cells_that_cannot_be_learned_from_leave_no_run_behind(alone):
    cells = read_h5ad(alone.train)
    cells.X = -cells.X
    write_h5ad(cells, alone.home / "negative.h5ad")
    with pytest.raises(DataError, match=r"negative\.h5ad.*negative values"):
        run_finetune(alone.config(data=str(alone.home / "negative.h5ad"), test=None))
    assert not (alone.home / "runs").exists()


def test_settings_that_are_missing_are_named(alone):
    for run, message in (
        (lambda: run_finetune(FinetuneConfig()), "data is empty"),
        (lambda: run_evaluate(EvaluateConfig()), "model is empty"),
        (lambda: run_finetune(alone.config(run="../escape")), "cannot be a folder's name"),
    ):
        with pytest.raises(ConfigError, match=message):
            run()


def test_fine_tuning_starts_from_a_base_model(alone, base_model):
    path = save_model(base_model, alone.home / "base")
    report = run_finetune(alone.config(test=None, base_model=str(path)))
    lineage = load_model(report.model).lineage
    assert lineage["base_model"] == verify_model(path)["model_sha256"]
    assert load_model(report.model).vocabulary == base_model.vocabulary


def test_evaluating_gives_the_scores_of_fine_tuning_and_writes_them_down(first, at_home, tmp_path):
    _, report, _ = first
    config = EvaluateConfig(model="models:/types/1", train=str(at_home.train), test=str(at_home.test), out=str(tmp_path))
    scores, out = run_evaluate(config)
    assert scores == report.scores
    assert out == tmp_path
    assert json.loads((out / "scores.json").read_text())["scores"] == scores
    assert {path.name for path in out.glob("*.png")} == {"confusion.png", "reliability.png", "umap.png"}


def in_another_process(config: Any, fault: str) -> int:
    """The exit code of a job that is killed at a named point."""
    file = Path(os.environ["CELLPLANE_HOME"]) / "job.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    program = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from cellplane.config import load_config\n"
        "from cellplane.pipelines.finetuning import TASKS, run_finetune\n"
        f"run_finetune(load_config(TASKS[{config.task!r}].config, {str(file)!r}, 'finetune'))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{PLATFORM}{os.pathsep}{ROOT}", "FAULT_AT": fault}
    return subprocess.run([sys.executable, "-c", program], env=environment, timeout=300).returncode


def test_a_job_that_was_killed_goes_on_and_makes_the_same_model(first, alone, monkeypatch):
    """Model, lineage and scores are those of the job that nothing disturbed; --resume needs the run's name alone."""
    place, report, _ = first
    config = alone.config(data=str(place.train), test=None, checkpoint={"every_steps": 10, "asynchronous": False})
    assert in_another_process(config, "step_rank0:16") == -9
    assert not RunFolder.of("types").model.exists()
    told: list[int] = []
    again = run_finetune(resumed_job("annotate", "types", None, []), lambda done, total, metrics: told.append(done))
    assert told == list(range(11, STEPS + 1))
    assert verify_model(again.model)["model_sha256"] == verify_model(report.model)["model_sha256"]
    assert [row.step for row in Journal(RunFolder.of("types").journal).rows()] == list(range(1, STEPS + 1))


def test_there_must_be_something_to_resume(alone):
    with pytest.raises(CheckpointError, match="no stored configuration"):
        resumed_job("annotate", "types", None, [])
    run_finetune(alone.config(test=None, optimizer={"steps": 2}))
    assert resumed_job("annotate", "types", None, []).run == "types"
    with pytest.raises(CheckpointError, match="of task annotate, not of denoise"):
        resumed_job("denoise", "types", None, [])
    with pytest.raises(CheckpointError, match="seed is 0 there and 1 here"):
        resumed_job("annotate", "types", None, ["seed=1"])


def test_other_settings_under_the_same_name_begin_anew_and_that_is_said(alone, caplog):
    before = run_finetune(alone.config(test=None, optimizer={"steps": 2}))
    sha256 = verify_model(before.model)["model_sha256"]
    with caplog.at_level(logging.WARNING):
        after = run_finetune(alone.config(test=None, optimizer={"steps": 3}))
    assert "begins anew: optimizer.steps is 2 there and 3 here" in caplog.text
    assert (after.reused, after.steps) == (False, 3)
    assert verify_model(after.model)["model_sha256"] != sha256


def test_two_jobs_never_write_one_run(alone, monkeypatch):
    monkeypatch.setattr(finetuning, "ANOTHER_WRITER_S", 0.1)
    with locked(RunFolder.of("types").lock, 1), pytest.raises(ServiceError, match="is busy"):
        run_finetune(alone.config(test=None))


def test_a_linear_probe_leaves_the_base_model_as_it_was(alone, base_model):
    path = save_model(base_model, alone.home / "base")
    report = run_finetune(alone.config(test=None, base_model=str(path), transfer={"learn": "head"}))
    weights = load_model(report.model).weights
    kept = [name for name in base_model.weights if name.startswith(("embedder.", "encoder."))]
    assert kept
    assert all(torch.equal(weights[name], base_model.weights[name]) for name in kept)
    with pytest.raises(ConfigError, match="there is none; name one"):
        run_finetune(alone.config(test=None, run="other", transfer={"learn": "head"}))


def denoise_config(place: Place, **changes: Any) -> DenoiseJobConfig:
    plain = {"data": str(place.train), "model": SMALL, "optimizer": {"steps": 12, "lr": 5e-3}, "max_cells": 60, "validate_every": 4}
    return DenoiseJobConfig.model_validate({**plain, **changes})


def test_a_denoising_job_is_tracked_resumed_and_reused(alone, empty_tracker, query):
    (alone.home / "mlflow.db").write_bytes(empty_tracker)
    config = denoise_config(alone, tracking_uri=local_uri(alone.home), checkpoint={"every_steps": 5, "asynchronous": False})
    assert in_another_process(config, "step_rank0:7") == -9
    told: list[int] = []
    report = run_finetune(config, lambda done, total, metrics: told.append(done))
    assert told == list(range(6, 13))
    run = connect(local_uri(alone.home)).get_run(report.run_id)
    assert run.info.status == "FINISHED"
    assert {"train/nb_hidden", "val/nb_hidden", "train/lr"} <= run.data.metrics.keys()
    assert load_model(report.model).task == "denoise"
    assert run_finetune(config).reused
    undisturbed = run_finetune(denoise_config(alone, tracking_uri=NOBODY, run="other"))
    assert verify_model(undisturbed.model)["model_sha256"] == verify_model(report.model)["model_sha256"]
    assert DenoisingPipeline.load(report.model).predict(query).shape == query.shape


def test_a_denoising_job_scores_its_recipe_when_asked(alone):
    report = run_finetune(denoise_config(alone, optimizer={"steps": 3}, evaluate=True, run="scored"))
    assert list(report.scores) == ["cellplm", "gene_frequency", "knn15", "nonzero_mean"]
    again = run_finetune(denoise_config(alone, optimizer={"steps": 3}, evaluate=True, run="scored"))
    assert again.reused
    assert again.scores == report.scores
