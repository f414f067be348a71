"""A pre-training run is one run in a real MLflow server, whatever restarts: every value once, origin, pictures, model."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cellplane.artifact.folder import load_model
from cellplane.data.shards import read_manifest
from cellplane.genes import GeneVocabulary
from cellplane.pipelines.jobs import run_pretrain
from cellplane.pipelines.record import closing_tags, held_out_scores, pretraining_spec, report_line, report_of
from cellplane.tracking.journal import Journal
from cellplane.tracking.registry import list_models
from cellplane.tracking.runs import MetricPump, connect
from cellplane.train.identity import full_model_config
from cellplane.train.run_folder import RunFolder
from cellplane.train.worker import run_worker
from tests.tracking.conftest import Server, empty_tracker
from tests.train.conftest import STEPS, run_config, run_workers, shards

__all__ = ["empty_tracker", "run_config", "run_workers", "shards"]
ORIGIN = ("data_fingerprint", "cells", "vocabulary_fingerprint", "config_sha256", "git_commit", "git_dirty", "ray_job_id", "world_size")
TORCH = {"engine": {"name": "torch"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_tracker: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "mlflow.db").write_bytes(empty_tracker.read_bytes())
    server = Server(folder)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path))
    return tmp_path


def history(uri: str, run_id: str) -> dict[str, list[int]]:
    """Steps of every metric of a run, as the tracker has them."""
    client = connect(uri)
    return {key: [point.step for point in client.get_metric_history(run_id, key)] for key in client.get_run(run_id).data.metrics}


def artifacts(uri: str, run_id: str) -> set[str]:
    return {item.path for folder in ("", "plots", "model") for item in connect(uri).list_artifacts(run_id, folder)}


def test_a_finished_run_tells_where_it_comes_from_and_how_it_went(server, home, run_config, shards):
    config = run_config("told", {**TORCH, "register_as": "cellplm-told", "tracking_uri": server.uri})
    run_worker(config, 1, 0, lambda metrics: None)
    RunFolder.of("told").started(1, 0, "submitted")
    report = run_pretrain(config)
    run = connect(server.uri).get_run(report.run_id)
    assert run.info.status == "FINISHED"
    assert {f"cellplane.{name}" for name in (*ORIGIN, "base_model", "world_sizes", "restarts")} <= run.data.tags.keys()
    manifest = read_manifest(shards)
    assert run.data.tags["cellplane.data_fingerprint"] == manifest.fingerprint
    assert run.data.tags["cellplane.vocabulary_fingerprint"] == manifest.vocabulary_fingerprint
    assert run.data.tags["cellplane.cells"] == "120"
    found = history(server.uri, report.run_id)
    assert {"train/loss", "train/nb", "train/kl", "train/lr", "train/grad_norm", "train/nan_skips", "train/cells_per_s"} <= found.keys()
    assert all(sorted(found[key]) == list(range(1, STEPS + 1)) for key in found if key.startswith("train/"))
    expected = {"config.yaml", "report.json", "plots/loss.png", "plots/course.png"}
    expected |= {f"model/{name}" for name in ("manifest.json", "weights.safetensors", "README.md", "vocabulary.json")}
    assert expected <= artifacts(server.uri, report.run_id)
    assert [(version.name, version.version) for version in list_models(server.uri)] == [("cellplm-told", 1)]


def test_the_meter_of_a_worker_reaches_the_run(server, home, run_config):
    config = run_config("measured", {**TORCH, "tracking_uri": server.uri})
    run_worker(config, 1, 0, lambda metrics: None)
    found = history(server.uri, str(run_pretrain(config).run_id))
    assert sorted(found["train/mfu"]) == list(range(1, STEPS + 1))
    assert 1 <= len(found["system/rss_bytes"]) <= STEPS
    assert {"system/rss_peak_bytes", "system/memory_used_bytes", "system/disk_free_bytes"} <= found.keys()


def test_a_run_killed_and_gone_on_with_fewer_workers_is_one_run_with_every_value_once(server, home, run_config, run_workers):
    """Two processes, rank 0 killed after step 5; then one process. The pump runs all the time, as in a job."""
    config = run_config("killed", {"tracking_uri": server.uri})
    folder = RunFolder.of("killed")
    folder.path.mkdir(parents=True)
    spec = pretraining_spec(config, read_manifest(Path(config.shards)), "killed")
    with MetricPump(spec, server.uri, Journal(folder.journal), interval_s=0.2) as pump:
        folder.started(2, 0, "submitted")
        assert run_workers(config, home, 2, fault=f"step_rank0:4:{home / 'killed'}") != [0, 0]
        deadline = time.monotonic() + 60
        while pump.run_id is None or len(history(server.uri, pump.run_id).get("train/loss", [])) < 5:
            assert time.monotonic() < deadline, "the first five steps did not reach the tracker"
            time.sleep(0.2)
        folder.started(1, 3, "a worker was lost")
        assert run_workers(config, home, 1) == [0]
    report = run_pretrain(config)
    assert report.run_id == pump.run_id
    found = history(server.uri, report.run_id)
    doubled = {key: steps for key, steps in found.items() if max(Counter(steps).values()) > 1}
    assert not doubled
    assert sorted(found["train/loss"]) == list(range(1, STEPS + 1))
    tags = connect(server.uri).get_run(report.run_id).data.tags
    assert (tags["cellplane.world_size"], tags["cellplane.world_sizes"], tags["cellplane.restarts"]) == ("1", "2 1", "1")
    experiment = connect(server.uri).get_experiment_by_name("cellplane/pretrain")
    runs = connect(server.uri).search_runs([experiment.experiment_id], f"tags.`cellplane.run_key` = '{spec.run_key}'")
    assert len(runs) == 1


def test_a_server_that_was_away_for_the_whole_run_gets_everything_once_afterwards(home, run_config, tmp_path_factory, empty_tracker):
    folder = tmp_path_factory.mktemp("late")
    (folder / "mlflow.db").write_bytes(empty_tracker.read_bytes())
    late = Server(folder)
    config = run_config("late", {**TORCH, "tracking_uri": late.uri})
    run_worker(config, 1, 0, lambda metrics: None)
    assert run_pretrain(config).run_id is None
    late.start()
    try:
        run_id = str(run_pretrain(config).run_id)
        found = history(late.uri, run_id)
        journal = {row.step: row for row in Journal(RunFolder.of("late").journal).rows()}
        for point in connect(late.uri).get_metric_history(run_id, "train/loss"):
            assert (point.timestamp, point.value) == (journal[point.step].time_ms, journal[point.step].metrics["train/loss"])
        assert all(max(Counter(steps).values()) == 1 for steps in found.values())
        assert sorted(found["train/loss"]) == list(range(1, STEPS + 1))
        assert "model/weights.safetensors" in artifacts(late.uri, run_id)
    finally:
        late.stop()


@pytest.fixture
def journalled(home: Path) -> RunFolder:
    """A run folder whose journal holds what a run with a restart, a skip and validation leaves."""
    folder = RunFolder.of("r")
    journal = Journal(folder.journal)
    for step in range(1, 5):
        values: dict[str, Any] = {"train/loss": 10.0 - step, "train/cells_per_s": 100.0 * step, "train/nan_skips": float(step > 2)}
        journal.append(step, {**values, **({"val/loss": 9.0, "val/nb": 8.0} if step == 4 else {})}, time_ms=1000 * step)
    journal.append(2, {"train/mfu": 0.25, "system/rss_peak_bytes": 5e8})
    folder.started(2, 0, "submitted")
    folder.started(1, 2, "a worker was lost")
    return folder


def test_the_report_says_how_a_run_went(journalled, run_config, shards):
    model = full_model_config(run_config("r"))
    report = report_of(journalled, model)
    assert (report["steps"], report["skipped_steps"], report["mfu_median"]) == (4, 1, 0.25)
    assert report["train_loss"] == {"first": 9.0, "last": 6.0, "lowest": 6.0}
    assert report["val_loss"]["last"] == 9.0
    assert report["cells_per_s_median"] == 250.0
    assert [start["workers"] for start in report["starts"]] == [2, 1]
    assert json.loads(json.dumps(report)) == report
    line = report_line(report)
    assert "4 steps, loss 9 -> 6, 250 cells/s, 1 steps skipped, 1 restarts" in line


def test_a_run_without_a_journal_has_a_report_too(home, run_config):
    report = report_of(RunFolder.of("empty"), full_model_config(run_config("empty")))
    assert (report["steps"], report["starts"], report["mfu_median"]) == (0, [], None)
    assert "0 steps" in report_line(report)
    assert closing_tags(report) == {}


def test_the_last_look_at_held_out_cells_is_on_the_card(journalled):
    assert held_out_scores(Journal(journalled.journal)) == {"cellplm": {"loss": 9.0, "nb": 8.0}}
    assert held_out_scores(Journal(journalled.path / "none.jsonl")) is None


def test_the_model_folder_alone_is_enough_to_go_on(server, home, run_config):
    config = run_config("alone", {**TORCH, "tracking_uri": server.uri})
    run_worker(config, 1, 0, lambda metrics: None)
    report = run_pretrain(config)
    model = load_model(report.model)
    assert isinstance(model.vocabulary, GeneVocabulary)
    assert model.lineage["data_fingerprint"] == read_manifest(Path(config.shards)).fingerprint
    assert model.lineage["data_fingerprint"] in model.card
