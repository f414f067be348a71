"""Both engines take the same steps, at any world size and ZeRO stage, and go on from a checkpoint as if never stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
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
from cellplane.train.config import PretrainConfig
from cellplane.train.engine import StepResult, TorchEngine
from cellplane.train.identity import full_model_config, run_identity
from cellplane.train.loop import Keeping, train
from cellplane.train.objective import MaskedObjective
from cellplane.train.run_folder import RunFolder
from cellplane.train.worker import run_worker
from tests.train.conftest import STEPS, MakeConfig, RunWorkers

SAME = 1e-6  # relative, between world sizes and engines: float32 sums in another order
TORCH = {"engine": {"name": "torch"}}

torch.set_num_threads(1)


def in_process(config: PretrainConfig) -> None:
    """A whole run in this process, alone."""
    run_worker(config, 1, 0, lambda metrics: None)


def state_of(home: Path, config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> TrainingState:
    monkeypatch.setenv("CELLPLANE_HOME", str(home))
    state = Checkpoints(RunFolder.of(config.run).checkpoints).newest_valid(run_identity(config))
    assert state is not None
    return state


def largest_difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def parts(config: PretrainConfig) -> tuple[MaskedObjective, StepPlan, torch.nn.Module]:
    store = ShardStore(Path(config.shards))
    network = new_model(full_model_config(config), config.plan.seed)
    return MaskedObjective(store, config.masking), StepPlan(store.sizes, config.plan), network


WARMING = {"latent": "vae", "kl_warmup_steps": 6, "kl_weight": 0.5, "local_blocks": 1, "decoder": "gaussian"}
NARROW = {"panel_rate": 0.5, "panel_min_genes": 5, "targeted_genes": 12, "targeted_mask_scale": 0.4}


@pytest.mark.parametrize("changes", [{}, {"model": WARMING, "masking": NARROW}], ids=["plain", "warming up, random panels"])
def test_a_resumed_run_equals_the_uninterrupted_one_exactly(changes, run_config, tmp_path, monkeypatch, losses):
    config = run_config("r", {**TORCH, **changes})
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / "whole"))
    in_process(config)
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / "resumed"))

    class Stopped(Exception):
        pass

    def stop(self: Journal, step: int, *_: object) -> bool:
        if step == 5:
            raise Stopped
        return append(self, step, *_)

    append = Journal.append
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "append", stop)
        with pytest.raises(Stopped):
            in_process(config)
    assert [path.name for path in Checkpoints(RunFolder.of("r").checkpoints).found()] == ["step-00000003"]
    in_process(config)
    assert losses(tmp_path / "resumed", "r") == losses(tmp_path / "whole", "r")
    whole, resumed = (state_of(tmp_path / name, config, monkeypatch) for name in ("whole", "resumed"))
    assert whole.step == resumed.step == STEPS
    assert largest_difference(whole.weights, resumed.weights) == 0.0
    assert largest_difference(whole.optimizer, resumed.optimizer) == 0.0


def test_training_lowers_the_loss_and_journals_its_parts(run_config, cellplane_home, losses):
    config = run_config("long", {**TORCH, "optimizer": {"steps": 60, "lr": 1e-2}})
    in_process(config)
    found = losses(cellplane_home, "long")
    assert len(found) == 60
    assert sum(found[-10:]) < 0.9 * sum(found[:10])
    row = Journal(RunFolder.of("long").journal).rows()[0]
    assert {"train/loss", "train/nb", "train/kl", "train/cluster", "train/grad_norm", "train/lr", "train/cells_per_s"} <= row.metrics.keys()


def test_the_same_seed_gives_the_same_run_and_another_seed_another(run_config, cellplane_home, losses):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        in_process(run_config(name, {**TORCH, "plan": {"seed": seed}}))
    assert losses(cellplane_home, "a") == losses(cellplane_home, "b")
    assert losses(cellplane_home, "a") != losses(cellplane_home, "c")


def test_another_seed_under_the_same_name_is_refused(run_config, cellplane_home):
    in_process(run_config("a", TORCH))
    with pytest.raises(TrainingError, match="another configuration or other data"):
        in_process(run_config("a", {**TORCH, "plan": {"seed": 1}}))


def test_the_loss_is_told_which_step_is_taken(run_config, monkeypatch):
    config = run_config("s", {"model": {"latent": "vae", "kl_warmup_steps": 100}})
    objective, plan, network = parts(config)
    engine, seen = TorchEngine(network, config.optimizer), []
    told = network.forward
    monkeypatch.setattr(network, "forward", lambda batch, mask, noise: (seen.append(noise.step), told(batch, mask, noise))[1])
    train(engine, objective, plan, range(3, 5))
    assert sorted(set(seen)) == [3, 4]
    assert len(seen) == len(plan.at(3)) + len(plan.at(4))


def test_settings_that_came_later_leave_the_identity_of_a_run_as_it_was(run_config):
    plain = run_identity(run_config("i"))
    assert run_identity(run_config("i", {"masking": {"panel_rate": 0.0}, "model": {"local_blocks": 0}})) == plain
    assert run_identity(run_config("i", {"masking": {"panel_rate": 0.1}})) != plain
    assert run_identity(run_config("i", {"model": {"local_blocks": 1}})) != plain


def test_a_gradient_is_clipped_to_the_configured_norm(run_config):
    config = run_config("clipped", {**TORCH, "optimizer": {"clip": 1e-3}})
    objective, plan, network = parts(config)
    seen: list[StepResult] = []
    train(TorchEngine(network, config.optimizer), objective, plan, range(1), after_step=lambda done, result: bool(seen.append(result)))
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]))
    assert seen[0].grad_norm > 1e-3
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_stopping_early_keeps_the_step_it_stopped_at(run_config, cellplane_home):
    config = run_config("stopped", TORCH)
    objective, plan, network = parts(config)
    keeping = Keeping(Checkpoints(cellplane_home / "checkpoints"), config.checkpoint, "id")
    assert train(TorchEngine(network, config.optimizer), objective, plan, range(STEPS), keeping, lambda done, _: done == 2) == 2
    assert keeping.checkpoints.newest_valid("id").step == 2


# DeepSpeed, in processes of its own


@pytest.fixture(scope="module")
def finished(run_config: MakeConfig, run_workers: RunWorkers, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, Any], Path]:
    """The home of an uninterrupted run, made once for each (engine, stage, workers)."""
    made: dict[tuple[str, int, int], Path] = {}

    def make(engine: str, stage: int, workers: int) -> Path:
        key = (engine, stage, workers)
        if key not in made:
            home = tmp_path_factory.mktemp(f"{engine}{stage}x{workers}")
            assert run_workers(run_config("r", engine_of(engine, stage)), home, workers) == [0] * workers, log_of(home)
            made[key] = home
        return made[key]

    return make


@pytest.fixture(scope="module")
def killed(run_config: MakeConfig, run_workers: RunWorkers, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The home of a run of two workers of which one was killed after step 5: the newest checkpoint is that of step 3."""
    made: dict[int, Path] = {}

    def make(stage: int) -> Path:
        if stage not in made:
            made[stage] = tmp_path_factory.mktemp(f"killed{stage}")
            codes = run_workers(run_config("r", engine_of("deepspeed", stage)), made[stage], 2, "step_rank1:4")
            assert codes[1] == -9, log_of(made[stage])
            assert codes[0] != 0
        return made[stage]

    return make


