"""Folders, globs, URLs and zarr mean the files in them, and a source that changed is another source."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import fsspec
import numpy as np
import pytest
import scipy.sparse as sp

from cellplane.data import inputs as inputs_module
from cellplane.data.config import ConvertConfig, DataKeys
from cellplane.data.convert import ConvertReport, convert_with, write_part
from cellplane.data.export import export
from cellplane.data.inputs import find_inputs, source_sha256
from cellplane.data.manifest import read_manifest
from cellplane.data.matrices import open_matrix
from cellplane.data.reader import CellReader
from cellplane.data.sources import AnnData, write_h5ad
from cellplane.errors import ConfigError, DataError, FileFormatError, IntegrityError, StorageError


def run(tmp_path: Path, *inputs: object, **options: object) -> ConvertReport:
    plain = {"inputs": tuple(map(str, inputs)), "out": str(tmp_path / "shards"), "max_cells": 16, "shard_bytes": 4000, **options}
    return convert_with(ConvertConfig.model_validate(plain), lambda tasks: map(write_part, tasks), lambda _: None)


def write_zarr(adata: AnnData, path: Path, version: int = 2) -> None:
    """As a user's anndata would, whatever it says about its next version."""
    with warnings.catch_warnings(), ad.settings.override(zarr_write_format=version):
        warnings.simplefilter("ignore")
        adata.write_zarr(path)


@pytest.fixture
def folder(cells, tmp_path) -> Path:
    (tmp_path / "in").mkdir()
    for name in ("b", "a"):
        write_h5ad(cells, tmp_path / "in" / f"{name}.h5ad")
    write_zarr(cells, tmp_path / "in" / "c.zarr")
    (tmp_path / "in" / "notes.txt").write_text("not data")
    return tmp_path / "in"


def test_folders_and_globs_mean_their_files_sorted_and_each_once(folder):
    expected = [folder / "a.h5ad", folder / "b.h5ad", folder / "c.zarr"]
    assert find_inputs([str(folder)]) == expected
    assert find_inputs([f"{folder}/*.h5ad"]) == expected[:2]
    assert find_inputs([str(folder / "b.h5ad"), f"{folder}/*.h5ad"]) == [expected[1], expected[0]]
    assert find_inputs([f"{folder.parent}/**/*.zarr"]) == [expected[2]]


def test_one_file_reached_in_two_ways_is_converted_once(cells, folder, tmp_path, monkeypatch):
    """A link to a file of the same folder would count its cells twice."""
    (folder / "latest.h5ad").symlink_to(folder / "b.h5ad")
    assert find_inputs([str(folder)]) == [folder / "a.h5ad", folder / "b.h5ad", folder / "c.zarr"]
    monkeypatch.chdir(folder)
    assert find_inputs(["a.h5ad", str(folder / "a.h5ad"), "../in/a.h5ad"]) == [Path("a.h5ad")]


def test_hidden_files_of_a_folder_are_not_meant(folder):
    (folder / "._a.h5ad").write_bytes(b"\0\5\x16\7")  # as macOS leaves them on other disks
    assert len(find_inputs([str(folder)])) == 3


def test_what_means_nothing_is_an_error_with_a_way_out(folder, tmp_path):
    with pytest.raises(DataError, match=r"nothing matches .*none"):
        find_inputs([f"{folder}/none*"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"without \.h5ad files"):
        find_inputs([str(tmp_path / "empty")])
    with pytest.raises(ConfigError, match="2 dataset names for 3 inputs"):
        run(tmp_path, folder, datasets=("x", "y"))


def test_a_new_file_of_a_folder_rewrites_no_shard_wherever_it_sorts(cells, folder, tmp_path):
    first = run(tmp_path, folder)
    before = {path.name: path.read_bytes() for path in (tmp_path / "shards").glob("*.arrow")}
    write_h5ad(cells[:40].copy(), folder / "aa.h5ad")
    second = run(tmp_path, folder)
    assert second.shards_reused == first.shards_new
    assert second.shards_new > 0
    assert all((tmp_path / "shards" / name).read_bytes() == content for name, content in before.items())
    assert [entry.name for entry in read_manifest(tmp_path / "shards").datasets] == ["a", "b", "c", "aa"]
    assert run(tmp_path, folder).shards_new == 0


@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csc_matrix, lambda matrix: matrix.toarray()])
@pytest.mark.parametrize("version", [2, 3])
def test_zarr_gives_the_shards_of_the_h5ad(cells, tmp_path, version, kind):
    cells.X = kind(cells.X)
    cells.obs["note"] = [f"caf\u00e9 {row}" for row in range(120)]
    write_zarr(cells, tmp_path / "cells.zarr", version)
    run(tmp_path, tmp_path / "cells.zarr", keys=DataKeys(batch_key="batch", labels_key="cell_type", spatial_key="spatial"))
    back = ad.read_h5ad(export(tmp_path / "shards", tmp_path)[0])
    assert type(back.X) is type(cells.X)
    np.testing.assert_array_equal(back.to_df(), cells.to_df())
    assert back.obs["note"].tolist() == cells.obs["note"].tolist()
    np.testing.assert_array_equal(back.obsm["spatial"], cells.obsm["spatial"])


