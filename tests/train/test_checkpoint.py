"""A checkpoint is whole or it is not used, and a run never starts again from 0 in silence."""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path

import pytest
import torch

from cellplane.errors import CheckpointError, DataError, StorageError
from cellplane.train.checkpoint import OPTIMIZER, STATE, WEIGHTS, Checkpoints, TrainingState, read_checkpoint

FILES = (WEIGHTS, OPTIMIZER, STATE, "manifest.json")


def state_of(step: int, identity: str = "this run") -> TrainingState:
    """A state whose every tensor depends on the step; weights are stored transposed to be not contiguous."""
    generator = torch.Generator().manual_seed(step)
    weights = {"linear.weight": torch.randn(5, 3, generator=generator).T, "linear.bias": torch.randn(3, generator=generator)}
    names = [f"{moment}:{name}" for moment in ("exp_avg", "exp_avg_sq") for name in weights]
    moments = {name: torch.randn(weights[name.partition(":")[2]].shape, generator=generator) for name in names}
    return TrainingState(step, weights, moments, identity)


def assert_same(found: TrainingState | None, expected: TrainingState) -> None:
    assert found is not None
    assert (found.step, found.identity) == (expected.step, expected.identity)
    assert found.weights.keys() == expected.weights.keys()
    assert found.optimizer.keys() == expected.optimizer.keys()
    for name, tensor in {**expected.weights, **expected.optimizer}.items():
        torch.testing.assert_close({**found.weights, **found.optimizer}[name], tensor, rtol=0, atol=0)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    """Steps 10 and 20 of a run."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (10, 20):
        checkpoints.save(state_of(step))
    return checkpoints


def newest(checkpoints: Checkpoints) -> Path:
    return checkpoints.found()[-1]


def test_weights_and_moments_come_back_bit_for_bit(checkpoints):
    assert_same(checkpoints.newest_valid("this run"), state_of(20))
    assert sorted(path.name for path in newest(checkpoints).iterdir()) == sorted(FILES)


def test_a_run_that_never_saved_begins_at_the_beginning(tmp_path):
    assert Checkpoints(tmp_path / "nothing").newest_valid("any") is None


def test_only_the_newest_are_kept(checkpoints):
    checkpoints.save(state_of(30))
    assert [path.name for path in checkpoints.found()] == ["step-00000020", "step-00000030"]


def test_saving_a_step_again_replaces_it(checkpoints):
    checkpoints.save(state_of(20, "another"))
    assert len(checkpoints.found()) == 2
    assert checkpoints.newest_valid("another").identity == "another"


def truncate(path: Path) -> None:
    file = path / WEIGHTS
    file.write_bytes(file.read_bytes()[:-7])


def flip(path: Path) -> None:
    file = path / OPTIMIZER
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def lose_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def lose_state(path: Path) -> None:
    (path / STATE).unlink()


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def garble_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"kind": "cellplane-checkpoint", "format_version": 1, "files": {"state.json": 3}}')


def forget_state(path: Path) -> None:
    """A manifest that is right about what it lists, but does not list everything."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"][STATE]
    (path / "manifest.json").write_text(json.dumps(manifest))


DAMAGES = [truncate, flip, lose_manifest, lose_state, empty, garble_manifest, forget_state]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_left_aside_with_a_warning(checkpoints, damage, caplog):
    damage(newest(checkpoints))
    with caplog.at_level(logging.WARNING):
        assert_same(checkpoints.newest_valid("this run"), state_of(10))
    assert "step-00000020 is damaged" in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_when_all_are_damaged_the_run_stops_instead_of_starting_over(checkpoints, damage):
    for path in checkpoints.found():
        damage(path)
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints") as caught:
        checkpoints.newest_valid("this run")
    assert "start anew" in str(caught.value)


def test_no_flipped_bit_goes_through(checkpoints):
    """A flip in unused room of the manifest changes nothing; any other is found."""
    path, rng = newest(checkpoints), random.Random(0)
    original = {name: (path / name).read_bytes() for name in FILES}
    kinds = set()
    for _ in range(200):
        name = rng.choice(FILES)
        content = bytearray(original[name])
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (path / name).write_bytes(content)
        found = checkpoints.newest_valid("this run")
        assert_same(found, state_of(found.step))
        assert found.step == 10 or name == "manifest.json"
        kinds.add((name, found.step))
        (path / name).write_bytes(original[name])
    assert {(name, 10) for name in FILES} <= kinds


def test_another_configuration_or_other_data_is_refused(checkpoints):
    with pytest.raises(CheckpointError, match="another configuration or other data"):
        checkpoints.newest_valid("another run")


def test_a_damaged_future_never_outlives_what_is_saved_after_it(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state_of(40))
    flip(newest(checkpoints))
    checkpoints.save(state_of(30))
    assert [path.name for path in checkpoints.found()] == ["step-00000030"]
    assert_same(checkpoints.newest_valid("this run"), state_of(30))


def test_what_a_killed_writer_leaves_is_not_a_checkpoint(checkpoints):
    staging = checkpoints.folder / ".step-00000030.abc"
    staging.mkdir()
    (staging / WEIGHTS).write_bytes(b"half")
    assert_same(checkpoints.newest_valid("this run"), state_of(20))


def test_a_disk_that_refuses_is_an_error_and_the_last_checkpoint_stays(checkpoints, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        checkpoints.save(state_of(30))
    monkeypatch.undo()
    assert_same(checkpoints.newest_valid("this run"), state_of(20))
    assert not list(checkpoints.folder.glob(".*"))


def test_a_folder_of_another_kind_is_named(checkpoints):
    manifest = newest(checkpoints) / "manifest.json"
    manifest.write_text(manifest.read_text().replace("cellplane-checkpoint", "cellplane-model"))
    with pytest.raises(DataError, match="describes a cellplane-model"):
        read_checkpoint(newest(checkpoints))