@pytest.fixture
def go_on(killed: Callable[[int], Path], run_workers: RunWorkers, tmp_path: Path) -> Callable[[PretrainConfig, int, int], Path]:
    """A home where a run that was killed at another ZeRO stage, after step 5, was started again with so many workers."""

    def start(config: PretrainConfig, killed_stage: int, workers: int) -> Path:
        home = tmp_path / f"from-{killed_stage}"
        shutil.copytree(killed(killed_stage), home)
        assert [path.name for path in (home / "runs" / "r" / "checkpoints").glob("step-*")] == ["step-00000003"]
        assert run_workers(config, home, workers) == [0] * workers, log_of(home)
        return home

    return start


def engine_of(name: str, stage: int) -> dict[str, object]:
    return {"engine": {"name": name, "zero_stage": stage}}


def log_of(home: Path) -> str:
    return "\n".join(path.read_text()[-2000:] for path in sorted(home.glob("rank-*.log")))


STAGES = [pytest.param(stage, marks=[] if stage == 2 else pytest.mark.chaos) for stage in (0, 1, 2, 3)]


@pytest.mark.parametrize("stage", STAGES)
def test_one_worker_and_two_give_the_same_losses(stage, finished, losses):
    one, two = (losses(finished("deepspeed", stage, workers), "r") for workers in (1, 2))
    assert len(one) == STEPS
    assert one == pytest.approx(two, rel=SAME)


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_gives_the_losses_of_plain_pytorch(stage, finished, run_config, cellplane_home, losses):
    in_process(run_config("r", TORCH))
    assert losses(finished("deepspeed", stage, 1), "r") == pytest.approx(losses(cellplane_home, "r"), rel=SAME)


