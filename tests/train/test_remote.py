"""Checkpoints behind a URL: only what arrived whole is seen, a store that refuses costs tries and then a clear error."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cellplane.errors import CheckpointError, ConfigError, StorageError
from cellplane.train.checkpoint import Checkpoints, checkpoints_of, write_checkpoint
from cellplane.train.config import CheckpointConfig
from cellplane.train.remote import RemoteFolder
from tests.train.states import IDENTITY, assert_same, state_of


class UnsteadyFileSystem(MemoryFileSystem):
    """A store in memory that refuses the next ``refusals`` calls of these operations."""

    protocol = "unsteady"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    refusals = 0
    calls: ClassVar[list[str]] = []

    def _count(self, call: str) -> None:
        cls = type(self)
        cls.calls.append(call)
        if cls.refusals:
            cls.refusals -= 1
            raise ConnectionError("the store is away")

    def put_file(self, lpath: str, rpath: str, callback: Any = None) -> None:
        self._count(f"put {rpath.rsplit('/', 1)[-1]}")
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def get_file(self, rpath: str, lpath: str, callback: Any = None) -> None:
        self._count("get")
        Path(lpath).write_bytes(self.cat_file(rpath))

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        self._count("ls")
        return super().ls(path, detail=detail, **kwargs)

    def rm_file(self, path: str) -> None:
        self._count(f"rm {path.rsplit('/', 1)[-1]}")
        self._rm(path)


@pytest.fixture
def unsteady() -> Iterator[type[UnsteadyFileSystem]]:
    """A store whose refusals the test sets."""
    fsspec.register_implementation("unsteady", UnsteadyFileSystem, clobber=True)
    UnsteadyFileSystem.refusals = 0
    UnsteadyFileSystem.calls.clear()
    UnsteadyFileSystem.store.clear()
    yield UnsteadyFileSystem
    UnsteadyFileSystem.refusals = 0


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place of this test alone, in memory and on the disk."""
    return f"memory://{uuid.uuid4().hex}/run" if request.param == "memory" else (tmp_path / "store" / "run").as_uri()


