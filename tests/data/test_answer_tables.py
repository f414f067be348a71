"""Answers as Parquet come back as they were written, whole or not at all."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cellplane.data import answer_tables
from cellplane.data.answer_tables import NAMES, PLACE, RECORD, is_table, read_answers, read_record, write_answers
from cellplane.data.stored import DiskRows
from cellplane.errors import DataError, FileFormatError


def rows_of(values: np.ndarray, folder) -> DiskRows:
    rows = DiskRows(values.shape, values.dtype, folder)
    rows.append(values, 0)
    return rows


def about(place: str, name: str, names: list[str]) -> dict[str, object]:
    return {
        RECORD: {"model_sha256": "abc", "n_shared": np.int64(5), "share": np.float32(0.5)},
        PLACE: {"in": place, "as": name},
        NAMES: names,
    }


@pytest.mark.parametrize("n", [0, 1, 25])
def test_a_file_reads_as_the_anndata_it_stands_for(tmp_path, monkeypatch, n):
    monkeypatch.setattr(answer_tables, "ROWS", 10)  # several row groups
    proba = np.random.default_rng(0).random((n, 3)).astype(np.float32)
    labels = pd.Categorical.from_codes(np.arange(n) % 3, categories=pd.Index(["a", "b", "unknown"]))
    flag = pd.Categorical.from_codes(np.where(np.arange(n) == 0, 0, -1), categories=pd.Index(["no counts"]))
    columns = {
        "cellplm_cell_type": labels,
        "cellplm_confidence": proba.max(1) if n else proba[:, 0],
        "cellplm_flag": flag,
        "cellplm_agrees": None,
    }
    path, cells = tmp_path / "out.parquet", [f"cell {row}" for row in range(n)]
    write_answers(path, cells, columns, ("proba", rows_of(proba, tmp_path)), about("obsm", "proba", ["a", "b", "c"]))
    found = read_answers(path)
    assert list(found.obs_names) == cells
    assert list(found.obs.columns) == ["cellplm_cell_type", "cellplm_confidence", "cellplm_flag"]
    assert found.obs["cellplm_cell_type"].tolist() == list(labels)
    assert found.obs["cellplm_flag"].isna().tolist() == [row > 0 for row in range(n)]
    np.testing.assert_array_equal(found.obsm["proba"], proba)
    assert found.uns["cellplm"] == {"model_sha256": "abc", "n_shared": 5, "share": 0.5}
    assert read_record(path)[NAMES] == ["a", "b", "c"]
    assert [file.name for file in tmp_path.iterdir()] == ["out.parquet"]


def test_rates_come_back_as_a_layer_over_their_genes(tmp_path):
    rates = np.arange(6, dtype=np.float32).reshape(2, 3)
    rates[0, 1] = np.nan
    write_answers(tmp_path / "x.parquet", ["c", "d"], {}, ("rates", rows_of(rates, tmp_path)), about("layers", "rates", ["A", "B", "C"]))
    found = read_answers(tmp_path / "x.parquet")
    np.testing.assert_array_equal(found.layers["rates"], rates)
    assert list(found.var_names) == ["A", "B", "C"]


def test_what_is_no_such_file_is_said(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(FileFormatError, match="not a readable Parquet"):
        read_record(tmp_path / "bad.parquet")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(DataError, match="no answers"):
        read_answers(tmp_path / "other.parquet")
    assert is_table(tmp_path / "x.parquet")
    assert not is_table(tmp_path / "x.h5ad")


def test_a_failure_leaves_nothing_behind(tmp_path):
    rows = rows_of(np.zeros((3, 2), dtype=np.float32), tmp_path)
    with pytest.raises((ValueError, TypeError)):
        write_answers(tmp_path / "x.parquet", ["a", "b", "c"], {"bad": np.array([object()] * 3)}, ("m", rows), about("obsm", "m", []))
    assert not list(tmp_path.iterdir())
