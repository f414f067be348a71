"""Shards give back exactly what was written, and the manifest notices every changed byte."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cellplane.data.config import ConvertConfig, DataKeys
from cellplane.data.convert import convert_with, write_part
from cellplane.data.shards import (
    MANIFEST,
    Block,
    ShardReader,
    choose_encoding,
    read_manifest,
    verify_shards,
    write_manifest,
    write_shard,
)
from cellplane.errors import DataError, FileFormatError, IntegrityError

N_GENES = 50


def block(values: np.ndarray, seed: int = 0, cells: int = 6) -> Block:
    """The values dealt to some cells (one of them empty) at random genes, unsorted."""
    rng = np.random.default_rng(seed)
    edges = np.sort(rng.integers(0, len(values) + 1, cells - 2))
    return Block(
        crow=np.array([0, *edges, len(values), len(values)], dtype=np.int64),
        gene=rng.integers(0, N_GENES, len(values)).astype(np.uint16),
        value=values,
        cell=rng.permutation(cells).astype(np.int64) + 2**33,
        batch=np.full(cells, 2, dtype=np.int32),
        label=rng.integers(-1, 3, cells).astype(np.int32),
        dataset=1,
        coord=rng.normal(size=(cells, 2)).astype(np.float32) if seed % 2 else None,
    )


def assert_same(got: Block, expected: Block) -> None:
    for name in ("crow", "gene", "cell", "batch", "label"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    np.testing.assert_array_equal(np.asarray(got.value, dtype=np.float64), np.asarray(expected.value, dtype=np.float64))
    assert got.dataset == expected.dataset
    assert (got.coord is None) == (expected.coord is None)
    if expected.coord is not None:
        np.testing.assert_array_equal(got.coord, expected.coord)


VALUES = {
    "small counts": (np.arange(1, 200, dtype=np.float32), "uint8"),
    "a few at the escape and above": (np.array([1] * 300 + [254, 255, 256, 70_000, 2**24], dtype=np.float32), "uint8"),
    "deep counts": (np.arange(1, 1000, dtype=np.float64), "uint16"),
    "deep with giants": (np.array([65_534, 65_535, 65_536, 2**32 - 1] * 5, dtype=np.float64), "uint16"),
    "whole numbers of an integer type": (np.array([3, 255, 65_535], dtype=np.uint32), "uint16"),
    "no values": (np.zeros(0, dtype=np.float32), "uint8"),
    "float32": (np.array([0.1, 2.5, 1e-30, 3e38], dtype=np.float32), "float32"),
    "float64": (np.array([0.1, np.pi, 1e300]), "float64"),
    "negative": (np.array([-3, 4], dtype=np.int64), "float64"),
}


@pytest.mark.parametrize("name", VALUES)
def test_every_value_comes_back_exactly_in_the_smallest_encoding(tmp_path, name):
    values, encoding = VALUES[name]
    blocks = [block(values, seed) for seed in range(3)]
    write_shard(tmp_path / "a.arrow", blocks, N_GENES, {"source": "test"})
    reader = ShardReader(tmp_path / "a.arrow")
    assert reader.encoding == encoding
    assert reader.metadata["source"] == "test"
    assert len(reader) == 3
    for index, expected in enumerate(blocks):
        assert_same(reader.block(index), expected)
        into = (np.empty(len(values), dtype=np.int64), np.empty(len(values), dtype=np.float64))
        assert_same(reader.block(index, into), expected)


def test_two_bytes_a_value_only_where_they_save_room():
    shallow = np.ones(1000, dtype=np.float32)
    shallow[:20] = 255
    assert choose_encoding([shallow]) == "uint8"
    shallow[20] = 255
    assert choose_encoding([shallow]) == "uint16"


def test_large_vocabularies_get_wider_gene_positions(tmp_path):
    wide = replace(block(np.ones(4, dtype=np.float32)), gene=np.array([0, 65_535, 65_536, 99_999], dtype=np.uint32))
    write_shard(tmp_path / "a.arrow", [wide], 100_000, {})
    np.testing.assert_array_equal(ShardReader(tmp_path / "a.arrow").block(0).gene, wide.gene)


def test_the_same_cells_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_shard(tmp_path / name, [block(np.arange(1.0, 500.0))], N_GENES, {"x": "y"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_counts_cost_three_bytes_an_entry(tmp_path):
    values = np.random.default_rng(0).integers(1, 20, 200_000).astype(np.float32)
    write_shard(tmp_path / "a.arrow", [block(values, cells=200)], N_GENES, {})
    assert (tmp_path / "a.arrow").stat().st_size < 3.2 * len(values)


def test_a_shard_cut_anywhere_is_refused(tmp_path):
    write_shard(tmp_path / "a.arrow", [block(np.arange(1.0, 99.0)) for _ in range(4)], N_GENES, {})
    content = (tmp_path / "a.arrow").read_bytes()
    for share in (0, 0.1, 0.5, 0.9, 0.999):
        (tmp_path / "a.arrow").write_bytes(content[: int(share * len(content))])
        with pytest.raises(FileFormatError, match="not a whole Arrow file"):
            ShardReader(tmp_path / "a.arrow")
    with pytest.raises(IntegrityError, match="missing"):
        ShardReader(tmp_path / "b.arrow")


@pytest.fixture
def folder(h5ad: Path, tmp_path: Path) -> Path:
    """A finished conversion of several shards."""
    keys = DataKeys(batch_key="batch", labels_key="cell_type", spatial_key="spatial")
    config = ConvertConfig(inputs=(str(h5ad),), out=str(tmp_path / "shards"), keys=keys, max_cells=16, shard_bytes=4000)
    convert_with(config, lambda tasks: map(write_part, tasks), lambda _: None)
    return tmp_path / "shards"


def test_the_manifest_says_what_is_in_the_folder(folder):
    manifest = verify_shards(folder)
    assert len(manifest.shards) > 2
    assert manifest.cells == 120 == sum(row.cells for row in manifest.sentences)
    assert [row.first_cell for row in manifest.sentences] == list(np.cumsum([0, *(row.cells for row in manifest.sentences)])[:-1])
    assert manifest.batch_names == ("cells/batch_0", "cells/batch_1")
    assert manifest.label_names == tuple(f"type_{t}" for t in range(4))
    assert manifest.panels().all()
    assert {path.name for path in folder.glob("*.arrow")} == {entry.name for entry in manifest.shards}
    for number, entry in enumerate(manifest.shards):
        reader = ShardReader(folder / entry.name)
        rows = [row for row in manifest.sentences if row.shard == number]
        blocks = [reader.block(row.index) for row in rows]
        assert [(found.n_cells, len(found.gene)) for found in blocks] == [(row.cells, row.nnz) for row in rows]


def test_a_manifest_reads_back_as_it_was_written(folder, tmp_path):
    manifest = read_manifest(folder)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert (tmp_path / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()


def test_200_flipped_bits_are_200_errors(folder):
    rng = np.random.default_rng(0)
    files = [path for path in folder.iterdir() if not path.name.startswith(".")]
    weights = np.array([path.stat().st_size for path in files])
    noticed = 0
    for _ in range(200):
        path = files[rng.choice(len(files), p=weights / weights.sum())]
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        with pytest.raises(DataError, match=".*" if path.name == MANIFEST else path.name):
            verify_shards(folder)
        noticed += 1
        path.write_bytes(good)
    assert noticed == 200
    verify_shards(folder)


def test_missing_extra_cut_and_swapped_shards_are_named(folder):
    first, second = (entry.name for entry in read_manifest(folder).shards[:2])
    content = (folder / first).read_bytes()
    (folder / first).write_bytes(content[:-1])
    with pytest.raises(IntegrityError, match=rf"{first} has {len(content) - 1} bytes, expected {len(content)}"):
        verify_shards(folder)
    (folder / first).unlink()
    with pytest.raises(IntegrityError, match=f"{first} is missing"):
        verify_shards(folder)
    shutil.copy(folder / second, folder / first)
    with pytest.raises(IntegrityError, match=first):
        verify_shards(folder)
    (folder / first).write_bytes(content)
    shutil.copy(folder / first, folder / "extra.arrow")
    with pytest.raises(IntegrityError, match=r"extra\.arrow"):
        verify_shards(folder)


def test_unreadable_old_and_newer_manifests_get_one_clear_sentence(folder):
    path = folder / MANIFEST
    good = path.read_text()
    for damage, error, said in (
        (good[: len(good) // 2], FileFormatError, "damaged"),
        ("", FileFormatError, "damaged"),
        ("[1, 2]", FileFormatError, "damaged"),
        ("{}", FileFormatError, "format_version"),
        (json.dumps({**json.loads(good), "format_version": 99}), FileFormatError, "format version 99"),
        (json.dumps({**json.loads(good), "max_cells": 99}), IntegrityError, "sha256"),
    ):
        path.write_text(damage)
        with pytest.raises(error, match=said) as caught:
            read_manifest(folder)
        assert str(path) in str(caught.value)
    path.unlink()
    with pytest.raises(DataError, match="did not finish"):
        read_manifest(folder)


def test_another_vocabulary_is_refused(folder):
    path = folder / read_manifest(folder).vocabulary_file
    genes = path.read_text().splitlines()
    path.write_text("\n".join([genes[1], genes[0], *genes[2:]]))
    with pytest.raises(IntegrityError, match=r"vocabulary-.* has sha256"):
        verify_shards(folder)
    path.unlink()
    with pytest.raises(IntegrityError, match="missing"):
        verify_shards(folder)


def test_a_manifest_with_more_in_it_than_we_know_is_one_clear_sentence(folder):
    plain = json.loads((folder / MANIFEST).read_text())
    plain["datasets"][0]["invented_later"] = 1
    del plain["manifest_sha256"]
    plain["manifest_sha256"] = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(plain))
    with pytest.raises(FileFormatError, match=r"invented_later.*use the newer cellplane that wrote it"):
        read_manifest(folder)


def test_a_table_too_many_is_named_and_what_is_not_ours_is_left_in_peace(folder):
    (folder / "notes.parquet").write_text("mine")
    verify_shards(folder)
    shutil.copy(folder / str(read_manifest(folder).datasets[0].obs_file), folder / "obs-other-0123456789ab.parquet")
    with pytest.raises(IntegrityError, match=r"holds 'obs-other-0123456789ab\.parquet', which its manifest does not know"):
        verify_shards(folder)
