"""The catalogue of bad AnnData inputs (RELIABILITY.md, C1 to C54): each row an input, and the one clear thing that happens.

A row either raises (type and gist of the message) or is accepted, and then checks its own answer.
"""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from cellplane.data.config import ConvertConfig, DataKeys, SimulateConfig
from cellplane.data.convert import convert_with, write_part
from cellplane.data.counts import canonical
from cellplane.data.export import export
from cellplane.data.loader import ShardStore
from cellplane.data.sentences import contexts
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData, CellReader, cell_table, find_counts, read_h5ad, write_h5ad
from cellplane.data.validate import validate
from cellplane.errors import ColumnError, CountsNotFoundError, DataError, FileFormatError, IntegrityError, VocabularyError
from cellplane.genes import GeneVocabulary
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.embedding import CellEmbeddingPipeline

KEYS = DataKeys()
RECIPE = {
    "model": {"width": 16, "n_heads": 2, "n_blocks": 1, "latent_width": 8},
    "optimizer": {"steps": 3},
    "max_cells": 60,
}


class Box:
    """What a row works with: fresh cells, their vocabulary, a folder, and a pipeline that has learned them."""

    def __init__(self, folder: Path, fitted: CellTypeAnnotationPipeline) -> None:
        self.folder, self.fitted = folder, fitted
        self.cells = simulate(SimulateConfig(n_cells=60, n_genes=40, n_types=3, spatial=True, field_cells=30))
        self.dense = self.cells.X.toarray()

    @cached_property
    def vocabulary(self) -> GeneVocabulary:
        return GeneVocabulary.from_ids(self.cells.var_names)

    def with_dense(self, dense: np.ndarray) -> AnnData:
        self.cells.X = sp.csr_matrix(dense)
        return self.cells

    def counts(self, cells: AnnData, keys: DataKeys = KEYS) -> sp.csr_matrix:
        return find_counts(cells, keys).matrix

    def table(self, cells: AnnData, vocabulary: GeneVocabulary | None = None, **keys: object) -> Any:
        return cell_table(cells, self.vocabulary if vocabulary is None else vocabulary, DataKeys(**keys))

    def path(self, name: str = "cells.h5ad") -> Path:
        """The cells as a file."""
        write_h5ad(self.cells, self.folder / name)
        return self.folder / name

    def rows(self, path: Path) -> sp.csr_matrix:
        with CellReader(path) as reader:
            return reader.rows("X", 0, reader.n_cells)

    def finite(self, cells: AnnData) -> np.ndarray:
        """Probabilities of the cells, finite and one row each."""
        proba = self.fitted.predict_proba(cells)
        assert proba.shape == (cells.n_obs, 3)
        assert np.isfinite(proba).all()
        return proba

    def fit(self, cells: AnnData) -> CellTypeAnnotationPipeline:
        return CellTypeAnnotationPipeline(config=RECIPE).fit(cells, label_fields=["cell_type"])

    def converted(self, **keys: object) -> ShardStore:
        """The cells as shards."""
        config = ConvertConfig(inputs=(str(self.path()),), out=str(self.folder / "shards"), keys=DataKeys(**keys))
        convert_with(config, lambda tasks: map(write_part, tasks), lambda _: None)
        return ShardStore(self.folder / "shards")

    def look(self, **keys: object) -> Any:
        return validate(ConvertConfig(inputs=(str(self.path()),), out=".", keys=DataKeys(**keys)))


@dataclass(frozen=True)
class Row:
    """Row ``number`` of the catalogue: ``act`` raises ``error`` with a message like ``said``, or returns having checked its answer."""

    number: int
    name: str
    act: Callable[[Box], object]
    error: type[Exception] | None = None
    said: str = ""

    @property
    def parameter(self) -> Any:
        return pytest.param(self, id=f"C{self.number} {self.name}")


def changed(box: Box, value: float) -> AnnData:
    box.dense[3, 7] = value
    return box.with_dense(box.dense)


def normalised(box: Box) -> AnnData:
    return box.with_dense(box.dense / box.dense.sum(axis=1, keepdims=True) * 1e4)


def logged(box: Box) -> AnnData:
    box.dense[:, 0] = 1
    return box.with_dense(np.log1p(box.dense / box.dense.sum(axis=1, keepdims=True) * 1e4).astype(np.float32))


def scaled(box: Box) -> AnnData:
    return ad.AnnData(X=(box.dense - box.dense.mean(axis=0)) / box.dense.std(axis=0), var=box.cells.var)


def renamed(box: Box, names: list[str]) -> AnnData:
    box.cells.var_names = names
    return box.cells


def ensembl(n: int, prefix: str = "ENSG", version: str = "") -> list[str]:
    return [f"{prefix}{number:011d}{version}" for number in range(n)]


