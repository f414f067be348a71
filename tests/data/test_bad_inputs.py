"""The catalogue of bad AnnData inputs (RELIABILITY.md, C1 to C54): each row an input, and the one clear thing that happens.

A row either raises (type and gist of the message) or is accepted, and then checks its own answer.
"""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Callable
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

from cellplane.data.config import ConvertConfig, DataKeys, SimulateConfig
from cellplane.data.counts import canonical
from cellplane.data.sentences import contexts
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData, CellReader, cell_table, find_counts, read_h5ad, write_h5ad
from cellplane.data.validate import validate
from cellplane.errors import ColumnError, CountsNotFoundError, DataError, FileFormatError, IntegrityError, VocabularyError
from cellplane.genes import GeneVocabulary
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline

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
    missing: str = ""  # why today's code does not do it

    @property
    def parameter(self) -> Any:
        marks = [pytest.mark.xfail(strict=True, reason=self.missing)] if self.missing else []
        return pytest.param(self, id=f"C{self.number} {self.name}", marks=marks)


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


def repeated_cells(box: Box) -> None:
    expected = box.finite(box.cells)
    box.cells.obs_names = ["same"] * 60
    np.testing.assert_array_equal(box.finite(box.cells), expected)


def low_overlap(box: Box) -> None:
    _, report = box.table(box.cells, GeneVocabulary.from_ids([*box.cells.var_names[:12], *(f"O{n}" for n in range(100))]))
    assert report["n_shared"] == 12
    assert report["overlap"] == 12 / 40


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
    box.finite(box.with_dense(box.dense))


def flagged(box: Box) -> None:
    box.dense[5:8] = 0
    cells = box.with_dense(box.dense)
    box.fitted.predict(cells, key_added="cellplm")
    assert [key for key in cells.obs if "empty" in key or "flag" in key]


def counts_elsewhere(box: Box) -> None:
    """Counts only in genes that the model does not know."""
    cells = renamed(box, [f"OTHER{n}" for n in range(28)] + list(box.cells.var_names[:12]))
    box.dense[:, 28:] = 0
    box.finite(box.with_dense(box.dense))
    assert cells.n_obs == 60


def no_cells(box: Box) -> None:
    none = box.cells[:0].copy()
    assert box.fitted.predict(none).shape == (0,)
    assert box.fitted.predict_proba(none).shape == (0, 3)


def one_cell(box: Box) -> None:
    np.testing.assert_allclose(box.finite(box.cells[4:5].copy()), box.finite(box.cells[[4]].copy()))


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


def only_another_layer(box: Box) -> None:
    cells = ad.AnnData(obs=box.cells.obs, var=box.cells.var, layers={"spliced": box.cells.X})
    with pytest.raises(CountsNotFoundError, match=r"layers\['spliced'\]"):
        box.counts(cells)


def raw_with_other_genes(box: Box) -> None:
    few = logged(box)[:, :5].copy()
    few.raw = ad.AnnData(X=sp.csr_matrix(box.dense), var=box.cells.var)
    for keys in (KEYS, DataKeys(layer="raw")):
        found = find_counts(few, keys)
        assert (found.place, len(found.gene_ids), found.matrix.shape) == ("raw.X", 40, (60, 40))


def corrupt(box: Box, part: str, value: int) -> Callable[[], object]:
    path = box.path()
    with h5py.File(path, "a") as file:
        file[f"X/{part}"][7] = value
    return lambda: box.rows(path)


def unsorted(box: Box) -> None:
    matrix = sp.csr_matrix((np.array([1.0, 2, 3, 0]), np.array([2, 0, 2, 1]), np.array([0, 3, 4])), shape=(2, 3))
    np.testing.assert_array_equal(canonical(matrix, "X").toarray(), [[2, 0, 4], [0, 0, 0]])


def wrong_shape(box: Box, read: Callable[[Path], object]) -> object:
    path = box.path()
    with h5py.File(path, "a") as file:
        file["X"].attrs["shape"] = [59, 40]
    return read(path)


def unused_categories(box: Box) -> None:
    box.cells.obs["cell_type"] = box.cells.obs["cell_type"].cat.add_categories(["unused"])
    assert box.fit(box.cells).classes_ == ("type_0", "type_1", "type_2")


def missing_labels(box: Box, caplog: Any = None) -> None:
    labels = box.cells.obs["cell_type"].astype(object)
    labels.iloc[:7] = np.nan
    box.cells.obs["cell_type"] = labels
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("cellplane.pipelines.annotation")
    logger.addHandler(handler)
    try:
        assert "nan" not in box.fit(box.cells).classes_
    finally:
        logger.removeHandler(handler)
    assert any("7 of 60 cells have no label" in text for text in records)


