"""DeepSpeed's own files inside our manifest: nothing is read that does not verify, and nothing by a group it does not fit."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cellplane.errors import CheckpointError, ConfigError
from cellplane.train.checkpoint import STATE, Checkpoints, TrainingState, read_checkpoint
from cellplane.train.config import PretrainConfig
from cellplane.train.launch import RunFolder, run_identity
from cellplane.train.retention import look
from cellplane.train.sharded import Group, load_shards, save_sharded
from tests.train.conftest import STEPS, MakeConfig, RunWorkers
from tests.train.states import IDENTITY, assert_same, state_of

ALONE = Group(rank=0, world_size=1, zero_stage=2)
HEAD = TrainingState(10, {}, {}, IDENTITY, {"norms": [1.0]})
# Workers and ZeRO stage; each takes three runs of DeepSpeed.
GROUPS = [*(pytest.param(1, stage, marks=pytest.mark.chaos) for stage in (0, 1)), (2, 2), pytest.param(2, 3, marks=pytest.mark.chaos)]
MIDDLE = [pytest.param("checkpoint_file:1", marks=pytest.mark.chaos), "before_checkpoint_manifest:1"]


def write(folder: Path) -> None:
    """What DeepSpeed would write: files in a folder of its own."""
    (folder / "deepspeed").mkdir()
    (folder / "deepspeed" / "mp_rank_00_model_states.pt").write_bytes(b"weights" * 1000)
    (folder / "deepspeed" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"moments" * 2000)


def save(checkpoints: Checkpoints, step: int, score: float | None = None) -> Path:
    return save_sharded(checkpoints, replace(HEAD, step=step), ALONE, write, score)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    """Steps 10 and 20, sharded."""
    made = Checkpoints(tmp_path / "checkpoints")
    for step in (10, 20):
        save(made, step)
    return made


def test_a_sharded_checkpoint_is_found_verified_and_left_to_the_engine(checkpoints):
    found = checkpoints.newest_valid(IDENTITY)
    assert found == replace(HEAD, step=20, shards=checkpoints.folder / "step-00000020")
    assert look(found.shards).whole


def test_its_manifest_knows_every_file_and_the_group(checkpoints):
    manifest = json.loads((checkpoints.found()[-1] / "manifest.json").read_text())
    assert set(manifest["files"]) == {
        STATE,
        "deepspeed/mp_rank_00_model_states.pt",
        "deepspeed/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    }
    assert (manifest["layout"], manifest["world_size"], manifest["zero_stage"], manifest["step"]) == ("sharded", 1, 2, 20)


def files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_one_is_left_aside(checkpoints, number, harm, caplog):
    file = files(checkpoints.found()[-1])[number]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data if harm == "flip" else data[: len(data) // 2])
    if harm == "remove":
        file.unlink()
    with caplog.at_level(logging.WARNING):
        assert checkpoints.newest_valid(IDENTITY).step == 10
    assert "step-00000020 is damaged" in caplog.text


def test_both_formats_live_beside_each_other(checkpoints):
    checkpoints.save(state_of(30))
    assert_same(checkpoints.newest_valid(IDENTITY), state_of(30))
    shutil.rmtree(checkpoints.folder / "step-00000030")
    assert checkpoints.newest_valid(IDENTITY).shards is not None


def test_the_newest_and_the_best_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step, score in ((10, 1.0), (20, 3.0), (30, 2.0)):
        save(checkpoints, step, score)
    assert checkpoints.steps() == [10, 30]
    assert not list(tmp_path.glob(".*"))


def test_saving_a_step_again_replaces_it(checkpoints):
    (checkpoints.found()[-1] / STATE).write_text("{}")
    save(checkpoints, 20)
    assert checkpoints.newest_valid(IDENTITY).step == 20


@pytest.mark.parametrize("group", [Group(0, 2, 2), Group(0, 1, 3)])
def test_another_group_is_refused_before_anything_is_read(checkpoints, group):
    state = checkpoints.newest_valid(IDENTITY)
    with pytest.raises(CheckpointError, match="written by 1 workers at ZeRO stage 2 and fits no other group"):
        load_shards(None, state, group)


class Finding:
    """An engine that finds nothing, which DeepSpeed says by returning None."""

    def load_checkpoint(self, folder: str, tag: str, load_lr_scheduler_states: bool) -> tuple[None, None]:
        return None, None


def test_nothing_found_is_an_error_and_not_a_start_from_nothing(checkpoints):
    with pytest.raises(CheckpointError, match="found nothing to go on from"):
        load_shards(Finding(), checkpoints.newest_valid(IDENTITY), ALONE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"checkpoint": {"format": "sharded", "folder": "s3://bucket/runs"}}, "is a URL"),
        ({"checkpoint": {"format": "sharded"}, "engine": {"name": "torch"}}, "engine.name deepspeed"),
        ({"checkpoint": {"format": "sharded"}, "workers": {"min": 1, "max": 2}}, "fits one number of workers"),
    ],
)
def test_what_shards_cannot_do_is_said_by_the_configuration(run_config, changes, words):
    with pytest.raises(ValueError, match=words):
        run_config("r", changes)


def sharded(run_config: MakeConfig, stage: int) -> PretrainConfig:
    return run_config("r", {"engine": {"zero_stage": stage}, "checkpoint": {"every_steps": 2, "format": "sharded"}})


Made = Callable[[int, int, str], Path]


@pytest.fixture(scope="module")
def made(run_config: MakeConfig, run_workers: RunWorkers, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The home of a run of a group that was whole, or killed at a point; each made once."""
    homes: dict[tuple[int, int, str], Path] = {}

    def make(workers: int, stage: int, fault: str) -> Path:
        key = (workers, stage, fault)
        if key not in homes:
            homes[key] = tmp_path_factory.mktemp("sharded")
            codes = run_workers(sharded(run_config, stage), homes[key], workers, fault)
            assert (-9 in codes) if fault else codes == [0] * workers, log_of(homes[key])
        return homes[key]

    return make


