"""Steps that cannot be trusted change nothing, on any engine, stage or rank; they are counted, and a bad state is never kept."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cellplane.data.loader import ShardStore
from cellplane.data.sentences import StepPlan
from cellplane.errors import TrainingError
from cellplane.model.cellplm import new_model
from cellplane.tracking.journal import Journal
from cellplane.train.checkpoint import Checkpoints, TrainingState
from cellplane.train.config import GuardConfig
from cellplane.train.engine import TorchEngine
from cellplane.train.guard import ENOUGH, REMEMBERED, Guard, all_finite, check_finite
from cellplane.train.identity import full_model_config
from cellplane.train.loop import Keeping, train
from cellplane.train.objective import MaskedObjective
from cellplane.train.step import StepResult
from tests.train.conftest import STEPS
from tests.train.scenario import GRADIENT_BAD, KEPT, LOSS_BAD, SPIKE

SCENARIO = Path(__file__).with_name("scenario.py")
NAN, INF = math.nan, math.inf


# What it decides


@pytest.mark.parametrize(
    ("losses", "norm", "said"),
    [([1.0, 2.0], 3.0, None), ([NAN, 2.0], 3.0, "loss"), ([1.0, INF], 3.0, "loss"), ([1.0], NAN, "gradients"), ([1.0], INF, "gradients")],
)
def test_what_is_not_finite_is_objected_to(losses, norm, said):
    found = Guard(GuardConfig()).objection(losses, norm)
    assert (found is None) if said is None else f"the {said} {'is' if said == 'loss' else 'are'} not finite" == found


def taken(guard: Guard, norms: list[float]) -> Guard:
    for step, norm in enumerate(norms):
        guard.settle(step, None, norm)
    return guard


def test_a_spike_is_a_multiple_of_the_median_of_the_last_steps_taken():
    guard = taken(Guard(GuardConfig(spike_factor=3.0)), [100.0] * 40 + [1.0, 2.0, 3.0] * 20)
    assert len(guard.norms) == REMEMBERED
    assert guard.objection([1.0], 5.9) is None
    assert "more than 3 times the usual 2" in str(guard.objection([1.0], 6.1))


def test_without_a_factor_or_enough_steps_nothing_is_a_spike():
    assert taken(Guard(GuardConfig()), [1.0] * 60).objection([1.0], 1e9) is None
    few = taken(Guard(GuardConfig(spike_factor=2.0)), [1.0] * (ENOUGH - 1))
    assert few.objection([1.0], 1e9) is None
    assert taken(few, [1.0]).objection([1.0], 1e9) is not None


def test_skipped_steps_do_not_move_what_is_usual():
    guard = taken(Guard(GuardConfig(spike_factor=2.0, max_skips=100)), [1.0] * ENOUGH)
    for step in range(60):
        guard.settle(step, guard.objection([1.0], 1e6), 1e6)
    assert (guard.skips, set(guard.norms)) == (60, {1.0})


def test_it_gives_up_after_too_many_in_a_row_and_one_good_step_forgives_those_before():
    guard = Guard(GuardConfig(max_skips=2))
    for step, objection in enumerate(["bad", "bad", None, "bad", "bad"]):
        guard.settle(step, objection, 1.0)
    with pytest.raises(
        TrainingError, match=r"step 6: bad, as in all of the last 3 steps; lower the learning rate.*last checkpoint is intact"
    ):
        guard.settle(5, "bad", 1.0)
    with pytest.raises(TrainingError, match="step 1: bad; lower"):
        Guard(GuardConfig(max_skips=0)).settle(0, "bad", 1.0)


def test_what_it_remembers_passes_through_json_and_decides_alike():
    norms = [math.sqrt(number + 0.1) for number in range(60)]
    guard = taken(Guard(GuardConfig(spike_factor=1.5)), norms)
    guard.settle(60, "bad", 1.0)
    again = Guard(guard.config, json.loads(json.dumps(guard.remember())))
    assert again.remember() == guard.remember()
    limit = 1.5 * sorted(norms[10:])[25]
    for norm in (limit * 0.98, limit * 1.02):
        assert again.objection([1.0], norm) == guard.objection([1.0], norm)
    assert Guard(guard.config).remember() == {"skips": 0, "in_a_row": 0, "norms": []}  # a checkpoint of an earlier version


def test_one_value_that_is_not_finite_is_found_wherever_it_is():
    tensors = [torch.zeros(0), torch.full((1000,), 3e38), torch.tensor(1.0)]
    assert all_finite(tensors)
    for bad in (NAN, INF, -INF):
        for place in (0, 499, 999):
            spoilt = torch.zeros(1000)
            spoilt[place] = bad
            assert not all_finite([*tensors, spoilt])
    good = TrainingState(7, {"w": torch.ones(2)}, {"exp_avg:w": torch.ones(2)}, "id")
    check_finite(good)
    with pytest.raises(TrainingError, match="after step 7 exp_avg:w is not finite, so no checkpoint is written"):
        check_finite(replace(good, optimizer={"exp_avg:w": torch.tensor([1.0, NAN])}))


# In the loop


class Run:
    """A short run of the plain engine with a journal and checkpoints, whose gradients are spoilt in some steps."""

    def __init__(self, config: Any, home: Path, bad: tuple[int, ...] = ()) -> None:
        self.config, self.bad = config, bad
        store = ShardStore(Path(config.shards))
        self.objective, self.plan = MaskedObjective(store, config.masking), StepPlan(store.sizes, config.plan)
        self.network = new_model(full_model_config(config), config.plan.seed)
        self.keeping = Keeping(Checkpoints(home / "checkpoints"), config.checkpoint, "id", Journal(home / "journal.jsonl"))
        self.now = 0
        for parameter in self.network.decoder.parameters():
            parameter.register_hook(lambda gradient: gradient * (NAN if self.now in self.bad else 1.0))

    def go(self, after: Callable[[int, StepResult], bool] = lambda done, result: False) -> int:
        state = self.keeping.checkpoints.newest_valid("id")
        self.now = 0 if state is None else state.step
        engine = TorchEngine(self.network, self.config.optimizer, state, self.config.guard)

        def next_step(done: int, result: StepResult) -> bool:
            self.now = done
            return after(done, result)

        return train(engine, self.objective, self.plan, range(self.now, STEPS), self.keeping, next_step)

    def column(self, name: str) -> list[float]:
        return [row.metrics[name] for row in self.keeping.journal.rows()]


@pytest.fixture
def make_run(run_config, tmp_path) -> Callable[..., Run]:
    def make(name: str, bad: tuple[int, ...] = (), max_skips: int = 10) -> Run:
        config = run_config(name, {"engine": {"name": "torch"}, "guard": {"max_skips": max_skips}})
        (tmp_path / name).mkdir(exist_ok=True)
        return Run(config, tmp_path / name, bad)

    return make


def test_skips_are_journalled_and_go_on_counting_after_a_restart(make_run):
    whole = make_run("whole", bad=(1, 4, 6))
    whole.go()
    assert whole.column("train/nan_skips") == [0, 1, 1, 1, 2, 2, 3, 3]
    first = make_run("parts", bad=(1, 4, 6))
    first.go(lambda done, _: done == 5)
    second = make_run("parts", bad=(1, 4, 6))
    assert second.go() == STEPS
    for name in ("train/nan_skips", "train/loss"):
        assert second.column(name) == whole.column(name)
    ends = [run.keeping.checkpoints.newest_valid("id") for run in (whole, second)]
    assert all(torch.equal(ends[0].optimizer[name], ends[1].optimizer[name]) for name in ends[0].optimizer)


def test_gradients_that_stay_bad_end_the_run_and_leave_the_last_checkpoint(make_run):
    run = make_run("bad", bad=(4, 5, 6), max_skips=2)
    with pytest.raises(TrainingError, match=r"step 7: the gradients are not finite, as in all of the last 3.*last checkpoint is intact"):
        run.go()
    state = run.keeping.checkpoints.newest_valid("id")
    assert state.step == 6  # written between skipped steps: what it holds is that of step 4
    assert all_finite([*state.weights.values(), *state.optimizer.values()])


def test_a_state_that_is_not_finite_is_never_kept(make_run):
    run = make_run("broken")

    def spoil(done: int, _: StepResult) -> bool:
        if done == 5:
            next(run.network.decoder.parameters()).data.fill_(NAN)
        return False

    with pytest.raises(TrainingError, match=r"after step 6 decoder\S+ is not finite, so no checkpoint is written"):
        run.go(spoil)
    assert [path.name for path in run.keeping.checkpoints.found()] == ["step-00000003"]


# In every engine


Story = dict[str, Any]
PLAIN = "torch:0:none:float32"
STAGES = [f"deepspeed:{stage}:none:float32" for stage in range(4)]
OFFLOADED = [*(f"deepspeed:{stage}:optimizer:float32" for stage in (1, 2, 3)), "deepspeed:3:parameters:float32"]
RECOMPUTED = [f"deepspeed:{stage}:none:float32:recompute" for stage in (0, 2, 3)]
HALF = [*(f"deepspeed:{stage}:none:bfloat16" for stage in (1, 2, 3)), "deepspeed:2:optimizer:bfloat16", "deepspeed:3:parameters:bfloat16"]


def tell(folder: Path, modes: list[str], world_size: int, device: str = "cpu") -> dict[str, Story]:
    """The story in these modes, on a machine where nothing can be compiled."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nowhere = {"PATH": "/nowhere", "CXX": "/nowhere/c++", "CC": "/nowhere/cc", "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    shared = nowhere | {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": device, "SCENARIO_DEVICE": device}
    shared |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    logs = [folder / f"rank-{rank}.log" for rank in range(world_size)]
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, str(SCENARIO), str(folder / "story.json"), *modes]
        with log.open("wb") as file:
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, stdout=file, stderr=file, env=environment))
    try:
        codes = [process.wait(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait(timeout=30)
    assert codes == [0] * world_size, "\n".join(log.read_text()[-2000:] for log in logs)
    assert not (folder / "extensions").exists()
    found: dict[str, Story] = json.loads((folder / "story.json").read_text(encoding="utf-8"))
    return found


# Told together, in the same processes: those of every day, all others of one worker, and some of two.
TELLINGS = {
    1: {
        "daily": [PLAIN, STAGES[2], STAGES[3], OFFLOADED[-1], HALF[1]],
        "rarely": [STAGES[0], STAGES[1], *OFFLOADED[:-1], *RECOMPUTED, HALF[0], *HALF[2:]],
    },
    2: {"rarely": [PLAIN, *STAGES, OFFLOADED[-1], HALF[-1]]},
}
CASES = [
    pytest.param(mode, world_size, marks=[] if when == "daily" else pytest.mark.chaos)
    for world_size, tellings in TELLINGS.items()
    for when, modes in tellings.items()
    for mode in modes
]
Tell = Callable[[str, int], Story]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Tell:
    """The story of a mode on so many workers."""
    known: dict[tuple[int, str], dict[str, Story]] = {}

    def of(mode: str, world_size: int) -> Story:
        when, modes = next((when, modes) for when, modes in TELLINGS[world_size].items() if mode in modes)
        if (world_size, when) not in known:
            known[world_size, when] = tell(tmp_path_factory.mktemp(f"story{world_size}"), modes, world_size)
        return known[world_size, when][mode]

    return of


everywhere = pytest.mark.parametrize(("mode", "world_size"), CASES)


@everywhere
def test_poisoned_steps_leave_weights_and_moments_untouched_without_a_compiler(story, mode, world_size):
    found = story(mode, world_size)
    assert (found["skipped"], found["skips"]) == ([LOSS_BAD, GRADIENT_BAD, SPIKE], 3)
    assert found["untouched"] == [True] * 3
    assert found["moved"]
    assert math.isnan(found["losses"][LOSS_BAD])
    assert all(map(math.isfinite, [*found["losses"][:LOSS_BAD], *found["losses"][GRADIENT_BAD:]]))


@everywhere
def test_a_run_resumed_after_skips_equals_the_uninterrupted_one_exactly(story, mode, world_size):
    found = story(mode, world_size)
    assert found["resumed_losses"] == found["losses"][KEPT:]
    assert found["resumed_same"]
    assert found["resumed_skips"] == 3
    assert found["dtypes"] == ["torch.float32"]


@everywhere
def test_all_engines_tell_the_same_story(story, mode, world_size):
    half = mode.endswith("bfloat16")
    known = [loss for loss in story(PLAIN, 1)["losses"] if math.isfinite(loss)]
    found = [loss for loss in story(mode, world_size)["losses"] if math.isfinite(loss)]
    assert found == pytest.approx(known, rel=5e-3 if half else 1e-6)
    assert (found == known) == (mode == PLAIN and world_size == 1)  # they do not all run the same code