def number_labels(box: Box) -> None:
    box.cells.obs["cell_type"] = box.cells.obs["cell_type"].cat.codes.to_numpy()
    try:
        classes = box.fit(box.cells).classes_
    except DataError:
        return
    assert [type(name) for name in classes] == [int, int, int]


def numbers_score(box: Box) -> None:
    """Numbers and truth values are learned and scored as their text."""
    for labels in (box.cells.obs["cell_type"].cat.codes.to_numpy(), (box.cells.obs["cell_type"] == "type_0").to_numpy()):
        box.cells.obs["cell_type"] = labels
        pipeline = box.fit(box.cells)
        assert pipeline.classes_ == tuple(sorted({str(label) for label in labels}))
        assert sum(pipeline.score(box.cells)["support"].values()) == 60


def unseen_labels(box: Box) -> None:
    box.cells.obs["cell_type"] = "never seen"
    assert box.fitted.score(box.cells)["accuracy"] == 0


def unseen_batch(box: Box) -> None:
    expected = box.finite(box.cells)
    box.cells.obs["batch"] = "another one"
    np.testing.assert_array_equal(box.finite(box.cells), expected)


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


def slash_in_a_key(box: Box) -> None:
    box.cells.obs["a/b"] = 1.0
    assert "a/b" in read_h5ad(box.path()).obs


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
    Row(5, "logged", lambda b: b.counts(logged(b)), CountsNotFoundError, "X: non-integer, looks log1p.*set recover_counts=true"),
    Row(6, "z-scored", lambda b: b.counts(scaled(b)), CountsNotFoundError, "negative values.*looks scaled"),
    Row(
        7,
        "repeated genes",
        lambda b: b.counts(renamed(b, ["A", "A", *b.cells.var_names[2:]])),
        DataError,
        r"1 genes stand.*'A'.*sum or drop",
    ),
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
        "0 of 40 genes",
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
    Row(14, "empty cells are flagged", flagged, missing="predict writes no flag for cells without counts"),
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
    Row(27, "no X but a layer", only_another_layer, missing="the message lists the places searched, not other layers that exist"),
    Row(28, "raw with other genes", raw_with_other_genes),
    Row(
        29, "no such layer", lambda b: b.counts(b.cells, DataKeys(layer="nowhere")), ColumnError, r"no layers\['nowhere'\].*this file has X"
    ),
    Row(30, "column out of range", lambda b: corrupt(b, "indices", 40)(), IntegrityError, "corrupt sparse matrix"),
    Row(30, "negative column", lambda b: corrupt(b, "indices", -1)(), IntegrityError, "corrupt sparse matrix"),
    Row(30, "row starts that fall", lambda b: corrupt(b, "indptr", 0)(), IntegrityError, "corrupt sparse matrix"),
    Row(31, "unsorted and repeated", unsorted),
    Row(32, "shape in memory", lambda b: wrong_shape(b, read_h5ad), FileFormatError, r"cells\.h5ad"),
    Row(32, "shape in ranges", lambda b: wrong_shape(b, b.rows), IntegrityError, ""),
    Row(33, "unused categories", unused_categories),
    Row(34, "labels missing", missing_labels),
    Row(35, "numbers as labels", numbers_score),
    Row(35, "types of labels", number_labels, missing="classes_ are the text of the labels, whatever their type was"),
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
    Row(51, "a folder", lambda b: read_h5ad(b.folder), FileFormatError, "is a folder"),
    Row(51, "missing", lambda b: read_h5ad(b.folder / "no.h5ad"), DataError, "no such file"),
    Row(51, "forbidden", forbidden, DataError, "[Pp]ermission"),
    Row(52, "external link", lambda b: attacked(b, external_link), FileFormatError, "ExternalLink"),
    Row(52, "loop of soft links", lambda b: attacked(b, soft_link), FileFormatError, "SoftLink"),
    Row(52, "external storage", lambda b: attacked(b, external_storage), FileFormatError, "other files"),
    Row(52, "virtual", lambda b: attacked(b, virtual), FileFormatError, "other files"),
    Row(53, "shape bomb", lambda b: attacked(b, bomb), FileFormatError, "declares 16000000000 bytes"),
    Row(54, "future version", future, FileFormatError, r"9\.9\.9"),
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
