"""Shards give every file back: the matrix in its types, with its zeros and order of entries, and both tables."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cellplane.data.config import ConvertConfig, DataKeys
from cellplane.data.convert import convert_with, write_part
from cellplane.data.export import export
from cellplane.data.manifest import read_manifest, verify_shards
from cellplane.data.sources import AnnData, write_h5ad
from cellplane.errors import ConfigError, IntegrityError

COMPAT = Path(__file__).parents[1] / "compat" / "v1" / "shards"


def there_and_back(path: Path, tmp_path: Path, **options: object) -> Path:
    plain = {"inputs": (str(path),), "out": str(tmp_path / "shards"), "max_cells": 16, "shard_bytes": 4000, **options}
    convert_with(ConvertConfig.model_validate(plain), lambda tasks: map(write_part, tasks), lambda _: None)
    return export(tmp_path / "shards", tmp_path / "back")[0]


def assert_same_matrix(got: object, expected: object) -> None:
    """Layout, types, stored entries and, in sparse ones, their order."""
    assert type(got) is type(expected)
    if not sp.issparse(expected):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
        return
    for part in ("data", "indices", "indptr"):
        assert getattr(got, part).dtype == getattr(expected, part).dtype, part
        np.testing.assert_array_equal(getattr(got, part), getattr(expected, part))


def counts(dtype: type, layout: str = "csr") -> object:
    """Seven genes of 60 cells: empty rows, large counts where the type holds them, an explicit zero, unsorted rows."""
    rng = np.random.default_rng(0)
    dense = rng.poisson(0.8, (60, 7))
    dense[5] = dense[59] = 0
    dense[:, 6] = 0  # a gene nobody has
    largest = 2**24 if np.dtype(dtype).kind == "f" else min(np.iinfo(dtype).max, 2**24)
    dense[1, :4] = [min(255, largest), min(256, largest), min(70_000, largest), largest]
    if layout == "dense":
        return dense.astype(dtype)
    matrix = (sp.csr_matrix if layout == "csr" else sp.csc_matrix)(dense.astype(dtype))
    matrix.data[3] = 0
    if layout == "csr":
        row = slice(matrix.indptr[1], matrix.indptr[2])
        matrix.indices[row], matrix.data[row] = matrix.indices[row][::-1].copy(), matrix.data[row][::-1].copy()
        matrix.has_sorted_indices = False
    return matrix


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.int32, np.uint16, np.uint8])
def test_counts_come_back_as_they_were(tmp_path, dtype, layout):
    write_h5ad(AnnData(X=counts(dtype, layout)), tmp_path / "a.h5ad")
    back = there_and_back(tmp_path / "a.h5ad", tmp_path)
    assert_same_matrix(ad.read_h5ad(back).X, ad.read_h5ad(tmp_path / "a.h5ad").X)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, bool])
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_any_other_values_come_back_too(tmp_path, dtype, layout):
    dense = np.random.default_rng(1).normal(size=(40, 6)) * (np.random.default_rng(2).random((40, 6)) < 0.5)
    dense = np.round(dense * 1e6) if dtype is np.int64 else dense
    values = dense.astype(dtype)
    x = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}[layout](values)
    write_h5ad(AnnData(X=x), tmp_path / "a.h5ad")
    back = there_and_back(tmp_path / "a.h5ad", tmp_path, values="any")
    assert_same_matrix(ad.read_h5ad(back).X, ad.read_h5ad(tmp_path / "a.h5ad").X)


def test_values_that_only_look_whole_at_first_are_stored_exactly(tmp_path):
    dense = np.ones((2000, 3), dtype=np.float32)
    dense[500, 1] = 0.25  # outside the sample
    write_h5ad(AnnData(X=sp.csr_matrix(dense)), tmp_path / "a.h5ad")
    back = there_and_back(tmp_path / "a.h5ad", tmp_path, values="any", max_cells=100)
    np.testing.assert_array_equal(ad.read_h5ad(back).X.toarray(), dense)


def tables(cells: int) -> pd.DataFrame:
    """One column of every kind that AnnData knows."""
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "category": pd.Categorical(rng.choice(["b", "a"], cells), categories=["unused", "b", "a"], ordered=True),
            "gap": pd.Categorical([None, *rng.choice(["x", "y"], cells - 1)]),
            "number_category": pd.Categorical(rng.integers(3, 6, cells)),
            "text": [f"caf\u00e9 {row}" for row in range(cells)],
            "float": rng.normal(size=cells).astype(np.float32),
            "double": rng.normal(size=cells),
            "integer": rng.integers(-5, 5, cells),
            "small": rng.integers(0, 5, cells).astype(np.uint8),
            "flag": rng.random(cells) < 0.5,
            "nullable": pd.array([None, *range(cells - 1)], dtype="Int64"),
            "maybe": pd.array([None, *([True, False] * cells)[: cells - 1]], dtype="boolean"),
        },
        index=pd.Index([f"barcode-{row}" for row in range(cells)], name="barcode"),
    )


def test_both_tables_come_back_with_their_types_and_categories(tmp_path):
    adata = AnnData(X=counts(np.float32), obs=tables(60), var=tables(7).set_index(pd.Index([f"G{gene}" for gene in range(7)])))
    write_h5ad(adata, tmp_path / "a.h5ad")
    before, after = ad.read_h5ad(tmp_path / "a.h5ad"), ad.read_h5ad(there_and_back(tmp_path / "a.h5ad", tmp_path))
    pd.testing.assert_frame_equal(after.obs, before.obs, check_freq=False)
    pd.testing.assert_frame_equal(after.var, before.var)


def test_every_real_file_comes_back(shared, tmp_path):
    for path in sorted((shared / "data").glob("*.h5ad")):
        (tmp_path / path.stem).mkdir()
        back = there_and_back(path, tmp_path / path.stem, max_cells=500, shard_bytes=10**6, values="any", keys=DataKeys(layer="X"))
        before, after = ad.read_h5ad(path), ad.read_h5ad(back)
        assert_same_matrix(after.X, before.X)
        pd.testing.assert_frame_equal(after.obs, before.obs)
        pd.testing.assert_frame_equal(after.var, before.var)


def test_a_smaller_vocabulary_keeps_its_genes_in_the_order_of_the_file(cells, h5ad, tmp_path):
    (tmp_path / "genes.txt").write_text("\n".join([*cells.var_names[20:0:-1], "UNSEEN"]))
    back = ad.read_h5ad(there_and_back(h5ad, tmp_path, vocabulary=str(tmp_path / "genes.txt")))
    assert list(back.var_names) == list(cells.var_names[1:21])
    np.testing.assert_array_equal(back.X.toarray(), cells.X.toarray()[:, 1:21])


def test_one_data_set_of_several_can_be_named(cells, h5ad, tmp_path):
    write_h5ad(cells[:30].copy(), tmp_path / "few.h5ad")
    there_and_back(h5ad, tmp_path, inputs=(str(h5ad), str(tmp_path / "few.h5ad")), keys=DataKeys(spatial_key="spatial"))
    heard: list[tuple[int, int]] = []
    written = export(tmp_path / "shards", tmp_path / "one", ["few"], lambda done, total: heard.append((done, total)))
    assert written == [tmp_path / "one" / "few.h5ad"]
    assert heard[-1] == (30, 30)
    np.testing.assert_array_equal(ad.read_h5ad(written[0]).obsm["spatial"], cells.obsm["spatial"][:30])
    with pytest.raises(ConfigError, match=r"no data set 'other'.*cells, few"):
        export(tmp_path / "shards", tmp_path / "one", ["other"])


def test_shards_without_tables_are_exported_too(tmp_path):
    first, second = (ad.read_h5ad(path) for path in export(COMPAT, tmp_path))
    assert (first.n_obs, first.n_vars, second.n_obs, second.n_vars) == (40, 20, 30, 25)
    assert first.X[4].max() == 100_000
    assert list(second.var_names)[:2] == ["GENE0001", "GENE0002"]
    assert set(second.obs["batch"]) == {"b/batch_0", "b/batch_1"}


def test_a_damaged_table_is_named(h5ad, tmp_path):
    there_and_back(h5ad, tmp_path)
    name = read_manifest(tmp_path / "shards").datasets[0].obs_file
    path = tmp_path / "shards" / str(name)
    good = path.read_bytes()
    path.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    with pytest.raises(IntegrityError, match=rf"table {name} has sha256"):
        verify_shards(tmp_path / "shards")
    path.unlink()
    with pytest.raises(IntegrityError, match=f"table {name} is missing"):
        export(tmp_path / "shards", tmp_path / "back")


def test_what_is_there_is_not_written_over_unless_asked(h5ad, tmp_path):
    """Exporting into the folder of the sources would replace them by less."""
    there_and_back(h5ad, tmp_path, inputs=(str(h5ad),))
    before = h5ad.read_bytes()
    with pytest.raises(ConfigError, match=r"cells\.h5ad is there already.*--overwrite"):
        export(tmp_path / "shards", h5ad.parent)
    assert h5ad.read_bytes() == before
    assert export(tmp_path / "shards", h5ad.parent, overwrite=True) == [h5ad]
    assert h5ad.read_bytes() != before


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.float16])
def test_sums_that_the_type_of_the_file_cannot_hold_get_a_wider_one(tmp_path, dtype, layout):
    most = 2048 if dtype is np.float16 else np.iinfo(dtype).max
    dense = np.full((12, 12), most, dtype=dtype)
    if layout != "dense" and dtype is np.float16:
        pytest.skip("scipy has no sparse matrices of float16")
    x = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}[layout](dense)
    write_h5ad(AnnData(X=x, var=pd.DataFrame(index=["A", "A", *(f"G{gene}" for gene in range(10))])), tmp_path / "a.h5ad")
    back = ad.read_h5ad(there_and_back(tmp_path / "a.h5ad", tmp_path, keys=DataKeys(repeated_genes="sum"))).to_df()
    assert (back["A"].astype(float) == 2 * float(most)).all()
    assert (back["G3"].astype(float) == float(most)).all()


def test_a_warning_names_what_does_not_come_back(cells, tmp_path, caplog):
    cells.obsm["X_pca"] = np.zeros((120, 3))
    cells.obsm["where"] = cells.obsm.pop("spatial")
    cells.layers["spliced"] = cells.X.copy()
    write_h5ad(cells, tmp_path / "cells.h5ad")
    (tmp_path / "genes.txt").write_text("\n".join(cells.var_names[:30]))
    keys = DataKeys(spatial_key="where")
    back = ad.read_h5ad(there_and_back(tmp_path / "cells.h5ad", tmp_path, keys=keys, vocabulary=str(tmp_path / "genes.txt")))
    assert list(back.obsm) == ["where"]
    np.testing.assert_array_equal(back.obsm["where"], cells.obsm["where"])
    lost = "layers['spliced'], obsm['X_pca'], varm['donor_effect'], varm['type_rate'], uns"
    assert caplog.messages == [
        f"cells comes back without {lost}: shards do not hold it",
        "cells comes back without 10 genes that the vocabulary did not have",
    ]


def test_a_file_of_counts_and_tables_alone_comes_back_without_a_warning(cells, tmp_path, caplog):
    write_h5ad(AnnData(X=cells.X, obs=cells.obs, var=cells.var), tmp_path / "plain.h5ad")
    there_and_back(tmp_path / "plain.h5ad", tmp_path)
    assert caplog.messages == []


def test_numbers_of_the_other_byte_order_come_back_in_ours(cells, h5ad, tmp_path):
    with h5py.File(h5ad, "a") as file:
        for part in ("data", "indices", "indptr"):
            values = file["X"][part][:]
            del file["X"][part]
            file["X"][part] = values.astype(values.dtype.newbyteorder(">"))
    back = ad.read_h5ad(there_and_back(h5ad, tmp_path)).X
    assert back.data.dtype == np.float32
    np.testing.assert_array_equal(back.toarray(), cells.X.toarray())