@contextmanager
def heard(name: str) -> Iterator[list[str]]:
    """What a logger says meanwhile."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(name).addHandler(handler)
    try:
        yield records
    finally:
        logging.getLogger(name).removeHandler(handler)


def repeated_cells(box: Box) -> None:
    expected = box.finite(box.cells)
    box.cells.obs_names = ["same"] * 60
    np.testing.assert_array_equal(box.finite(box.cells), expected)
    assert "59 cells have the name of another one; they are told apart by position only" in box.look().warnings


def repeated_genes(box: Box) -> None:
    """Added up, or the first taken, where that is asked for."""
    renamed(box, ["A", "A", *box.cells.var_names[2:]])
    vocabulary = GeneVocabulary.from_ids(["A", *box.cells.var_names[2:]])
    for rule, expected in (("sum", box.dense[:, 0] + box.dense[:, 1]), ("first", box.dense[:, 0])):
        table, _ = box.table(box.cells, vocabulary, repeated_genes=rule)
        found = sp.csr_matrix((table.value, table.gene, table.crow), shape=(60, 39)).toarray()
        np.testing.assert_array_equal(found, np.column_stack([expected, box.dense[:, 2:]]))


def low_overlap(box: Box) -> None:
    """Above the floor it is answered, with the overlap in the report, and a warning where it is a small share."""
    _, report = box.table(box.cells, GeneVocabulary.from_ids([*box.cells.var_names[:12], *(f"O{n}" for n in range(100))]))
    assert report["n_shared"] == 12
    assert report["overlap"] == 12 / 40
    many = [f"P{n}" for n in range(200)]
    wide = ad.AnnData(X=sp.hstack([box.cells.X, sp.csr_matrix((60, 200), dtype=np.float32)], format="csr"))
    wide.var_names = [*box.cells.var_names, *many]
    with heard("cellplane.genes") as said:
        box.table(wide, GeneVocabulary.from_ids([*box.cells.var_names[:12], *(f"O{n}" for n in range(200))]))
    assert said == ["only 12 of 240 genes are among the model's 212: answers rest on few genes"]


def versions(box: Box) -> None:
    _, report = box.table(renamed(box, ensembl(40, version=".7")), GeneVocabulary.from_ids(ensembl(40)))
    assert report["n_shared"] == 40


def version_collision(box: Box) -> None:
    names = ensembl(40, version=".1")
    names[1] = names[0].replace(".1", ".2")
    table, report = box.table(renamed(box, names), GeneVocabulary.from_ids(ensembl(40)))
    first = sp.csr_matrix((table.value, table.gene, table.crow), shape=(60, 40)).toarray()[:, 0]
    np.testing.assert_array_equal(first, box.dense[:, 0] + box.dense[:, 1])
    assert report["n_summed"] == 1


def symbols_in_a_column(box: Box) -> None:
    symbols = list(box.cells.var_names)
    renamed(box, ensembl(40)).var["feature_name"] = symbols
    assert box.table(box.cells, GeneVocabulary.from_ids(symbols))[1]["n_shared"] == 40


def empty_cells(box: Box) -> None:
    box.dense[5:8] = 0
    cells = box.with_dense(box.dense)
    proba = box.finite(cells)
    assert np.isfinite(CellEmbeddingPipeline(box.fitted.folder_).predict(cells)).all()
    labels = box.fitted.predict(cells)
    assert labels[5:8].tolist() == ["unknown"] * 3
    assert np.delete(labels, [5, 6, 7]).tolist() == [box.fitted.classes_[best] for best in np.delete(proba, [5, 6, 7], axis=0).argmax(1)]


def flagged(box: Box) -> None:
    """Cells without counts are flagged by either pipeline, and the flag goes when a later answer has no need of it."""
    full = box.cells.copy()
    box.dense[5:8] = 0
    cells = box.with_dense(box.dense)
    box.fitted.predict(cells, key_added="cellplm")
    CellEmbeddingPipeline(box.fitted.folder_).predict(cells, key_added="z")
    for key in ("cellplm_flag", "z_flag"):
        assert cells.obs[key][5:8].tolist() == ["no counts"] * 3
        assert np.delete(cells.obs[key].isna().to_numpy(), [5, 6, 7]).all()
    assert cells.obs["cellplm_confidence"][5:8].tolist() == [0] * 3
    assert list(cells.obs["cellplm_cell_type"].cat.categories) == ["type_0", "type_1", "type_2", "unknown"]
    assert (box.path(), read_h5ad(box.folder / "cells.h5ad").obs["cellplm_flag"].notna().sum())[1] == 3
    cells.X = full.X
    box.fitted.predict(cells, key_added="cellplm")
    assert "cellplm_flag" not in cells.obs
    assert "unknown" not in cells.obs["cellplm_cell_type"].cat.categories


def counts_elsewhere(box: Box) -> None:
    """Counts only in genes that the model does not know."""
    cells = renamed(box, [f"OTHER{n}" for n in range(28)] + list(box.cells.var_names[:12]))
    box.dense[:, 28:] = 0
    box.dense[0] = 0
    box.finite(box.with_dense(box.dense))
    assert set(box.fitted.predict(cells, key_added="cellplm")) == {"unknown"}
    expected = ["no counts", *["no counts in genes the model knows"] * 59]
    assert cells.obs["cellplm_flag"].tolist() == [expected[0] if not row.any() else expected[1] for row in box.dense]


def no_cells(box: Box) -> None:
    none = box.cells[:0].copy()
    labels, proba = box.fitted.predict(none, key_added="cellplm"), box.fitted.predict_proba(none)
    assert (labels.shape, labels.dtype) == ((0,), object)
    assert (proba.shape, proba.dtype) == ((0, 3), np.float32)
    assert list(none.obs["cellplm_cell_type"].cat.categories) == list(box.fitted.classes_)


def one_cell(box: Box) -> None:
    """Alone it is what it is as a sentence of one among others; among the others of its sentence it is something else."""
    alone = box.finite(box.cells[4:5].copy())
    box.cells.obs["own"] = pd.Categorical([str(row) for row in range(60)])
    sentences = box.fitted.predict_proba(box.cells, {"keys": {"batch_key": "own"}})
    np.testing.assert_allclose(sentences[4:5], alone, atol=1e-6)
    assert np.abs(box.finite(box.cells)[4] - alone[0]).max() > 1e-6


def long_row(box: Box) -> None:
    entries = 100_000
    matrix = sp.csr_matrix((np.ones(entries, np.float32), np.zeros(entries, np.int32), [0, entries]), shape=(1, 40))
    box.counts(ad.AnnData(X=matrix, var=box.cells.var))


def dtypes(box: Box) -> None:
    for dtype in (np.int64, np.uint16, np.float64, np.int32, np.uint8):
        found = box.counts(ad.AnnData(X=box.cells.X.astype(dtype), var=box.cells.var))
        assert (found != box.cells.X).nnz == 0
    expected = box.finite(box.cells)
    box.cells.X = box.cells.X.astype(np.int64)
    np.testing.assert_array_equal(box.finite(box.cells), expected)


def layouts(box: Box) -> None:
    """Sparse of any layout, dense, matrix: the same rows; and the same from a file."""
    for kind in (sp.csr_matrix, sp.csc_matrix, sp.coo_matrix, sp.csr_array, sp.csc_array, np.asarray, np.matrix):
        found = canonical(kind(box.dense), "X")
        for part in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(found, part), getattr(box.cells.X, part))
    for kind in (sp.csc_matrix, np.asarray):
        box.cells.X = kind(box.dense)
        np.testing.assert_array_equal(box.rows(box.path()).toarray(), box.dense)


def masked(box: Box) -> None:
    canonical(np.ma.masked_array(box.dense, mask=box.dense > 3), "X")


def backed(box: Box) -> None:
    file = read_h5ad(box.path(), backed=True)
    assert (box.counts(file) != box.cells.X).nnz == 0
    file.file.close()


def digest(cells: AnnData) -> str:
    parts = (cells.X.data, cells.X.indices, cells.X.indptr, cells.obsm["spatial"])
    return hashlib.sha256(
        b"".join(part.tobytes() for part in parts) + cells.obs.to_csv().encode() + cells.var.to_csv().encode()
    ).hexdigest()


def view(box: Box) -> None:
    before = digest(box.cells)
    box.table(box.cells[:20], batch_key="batch", spatial_key="spatial")
    box.finite(box.cells[10:40, :30])
    assert digest(box.cells) == before


def no_matrix(box: Box) -> None:
    box.counts(ad.AnnData(obs=box.cells.obs, var=box.cells.var))


def only_another_layer(box: Box) -> object:
    """In memory and from a file the layer is named; naming it back gives its counts."""
    box.cells.layers["spliced"], box.cells.X = box.cells.X, None
    np.testing.assert_array_equal(box.counts(box.cells, DataKeys(layer="spliced")).toarray(), box.dense)
    assert "not looked at: layers['spliced']" in box.look().errors[0]
    with pytest.raises(CountsNotFoundError, match=r"cells\.h5ad.*not looked at: layers\['spliced'\]"):
        box.converted()
    return box.counts(box.cells)


def raw_with_other_genes(box: Box) -> None:
    few = logged(box)[:, :5].copy()
    few.raw = ad.AnnData(X=sp.csr_matrix(box.dense), var=box.cells.var)
    for keys in (KEYS, DataKeys(layer="raw")):
        found = find_counts(few, keys)
        assert (found.place, len(found.gene_ids), found.matrix.shape) == ("raw.X", 40, (60, 40))


def corrupt(box: Box, part: str, value: int) -> object:
    """Refused whole in memory, by row ranges, and in a conversion."""
    path = box.path()
    with h5py.File(path, "a") as file:
        file[f"X/{part}"][7] = value
    with pytest.raises(DataError, match="corrupt sparse matrix"):
        box.counts(ad.read_h5ad(path))
    with pytest.raises(IntegrityError, match=r"cells\.h5ad: X is a corrupt sparse matrix"):
        convert_with(ConvertConfig(inputs=(str(path),), out=str(box.folder / "out")), lambda tasks: map(write_part, tasks), lambda _: None)
    return box.rows(path)


def unsorted(box: Box) -> None:
    """Repeated entries are added up, also where their type is too small for the sum; from a file too."""
    for dtype in (np.float32, np.uint8, np.int16):
        matrix = sp.csr_matrix((np.array([100, 2, 200, 0], dtype), np.array([2, 0, 2, 1]), np.array([0, 3, *[4] * 11])), shape=(12, 12))
        found = canonical(matrix, "X")
        np.testing.assert_array_equal(found.toarray()[:2, :3], [[2, 0, 300], [0, 0, 0]])
        assert found.has_canonical_format
        box.cells = ad.AnnData(X=matrix)
        batch = box.converted().read([0])
        assert sorted(zip(batch.gene.tolist(), batch.value.tolist(), strict=True)) == [(0, 2), (1, 0), (2, 300)][: len(batch.value)]


def wrong_shape(box: Box, read: Callable[[Path], object]) -> object:
    path = box.path()
    with h5py.File(path, "a") as file:
        file["X"].attrs["shape"] = [59, 40]
    return read(path)


def too_few(box: Box, name: str, lost: int = 5) -> object:
    """A column that was cut (or lost whole) beside others that were not."""
    box.cells.var = box.cells.var[[]]
    path = box.path()
    with h5py.File(path, "a") as file:
        values, attributes, dtype = file[name][:-lost], dict(file[name].attrs), file[name].dtype
        del file[name]
        if len(values):
            file.create_dataset(name, data=values, dtype=dtype).attrs.update(attributes)
    keys = DataKeys(labels_key="cell_type", spatial_key="spatial")
    config = ConvertConfig(inputs=(str(path),), out=str(box.folder / "out"), keys=keys)
    assert not validate(config).ok
    return convert_with(config, lambda tasks: map(write_part, tasks), lambda _: None)


def unused_categories(box: Box) -> None:
    box.cells.obs["cell_type"] = box.cells.obs["cell_type"].cat.add_categories(["unused"])
    assert box.fit(box.cells).classes_ == ("type_0", "type_1", "type_2")


def missing_labels(box: Box) -> None:
    labels = box.cells.obs["cell_type"].astype(object)
    labels.iloc[:7] = np.nan
    for values in (labels, labels.astype(str), pd.Categorical(labels)):
        box.cells.obs["cell_type"] = values
        with heard("cellplane.pipelines.annotation") as said:
            assert box.fit(box.cells).classes_ == ("type_0", "type_1", "type_2")
        assert any("7 of 60 cells have no label" in text for text in said)
        assert box.converted(labels_key="cell_type").class_names == ("type_0", "type_1", "type_2")


LABELS_OF = {"numbers": lambda code: int(code), "truth values": lambda code: bool(code), "fractions": lambda code: code / 4}


def typed_labels(box: Box, make: Callable[[int], Any], column: Callable[[list[Any]], Any]) -> None:
    """classes_ and predict give back the type of the labels, fitted or loaded; scores and obs are text."""
    labels = [make(code) for code in box.cells.obs["cell_type"].cat.codes]
    box.cells.obs["cell_type"] = column(labels)
    fitted = box.fit(box.cells)
    pipeline = CellTypeAnnotationPipeline.load(fitted.save(box.folder / "model"))
    for one in (fitted, pipeline):
        assert one.classes_ == tuple(sorted(set(labels)))
        assert {type(name) for name in (*one.classes_, *one.predict(box.cells))} == {type(labels[0])}
    scores = fitted.score(box.cells)
    assert scores["support"] == {str(name): labels.count(name) for name in set(labels)}
    assert scores["accuracy"] == np.mean([one == true for one, true in zip(fitted.predict(box.cells), labels, strict=True)])
    pipeline.predict(box.cells, key_added="cellplm")
    assert list(box.cells.obs["cellplm_cell_type"].cat.categories) == [str(name) for name in sorted(set(labels))]


def mixed_labels(box: Box) -> object:
    box.cells.obs["cell_type"] = [1, "1", 2] * 20
    return box.fit(box.cells)


def unseen_labels(box: Box) -> None:
    box.cells.obs["cell_type"] = ["never seen", *box.cells.obs["cell_type"][1:]]
    with heard("cellplane.pipelines.annotation") as said:
        scores = box.fitted.score(box.cells)
    assert said == ["1 of 60 cells have labels that were never learned and count as wrong: never seen"]
    assert scores["per_class_f1"]["never seen"] == 0
    assert scores["support"]["never seen"] == 1
    assert scores["accuracy"] <= 59 / 60


def unseen_batch(box: Box) -> None:
    """A batch tells which cells are seen together; its name, learned or not, tells nothing."""
    keys = {"keys": {"batch_key": "batch", "labels_key": "cell_type"}}
    pipeline = CellTypeAnnotationPipeline(config={**RECIPE, **keys}).fit(box.cells)
    expected = pipeline.predict_proba(box.cells)
    box.cells.obs["batch"] = ["never seen " + str(name) for name in box.cells.obs["batch"]]
    np.testing.assert_array_equal(pipeline.predict_proba(box.cells), expected)
    del box.cells.obs["batch"]
    assert np.isfinite(pipeline.predict_proba(box.cells)).all()


def missing_batch(box: Box) -> None:
    box.cells.obs["batch"] = [None, *box.cells.obs["batch"][1:]]
    box.table(box.cells, batch_key="batch")


def few_batches(box: Box) -> None:
    for values in (["one"] * 60, [str(n) for n in range(60)]):
        box.cells.obs["batch"] = values
        table, _ = box.table(box.cells, batch_key="batch")
        sentences = contexts(list(table.batch), 60, 100)
        assert len(sentences) == len(set(values))
        assert sorted(np.concatenate(sentences)) == list(range(60))


def number_names(box: Box) -> None:
    expected = box.finite(box.cells)
    box.cells.obs.index = pd.Index(np.arange(60)[::-1])
    np.testing.assert_array_equal(box.finite(box.cells), expected)


def strange_names(box: Box) -> None:
    names = [f"\u00e9/\U0001f9ec {number}" for number in range(60)]
    box.cells.obs_names = names
    box.cells.obs["batch"] = pd.Categorical(["a/\u00df", "b\U0001f9ec"] * 30)
    path = box.path("caf\u00e9 \U0001f9ec.h5ad")
    again = read_h5ad(path)
    assert again.obs_names.tolist() == names
    with CellReader(path) as reader:
        assert reader.obs("batch").tolist() == ["a/\u00df", "b\U0001f9ec"] * 30
    config = ConvertConfig(inputs=(str(path),), out=str(box.folder / "shards"), keys=DataKeys(batch_key="batch"))
    convert_with(config, lambda tasks: map(write_part, tasks), lambda _: None)
    written = export(box.folder / "shards", box.folder / "back")[0]
    assert written.name.isascii()
    assert ad.read_h5ad(written).obs_names.tolist() == names
    assert ad.read_h5ad(written).obs["batch"].tolist() == ["a/\u00df", "b\U0001f9ec"] * 30


def slash_in_a_key(box: Box) -> None:
    box.cells.obs["a/b"] = [float(row) for row in range(60)]
    assert read_h5ad(box.path()).obs["a/b"].tolist() == list(range(60))
    with CellReader(box.folder / "cells.h5ad") as reader:
        assert reader.obs("a/b").tolist() == list(range(60))
    box.converted()
    assert ad.read_h5ad(export(box.folder / "shards", box.folder / "back")[0]).obs["a/b"].tolist() == list(range(60))


def no_positions(box: Box) -> None:
    del box.cells.obsm["spatial"]
    box.table(box.cells)
    box.table(box.cells, spatial_key="spatial")


def positions(box: Box, values: Any) -> object:
    box.cells.obsm["spatial"] = values
    return box.table(box.cells, spatial_key="spatial")[0]


def flat_positions(box: Box) -> None:
    line = np.column_stack([np.arange(60.0), np.zeros(60)])
    for values in (np.ones((60, 2)), line, np.repeat(line[:30], 2, axis=0)):
        assert np.isfinite(positions(box, values).coordinates).all()
        found = box.look(spatial_key="spatial")
        assert found.ok
        assert found.warnings
        batch = box.converted(spatial_key="spatial").read([0])
        assert sorted(batch.row.tolist()) == list(range(60))
        np.testing.assert_array_equal(batch.coordinates.numpy(), values[batch.row.numpy()].astype(np.float32))


def pixels(box: Box) -> None:
    box.cells.obsm["spatial"] = box.cells.obsm["spatial"] * 1e4
    found = box.look(spatial_key="spatial", batch_key="batch")
    assert found.ok
    assert "pixels" in found.warnings[0]
    assert found.spatial["suggested_scale"] < 0.01


def huge_obs(box: Box) -> None:
    """A column that nobody could even read does not hinder the others."""
    path = box.path()
    with h5py.File(path, "a") as file:
        huge = file["obs"].create_dataset("huge", data=np.zeros(60))
        huge.attrs["encoding-type"], huge.attrs["encoding-version"] = "unheard of", "9.0.0"
    with CellReader(path) as reader:
        assert reader.obs("batch").tolist() == box.cells.obs["batch"].tolist()
    assert validate(ConvertConfig(inputs=(str(path),), out=".", keys=DataKeys(batch_key="batch"))).ok


def cut(box: Box, share: float) -> object:
    path = box.path()
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(FileFormatError, match=rf"cells\.h5ad \({int(share * len(content))} bytes\)"):
        CellReader(path)
    return read_h5ad(path)


def other_kind(box: Box, content: bytes) -> object:
    path = box.folder / "cells.h5ad"
    path.write_bytes(content)
    return read_h5ad(path)


def plain_hdf5(box: Box) -> object:
    with h5py.File(box.folder / "other.h5ad", "w") as file:
        file["a"] = np.arange(3)
    return read_h5ad(box.folder / "other.h5ad")


def loom(box: Box) -> object:
    with h5py.File(box.folder / "cells.loom", "w") as file:
        file["matrix"] = box.dense.T
        file["row_attrs/Gene"], file["col_attrs/CellID"] = np.arange(40), np.arange(60)
    return read_h5ad(box.folder / "cells.loom")


def forbidden(box: Box) -> object:
    path = box.path()
    path.chmod(0)
    box.folder.chmod(0o755)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)  # nobody: root may read everything
        return read_h5ad(path)
    finally:
        if root:
            os.seteuid(0)


def attacked(box: Box, attack: Callable[[h5py.File, Path], object]) -> object:
    path = box.path()
    with h5py.File(path, "a") as file:
        attack(file, box.folder)
    with pytest.raises(FileFormatError):
        CellReader(path)
    return read_h5ad(path)


def external_link(file: h5py.File, folder: Path) -> None:
    file["layers/other"] = h5py.ExternalLink("other.h5", "/data")


def soft_link(file: h5py.File, folder: Path) -> None:
    file["layers/other"] = h5py.SoftLink("/layers/other")


def external_storage(file: h5py.File, folder: Path) -> None:
    (folder / "secret").write_bytes(b"x" * 80)
    file.create_dataset("layers/other", shape=(10,), dtype="f8", external=[(str(folder / "secret"), 0, 80)])


def virtual(file: h5py.File, folder: Path) -> None:
    layout = h5py.VirtualLayout(shape=(4,), dtype="f8")
    layout[:] = h5py.VirtualSource("other.h5", "data", shape=(4,))
    file.create_virtual_dataset("layers/other", layout)


def bomb(file: h5py.File, folder: Path) -> None:
    file.create_dataset("layers/other", shape=(50_000, 80_000), dtype="f4", chunks=(1000, 1000), compression="gzip")


def future(box: Box) -> object:
    path = box.path()
    with h5py.File(path, "a") as file:
        file["X"].attrs["encoding-version"] = "9.9.9"
    return read_h5ad(path)


def zarr_bomb(box: Box) -> None:
    box.cells.write_zarr(box.folder / "cells.zarr")
    group = zarr.open_group(str(box.folder / "cells.zarr"), mode="a", use_consolidated=False)
    attributes = dict(group["obs/_index"].attrs)
    del group["obs/_index"]
    group["obs"].create_array("_index", shape=(10**12,), chunks=(1000,), dtype="i8").attrs.update(attributes)
    (box.folder / "cells.zarr" / ".zmetadata").unlink()
    CellReader(box.folder / "cells.zarr")


def zarr_folder(box: Box, version: int) -> object:
    """Converted as it is; whoever asks for an h5ad hears what it is."""
    with ad.settings.override(zarr_write_format=version):
        box.cells.write_zarr(box.folder / "cells.zarr")
    np.testing.assert_array_equal(box.rows(box.folder / "cells.zarr").toarray(), box.dense)
    return read_h5ad(box.folder / "cells.zarr")


def old_file(box: Box) -> None:
    """A file as anndata 0.6 wrote them: compound tables, h5sparse."""
    path = box.folder / "old.h5ad"
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs.update({"h5sparse_format": "csr", "h5sparse_shape": (60, 40)})
        for part in ("data", "indices", "indptr"):
            group[part] = getattr(box.cells.X, part)
        file["obs"] = np.array([(f"c{n}".encode(),) for n in range(60)], dtype=[("index", "S8")])
        file["var"] = np.array([(f"G{n}".encode(),) for n in range(40)], dtype=[("index", "S8")])
    np.testing.assert_array_equal(box.rows(path).toarray(), box.dense)


OTHER_KINDS = {"text": b"cell,gene\n", "a zip archive": b"PK\x03\x04rest", "a PNG image": b"\x89PNG\r\n\x1a\n", "empty": b""}
OUTSIDE = [f"OTHER{n}" for n in range(35)]
MICE = [f"Gene{n}" for n in range(40)]
SYMBOLS = GeneVocabulary.from_ids([f"SYMBOL{n}" for n in range(40)])

ROWS = [
    Row(
        1,
        "negative",
        lambda b: b.counts(changed(b, -3.1)),
        CountsNotFoundError,
        "1 negative values, the first at cell 3, gene 7: looks scaled",
    ),
    Row(2, "nan", lambda b: b.counts(changed(b, np.nan)), DataError, "1 NaN values, the first at cell 3, gene 7"),
    Row(3, "infinite", lambda b: b.counts(changed(b, -np.inf)), DataError, "1 infinite values, the first at cell 3, gene 7"),
    Row(4, "normalised", lambda b: b.counts(normalised(b)), CountsNotFoundError, "X: non-integer, looks normalised"),
    Row(5, "logged", lambda b: b.counts(logged(b)), CountsNotFoundError, "X: non-integer, looks log1p.*--recover-counts"),
    Row(6, "z-scored", lambda b: b.counts(scaled(b)), CountsNotFoundError, "negative values.*looks scaled"),
    Row(
        7,
        "repeated genes",
        lambda b: b.counts(renamed(b, ["A", "A", *b.cells.var_names[2:]])),
        DataError,
        r"1 genes stand.*'A'.*sum or drop",
    ),
    Row(7, "repeated genes that may be", repeated_genes),
    Row(8, "repeated cells", repeated_cells),
    Row(
        9,
        "no overlap",
        lambda b: b.table(renamed(b, ensembl(40, "ENSMUSG")), GeneVocabulary.from_ids(ensembl(40))),
        VocabularyError,
        "0 of 40 genes.*mouse.*human",
    ),
    Row(
        10,
        "too few genes",
        lambda b: b.table(b.cells, GeneVocabulary.from_ids([*b.cells.var_names[:5], *OUTSIDE])),
        VocabularyError,
        "5 of 40 genes.*at least 10",
    ),
    Row(10, "few genes", low_overlap),
    Row(11, "versions", versions),
    Row(11, "versions that collide", version_collision),
    Row(
        12,
        "mouse symbols",
        lambda b: b.table(renamed(b, MICE), GeneVocabulary.from_ids([gene.upper() for gene in MICE])),
        VocabularyError,
        "0 of 40 genes.*looks like mouse.*the model's genes are human.*replace the genes by their orthologs",
    ),
    Row(13, "a column of symbols", symbols_in_a_column),
    Row(
        13,
        "ids for symbols",
        lambda b: b.table(renamed(b, ensembl(40)), SYMBOLS),
        VocabularyError,
        "0 of 40 genes.*symbol.*ensembl_human.*tried var_names",
    ),
    Row(14, "empty cells", empty_cells),
    Row(14, "empty cells are flagged", flagged),
    Row(15, "no counts the model knows", counts_elsewhere),
    Row(16, "no cells to predict", no_cells),
    Row(16, "no cells to learn from", lambda b: b.fit(b.cells[:0].copy()), DataError, "0 cell types"),
    Row(17, "no genes", lambda b: b.counts(b.cells[:, :0].copy()), DataError, "no genes"),
    Row(18, "one cell", one_cell),
    Row(19, "a row longer than the genes", long_row, IntegrityError, "a row with more entries than its 40 columns"),
    Row(20, "number types", dtypes),
    Row(21, "too large", lambda b: b.counts(changed(b, 2.0**25)), DataError, "above 16777216"),
    Row(22, "truth values", lambda b: b.counts(ad.AnnData(X=b.cells.X > 0)), CountsNotFoundError, "binarised"),
    Row(23, "objects", lambda b: canonical(b.dense.astype(object), "X"), DataError, "object values; counts are numbers"),
    Row(23, "text", lambda b: canonical(b.dense.astype(str), "X"), DataError, "counts are numbers"),
    Row(24, "layouts", layouts),
    Row(24, "masked", masked, DataError, "masked array"),
    Row(25, "backed", backed),
    Row(26, "a view", view),
    Row(27, "no X", no_matrix, CountsNotFoundError, "X: absent"),
    Row(27, "no X but a layer", only_another_layer, CountsNotFoundError, r"X: absent \(not looked at: layers\['spliced'\]\); .*--layer"),
    Row(28, "raw with other genes", raw_with_other_genes),
    Row(
        29, "no such layer", lambda b: b.counts(b.cells, DataKeys(layer="nowhere")), ColumnError, r"no layers\['nowhere'\].*this file has X"
    ),
    Row(
        30,
        "column out of range",
        lambda b: corrupt(b, "indices", 40),
        IntegrityError,
        "corrupt sparse matrix: column indices outside 0 to 39",
    ),
    Row(
        30, "negative column", lambda b: corrupt(b, "indices", -1), IntegrityError, "corrupt sparse matrix: column indices outside 0 to 39"
    ),
    Row(
        30,
        "row starts that fall",
        lambda b: corrupt(b, "indptr", 0),
        IntegrityError,
        "corrupt sparse matrix: row starts that do not ascend",
    ),
    Row(31, "unsorted and repeated", unsorted),
    Row(32, "shape in memory", lambda b: wrong_shape(b, read_h5ad), FileFormatError, r"cells\.h5ad"),
    Row(32, "shape in ranges", lambda b: wrong_shape(b, b.rows), IntegrityError, "X is a corrupt sparse matrix: 60 row starts for 59 rows"),
    Row(
        32,
        "too few labels",
        lambda b: too_few(b, "obs/cell_type/codes"),
        IntegrityError,
        r"cells\.h5ad: obs/cell_type has 55 values for 60 cells",
    ),
    Row(
        32,
        "too few positions",
        lambda b: too_few(b, "obsm/spatial"),
        IntegrityError,
        r"cells\.h5ad: obsm/spatial has 55 values for 60 cells",
    ),
    Row(32, "too few gene names", lambda b: too_few(b, "var/_index"), IntegrityError, "35 genes are named for the 40 columns of X"),
    Row(32, "no cell names", lambda b: too_few(b, "obs/_index", 60), FileFormatError, r"cells\.h5ad.*cannot be read as AnnData.*_index"),
    Row(33, "unused categories", unused_categories),
    Row(34, "labels missing", missing_labels),
    *(Row(35, f"{name} as labels", lambda b, m=make: typed_labels(b, m, list)) for name, make in LABELS_OF.items()),
    *(Row(35, f"{name} as categories", lambda b, m=make: typed_labels(b, m, pd.Categorical)) for name, make in LABELS_OF.items()),
    Row(35, "labels of several types", mixed_labels, DataError, r"obs\['cell_type'\] holds labels of several types \(int, str\)"),
    Row(36, "labels unseen", unseen_labels),
    Row(37, "no such label column", lambda b: b.fit(_without(b, "cell_type", "cell_typ")), ColumnError, "did you mean 'cell_typ'"),
    Row(37, "no such batch column", lambda b: b.table(b.cells, batch_key="bacth"), ColumnError, "did you mean 'batch'"),
    Row(37, "no such positions", lambda b: b.table(b.cells, spatial_key="spatail"), ColumnError, "did you mean 'spatial'"),
    Row(38, "batch unseen", unseen_batch),
    Row(39, "batch missing", missing_batch, DataError, "1 of 60 cells have no value in obs\\['batch'\\]"),
    Row(39, "one batch, one cell a batch", few_batches),
    Row(40, "numbers as names", number_names),
    Row(41, "strange names", strange_names),
    Row(41, "a slash in a key", slash_in_a_key),
    Row(42, "no positions", no_positions, ColumnError, "no 'spatial' in obsm"),
    Row(43, "positions missing", lambda b: positions(b, np.full((60, 2), np.nan)), DataError, "60 cells with NaN or infinite"),
    Row(
        43,
        "a position at infinity",
        lambda b: positions(b, np.array([[0.0, np.inf], *[[0.0, 1]] * 59])),
        DataError,
        "1 cells with NaN or infinite",
    ),
    Row(44, "positions in space", lambda b: positions(b, np.zeros((60, 3))), DataError, r"shape \(60, 3\)"),
    Row(44, "positions on a line", lambda b: positions(b, np.zeros((60, 1))), DataError, r"shape \(60, 1\)"),
    Row(45, "positions that are flat", flat_positions),
    Row(46, "pixels", pixels),
    Row(47, "huge obs", huge_obs),
    *(
        Row(48, f"cut at {100 * s} %", lambda b, s=s: cut(b, s), FileFormatError, r"cells\.h5ad.*bytes")
        for s in (0, 0.001, 0.5, 0.99, 0.9999)
    ),
    *(
        Row(49, kind, lambda b, c=c: other_kind(b, c), FileFormatError, f"bytes\\) is not an HDF5 file but {kind}")
        for kind, c in OTHER_KINDS.items()
    ),
    Row(50, "plain HDF5", plain_hdf5, FileFormatError, "HDF5 but not AnnData.*encoding-type"),
    Row(51, "a folder", lambda b: read_h5ad(b.folder), FileFormatError, "is a folder; expected an .h5ad file"),
    Row(51, "missing", lambda b: read_h5ad(b.folder / "no.h5ad"), DataError, "no such file"),
    Row(51, "forbidden", forbidden, DataError, "[Pp]ermission"),
    Row(52, "external link", lambda b: attacked(b, external_link), FileFormatError, "ExternalLink"),
    Row(52, "loop of soft links", lambda b: attacked(b, soft_link), FileFormatError, "SoftLink"),
    Row(52, "external storage", lambda b: attacked(b, external_storage), FileFormatError, "other files"),
    Row(52, "virtual", lambda b: attacked(b, virtual), FileFormatError, "other files"),
    Row(53, "shape bomb", lambda b: attacked(b, bomb), FileFormatError, "declares 16000000000 bytes"),
    Row(53, "shape bomb in zarr", zarr_bomb, FileFormatError, r"obs/_index declares 8000000000000 bytes but stores \d+; refused"),
    Row(54, "future version", future, FileFormatError, r"9\.9\.9"),
    *(
        Row(54, f"zarr {n} for h5ad", lambda b, n=n: zarr_folder(b, n), FileFormatError, r"is a folder \(zarr\); expected an .h5ad")
        for n in (2, 3)
    ),
    Row(54, "loom", loom, FileFormatError, "HDF5 but not AnnData"),
    Row(54, "old version", old_file),
]


def _without(box: Box, key: str, near: str) -> AnnData:
    box.cells.obs = box.cells.obs.rename(columns={key: near})
    return box.cells


@pytest.fixture(scope="module")
def fitted() -> CellTypeAnnotationPipeline:
    """A model of three types over the genes of the rows' cells."""
    return CellTypeAnnotationPipeline(config=RECIPE).fit(
        simulate(SimulateConfig(n_cells=60, n_genes=40, n_types=3)), label_fields=["cell_type"]
    )


@pytest.mark.parametrize("row", [row.parameter for row in ROWS])
def test_a_bad_input_gets_the_answer_of_the_catalogue(tmp_path, monkeypatch, fitted, row):
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / "home"))
    box = Box(tmp_path, fitted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata's own remarks on such inputs
        if row.error is None:
            row.act(box)
            return
        with pytest.raises(row.error, match=row.said) as caught:
            row.act(box)
    assert isinstance(caught.value, DataError)
    assert caught.value.exit_code == 3


def test_every_row_of_the_catalogue_is_here():
    assert {row.number for row in ROWS} == set(range(1, 55))