def copied(folder: Path, url: str, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    checkpoints.remote = RemoteFolder(url, waits_s=(0.0, 0.0))
    return checkpoints


def names(url: str) -> list[str]:
    system, place = fsspec.core.url_to_fs(url)
    return sorted(path.rsplit("/", 1)[-1] for path in system.ls(place, detail=False))


def test_another_machine_goes_on_from_what_was_copied(tmp_path, url):
    here = copied(tmp_path / "here", url)
    for step in (10, 20):
        here.save(state_of(step), score=1.0 / step)
    there = copied(tmp_path / "another machine", url)
    assert_same(there.newest_valid(IDENTITY), state_of(20))
    assert_same(there.best_valid(IDENTITY), state_of(20))
    assert there.steps() == [10, 20]
    assert not list(there.folder.iterdir()), "what was fetched is gone again"


def test_the_same_stay_there_as_here(tmp_path, url):
    checkpoints = copied(tmp_path / "here", url, keep=1)
    for step, score in ((10, 1.0), (20, 2.0), (30, 3.0)):
        checkpoints.save(state_of(step), score)
    assert names(url) == ["step-00000010", "step-00000030"] == [path.name for path in checkpoints.found()]


def test_a_machine_that_starts_from_a_copy_keeps_the_best_there(tmp_path, url):
    copied(tmp_path / "here", url, keep=1).save(state_of(10), 1.0)
    another = copied(tmp_path / "another machine", url, keep=1)
    for step in (20, 30):
        another.save(state_of(step), 2.0)
    assert names(url) == ["step-00000010", "step-00000030"]


def test_an_empty_place_is_a_run_that_never_saved(tmp_path, url):
    assert copied(tmp_path / "here", url).newest_valid(IDENTITY) is None


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_what_arrived_in_part_is_not_seen(tmp_path, url, file):
    here = copied(tmp_path / "here", url)
    for step in (10, 20):
        here.save(state_of(step))
    system, place = fsspec.core.url_to_fs(url)
    system.rm(f"{place}/step-00000020/{file}")
    assert_same(copied(tmp_path / "another machine", url).newest_valid(IDENTITY), state_of(10))


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_bit_that_flipped_there_is_found(tmp_path, url, file, caplog):
    here = copied(tmp_path / "here", url)
    for step in (10, 20):
        here.save(state_of(step))
    system, place = fsspec.core.url_to_fs(url)
    data = bytearray(system.cat_file(f"{place}/step-00000020/{file}"))
    data[len(data) // 2] ^= 16
    system.pipe_file(f"{place}/step-00000020/{file}", bytes(data))
    assert_same(copied(tmp_path / "another machine", url).newest_valid(IDENTITY), state_of(10))
    assert file == "manifest.json" or "step-00000020 is damaged" in caplog.text


def test_a_damaged_one_here_is_replaced_by_its_copy_there(tmp_path, url):
    checkpoints = copied(tmp_path / "here", url)
    for step in (10, 20):
        checkpoints.save(state_of(step))
    (checkpoints.found()[-1] / "state.json").write_text("{}")
    assert_same(checkpoints.newest_valid(IDENTITY), state_of(20))


def test_when_nothing_is_whole_here_or_there_the_run_stops(tmp_path, url):
    checkpoints = copied(tmp_path / "here", url)
    checkpoints.save(state_of(10))
    (checkpoints.found()[-1] / "state.json").write_text("{}")
    system, place = fsspec.core.url_to_fs(url)
    system.pipe_file(
        f"{place}/step-00000010/weights.safetensors", b"0" * int(system.info(f"{place}/step-00000010/weights.safetensors")["size"])
    )
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        checkpoints.newest_valid(IDENTITY)


def test_only_halves_at_the_url_do_not_start_a_run_anew(tmp_path, url):
    """The machine is lost and the only copy that was ever begun is not whole: that is said, not passed over."""
    here = copied(tmp_path / "here", url)
    here.save(state_of(10))
    system, place = fsspec.core.url_to_fs(url)
    system.pipe_file(f"{place}/step-00000010/manifest.json", b"{}")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        copied(tmp_path / "another machine", url).newest_valid(IDENTITY)


def test_files_go_first_and_the_manifest_last(tmp_path, unsteady):
    copied(tmp_path, "unsteady://bucket/run").save(state_of(10))
    puts = [call for call in unsteady.calls if call.startswith("put")]
    assert puts == ["put optimizer.safetensors", "put state.json", "put weights.safetensors", "put manifest.json"]


def test_the_manifest_goes_first_when_one_is_removed(tmp_path, unsteady):
    remote = RemoteFolder("unsteady://bucket/run")
    remote.put(write_checkpoint(tmp_path, state_of(10)))
    unsteady.calls.clear()
    remote.remove("step-00000010")
    assert next(call for call in unsteady.calls if call.startswith("rm")) == "rm manifest.json"
    assert remote.entries() == []


@pytest.mark.parametrize("refusals", [1, 2])
def test_a_store_that_refuses_once_or_twice_is_asked_again(tmp_path, unsteady, refusals, caplog):
    checkpoints = copied(tmp_path, "unsteady://bucket/run")
    unsteady.refusals = refusals
    checkpoints.save(state_of(10))
    assert [entry.whole for entry in RemoteFolder("unsteady://bucket/run").entries()] == [True]
    assert caplog.text.count("the store is away") == refusals


def test_a_store_that_stays_away_is_an_error_and_nothing_here_is_lost(tmp_path, unsteady):
    checkpoints = copied(tmp_path, "unsteady://bucket/run", keep=1)
    checkpoints.save(state_of(10))
    unsteady.refusals = 10**6
    with pytest.raises(StorageError, match=r"could not copy .*step-00000020 to unsteady://bucket/run \(3 tries\): the store is away"):
        checkpoints.save(state_of(20))
    unsteady.refusals = 0
    assert_same(Checkpoints(tmp_path).newest_valid(IDENTITY), state_of(20))
    assert [entry.step for entry in RemoteFolder("unsteady://bucket/run").entries() if entry.whole] == [10]


def test_a_store_that_cannot_be_asked_does_not_start_a_run_anew(tmp_path, unsteady):
    checkpoints = copied(tmp_path, "unsteady://bucket/run")
    unsteady.refusals = 10**6
    with pytest.raises(StorageError, match="could not list"):
        checkpoints.newest_valid(IDENTITY)


def test_the_error_of_a_copy_in_the_background_is_raised_by_the_next_save(tmp_path, unsteady):
    checkpoints = copied(tmp_path, "unsteady://bucket/run").in_background()
    unsteady.refusals = 10**6
    checkpoints.save(state_of(10))
    with pytest.raises(StorageError, match="could not copy"):
        checkpoints.save(state_of(20))
    unsteady.refusals = 0
    checkpoints.save(state_of(20))
    checkpoints.close()
    assert [entry.step for entry in RemoteFolder("unsteady://bucket/run").entries() if entry.whole] == [20]


def test_what_a_failed_copy_left_behind_is_said_on_the_way(tmp_path, unsteady, caplog):
    checkpoints = copied(tmp_path, "unsteady://bucket/run")
    with caplog.at_level(logging.INFO):
        checkpoints.save(state_of(10))
    assert "checkpoint step-00000010 is copied to unsteady://bucket/run" in caplog.text


def test_a_configured_url_gets_a_folder_for_each_run(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path))
    root = f"memory://{uuid.uuid4().hex}"
    for run in ("one", "two"):
        with checkpoints_of(tmp_path / "runs" / run, CheckpointConfig(folder=root)) as checkpoints:
            checkpoints.save(state_of(10))
    assert names(root) == ["one", "two"]
    assert names(f"{root}/one") == ["step-00000010"]


def test_a_protocol_without_its_package_is_a_configuration_error():
    with pytest.raises(ConfigError, match="install the package"):
        RemoteFolder("nowhere://bucket")
