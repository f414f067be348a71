"""One run across restarts, parameters once, metrics complete and never doubled, with their original times."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cellplane.config import load_config
from cellplane.errors import ConfigError, ServiceError
from cellplane.tracking import runs
from cellplane.tracking.journal import Journal
from cellplane.tracking.runs import MetricPump, RunSpec, TrackedRun, TrackingConfig, flatten, resolve_uri

SPEC = RunSpec(
    run_key="pretrain-1",
    experiment="cellplane/pretrain",
    name="pretrain-toy-abc1234",
    params={"optimizer": {"lr": 2e-4}, "steps": 5, "sizes": [1, 2], "note": None},
    tags={"world_size": 2, "cellplane.base_model": "none"},
)
DEAD = "http://127.0.0.1:1"


def steps_of(uri: str, run_id: str, key: str) -> list[tuple[int, int, float]]:
    history = runs.connect(uri).get_metric_history(run_id, key)
    return sorted((metric.step, metric.timestamp, metric.value) for metric in history)


def filled(path: Path, steps: int) -> Journal:
    journal = Journal(path / "metrics.jsonl")
    for step in range(1, steps + 1):
        journal.append(step, {"train/loss": 1 / step, "train/kl": float(step)}, time_ms=1_700_000_000_000 + step)
    return journal


def test_the_same_key_opens_the_same_run_again_and_sets_it_running(tracker: str) -> None:
    first = TrackedRun.open(SPEC, tracker)
    first.finish()
    assert first.client.get_run(first.run_id).info.status == "FINISHED"
    again = TrackedRun.open(SPEC, tracker)
    assert again.run_id == first.run_id
    assert again.client.get_run(first.run_id).info.status == "RUNNING"
    assert TrackedRun.open(RunSpec(run_key="pretrain-2", experiment=SPEC.experiment, name="other"), tracker).run_id != first.run_id


def test_threads_that_open_the_same_key_at_once_get_one_run(tracker: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(lambda _: TrackedRun.open(SPEC, tracker).run_id, range(8)))
    assert len(set(opened)) == 1


def test_parameters_are_flattened_and_the_first_value_stays(tracker: str) -> None:
    run = TrackedRun.open(SPEC, tracker)
    params = {"optimizer": {"lr": 1.0}, "long": "x" * 10_000, "new": {"nested": True}}
    TrackedRun.open(RunSpec(run_key=SPEC.run_key, experiment=SPEC.experiment, name=SPEC.name, params=params), tracker)
    data = run.client.get_run(run.run_id).data
    assert data.params["optimizer.lr"] == "0.0002"
    assert data.params["sizes"] == "[1, 2]"
    assert data.params["new.nested"] == "True"
    assert len(data.params["long"]) == runs.MAX_PARAM


def test_three_hundred_parameters_fit(tracker: str) -> None:
    params = {f"p{number}": number for number in range(300)}
    run = TrackedRun.open(RunSpec(run_key="many", experiment="cellplane/pretrain", name="many", params=params), tracker)
    assert len(run.client.get_run(run.run_id).data.params) == 300


def test_tags_carry_the_prefix_once(tracker: str) -> None:
    run = TrackedRun.open(SPEC, tracker)
    run.set_tags({"world_size": 1})
    tags = run.client.get_run(run.run_id).data.tags
    assert tags["cellplane.world_size"] == "1"
    assert tags["cellplane.base_model"] == "none"
    assert tags["cellplane.run_key"] == "pretrain-1"


def test_flattening_replaces_characters_mlflow_refuses() -> None:
    assert flatten({"a": {"b(c)": 1}}) == {"a.b_c_": "1"}


def test_a_replay_sends_every_value_once_with_its_own_time(tracker: str, tmp_path: Path) -> None:
    journal = filled(tmp_path, 1200)
    run = TrackedRun.open(SPEC, tracker)
    assert run.replay(journal) == 2400
    assert run.replay(journal) == 0
    assert TrackedRun.open(SPEC, tracker).replay(journal) == 0
    assert steps_of(tracker, run.run_id, "train/loss") == [(step, 1_700_000_000_000 + step, 1 / step) for step in range(1, 1201)]


def test_a_replay_after_a_cut_does_not_double_the_repeated_steps(tracker: str, tmp_path: Path) -> None:
    journal = filled(tmp_path, 10)
    run = TrackedRun.open(SPEC, tracker)
    run.replay(journal)
    journal.cut(6)
    for step in range(7, 13):
        journal.append(step, {"train/loss": 1 / step, "train/kl": float(step)}, time_ms=1_800_000_000_000 + step)
    assert run.replay(journal) == 4
    assert TrackedRun.open(SPEC, tracker).replay(journal) == 0
    assert [step for step, _, _ in steps_of(tracker, run.run_id, "train/loss")] == list(range(1, 13))


def test_values_that_are_not_finite_do_not_stop_the_replay(tracker: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.append(1, {"loss": math.nan, "scale": math.inf})
    journal.append(2, {"loss": 1.0})
    run = TrackedRun.open(SPEC, tracker)
    run.replay(journal)
    assert run.replay(journal) == 0
    assert [step for step, _, _ in steps_of(tracker, run.run_id, "loss")] == [1, 2]


def test_artifacts_lie_beside_the_database(tracker: str, tmp_path: Path) -> None:
    run = TrackedRun.open(SPEC, tracker)
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "loss.png").write_bytes(b"picture")
    run.log_artifacts(tmp_path / "plots", "plots")
    run.log_file(tmp_path / "plots" / "loss.png", "single")
    run.log_text("steps: 5", "config/resolved.yaml")
    found = {path.relative_to(tmp_path / "artifacts").parts[-2:] for path in (tmp_path / "artifacts").rglob("*") if path.is_file()}
    assert found == {("plots", "loss.png"), ("single", "loss.png"), ("config", "resolved.yaml")}


def test_a_dead_tracker_fails_within_seconds_and_says_how_to_go_on() -> None:
    began = time.monotonic()
    with pytest.raises(ServiceError, match="cellplane up") as caught:
        TrackedRun.open(SPEC, "http://user:secret@127.0.0.1:1")
    assert time.monotonic() - began < 20
    assert caught.value.exit_code == 4
    assert "secret" not in str(caught.value)


def test_a_folder_is_refused_as_a_tracker() -> None:
    for uri in ("mlruns", "file:///somewhere"):
        with pytest.raises(ConfigError, match="sqlite"):
            resolve_uri(uri)


def test_the_address_comes_from_the_argument_then_the_environment_then_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path))
    assert resolve_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert resolve_uri() == "http://tracker:5000"
    assert resolve_uri("http://other") == "http://other"


def test_a_bad_run_key_is_refused_before_it_reaches_a_query(tracker: str) -> None:
    with pytest.raises(ConfigError, match="run key"):
        TrackedRun.open(RunSpec(run_key="x' OR '1'='1", experiment="cellplane/pretrain", name="x"), tracker)


def test_the_tracking_section_knows_its_keys() -> None:
    assert load_config(TrackingConfig, None, "tracking", ["uri=http://x"]).uri == "http://x"
    with pytest.raises(ConfigError, match="did you mean 'uri'"):
        load_config(TrackingConfig, None, "tracking", ["url=http://x"])


def test_the_pump_delivers_while_work_goes_on_and_ends_the_run(tracker: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    pump = MetricPump(SPEC, tracker, journal, interval_s=0.05).start()
    for step in range(1, 6):
        journal.append(step, {"train/loss": 1.0})
    assert pump.close("FINISHED")
    assert pump.run is not None
    assert pump.run_id is not None
    assert [step for step, _, _ in steps_of(tracker, pump.run_id, "train/loss")] == [1, 2, 3, 4, 5]
    assert pump.run.client.get_run(pump.run_id).info.status == "FINISHED"


def test_a_block_that_fails_marks_the_run_failed_and_still_delivers(tracker: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    pump = MetricPump(SPEC, tracker, journal)
    journal.append(1, {"train/loss": 1.0})
    with pytest.raises(ZeroDivisionError), pump:
        raise ZeroDivisionError
    assert pump.run is not None
    run = pump.run.client.get_run(pump.run.run_id)
    assert run.info.status == "FAILED"
    assert run.data.metrics == {"train/loss": 1.0}


def test_the_pump_of_a_dead_tracker_neither_raises_nor_blocks(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    pump = MetricPump(SPEC, DEAD, journal, interval_s=0.05).start()
    began = time.monotonic()
    for step in range(100):
        journal.append(step, {"train/loss": 1.0})
    assert time.monotonic() - began < 5
    assert not pump.close("FINISHED", timeout_s=1.0)
    assert time.monotonic() - began < 30
    assert pump.run_id is None
    assert len(journal.rows()) == 100


def test_work_that_was_refused_at_once_does_not_wait_for_a_dead_tracker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError), MetricPump(SPEC, DEAD, Journal(tmp_path / "metrics.jsonl")):
        raise ZeroDivisionError
    assert time.monotonic() - began < 10
    assert "they are kept" not in caplog.text, "there are none"


def test_a_server_that_dies_and_returns_ends_with_complete_metrics(server, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    server.start()
    journal = Journal(tmp_path / "metrics.jsonl")
    pump = MetricPump(SPEC, server.uri, journal, interval_s=0.05).start()
    journal.append(1, {"train/loss": 1.0}, time_ms=1001)
    wait_for(lambda: pump.run_id is not None and steps_of(server.uri, pump.run_id, "train/loss") != [])
    server.stop()
    began = time.monotonic()
    for step in range(2, 1500):
        journal.append(step, {"train/loss": 1.0, "train/kl": 0.5}, time_ms=1000 + step)
    assert time.monotonic() - began < 10
    server.start()
    assert pump.close("FINISHED", timeout_s=90)
    assert pump.run_id is not None
    assert steps_of(server.uri, pump.run_id, "train/loss") == [(step, 1000 + step, 1.0) for step in range(1, 1500)]
    assert len(steps_of(server.uri, pump.run_id, "train/kl")) == 1498
    assert TrackedRun.open(SPEC, server.uri).replay(journal) == 0


def wait_for(condition) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_work_refused_at_once_leaves_a_database_that_works(tmp_path, monkeypatch):
    """Its tables are made while the refusal goes out: half of them would be in the way of every later run."""
    monkeypatch.setattr(runs, "NOTHING_TO_TELL_S", 0.0)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(ZeroDivisionError), MetricPump(SPEC, uri, Journal(tmp_path / "metrics.jsonl")) as pump:
        _ = 1 / 0
    assert not pump._thread.is_alive()
    assert TrackedRun.open(SPEC, uri).run_id
