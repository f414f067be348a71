"""A search knows its trials from its seed, keeps what ended, finds the best, and tells the tracker of each trial."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cellplane.config import load_config, read_yaml
from cellplane.data.sources import AnnData
from cellplane.errors import CheckpointError, ConfigError, DataError, ServiceError, TrainingError
from cellplane.pipelines import tuning
from cellplane.pipelines.config import FinetuneConfig
from cellplane.pipelines.finetuning import run_finetune
from cellplane.pipelines.tune_config import TuneConfig, Values, overrides_of
from cellplane.pipelines.tuning import TrialResult, TuneReport, fit_trial, plan_search, run_tune, write_result
from cellplane.tracking.journal import Journal
from cellplane.tracking.runs import connect, local_uri
from tests.pipelines.conftest import NOBODY, RECIPE, Place, make_place

STEPS, TRIALS = 12, 4
SPACE = {"optimizer.lr": {"low": 1e-7, "high": 3e-2, "scale": "log"}, "head_dropout": {"choices": [0.0, 0.3]}}


def search(place: Place, **changes: Any) -> TuneConfig:
    """Four small trials over the cells of a place."""
    job = {**RECIPE, "data": str(place.train), "optimizer": {"steps": STEPS, "lr": 1e-2, "warmup_steps": 1}, "validate_every": 3}
    plain = {"fixed": job, "space": SPACE, "run": "search", "trials": TRIALS, "grace_steps": 3, "concurrent": 2}
    return TuneConfig.model_validate({**plain, **changes})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, empty_tracker: bytes, training: AnnData, query: AnnData) -> Place:
    """A home with cells and an empty tracker."""
    place = make_place(tmp_path_factory.mktemp("home"), training, query)
    (place.home / "mlflow.db").write_bytes(empty_tracker)
    return place


@pytest.fixture
def at_home(home: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("CELLPLANE_HOME", str(home.home))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", local_uri(home.home))
    return home


@pytest.fixture(scope="module")
def found(home: Place, ray_cluster: None) -> Iterator[TuneReport]:
    """The report of a search that ran through on Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELLPLANE_HOME", str(home.home))
        patch.setenv("MLFLOW_TRACKING_URI", local_uri(home.home))
        yield run_tune(search(home))


@pytest.mark.cluster
def test_every_trial_ends_and_the_best_comes_first(found, at_home):
    assert sorted(result.name for result in found.results) == [f"{number:04d}" for number in range(TRIALS)]
    scores = [result.score for result in found.results]
    assert scores == sorted(scores, reverse=True)
    assert (found.new, found.failed) == (TRIALS, {})
    assert {result.status for result in found.results} <= {"finished", "stopped"}
    assert all(result.steps % 3 == 0 and 0 < result.steps <= STEPS for result in found.results)


@pytest.mark.cluster
def test_a_trial_scores_its_best_look(found, at_home):
    for result in found.results:
        rows = Journal(at_home.home / "runs" / "search" / "trials" / result.name / "journal.jsonl").rows()
        looks = [row.metrics["val/macro_f1"] for row in rows if "val/macro_f1" in row.metrics and row.step <= result.steps]
        assert result.score == pytest.approx(max(looks))


@pytest.mark.cluster
def test_the_best_configuration_is_one_that_finetune_takes(found, at_home):
    assert found.best.read_text().startswith("# The best of 4 trials of search: val/macro_f1 ")
    config = load_config(FinetuneConfig, found.best, "finetune")
    assert config.run == "search-best"
    for key, value in found.results[0].values.items():
        section, _, name = key.rpartition(".")
        assert getattr(getattr(config, section) if section else config, name) == value
    report = run_finetune(config)
    assert report.steps == STEPS