def test_a_folder_that_is_zarr_but_no_anndata_or_points_elsewhere_is_refused(cells, tmp_path):
    import zarr

    zarr.open_group(str(tmp_path / "other.zarr"), mode="w").create_group("a")
    with pytest.raises(FileFormatError, match=r"zarr but not AnnData: it holds \['a'\]"):
        CellReader(tmp_path / "other.zarr")
    write_zarr(cells, tmp_path / "c.zarr")
    (tmp_path / "c.zarr" / "link").symlink_to("/etc")
    with pytest.raises(FileFormatError, match="symbolic link"):
        CellReader(tmp_path / "c.zarr")


def test_a_url_is_fetched_once_for_each_version_of_it(cells, h5ad, tmp_path, monkeypatch):
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / "home"))
    url = f"file://{h5ad}"
    report = run(tmp_path, url)
    assert report.cells == 120
    copies = list((tmp_path / "home").rglob("*.h5ad"))
    assert [copy.name for copy in copies] == ["cells.h5ad"]
    monkeypatch.setattr(inputs_module, "storage_errors", None)  # would be called to fetch again
    assert run(tmp_path, url).shards_new == 0
    monkeypatch.undo()
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / "home"))
    os.utime(h5ad, ns=(1, 1))
    assert find_inputs([url]) != copies
    with pytest.raises(DataError, match="no such file"):
        find_inputs([f"file://{tmp_path}/none.h5ad"])
    with pytest.raises(DataError, match="install the package of that protocol"):
        find_inputs(["nosuchprotocol://bucket/a.h5ad"])


