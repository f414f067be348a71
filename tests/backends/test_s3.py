"""Shards, checkpoints and models in a bucket, over a network that breaks at any request: nothing lost, no half taken for whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from cellplane.data.config import ConvertConfig, DataKeys
from cellplane.data.convert import convert_with, write_part
from cellplane.data.inputs import find_inputs
from cellplane.data.loader import ShardStore
from cellplane.data.manifest import read_manifest
from cellplane.data.remote import fetch_shards, send_shards, shard_folder
from cellplane.errors import CheckpointError, DataError, IntegrityError, StorageError
from cellplane.train.checkpoint import Checkpoints
from cellplane.train.remote import RemoteFolder
from tests.backends.proxy import MODES
from tests.train.states import IDENTITY, assert_same, state_of

AFTER = (0, 1, 2, 4, 7)  # requests that go well before the fault; a whole fetch of the shards below takes 8, a copy some 15
HUNG_AFTER = (1, 4)  # waiting takes its time
FAULTS = [(mode, after) for mode in MODES for after in (HUNG_AFTER if mode == "hang" else AFTER)]


def converted(h5ad: Path, out: Path, seed: int = 0) -> Path:
    """Shards of 120 cells in several files."""
    keys = DataKeys(batch_key="batch", labels_key="cell_type")
    config = ConvertConfig(inputs=(str(h5ad),), out=str(out), keys=keys, max_cells=16, shard_bytes=4000, seed=seed)
    convert_with(config, lambda tasks: map(write_part, tasks), lambda _: None)
    return out


@pytest.fixture
def made(h5ad: Path, tmp_path: Path) -> Path:
    return converted(h5ad, tmp_path / "made")


def visible(folder: Path) -> dict[str, str]:
    """sha256 of every file that no one hides."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if not path.name.startswith(".")}


def another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str = "another") -> None:
    """From here on CELLPLANE_HOME is an empty folder."""
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / name))


def test_shards_come_back_on_another_machine_to_the_byte(s3, bucket, made, tmp_path, monkeypatch):
    sent = send_shards(made, f"{bucket}/data/shards")
    another_machine(monkeypatch, tmp_path)
    folder = fetch_shards(f"{bucket}/data/shards")
    assert visible(folder) == visible(made)
    assert sent == len(visible(made)) - 1
    assert len(ShardStore(folder).sizes) == len(read_manifest(made).sentences)


def test_the_manifest_is_the_last_that_is_written(s3, bucket, made):
    send_shards(made, f"{bucket}/shards")
    assert [line for line in s3.network.requests if line.startswith("PUT")][-1].endswith("/manifest.json")


def test_what_is_there_is_neither_sent_nor_fetched_again(s3, bucket, made, tmp_path, monkeypatch):
    send_shards(made, f"{bucket}/shards")
    assert send_shards(made, f"{bucket}/shards") == 0
    another_machine(monkeypatch, tmp_path)
    fetch_shards(f"{bucket}/shards")
    s3.network.count()
    fetch_shards(f"{bucket}/shards")
    assert [line.rsplit("/", 1)[-1] for line in s3.network.requests if line.startswith("GET")] == ["manifest.json"]


@pytest.mark.parametrize(("mode", "after"), FAULTS)
def test_a_copy_that_breaks_off_is_no_folder_yet_and_goes_on(s3, bucket, made, tmp_path, monkeypatch, mode, after):
    url = f"{bucket}/shards"
    with s3.network.broken(mode, after), pytest.raises(StorageError, match="could not"):
        send_shards(made, url)
    another_machine(monkeypatch, tmp_path, "early")
    with pytest.raises(DataError, match=r"holds no manifest\.json"):
        fetch_shards(url)
    send_shards(made, url)
    another_machine(monkeypatch, tmp_path, "late")
    assert visible(fetch_shards(url)) == visible(made)


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("mode", ["503", "cut"])
def test_readers_of_the_older_data_never_see_a_newer_half(s3, bucket, made, h5ad, tmp_path, monkeypatch, mode, after):
    url, newer = f"{bucket}/shards", converted(h5ad, tmp_path / "newer", seed=1)
    send_shards(made, url)
    with s3.network.broken(mode, after), pytest.raises(StorageError, match="could not"):
        send_shards(newer, url)
    another_machine(monkeypatch, tmp_path, "early")
    assert visible(fetch_shards(url)) == visible(made)
    send_shards(newer, url)
    assert visible(fetch_shards(url)) == visible(newer)
    assert set(s3.objects(url)) == set(visible(newer)), "files of the older data are gone"


@pytest.mark.parametrize(("mode", "after"), FAULTS)
def test_a_fetch_that_breaks_off_is_no_folder_yet_and_goes_on(s3, bucket, made, tmp_path, monkeypatch, mode, after):
    url = f"{bucket}/shards"
    send_shards(made, url)
    another_machine(monkeypatch, tmp_path)
    with s3.network.broken(mode, after), pytest.raises(StorageError, match="could not"):
        fetch_shards(url)
    with pytest.raises(DataError):
        read_manifest(shard_folder(url))
    assert visible(fetch_shards(url)) == visible(made)