@pytest.mark.cluster
def test_the_tracker_has_a_run_for_each_trial_nested_in_the_searchs_own(found, at_home):
    client = connect()
    parent = client.get_run(found.run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["cellplane.best_trial"] == found.results[0].name
    assert [item.path for item in client.list_artifacts(found.run_id)] == ["best.yaml"]
    nested = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{found.run_id}'")
    assert {run.data.tags["cellplane.trial"] for run in nested} == {result.name for result in found.results}
    assert all({"train/loss", "val/macro_f1"} <= run.data.metrics.keys() for run in nested)
    assert client.get_experiment(parent.info.experiment_id).name == "cellplane/tune"


@pytest.mark.cluster
def test_what_ended_is_not_done_again_and_what_is_missing_is(found, at_home):
    """As after a driver that was killed: one trial has no result, another search of the same name goes on."""
    missing = found.results[-1].name
    shutil.rmtree(at_home.home / "runs" / "search" / "trials" / missing)
    again = run_tune(search(at_home))
    assert again.new == 1
    assert {result.name for result in again.results} == {result.name for result in found.results}
    assert [result for result in again.results if result.name != missing] == [result for result in found.results if result.name != missing]
    assert again.run_id == found.run_id
    assert run_tune(search(at_home, trials=2)).new == 0


@pytest.mark.cluster
def test_trials_that_fail_are_named_and_the_others_count(at_home, ray_cluster):
    config = search(at_home, run="broken", metric="val/accuracy_of_nothing", trials=1, tracking_uri=NOBODY)
    with pytest.raises(TrainingError, match=r"none of the 1 trials ended: .*no look told of val/accuracy_of_nothing.*val/macro_f1"):
        run_tune(config)


def test_trials_are_a_function_of_space_seed_and_number(at_home):
    plan = plan_search(search(at_home))
    assert plan.values["0000"] == {}
    assert plan.jobs["0000"].optimizer.lr == 1e-2
    assert plan.values == plan_search(search(at_home)).values
    assert plan.values.items() <= plan_search(search(at_home, trials=9)).values.items()
    assert plan.values["0001"] != plan_search(search(at_home, seed=1)).values["0001"]
    for name, values in plan.values.items():
        if values:
            assert plan.jobs[name].optimizer.lr == values["optimizer.lr"]
            assert plan.jobs[name].head_dropout == values["head_dropout"]


def test_another_search_does_not_go_on_under_the_same_name(at_home, monkeypatch):
    tuning._begin(plan_search(search(at_home, run="named")))
    tuning._begin(plan_search(search(at_home, run="named", trials=9, concurrent=1)))
    with pytest.raises(CheckpointError, match="holds another search: seed is 0 there and 1 here"):
        tuning._begin(plan_search(search(at_home, run="named", seed=1)))


def test_a_trial_goes_on_from_its_own_checkpoint(at_home, tmp_path):
    """A worker that died with its driver; what it reports afterwards counts the looks before."""
    plan = plan_search(search(at_home, run="continued", trials=1))
    settings = {**tuning._settings(plan), "folder": str(tmp_path)}
    settings["jobs"]["0000"]["checkpoint"] |= {"every_steps": 3, "asynchronous": False}
    whole: list[tuple[int, float]] = []
    fit_trial(settings, "0000", lambda step, score: whole.append((step, score)))
    shutil.rmtree(tmp_path / "trials")

    def dies(step: int, score: float) -> None:
        if step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_trial(settings, "0000", dies)
    rest: list[tuple[int, float]] = []
    fit_trial(settings, "0000", lambda step, score: rest.append((step, score)))
    assert rest == [reported for reported in whole if reported[0] > 6]


def test_smaller_may_be_better(at_home, tmp_path):
    plan = plan_search(search(at_home, run="losses", metric="val/loss", mode="min", trials=2))
    settings = tuning._settings(plan)
    for name, loss in (("0000", 3.0), ("0001", 2.0)):
        write_result(settings, name, "finished", -loss, STEPS)
    assert [(result.name, result.score) for result in plan.results()] == [("0001", 2.0), ("0000", 3.0)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, "space is empty"),
        ({"space": {"optimizer.stpes": {"choices": [1]}}}, "did you mean 'optimizer.steps'"),
        ({"space": {"optimizer.lr": {"choices": [-1.0]}}}, r"optimizer\.lr"),
        ({"task": "cook"}, "no task 'cook'; there are annotate, denoise"),
        ({"base": "nowhere"}, "none of that name is shipped for finetune"),
    ],
)
def test_a_wrong_search_is_refused_before_any_cluster(at_home, changes, message):
    with pytest.raises(ConfigError, match=message):
        plan_search(search(at_home, **changes))


def test_bad_cells_are_refused_before_any_cluster(at_home):
    with pytest.raises(DataError, match="no such file"):
        plan_search(search(at_home, fixed={"data": "nowhere.h5ad"}))


def test_tuning_without_ray_says_how_to_start_it(at_home, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(ServiceError, match="cellplane up"):
        run_tune(search(at_home, run="alone", tracking_uri=NOBODY))


def test_values_are_drawn_as_they_say():
    rng = np.random.default_rng(0)
    drawn = [Values(low=1e-4, high=1e-2, scale="log").draw(rng) for _ in range(300)]
    assert all(1e-4 <= value <= 1e-2 for value in drawn)
    assert 0.4 < np.mean(np.array(drawn) < 1e-3) < 0.6
    assert {Values(low=1, high=3, integer=True).draw(rng) for _ in range(50)} == {1, 2, 3}
    assert {Values(choices=("a", "b")).draw(rng) for _ in range(50)} == {"a", "b"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "give choices, or low and high"),
        ({"choices": [], "low": None}, "give choices"),
        ({"choices": [1], "low": 0, "high": 1}, "give choices"),
        ({"low": 2, "high": 1}, "must lie below"),
        ({"low": 0, "high": 1, "scale": "log"}, "above 0"),
    ],
)
def test_what_cannot_be_drawn_from_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Values.model_validate(values)


def test_nested_settings_become_dotted_ones():
    assert overrides_of({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}


def test_a_result_is_written_whole_or_not_at_all(at_home):
    plan = plan_search(search(at_home, run="results", trials=1))
    assert plan.result("0000") is None
    write_result(tuning._settings(plan), "0000", "stopped", 0.5, 6)
    assert plan.result("0000") == TrialResult("0000", "stopped", 0.5, 6, {})
    assert json.loads((plan.place("0000") / "result.json").read_text())["status"] == "stopped"
    assert read_yaml(Path("configs/tune/annotate.yaml"))["kind"] == "tune"
