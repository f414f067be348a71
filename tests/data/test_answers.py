"""Answers stand beside what a file held, which stays as it was."""

from __future__ import annotations

import h5py
import numpy as np
import pandas as pd
import pytest

from cellplane.data.answers import answered_copy, takes_answers
from cellplane.data.config import SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import read_h5ad, write_h5ad
from cellplane.data.stored import DiskRows


@pytest.fixture
def source(tmp_path):
    adata = simulate(SimulateConfig(n_cells=40, n_genes=30, n_types=3, seed=1))
    adata.obs["kept"] = np.arange(40)
    write_h5ad(adata, tmp_path / "in.h5ad")
    return tmp_path / "in.h5ad"


def disk(values, folder) -> DiskRows:
    rows = DiskRows(values.shape, values.dtype, folder)
    rows[np.arange(len(values))] = values
    return rows


def test_a_copy_holds_what_was_there_and_what_is_new(source, tmp_path):
    before, values = read_h5ad(source), np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    bytes_before = source.read_bytes()
    with answered_copy(source, tmp_path / "out.h5ad") as answers:
        answers.column("label", pd.Categorical(["a", "b"] * 20))
        answers.column("sure", np.linspace(0, 1, 40, dtype=np.float32))
        answers.matrix("obsm", "X_new", disk(values, tmp_path))
        answers.matrix("layers", "rates", disk(np.ones((40, 30), dtype=np.float32), tmp_path))
        answers.note("cellplm", {"model": "m", "number": 3})
    after = read_h5ad(tmp_path / "out.h5ad")
    assert (after.X != before.X).nnz == 0
    pd.testing.assert_frame_equal(after.obs[before.obs.columns], before.obs)
    assert list(after.obs.columns) == [*before.obs.columns, "label", "sure"]
    assert after.obs["label"].tolist() == ["a", "b"] * 20
    np.testing.assert_array_equal(after.obsm["X_new"], values)
    assert after.layers["rates"].sum() == 1200
    assert after.uns["cellplm"]["number"] == 3
    assert source.read_bytes() == bytes_before


def test_an_answer_is_replaced_and_removed(source, tmp_path):
    with answered_copy(source, tmp_path / "once.h5ad") as answers:
        answers.column("kept", np.zeros(40))
        answers.matrix("obsm", "X_new", disk(np.zeros((40, 4), dtype=np.float32), tmp_path))
        answers.column("flag", np.ones(40))
    with answered_copy(tmp_path / "once.h5ad", tmp_path / "twice.h5ad") as answers:
        answers.column("flag", None)
        answers.column("nobody", None)
        answers.matrix("obsm", "X_new", disk(np.ones((40, 2), dtype=np.float32), tmp_path))
    after = read_h5ad(tmp_path / "twice.h5ad")
    assert "flag" not in after.obs
    assert after.obs["kept"].sum() == 0
    assert after.obsm["X_new"].shape == (40, 2)


def end_badly(source, target) -> None:
    with answered_copy(source, target) as answers:
        answers.column("sure", np.zeros(40))
        raise RuntimeError("away")


def test_nothing_is_left_of_an_answer_that_fails(source, tmp_path):
    with pytest.raises(RuntimeError, match="away"):
        end_badly(source, tmp_path / "out.h5ad")
    assert [path.name for path in tmp_path.iterdir()] == ["in.h5ad"]


def test_files_of_another_form_are_told_apart(source, tmp_path):
    assert takes_answers(source)
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        file.create_dataset("obs", data=np.zeros(3, dtype=[("index", "S3"), ("a", "f4")]))
    assert not takes_answers(tmp_path / "old.h5ad")
    (tmp_path / "text.h5ad").write_text("no")
    assert not takes_answers(tmp_path / "text.h5ad")
