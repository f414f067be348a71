"""A checkpoint is whole or it is not used, and a run never starts again from 0 in silence."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cellplane.artifact.folder import parse_manifest, sealed
from cellplane.errors import CheckpointError, ConfigError, DataError, StorageError
from cellplane.train.checkpoint import (
    OPTIMIZER,
    STATE,
    WEIGHTS,
    Checkpoints,
    checkpoints_of,
    read_checkpoint,
)
from cellplane.train.config import CheckpointConfig
from cellplane.train.retention import KIND
from tests.train.states import assert_same, large_state, state_of

FILES = (WEIGHTS, OPTIMIZER, STATE, "manifest.json")


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


def lose_weights(path: Path) -> None:
    (path / WEIGHTS).unlink()


def lose_optimizer(path: Path) -> None:
    (path / OPTIMIZER).unlink()


def lengthen(path: Path) -> None:
    with (path / WEIGHTS).open("ab") as file:
        file.write(b"\0" * 8)


def swap_tensors(path: Path) -> None:
    """Two good files under each other's names."""
    (path / WEIGHTS).rename(path / "other")
    (path / OPTIMIZER).rename(path / WEIGHTS)
    (path / "other").rename(path / OPTIMIZER)


def another_step_inside(path: Path) -> None:
    """Whole files of another step, as a copy or a wrong rename leaves them."""
    other = path.parent / "step-00000010"
    shutil.rmtree(path)
    shutil.copytree(other, path)


def another_step_in_the_state(path: Path) -> None:
    """A state.json that its manifest vouches for but that is of another step than the manifest."""
    data = json.dumps({"step": 19, "identity": "this run"}).encode()
    (path / STATE).write_bytes(data)
    manifest = parse_manifest((path / "manifest.json").read_bytes(), KIND, "")
    manifest["files"][STATE] = hash_of(data)
    del manifest["manifest_sha256"]
    (path / "manifest.json").write_bytes(sealed(manifest))


def hash_of(data: bytes) -> dict[str, object]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def one_file_too_many(path: Path) -> None:
    shutil.copy(path / WEIGHTS, path / "more.safetensors")


def link_instead_of_a_file(path: Path) -> None:
    shutil.move(path / WEIGHTS, path.parent / "elsewhere")
    (path / WEIGHTS).symlink_to(path.parent / "elsewhere")


def reach_outside(path: Path) -> None:
    """A manifest that vouches for a file beside the checkpoint."""
    manifest = parse_manifest((path / "manifest.json").read_bytes(), KIND, "")
    manifest["files"]["../step-00000010/state.json"] = hash_of((path.parent / "step-00000010" / STATE).read_bytes())
    del manifest["manifest_sha256"]
    (path / "manifest.json").write_bytes(sealed(manifest))


DAMAGES = [truncate, flip, lose_manifest, lose_state, lose_weights, lose_optimizer, empty, garble_manifest, forget_state, lengthen]
DAMAGES += [swap_tensors, one_file_too_many, link_instead_of_a_file]
OF_THE_NEWEST = [*DAMAGES, another_step_inside, another_step_in_the_state, reach_outside]


@pytest.mark.parametrize("damage", OF_THE_NEWEST)
def test_a_damaged_newest_is_left_aside_with_a_warning(checkpoints, damage, caplog):
    damage(newest(checkpoints))
    with caplog.at_level(logging.WARNING):
        assert_same(checkpoints.newest_valid("this run"), state_of(10))
    assert "step-00000020 is damaged" in caplog.text


def test_what_a_run_goes_on_from_is_said(checkpoints, caplog):
    with caplog.at_level(logging.INFO):
        checkpoints.newest_valid("this run")
    assert f"going on from checkpoint {checkpoints.folder / 'step-00000020'}" in caplog.text