def test_a_short_fault_costs_a_try_and_nothing_else(s3, bucket, made, caplog, monkeypatch, tmp_path):
    """The network heals between two tries."""
    import threading

    monkeypatch.setattr("cellplane.data.remote.WAITS_S", (1.0, 1.0))
    with s3.network.broken("503", 2):
        sending = threading.Thread(target=send_shards, args=(made, f"{bucket}/shards"))
        sending.start()
        while "trying again" not in caplog.text:
            sending.join(0.05)
            assert sending.is_alive()
    sending.join(60)
    another_machine(monkeypatch, tmp_path)
    assert visible(fetch_shards(f"{bucket}/shards")) == visible(made)


def test_shards_that_are_here_are_used_while_the_bucket_is_away(s3, bucket, made, tmp_path, monkeypatch, caplog):
    send_shards(made, f"{bucket}/shards")
    another_machine(monkeypatch, tmp_path)
    fetch_shards(f"{bucket}/shards")
    with s3.network.broken("hang"):
        assert visible(fetch_shards(f"{bucket}/shards")) == visible(made)
    assert "going on with the shards fetched before" in caplog.text


@pytest.mark.parametrize("change", ["flipped", "cut", "missing"])
def test_damage_in_the_bucket_is_found_and_named(s3, bucket, made, tmp_path, monkeypatch, change):
    import boto3

    url, name = f"{bucket}/shards", read_manifest(made).shards[1].name
    send_shards(made, url)
    content = bytearray((made / name).read_bytes())
    content[len(content) // 2] ^= 4
    if change == "missing":
        boto3.client("s3", endpoint_url=s3.direct).delete_object(Bucket=bucket.removeprefix("s3://"), Key=f"shards/{name}")
    else:
        s3.put(f"{url}/{name}", bytes(content if change == "flipped" else content[:-9]))
    another_machine(monkeypatch, tmp_path)
    with pytest.raises(IntegrityError, match=name):
        fetch_shards(url)
    with pytest.raises(DataError):
        read_manifest(shard_folder(url))


def test_a_damaged_file_here_is_fetched_again(s3, bucket, made, tmp_path, monkeypatch):
    send_shards(made, f"{bucket}/shards")
    another_machine(monkeypatch, tmp_path)
    folder = fetch_shards(f"{bucket}/shards")
    (folder / read_manifest(made).shards[0].name).write_bytes(b"rot")
    assert visible(fetch_shards(f"{bucket}/shards")) == visible(made)


def test_cells_are_read_from_a_bucket(s3, bucket, h5ad, tmp_path, monkeypatch):
    another_machine(monkeypatch, tmp_path)
    s3.put(f"{bucket}/raw/cells.h5ad", h5ad.read_bytes())
    (found,) = find_inputs([f"{bucket}/raw/*.h5ad"])
    assert found.read_bytes() == h5ad.read_bytes()


def copied(folder: Path, url: str) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.remote = RemoteFolder(url, waits_s=(0.0,))
    return checkpoints


@pytest.mark.parametrize(("mode", "after"), [*FAULTS, *((mode, after) for mode in ("503", "cut") for after in (3, 6, 9, 12, 15))])
def test_a_checkpoint_that_was_copied_in_part_is_never_gone_on_from(s3, bucket, tmp_path, mode, after):
    url = f"{bucket}/runs/r"
    here = copied(tmp_path / "here", url)
    here.save(state_of(10))
    with s3.network.broken(mode, after):
        try:
            here.save(state_of(20))
            arrived = True
        except StorageError:
            arrived = False
    there = copied(tmp_path / "there", url)
    whole = [entry.step for entry in there.remote.entries() if entry.whole]
    assert whole[0] == 10, "the one before it is not lost"
    assert_same(there.newest_valid(IDENTITY), state_of(20 if 20 in whole else 10))
    assert not arrived or 20 in whole
    assert_same(here.newest_valid(IDENTITY), state_of(20))
    here.save(state_of(20))
    assert_same(copied(tmp_path / "later", url).newest_valid(IDENTITY), state_of(20))


def test_a_bucket_that_cannot_be_asked_does_not_start_a_run_anew(s3, bucket, tmp_path):
    copied(tmp_path / "here", f"{bucket}/r").save(state_of(10))
    with s3.network.broken("hang"), pytest.raises(StorageError, match="could not list"):
        copied(tmp_path / "there", f"{bucket}/r").newest_valid(IDENTITY)


def test_a_flipped_bit_in_the_only_copy_stops_the_run(s3, bucket, tmp_path):
    copied(tmp_path / "here", f"{bucket}/r").save(state_of(10))
    key = "step-00000010/weights.safetensors"
    content = bytearray(s3.objects(f"{bucket}/r")[key])
    content[-1] ^= 1
    s3.put(f"{bucket}/r/{key}", bytes(content))
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        copied(tmp_path / "there", f"{bucket}/r").newest_valid(IDENTITY)