@pytest.mark.parametrize("stage", [pytest.param(stage, marks=pytest.mark.chaos) for stage in (0, 2, 3)])
def test_a_network_with_every_option_trains_alike_on_two_workers_of_deepspeed(stage, run_config, run_workers, tmp_path, losses):
    options = {"model": WARMING, "masking": NARROW}
    assert run_workers(run_config("r", engine_of("deepspeed", stage) | options), tmp_path / "two", 2) == [0, 0], log_of(tmp_path / "two")
    assert run_workers(run_config("r", TORCH | options), tmp_path / "one", 1) == [0], log_of(tmp_path / "one")
    assert losses(tmp_path / "two", "r") == pytest.approx(losses(tmp_path / "one", "r"), rel=SAME)


HALF = {"model": {"precision": "bfloat16", "width": 64, "decoder_width": 64}}


def test_half_precision_trains_nearly_alike_and_keeps_whole_weights(run_config, tmp_path, monkeypatch, losses):
    found = []
    for name, precision in (("whole", "float32"), ("half", "bfloat16")):
        monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / name))
        config = run_config("r", TORCH | {"model": HALF["model"] | {"precision": precision}})
        in_process(config)
        found.append(losses(tmp_path / name, "r"))
        weights = state_of(tmp_path / name, config, monkeypatch).weights
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=1e-2)


@pytest.mark.parametrize("stage", [pytest.param(stage, marks=pytest.mark.chaos) for stage in (0, 2, 3)])
def test_half_precision_is_the_same_in_deepspeed(stage, run_config, run_workers, tmp_path, losses):
    assert run_workers(run_config("r", engine_of("deepspeed", stage) | HALF), tmp_path / "two", 2) == [0, 0], log_of(tmp_path / "two")
    assert run_workers(run_config("r", TORCH | HALF), tmp_path / "one", 1) == [0], log_of(tmp_path / "one")
    assert losses(tmp_path / "two", "r") == pytest.approx(losses(tmp_path / "one", "r"), rel=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_worker_costs_only_the_steps_since_the_checkpoint(stage, finished, go_on, run_config, monkeypatch, losses):
    config = run_config("r", engine_of("deepspeed", stage))
    home = go_on(config, stage, 2)
    whole = finished("deepspeed", stage, 2)
    assert losses(home, "r") == losses(whole, "r")
    one, other = (state_of(folder, config, monkeypatch) for folder in (home, whole))
    assert largest_difference(one.weights, other.weights) == 0.0
    assert largest_difference(one.optimizer, other.optimizer) == 0.0


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_of_two_workers_goes_on_with_one(stage, finished, go_on, run_config, losses):
    home = go_on(run_config("r", engine_of("deepspeed", stage)), stage, 1)
    assert losses(home, "r") == pytest.approx(losses(finished("deepspeed", stage, 2), "r"), rel=SAME)


def test_plain_pytorch_goes_on_where_deepspeed_stopped(finished, killed, run_config, tmp_path, monkeypatch, losses):
    home = tmp_path / "home"
    shutil.copytree(killed(2), home)
    monkeypatch.setenv("CELLPLANE_HOME", str(home))
    in_process(run_config("r", TORCH))
    assert losses(home, "r") == pytest.approx(losses(finished("deepspeed", 2, 2), "r"), rel=SAME)


def test_deepspeed_goes_on_where_plain_pytorch_stopped(finished, run_config, run_workers, cellplane_home, losses):
    config = run_config("r", TORCH)
    objective, plan, network = parts(config)
    folder = RunFolder.of("r")
    keeping = Keeping(Checkpoints(folder.checkpoints), config.checkpoint, run_identity(config), Journal(folder.journal))
    train(TorchEngine(network, config.optimizer), objective, plan, range(STEPS), keeping, lambda done, _: done == 4)
    assert run_workers(run_config("r", engine_of("deepspeed", 2)), cellplane_home, 1) == [0], log_of(cellplane_home)
    assert losses(cellplane_home, "r") == pytest.approx(losses(finished("deepspeed", 2, 2), "r"), rel=SAME)


@pytest.mark.chaos
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_goes_on_where_another_stage_stopped(stage, finished, go_on, run_config, losses):
    for source in (0, 3):
        home = go_on(run_config("r", engine_of("deepspeed", stage)), source, 2)
        assert losses(home, "r") == pytest.approx(losses(finished("deepspeed", 2, 2), "r"), rel=SAME)


@pytest.mark.chaos
@pytest.mark.parametrize("point", ["step_rank0:0", "step_rank1:2", "step_rank0:7", "before_checkpoint:0", "before_checkpoint:1"])
def test_a_kill_at_any_moment_leaves_the_run_as_it_was(point, finished, run_config, run_workers, tmp_path, losses):
    config = run_config("r", engine_of("deepspeed", 2))
    codes = run_workers(config, tmp_path, 2, point)
    assert -9 in codes
    assert run_workers(config, tmp_path, 2) == [0, 0], log_of(tmp_path)
    assert losses(tmp_path, "r") == losses(finished("deepspeed", 2, 2), "r")