@pytest.mark.parametrize("name", FILES)
def test_a_newest_that_ends_early_is_left_aside_whatever_its_length(checkpoints, name):
    file = newest(checkpoints) / name
    whole = file.read_bytes()
    for length in sorted({0, 1, 7, 8, 9, len(whole) // 3, len(whole) // 2, len(whole) - 8, len(whole) - 1}):
        file.write_bytes(whole[:length])
        assert_same(checkpoints.newest_valid("this run"), state_of(10))
    file.write_bytes(whole)
    assert_same(checkpoints.newest_valid("this run"), state_of(20))


@pytest.mark.parametrize("name", ["step-20", "step-0000000030x", "step-00000030.old", "Step-00000030", "step-+0000030"])
def test_a_folder_with_a_name_that_no_checkpoint_has_is_not_one(checkpoints, name):
    shutil.copytree(newest(checkpoints), checkpoints.folder / name)
    assert_same(checkpoints.newest_valid("this run"), state_of(20))
    newest(checkpoints).rename(checkpoints.folder / "moved away")
    assert_same(checkpoints.newest_valid("this run"), state_of(10))


def test_a_renamed_checkpoint_is_not_taken_for_another_step(checkpoints):
    newest(checkpoints).rename(checkpoints.folder / "step-00000099")
    assert_same(checkpoints.newest_valid("this run"), state_of(10))


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
    Checkpoints(checkpoints.folder).save(state_of(30))
    assert not staging.exists()


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


def test_small_values_of_the_loop_come_back(checkpoints):
    state = replace(state_of(30), extra={"skipped": [3, 4], "norms": [0.5, 1.25]})
    checkpoints.save(state)
    assert_same(checkpoints.newest_valid("this run"), state)


def test_the_best_stays_until_there_is_a_better_one_also_after_a_restart(tmp_path):
    scores = {10: 3.0, 20: 1.0, 30: 2.0, 40: 2.0, 50: 0.5, 60: math.nan, 70: None}
    kept = {10: [10], 20: [20], 30: [20, 30], 40: [20, 40], 50: [50], 60: [50, 60], 70: [50, 70]}
    for step, score in scores.items():
        checkpoints = Checkpoints(tmp_path, keep=1)  # a new process each time: nothing is remembered but on the disk
        checkpoints.save(state_of(step), score)
        assert checkpoints.steps() == kept[step]
    assert_same(checkpoints.best_valid("this run"), state_of(50))
    assert_same(checkpoints.newest_valid("this run"), state_of(70))


def test_the_best_goes_when_it_is_not_to_be_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, keep_best=False)
    for step, score in ((10, 1.0), (20, 2.0)):
        checkpoints.save(state_of(step), score)
    assert checkpoints.steps() == [20]


def test_a_damaged_best_gives_way_to_the_next(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step, score in ((10, 2.0), (20, 1.0), (30, 3.0)):
        checkpoints.save(state_of(step), score)
    flip(tmp_path / "step-00000020")
    assert_same(checkpoints.best_valid("this run"), state_of(10))
    assert "step-00000020 is damaged" in caplog.text


def test_without_scores_there_is_no_best(checkpoints):
    assert checkpoints.best_valid("this run") is None


def test_what_is_damaged_does_not_push_out_what_is_whole(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (10, 20, 30):
        checkpoints.save(state_of(step))
    truncate(tmp_path / "step-00000030")
    checkpoints.save(state_of(40))
    assert checkpoints.steps() == [20, 30, 40]
    flip(tmp_path / "step-00000040")
    assert_same(checkpoints.newest_valid("this run"), state_of(20))


@pytest.fixture
def writing(tmp_path: Path) -> Iterator[Checkpoints]:
    """Checkpoints that a thread writes."""
    with Checkpoints(tmp_path / "checkpoints", keep=2).in_background() as checkpoints:
        yield checkpoints


def test_a_thread_writes_the_state_of_its_step_whatever_becomes_of_the_weights(writing):
    state = large_state(10)
    expected = large_state(10)
    writing.save(state)
    for tensor in (*state.weights.values(), *state.optimizer.values()):
        tensor.fill_(-1.0)
    writing.close()
    assert_same(Checkpoints(writing.folder).newest_valid("this run"), expected)


def test_one_write_is_in_flight_and_the_next_save_waits_for_it(writing, monkeypatch):
    busy, most = [], []
    write = Checkpoints._write

    def counted(self: Checkpoints, *arguments: object) -> Path:
        busy.append(threading.current_thread().name)
        most.append(len(busy))
        path = write(self, *arguments)
        busy.pop()
        return path

    monkeypatch.setattr(Checkpoints, "_write", counted)
    for step in range(1, 6):
        writing.save(large_state(step, megabytes=1))
    writing.close()
    assert most == [1] * 5
    assert writing.steps() == [4, 5]


def test_reading_waits_for_what_is_being_written(writing):
    for step in (10, 20):
        writing.save(large_state(step))
        assert_same(writing.newest_valid("this run"), large_state(step))


def refuse(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_an_error_of_the_thread_is_raised_by_the_next_save_and_nothing_is_lost(writing, monkeypatch):
    writing.save(state_of(10))
    writing.wait()
    monkeypatch.setattr(os, "fsync", refuse)
    writing.save(state_of(20))
    with pytest.raises(StorageError, match="No space left"):
        writing.save(state_of(30))
    monkeypatch.undo()
    assert_same(writing.newest_valid("this run"), state_of(10))
    writing.save(state_of(30))
    assert_same(writing.newest_valid("this run"), state_of(30))


def test_an_error_of_the_last_write_is_raised_when_they_are_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match="No space left"), Checkpoints(tmp_path).in_background() as checkpoints:
        checkpoints.save(state_of(10))


def save_and_fail(folder: Path) -> None:
    with Checkpoints(folder).in_background() as checkpoints:
        checkpoints.save(state_of(10))
        raise KeyError("the run")


def test_what_ended_a_run_is_not_hidden_by_the_error_of_the_thread(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(KeyError):
        save_and_fail(tmp_path)
    assert "a checkpoint was not written either" in caplog.text


def test_the_configuration_says_where_and_how(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / "home"))
    run = tmp_path / "home" / "runs" / "mine"
    for folder, place in (
        (None, run / "checkpoints"),
        (str(tmp_path / "big disk"), tmp_path / "big disk" / "mine"),
        ("there", tmp_path / "home/there/mine"),
    ):
        with checkpoints_of(run, CheckpointConfig(keep=1, folder=folder)) as checkpoints:
            checkpoints.save(state_of(10))
            checkpoints.save(state_of(20))
        assert checkpoints.folder == place
        assert [path.name for path in place.iterdir()] == ["step-00000020"]


def test_checkpoints_that_nobody_writes_in_the_background_are_complete_at_once(tmp_path):
    checkpoints = checkpoints_of(tmp_path / "run", CheckpointConfig(asynchronous=False))
    assert read_checkpoint(checkpoints.save(state_of(10))).step == 10


def test_a_url_of_an_unknown_kind_is_refused_before_anything_begins(tmp_path):
    with pytest.raises(ConfigError, match="nowhere://bucket/run"):
        checkpoints_of(tmp_path / "run", CheckpointConfig(folder="nowhere://bucket"))
