"""The loop beside bare steps: both sides do the same steps, and every figure comes with what it is asked for."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cellplane.benchmark import train
from cellplane.benchmark.sides import LoadMeter, Rounds, Side
from cellplane.benchmark.train import CASES, KEPT, SHARED, Case, TrainBenchmark
from cellplane.benchmark.train_ours import READY, Training
from cellplane.config import load_config
from cellplane.tracking.journal import Journal
from cellplane.train.config import PretrainConfig
from cellplane.train.run_folder import RunFolder
from jobs import benchmark

SMALL = Case("tiny", 60, 48, 2, 24, steps=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small case's shards."""
    folder = tmp_path_factory.mktemp("made")
    Training().make(str(folder), train.EPOCH * SMALL.cells, 12, SMALL.genes, SMALL.sentence)
    return folder


@pytest.fixture
def training(made, tmp_path, monkeypatch) -> Training:
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path))
    threads, side = torch.get_num_threads(), Training()
    side.setup(SMALL.config(made), str(tmp_path), 1)
    torch.set_num_threads(threads)
    return side


def test_a_step_has_the_cells_that_are_asked_for(training):
    assert all(sum(int(training.plan.sizes[list(part.sentences)].sum()) for part in training.plan.at(step)) == 48 for step in range(8))
    assert len(training.works) == READY == train.EPOCH
    assert all(len(works) == SMALL.micro_batches for works, _ in training.works)


def test_bare_steps_and_the_loop_train_the_same_network(training):
    weights = [parameter.detach().clone() for parameter in training.engine.model.parameters()]
    bare = training.bare(3)
    after = [parameter.detach().clone() for parameter in training.engine.model.parameters()]
    assert 0 < bare["wall_s"] < 10
    assert not all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))
    looped = training.loop(4)
    assert 0 < looped["wall_s"] <= looped["all_s"]
    assert not all(torch.equal(a, b) for a, b in zip(after, training.engine.model.parameters(), strict=True))


def test_the_loop_journals_as_a_worker_does_and_goes_on_where_it_was(training):
    training.loop(4)
    training.loop(4)
    rows = Journal(RunFolder.of("steps-4").journal).rows()
    assert [row.step for row in rows] == [5, 6, 7, 8]
    assert {"train/loss", "train/lr", "train/cells_per_s", "train/mfu"} <= rows[-1].metrics.keys()


@pytest.mark.parametrize(("every", "kept"), [(0, [8]), (3, [6, 8])])
def test_checkpoints_are_kept_when_asked_and_at_the_end(training, every, kept):
    training.loop(4)
    training.loop(4, every)
    found = (RunFolder.of("steps-4").path / "checkpoints").glob("step-*")
    assert sorted(int(path.name.removeprefix("step-")) for path in found) == kept


@pytest.fixture
def quiet(monkeypatch) -> None:
    monkeypatch.setattr(LoadMeter, "foreign", lambda self: 0.0)


def test_what_the_loop_adds_is_a_gate_for_the_plain_engine_and_a_figure_for_deepspeeds(quiet, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "CASES", (SMALL, replace(SMALL, engine="deepspeed")))
    monkeypatch.setattr(train.tempfile, "tempdir", str(tmp_path))
    plain, deepspeed = TrainBenchmark(nonzeros=12, threads=1, rounds=1, only=("loop",)).run()
    assert plain.gate == "<= 0.1"
    assert plain.value == pytest.approx(plain.details["loop_s"] / plain.details["bare_s"] - 1)
    assert plain.details["loop_cpu_s"] > 0
    assert (deepspeed.gate, deepspeed.holds) == ("", None)
    assert deepspeed.value is not None
    assert not list(tmp_path.iterdir())