def test_every_byte_of_a_small_source_counts_and_most_of_a_large_one(tmp_path, monkeypatch):
    path = tmp_path / "a"
    content = bytearray(os.urandom(3_000_000))
    path.write_bytes(content)
    first = source_sha256(path, False)
    content[1_234_567] ^= 1
    path.write_bytes(content)
    assert source_sha256(path, False) != first
    monkeypatch.setattr(inputs_module, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(inputs_module, "END_BYTES", 1000)
    monkeypatch.setattr(inputs_module, "SAMPLES", 10)
    sampled, whole = source_sha256(path, False), source_sha256(path, True)
    content[1_034_567] ^= 1
    path.write_bytes(content)
    assert source_sha256(path, True) != whole
    assert source_sha256(path, False) == sampled  # what full_hash is for
    content[10] ^= 1
    path.write_bytes(content)
    assert source_sha256(path, False) != sampled


@pytest.fixture
def column_wise(cells, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("cellplane.data.matrices.CSC_IN_MEMORY_BYTES", 0)
    monkeypatch.setattr("cellplane.data.matrices.READ_BYTES", 2000)
    cells.X = sp.csc_matrix(cells.X)
    cells.X.data[5] = 0
    write_h5ad(cells, tmp_path / "csc.h5ad")
    return tmp_path / "csc.h5ad"


def test_a_large_column_compressed_file_is_turned_in_pieces(cells, column_wise, tmp_path):
    run(tmp_path, column_wise)
    back = ad.read_h5ad(export(tmp_path / "shards", tmp_path / "back")[0])
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(back.X, part), getattr(cells.X, part))
    assert not (tmp_path / "shards" / ".staging").exists()


def test_its_rows_are_read_in_any_range(cells, column_wise, tmp_path):
    expected = cells.X.toarray()
    with CellReader(column_wise, tmp_path / "scratch") as reader:
        reader.rows("X", 0, 0)
        assert len(list((tmp_path / "scratch").rglob("indptr-*.npy"))) > 2
        for start, stop in ((0, 120), (7, 30), (5, 5), (119, 120)):
            np.testing.assert_array_equal(reader.rows("X", start, stop).toarray(), expected[start:stop])
        np.testing.assert_array_equal(reader.entries_per_row("X"), np.diff(sp.csr_matrix(cells.X).indptr))
        assert sum(len(rows.data) for _, rows in reader.parts("X", 0, 120)) == cells.X.nnz


def test_a_corrupt_column_compressed_file_is_refused(cells, tmp_path, monkeypatch):
    cells.X = sp.csc_matrix(cells.X)
    cells.X.indices[7] = 500
    with pytest.raises(IntegrityError, match="corrupt sparse matrix"):
        open_matrix(cells.X, "X", 120)


def test_a_column_wise_file_replaced_after_a_kill_is_turned_again(cells, column_wise, tmp_path):
    """What a killed run had turned belongs to the file as it was then."""

    def stopping(tasks):
        raise KeyboardInterrupt
        yield

    plain = {"inputs": (str(column_wise),), "out": str(tmp_path / "shards"), "max_cells": 16, "shard_bytes": 4000}
    with pytest.raises(KeyboardInterrupt):
        convert_with(ConvertConfig.model_validate(plain), stopping, lambda _: None)
    assert list((tmp_path / "shards" / ".staging" / "columns").rglob("done.json"))
    cells.X.data[:] = cells.X.data + 1
    write_h5ad(cells, column_wise)
    run(tmp_path, column_wise)
    np.testing.assert_array_equal(ad.read_h5ad(export(tmp_path / "shards", tmp_path / "back")[0]).X.data, cells.X.data)


def test_a_disk_that_fills_up_while_columns_are_turned_is_a_storage_error(column_wise, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cellplane.data.matrices.np.save", full)
    with pytest.raises(StorageError, match="no room to write"):
        run(tmp_path, column_wise)


@pytest.fixture
def store(monkeypatch, tmp_path) -> Any:
    """A file system of its own scheme, in memory, and a home for the copies."""
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / "home"))
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def test_a_zarr_folder_behind_a_url_is_fetched_again_when_a_file_in_it_changed(cells, store, tmp_path):
    write_zarr(cells, tmp_path / "cells.zarr")
    store.put(str(tmp_path / "cells.zarr"), "/bucket/cells.zarr", recursive=True)
    first = find_inputs(["memory://bucket/cells.zarr"])
    assert find_inputs(["memory://bucket/cells.zarr"]) == first
    name = next(name for name in store.find("/bucket/cells.zarr") if "/X/data/" in name)
    store.pipe(name, store.cat(name))
    assert find_inputs(["memory://bucket/cells.zarr"]) != first
    assert not list((tmp_path / "home").rglob("*.tmp"))


def test_what_a_store_has_against_us_is_one_data_error(store, monkeypatch):
    store.pipe("/bucket/a.h5ad", b"x")
    for error in (PermissionError("no credentials"), RuntimeError("no route")):
        monkeypatch.setattr(type(store), "info", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        with pytest.raises(DataError, match=rf"memory://bucket/a\.h5ad cannot be read: {type(error).__name__}: {error}; check address"):
            find_inputs(["memory://bucket/a.h5ad"])


def test_two_that_fetch_the_same_do_not_disturb_each_other(store, h5ad, monkeypatch):
    """The copy of whoever is first is taken; nobody sees half of one."""
    store.put(str(h5ad), "/bucket/cells.h5ad")
    get, inner = type(store).get, []

    def meanwhile(self, place, target, **options):
        if not inner:
            inner.append(None)
            inner[0] = find_inputs(["memory://bucket/cells.h5ad"])
        return get(self, place, target, **options)

    monkeypatch.setattr(type(store), "get", meanwhile)
    monkeypatch.setattr(os, "getpid", lambda numbers=iter(range(1, 100)): next(numbers))
    assert find_inputs(["memory://bucket/cells.h5ad"]) == inner[0]
    assert inner[0][0].read_bytes() == h5ad.read_bytes()
    assert [path.name.startswith(".") for path in inner[0][0].parents[1].iterdir()] == [False]