def log_of(home: Path) -> str:
    return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(home.glob("rank-*.log")))


def found(home: Path, config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> TrainingState | None:
    monkeypatch.setenv("CELLPLANE_HOME", str(home))
    return Checkpoints(RunFolder.of("r").checkpoints).newest_valid(run_identity(config))


@pytest.mark.parametrize(("workers", "stage"), GROUPS)
def test_a_killed_group_goes_on_from_its_shards_exactly(workers, stage, made, run_config, run_workers, tmp_path, monkeypatch, losses):
    config = sharded(run_config, stage)
    home = Path(shutil.copytree(made(workers, stage, f"step_rank{workers - 1}:4"), tmp_path / "home"))
    state = found(home, config, monkeypatch)
    assert (state.step, state.shards is not None, dict(state.weights)) == (4, True, {})
    assert run_workers(config, home, workers) == [0] * workers, log_of(home)
    whole = made(workers, stage, "")
    assert losses(home, "r") == losses(whole, "r")
    one, other = (found(folder, config, monkeypatch) for folder in (home, whole))
    assert_same(one, other)  # the last is consolidated: the model folder is made of it
    assert one.step == STEPS


@pytest.mark.parametrize("fault", [*MIDDLE, pytest.param("before_checkpoint_rename:1", marks=pytest.mark.chaos)])
def test_a_group_killed_while_it_writes_goes_on_from_the_one_before(fault, made, run_config, run_workers, tmp_path, monkeypatch, losses):
    config = sharded(run_config, 1)
    home = Path(shutil.copytree(made(1, 1, fault), tmp_path / "home"))
    assert found(home, config, monkeypatch).step == 2
    assert run_workers(config, home, 1) == [0], log_of(home)
    assert losses(home, "r") == losses(made(1, 1, ""), "r")
    assert not list(RunFolder.of("r").checkpoints.glob(".*"))


@pytest.mark.parametrize("changes", [{"zero_stage": 2}, {"name": "torch"}])
def test_another_stage_or_engine_ends_with_a_word(changes, made, run_config, run_workers, tmp_path):
    home = Path(shutil.copytree(made(1, 1, "step_rank0:4"), tmp_path / "home"))
    config = run_config("r", {"engine": {"zero_stage": 1, **changes}})
    assert run_workers(config, home, 1) == [1]
    assert "fits no other group" in log_of(home) or "DeepSpeed's own files" in log_of(home)


def test_a_read_of_shards_holds_no_tensors(checkpoints):
    assert read_checkpoint(checkpoints.found()[0]).weights == {}


def test_the_error_of_a_url_is_the_configurations(run_config):
    with pytest.raises((ConfigError, ValueError), match="name a shared path"):
        sharded(run_config, 1).checkpoint.model_validate({"format": "sharded", "folder": "memory://x"})