def test_the_cost_of_checkpoints_is_told_for_the_shipped_intervals(quiet, monkeypatch):
    monkeypatch.setattr(train, "KEPT", (("demo", SMALL),))
    (figure,) = TrainBenchmark(nonzeros=12, threads=1, rounds=1, only=("checkpoints",)).run()
    assert figure.name == "checkpoints, demo, every 50 steps"
    assert figure.gate == "<= 0.03"
    assert figure.value == pytest.approx(figure.details["checkpoint_s"] / (50 * figure.details["step_s"]))


def test_two_workers_do_the_step_of_one(quiet, monkeypatch):
    monkeypatch.setattr(train, "SHARED", (replace(SMALL, engine="deepspeed"),))
    (figure,) = TrainBenchmark(nonzeros=12, rounds=1, only=("workers",)).run()
    assert figure.value is not None
    assert figure.value > 0
    assert {"one worker, peak_gib", "worker 0, peak_gib", "worker 1, peak_gib"} <= figure.details.keys()


@pytest.mark.parametrize(("never", "kept", "share", "holds"), [(10.0, 10.2, 0.02, True), (10.0, 11.0, 0.1, False)])
def test_a_checkpoint_costs_what_two_of_them_add_shared_out_over_their_interval(never, kept, share, holds):
    rounds = Rounds({"never": [{"all_s": never, "wall_s": 0.1}], "kept": [{"all_s": kept, "wall_s": 0.1}]}, [0.0])
    figure = train._cost("x", rounds, 50, SMALL)
    assert figure.value == pytest.approx(share)
    assert figure.holds is holds


def test_without_a_quiet_round_there_is_no_ratio():
    noisy = Rounds({name: [{"all_s": 1.0, "wall_s": 1.0, "cpu_s": 1.0}] for name in ("bare", "loop", "never", "kept")}, [], 3)
    assert train._added("x", noisy, SMALL).value is None
    assert train._cost("x", noisy, 50, SMALL).value is None


def test_the_cases_are_those_of_the_shipped_configurations():
    demo = load_config(PretrainConfig, "demo", "pretrain")
    tiny = CASES[0]
    assert (tiny.cells, tiny.micro_batches) == (
        demo.plan.cells_per_micro_batch * demo.plan.micro_batches_per_step,
        demo.plan.micro_batches_per_step,
    )
    assert {case.model for case in CASES} == {"tiny", "10m", "85m"}
    assert [case.cells for case in SHARED] == [2048, 256]
    for name, case in KEPT:
        assert PretrainConfig.model_validate(case.config(Path())).model == load_config(PretrainConfig, name, "pretrain").model
    for case in (*CASES, *SHARED):
        assert PretrainConfig.model_validate(case.config(Path("x"), zero_stage=1)).engine.name == case.engine


def test_only_the_models_that_are_asked_for_are_measured():
    plan = TrainBenchmark(models=("10m",))
    assert [case.model for case in CASES if plan.wants(case)] == ["10m"]
    assert all(map(TrainBenchmark().wants, CASES))


def test_a_side_beside_another_is_no_foreign_load(monkeypatch):
    metered: list[list[int]] = []

    class Meter(LoadMeter):
        def __init__(self, pids):
            metered.append(list(pids))
            super().__init__([])

        def foreign(self) -> float:
            return 0.0

    monkeypatch.setitem(train.alternate.__globals__, "LoadMeter", Meter)
    with Side("a", "cellplane.benchmark.train_ours") as a, Side("b", "cellplane.benchmark.train_ours") as b:
        train.alternate({"a": (a, lambda side: {"wall_s": 1.0})}, 1, beside=[b])
        assert metered == [[a.pid, b.pid]]


def test_the_job_measures_training_with_what_it_is_given(monkeypatch):
    asked: list[TrainBenchmark] = []
    monkeypatch.setattr(TrainBenchmark, "run", lambda self: asked.append(self) or iter(()))
    monkeypatch.setattr(sys, "argv", ["benchmark", "train", "--only", "loop", "--models", "tiny", "--rounds", "2"])
    assert benchmark.main() == 0
    assert asked == [TrainBenchmark(only=("loop",), models=("tiny",), rounds=2)]
