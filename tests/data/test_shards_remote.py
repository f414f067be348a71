"""Shards behind a URL: files first, the manifest last, mirrored and checked before use. tests/backends asks a real S3 server."""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path

import fsspec
import pytest

from cellplane.data.config import ConvertConfig, DataKeys
from cellplane.data.convert import convert, convert_with, write_part
from cellplane.data.manifest import MANIFEST, read_manifest, verify_shards
from cellplane.data.remote import fetch_shards, send_shards, shard_folder, shards_here
from cellplane.errors import ConfigError, DataError, IntegrityError


def converted(h5ad: Path, out: Path, seed: int = 0) -> Path:
    config = ConvertConfig(inputs=(str(h5ad),), out=str(out), keys=DataKeys(batch_key="batch"), max_cells=16, shard_bytes=4000, seed=seed)
    convert_with(config, lambda tasks: map(write_part, tasks), lambda _: None)
    return out


@pytest.fixture
def made(h5ad: Path, tmp_path: Path) -> Path:
    return converted(h5ad, tmp_path / "made")


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place of this test alone, in memory and on the disk, and a home without shards."""
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("cellplane.data.remote.WAITS_S", (0.0,))
    return f"memory://{uuid.uuid4().hex}/shards" if request.param == "memory" else (tmp_path / "store" / "shards").as_uri()


def visible(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if not path.name.startswith(".")}


def names(url: str) -> set[str]:
    system, place = fsspec.core.url_to_fs(url)
    return {path.rsplit("/", 1)[-1] for path in system.ls(place, detail=False)}


def test_what_is_sent_comes_back_to_the_byte(made, url):
    assert send_shards(made, url) == len(visible(made)) - 1
    assert visible(fetch_shards(url)) == visible(made)
    verify_shards(shard_folder(url))


def test_a_second_copy_sends_nothing(made, url):
    send_shards(made, url)
    assert send_shards(made, url) == 0


def test_a_path_is_handed_back_and_asks_nobody(tmp_path):
    assert fetch_shards(str(tmp_path / "nowhere")) == shard_folder(str(tmp_path / "nowhere")) == tmp_path / "nowhere"


def test_a_copy_without_its_manifest_is_no_folder(made, url):
    send_shards(made, url)
    system, place = fsspec.core.url_to_fs(url)
    system.rm(f"{place}/{MANIFEST}")
    with pytest.raises(DataError, match=r"holds no manifest\.json"):
        fetch_shards(url)


def test_a_file_that_arrived_in_part_is_sent_again(made, url):
    send_shards(made, url)
    system, place = fsspec.core.url_to_fs(url)
    name = read_manifest(made).shards[0].name
    system.pipe_file(f"{place}/{name}", b"half")
    assert send_shards(made, url) == 1
    assert visible(fetch_shards(url)) == visible(made)


def test_newer_data_replace_older_and_leave_no_file_behind(made, url, h5ad, tmp_path):
    send_shards(made, url)
    fetch_shards(url)
    newer = converted(h5ad, tmp_path / "newer", seed=1)
    send_shards(newer, url)
    assert names(url) == set(visible(newer))
    assert visible(shards_here(url)) == visible(made), "a worker takes what its driver fetched"
    assert visible(fetch_shards(url)) == visible(newer)


def test_what_is_not_ours_stays(made, url):
    system, place = fsspec.core.url_to_fs(url)
    system.makedirs(place, exist_ok=True)
    system.pipe_file(f"{place}/notes.txt", b"mine")
    send_shards(made, url)
    assert "notes.txt" in names(url)


def test_a_flipped_bit_is_named_and_nothing_is_taken_for_whole(made, url):
    send_shards(made, url)
    system, place = fsspec.core.url_to_fs(url)
    name = read_manifest(made).shards[1].name
    content = bytearray(system.cat_file(f"{place}/{name}"))
    content[100] ^= 1
    system.pipe_file(f"{place}/{name}", bytes(content))
    with pytest.raises(IntegrityError, match=name):
        fetch_shards(url)
    assert not (shard_folder(url) / MANIFEST).exists()


def test_two_urls_of_one_name_have_mirrors_of_their_own(url):
    assert shard_folder(url) != shard_folder(f"{url.rsplit('/', 1)[0]}-other/shards")
    assert shard_folder(url) == shard_folder(f"{url}/")


def test_a_protocol_without_its_package_is_a_configuration_error(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="install the package"):
        fetch_shards("nowhere://bucket/shards")


@pytest.mark.cluster
def test_a_conversion_into_a_url_is_the_conversion_into_a_folder(ray_cluster, made, h5ad, tmp_path, monkeypatch):
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / "home"))
    url = (tmp_path / "store" / "shards").as_uri()
    config = ConvertConfig(inputs=(str(h5ad),), out=url, keys=DataKeys(batch_key="batch"), max_cells=16, shard_bytes=4000)
    assert convert(config).shards_new > 1
    assert visible(tmp_path / "store" / "shards") == visible(made)
    assert convert(config).shards_new == 0
