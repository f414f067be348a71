"""Cells whose entries stay on disk are the cells that are read whole, whatever the file looks like."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from cellplane.data.config import DataKeys, SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import cell_table, write_h5ad
from cellplane.data.stored import DiskRows, store_cells
from cellplane.errors import ColumnError, DataError
from cellplane.genes import GeneVocabulary

GENES = [f"GENE{gene:04d}" for gene in range(1, 41)]
KEYS = DataKeys(batch_key="batch")


def cells(**changes: object) -> anndata.AnnData:
    return simulate(SimulateConfig.model_validate({"n_cells": 90, "n_genes": 40, "n_types": 3, "seed": 4, **changes}))


def logged(adata: anndata.AnnData) -> anndata.AnnData:
    counts = adata.X.toarray()
    adata.X = sp.csr_matrix(np.log1p(counts / counts.sum(1, keepdims=True) * 1e4).astype(np.float32))
    return adata


def in_raw(adata: anndata.AnnData) -> anndata.AnnData:
    adata.raw = adata.copy()
    smaller = logged(adata)[:, ::-3].copy()
    smaller.raw = adata.raw.to_adata() if smaller.raw is None else smaller.raw.to_adata()
    return smaller


def with_layer(adata: anndata.AnnData) -> anndata.AnnData:
    adata.layers["counts"] = adata.X.copy()
    return logged(adata)


def as_kind(kind: str):
    def change(adata: anndata.AnnData) -> anndata.AnnData:
        adata.X = {"csc": sp.csc_matrix, "dense": lambda x: x.toarray(), "int": lambda x: x.astype(np.int32)}[kind](adata.X)
        return adata

    return change


FILES = {
    "csr": lambda adata: adata,
    "csc": as_kind("csc"),
    "dense": as_kind("dense"),
    "int": as_kind("int"),
    "layer": with_layer,
    "raw": in_raw,
    "recovered": logged,
}


@pytest.mark.parametrize("vocabulary", [GENES, [*GENES[5:], "ELSEWHERE"], GENES[::-1]], ids=["same", "other", "reversed"])
@pytest.mark.parametrize("kind", [*FILES])
def test_stored_cells_are_the_cells_of_the_file(kind, vocabulary, tmp_path):
    adata = FILES[kind](cells())
    write_h5ad(adata, tmp_path / "in.h5ad")
    keys = KEYS.model_copy(update={"recover_counts": kind == "recovered"})
    genes = GeneVocabulary.from_ids(vocabulary)
    whole, report = cell_table(adata, genes, keys)
    stored = store_cells(tmp_path / "in.h5ad", genes, keys, tmp_path)
    assert stored.report == report
    assert stored.table.n_cells == whole.n_cells
    np.testing.assert_allclose(stored.table.totals(), whole.totals())
    for name in ("panel", "empty", "batch"):
        np.testing.assert_array_equal(getattr(stored.table, name), getattr(whole, name))
    rng = np.random.default_rng(0)
    for rows in (np.arange(90), np.sort(rng.permutation(90)[:31]), rng.permutation(90), np.array([7]), np.zeros(0, dtype=np.int64)):
        mine, theirs = stored.table.rows(rows), whole.rows(rows)
        np.testing.assert_array_equal(mine.crow, theirs.crow)
        shape = (len(rows), len(genes))
        dense = [sp.csr_matrix((part.value, part.gene, part.crow), shape=shape).toarray() for part in (mine, theirs)]
        np.testing.assert_array_equal(*dense)
    assert not list(tmp_path.glob(".*"))  # nothing is left behind


@pytest.mark.parametrize("n_genes", [40, 70_000], ids=["16 bits", "32 bits"])
def test_counts_that_need_more_than_16_bits_come_back_exactly(n_genes, tmp_path):
    adata = cells(n_cells=300)
    counts = adata.X.tolil()
    for cell, gene, count in ((0, 0, 65_535), (3, 1, 65_536), (3, 7, 2**24), (299, 39, 70_000)):
        counts[cell, gene] = count
    adata.X = counts.tocsr().astype(np.float32)
    write_h5ad(adata, tmp_path / "in.h5ad")
    genes = GeneVocabulary.from_ids([*(f"OTHER{gene}" for gene in range(n_genes - 40)), *GENES])
    whole, _ = cell_table(adata, genes, KEYS)
    stored = store_cells(tmp_path / "in.h5ad", genes, KEYS, tmp_path).table
    np.testing.assert_array_equal(stored.totals(), whole.totals())
    for rows in (np.arange(300), np.array([299, 3, 2, 0]), np.array([5])):
        mine, theirs = stored.rows(rows), whole.rows(rows)
        np.testing.assert_array_equal(mine.gene, theirs.gene)
        np.testing.assert_array_equal(mine.value, theirs.value)


def test_cells_that_are_looked_at_are_not_overwritten_by_later_ones(tmp_path):
    write_h5ad(cells(), tmp_path / "in.h5ad")
    stored = store_cells(tmp_path / "in.h5ad", GeneVocabulary.from_ids(GENES), KEYS, tmp_path).table
    held = [stored.rows(np.array([row])) for row in range(90)]
    again = stored.rows(np.arange(90))
    np.testing.assert_array_equal(np.concatenate([part.value for part in held]), again.value)
    np.testing.assert_array_equal(np.concatenate([part.gene for part in held]), again.gene)


def test_places_are_kept_with_the_cells(tmp_path):
    adata = cells(spatial=True)
    write_h5ad(adata, tmp_path / "in.h5ad")
    table = store_cells(tmp_path / "in.h5ad", GeneVocabulary.from_ids(GENES), DataKeys(spatial_key="spatial"), tmp_path).table
    rows = np.array([3, 80, 4])
    np.testing.assert_allclose(table.rows(rows).coordinates, adata.obsm["spatial"][rows].astype(np.float32))


def test_a_cell_that_is_no_counts_is_named_even_where_no_sample_looks(tmp_path):
    adata = cells(n_cells=1500)
    spoilt = adata.X.tolil()
    spoilt[400, int(adata.X[400].indices[0])] = 0.5
    adata.X = spoilt.tocsr().astype(np.float32)
    write_h5ad(adata, tmp_path / "in.h5ad")
    with pytest.raises(DataError, match=r"in\.h5ad.*non-integer"):
        store_cells(tmp_path / "in.h5ad", GeneVocabulary.from_ids(GENES), KEYS, tmp_path)


def test_a_missing_column_is_named(tmp_path):
    write_h5ad(cells(), tmp_path / "in.h5ad")
    with pytest.raises(ColumnError, match="donr"):
        store_cells(tmp_path / "in.h5ad", GeneVocabulary.from_ids(GENES), DataKeys(batch_key="donr"), tmp_path)


@pytest.mark.parametrize("width", [3, 5000], ids=["in one piece", "row by row"])
def test_rows_on_disk_come_back_in_whatever_order_they_went(tmp_path: Path, width: int):
    rng = np.random.default_rng(1)
    rows, truth = DiskRows((57, width), np.float32, tmp_path), np.zeros((57, width), dtype=np.float32)
    for _ in range(20):
        where = rng.permutation(50)[: rng.integers(0, 9)]  # the last seven stay unwritten
        values = rng.normal(size=(len(where), width)).astype(np.float32)
        rows[where], truth[where] = values, values
    np.testing.assert_array_equal(np.concatenate([block for _, block in rows.blocks()]), truth)
