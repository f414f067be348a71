"""Whole jobs leave a model folder, a run with everything in it, and a version; a second time they reuse what is there."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cellplane.artifact.folder import load_model, save_model, verify_model
from cellplane.config import load_config
from cellplane.data.config import ConvertConfig
from cellplane.data.convert import convert_with, write_part
from cellplane.data.sources import AnnData, write_h5ad
from cellplane.errors import ColumnError, ConfigError, DataError, FileFormatError, ServiceError, TrainingError
from cellplane.pipelines import jobs
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.baselines import BASELINES
from cellplane.pipelines.config import EvaluateConfig, FinetuneConfig
from cellplane.pipelines.jobs import JobReport, run_evaluate, run_finetune, run_pretrain
from cellplane.tracking.registry import list_models, resolve_model
from cellplane.tracking.runs import RunSpec, TrackedRun, connect, local_uri
from cellplane.train.config import PretrainConfig
from cellplane.train.launch import RunFolder, run_worker
from tests.pipelines.conftest import RECIPE

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there
METHODS = ["cellplm", *BASELINES]
STEPS = 30


@dataclass
class Place:
    """A home with cells in it."""

    home: Path
    train: Path
    test: Path

    def config(self, **changes: Any) -> FinetuneConfig:
        plain = {**RECIPE, "optimizer": {"steps": STEPS, "lr": 1e-2, "warmup_steps": 5}, "validate_every": 10}
        return FinetuneConfig.model_validate({**plain, "data": str(self.train), "test": str(self.test), "run": "types", **changes})


@pytest.fixture(scope="module")
def empty_tracker(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An sqlite file with MLflow's tables and nothing in them: making the tables takes seconds."""
    folder = tmp_path_factory.mktemp("tracker")
    TrackedRun.open(RunSpec(run_key="none", experiment="cellplane/none", name="none"), local_uri(folder)).finish()
    return (folder / "mlflow.db").read_bytes()


def make_place(home: Path, training: AnnData, query: AnnData) -> Place:
    torch.set_num_threads(1)
    for name, data in (("train", training), ("test", query)):
        write_h5ad(data, home / f"{name}.h5ad")
    return Place(home, home / "train.h5ad", home / "test.h5ad")


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


@pytest.fixture
def alone(tmp_path: Path, training: AnnData, query: AnnData, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A place without a tracker."""
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOBODY)
    return make_place(tmp_path, training, query)


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
    identity = jobs._finetune_identity(at_home.config())
    assert identity == jobs._finetune_identity(at_home.config(test=None, register_as="other", tracking_uri=NOBODY))
    assert identity != jobs._finetune_identity(at_home.config(seed=1))
    assert identity != jobs._finetune_identity(at_home.config(data=str(at_home.test)))


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

    monkeypatch.setattr(jobs, "_score_finetuned", fail)
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


def test_settings_that_are_missing_are_named(alone):
    for run, message in (
        (lambda: run_finetune(FinetuneConfig()), "data is empty"),
        (lambda: run_pretrain(PretrainConfig()), "shards is empty"),
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


def test_held_out_cells_may_have_other_genes(fitted, training, query):
    other = query[:, ::-1][:, :100].copy()
    scores = jobs.evaluate_annotation(fitted, training, other, 0)
    assert scores["pca_knn"]["macro_f1"] > scores["majority"]["macro_f1"]
    stranger = query.copy()
    stranger.var_names = [f"x{n}" for n in range(stranger.n_vars)]
    with pytest.raises(DataError):
        jobs.evaluate_annotation(fitted, training, stranger, 0)


@pytest.fixture
def shards(alone: Place) -> Path:
    """The training cells as shards."""
    config = ConvertConfig(inputs=(str(alone.train),), out=str(alone.home / "shards"), max_cells=40)
    convert_with(config, lambda tasks: map(write_part, tasks), lambda _: None)
    return alone.home / "shards"


Pretrain = Callable[..., PretrainConfig]


@pytest.fixture
def pretrain_config(alone: Place, shards: Path, empty_tracker: bytes) -> Pretrain:
    (alone.home / "mlflow.db").write_bytes(empty_tracker)
    tracker = local_uri(alone.home)
    model = {"width": 16, "n_blocks": 1, "n_heads": 2, "latent_width": 8, "n_clusters": 3, "cluster_width": 8, "decoder_width": 16}

    def make(**changes: Any) -> PretrainConfig:
        plain = {"shards": str(shards), "run": "base", "model": model, "optimizer": {"steps": 4}, "engine": {"name": "torch"}}
        return PretrainConfig.model_validate({**plain, "tracking_uri": tracker, **changes})

    return make


def test_pre_training_leaves_a_model_with_a_card_and_a_run(alone, pretrain_config):
    """The workers ran before, in this process; the job finds their checkpoint, keeps the model and tells the tracker."""
    config = pretrain_config(register_as="cellplm-tiny")
    run_worker(config, 1, 0, lambda metrics: None)
    report = run_pretrain(config)
    assert (report.reused, report.steps, report.version) == (True, 4, 1)
    model = load_model(report.model)
    assert (model.task, model.max_cells, model.lineage["steps"]) == ("pretrain", 40, "4")
    assert "a pre-trained cell language model" in model.card
    run = connect(local_uri(alone.home)).get_run(report.run_id)
    assert run.info.status == "FINISHED"
    assert {"train/loss", "train/nb", "train/kl", "train/cells_per_s"} <= run.data.metrics.keys()
    assert run.data.params["network.n_genes"] == "150"
    assert run.data.tags["cellplane.cells"] == "200"
    assert run_pretrain(config).version == 1


def test_pre_training_without_ray_says_how_to_start_it(pretrain_config, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(ServiceError, match="cellplane up"):
        run_pretrain(pretrain_config())


def test_pre_training_refuses_a_run_of_another_seed(pretrain_config, monkeypatch):
    run_worker(pretrain_config(), 1, 0, lambda metrics: None)
    with pytest.raises(TrainingError, match="another configuration"):
        run_pretrain(pretrain_config(plan={"seed": 1}))
