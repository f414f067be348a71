"""What changed between two answers about the same cells is found, and told in numbers and in words."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from cellplane.cli.main import main
from cellplane.data.answer_tables import NAMES, PLACE, RECORD, write_answers
from cellplane.data.sources import AnnData, write_h5ad
from cellplane.data.stored import DiskRows
from cellplane.difference import difference, sections
from cellplane.errors import DataError


def annotated(labels: list[str], confidence: list[float], names: list[str] | None = None, sha256: str = "a" * 64) -> AnnData:
    obs = pd.DataFrame({"cellplm_cell_type": pd.Categorical(labels), "cellplm_confidence": confidence})
    obs.index = pd.Index(names or [f"c{row}" for row in range(len(labels))])
    data = AnnData(X=np.ones((len(labels), 2), dtype=np.float32), obs=obs, var=pd.DataFrame(index=["A", "B"]))
    data.uns["cellplm"] = {"model_sha256": sha256}
    return data


@pytest.fixture
def files(tmp_path):
    write_h5ad(annotated(["T", "T", "B", "B", "NK"], [0.9, 0.8, 0.7, 0.9, 0.6]), tmp_path / "a.h5ad")
    later = annotated(["T", "B", "B", "T", "T"], [0.9, 0.9, 0.4, 0.9, 0.6], ["c4", "c1", "c2", "c0", "new"], "b" * 64)
    write_h5ad(later, tmp_path / "b.h5ad")
    return tmp_path / "a.h5ad", tmp_path / "b.h5ad"


def test_labels_are_compared_cell_by_cell_whatever_their_order(files):
    told = difference(*files)
    assert told["models"] == ["a" * 12, "b" * 12]
    assert told["cells"] == {"both": 4, "only_first": 1, "only_second": 1}
    assert (told["labels"]["changed"], told["labels"]["share"]) == (2, 0.5)
    assert told["labels"]["changes"] == [{"from": "NK", "to": "T", "cells": 1}, {"from": "T", "to": "B", "cells": 1}]
    assert told["confidence"]["mean_shift"] == pytest.approx((0.0 + 0.1 - 0.3 + 0.3) / 4)
    assert told["confidence"]["noticeable"] == 2


def test_the_same_file_twice_differs_in_nothing(files):
    told = difference(files[0], files[0])
    assert (told["labels"]["changed"], told["labels"]["changes"], told["confidence"]["noticeable"]) == (0, [], 0)


def test_a_parquet_of_the_same_answers_is_the_same(files, tmp_path):
    rows = DiskRows((5, 3), np.float32, tmp_path)
    columns = {"cellplm_cell_type": pd.Categorical(["T", "T", "B", "B", "NK"]), "cellplm_confidence": np.array([0.9, 0.8, 0.7, 0.9, 0.6])}
    record = {RECORD: {"model_sha256": "a" * 64}, PLACE: {"in": "obsm", "as": "cellplm_cell_type_proba"}, NAMES: ["B", "NK", "T"]}
    write_answers(tmp_path / "a.parquet", [f"c{row}" for row in range(5)], columns, ("cellplm_cell_type_proba", rows), record)
    told = difference(files[0], tmp_path / "a.parquet")
    assert (told["labels"]["changed"], told["cells"]["both"]) == (0, 5)
    assert told["confidence"]["mean_shift"] == pytest.approx(0.0)


def test_embeddings_by_their_direction(tmp_path):
    rng = np.random.default_rng(0)
    first = AnnData(X=np.ones((30, 2), dtype=np.float32), obsm={"X_cellplm": rng.normal(size=(30, 4)).astype(np.float32)})
    turned, wider = first.copy(), first.copy()
    turned.obsm["X_cellplm"] = 3 * first.obsm["X_cellplm"]
    turned.obsm["X_cellplm"][0] *= -1
    wider.obsm["X_cellplm"] = np.ones((30, 5), dtype=np.float32)
    for name, data in (("first", first), ("turned", turned), ("wider", wider)):
        write_h5ad(data, tmp_path / f"{name}.h5ad")
    told = difference(tmp_path / "first.h5ad", tmp_path / "turned.h5ad")["embedding"]
    assert (round(told["cosine_min"], 5), round(told["cosine_50"], 5)) == (-1, 1)
    assert difference(tmp_path / "first.h5ad", tmp_path / "wider.h5ad")["embedding"] == {"comparable": False, "widths": [4, 5]}


def test_rates_by_gene_the_most_changed_first(tmp_path):
    rng = np.random.default_rng(0)
    rates = rng.random((20, 3)).astype(np.float32)
    first = AnnData(X=rates, var=pd.DataFrame(index=["A", "B", "C"]), layers={"cellplm_denoised": rates.copy()})
    second = AnnData(X=rates, var=pd.DataFrame(index=["C", "B", "D"]), layers={"cellplm_denoised": rates[:, [2, 1, 0]].copy()})
    second.layers["cellplm_denoised"][:, 0] += 0.5
    second.layers["cellplm_denoised"][3, 1] = np.nan  # refused there
    write_h5ad(first, tmp_path / "a.h5ad")
    write_h5ad(second, tmp_path / "b.h5ad")
    told = difference(tmp_path / "a.h5ad", tmp_path / "b.h5ad")["rates"]
    assert (told["genes"], told["unknown_in_one"], told["only_first"], told["only_second"]) == (1, 1, 1, 1)
    (row,) = told["most_changed"]
    assert (row["gene"], round(row["mean_difference"], 5), round(row["correlation"], 5)) == ("C", 0.5, 1.0)


def test_what_cannot_be_compared_is_said(files, tmp_path):
    write_h5ad(annotated(["T"], [0.5], ["nobody"]), tmp_path / "other.h5ad")
    with pytest.raises(DataError, match="no cell in common"):
        difference(files[0], tmp_path / "other.h5ad")
    write_h5ad(AnnData(X=np.ones((5, 2), dtype=np.float32)), tmp_path / "plain.h5ad")
    with pytest.raises(DataError, match="no answers"):
        difference(files[0], tmp_path / "plain.h5ad")
    embedded = AnnData(X=np.ones((2, 2), dtype=np.float32), obs=pd.DataFrame(index=["c0", "c1"]), obsm={"X_cellplm": np.ones((2, 2))})
    write_h5ad(embedded, tmp_path / "embedded.h5ad")
    with pytest.raises(DataError, match="different tasks"):
        difference(files[0], tmp_path / "embedded.h5ad")


def test_it_is_told_as_tables_and_as_json_and_always_ends_well(files, capsys):
    assert main(["diff", *map(str, files)]) == 0
    text = capsys.readouterr().out
    assert "2 changed (50.00%)" in text
    assert "NK    T   1" in text
    assert main(["diff", *map(str, files), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labels"]["changed"] == 2
    assert [title.split(":")[0] for title, *_ in sections(difference(*files))] == ["cells", "labels", "confidence"]
