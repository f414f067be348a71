"""Reading AnnData safely and helpfully, whole and in memory; `reader` reads row ranges of large files.

Counts are searched where people keep them, and the choice is reported; genes are taken under the naming scheme that the
vocabulary knows best. Others take the AnnData type from here.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData as AnnData  # the one door to anndata: others take the type from here
from numpy.typing import NDArray

from cellplane.data.columns import TOTAL_COLUMNS as TOTAL_COLUMNS
from cellplane.data.columns import as_strings as as_strings
from cellplane.data.columns import class_positions as class_positions
from cellplane.data.columns import complete as complete
from cellplane.data.columns import known_totals as known_totals
from cellplane.data.columns import missing_column as missing_column
from cellplane.data.columns import positions as positions
from cellplane.data.config import DataKeys
from cellplane.data.counts import Candidate, canonical, choose
from cellplane.data.gene_mapping import GeneRules
from cellplane.data.guard import check_h5ad as check_h5ad
from cellplane.data.guard import quiet, readable
from cellplane.data.naming import best_naming, default_naming, gene_namings, to_vocabulary
from cellplane.data.reader import CellReader as CellReader
from cellplane.data.reader import count_candidates as count_candidates
from cellplane.data.reader import stored_matrices
from cellplane.data.sentences import CellTable
from cellplane.data.shards import atomic_file
from cellplane.errors import ColumnError, DataError
from cellplane.genes import GeneVocabulary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CountSource:
    """Counts and where they were found.

    ``matrix`` is CSR float32 [n, n_var] (it may share memory with the AnnData: do not write into it), ``gene_ids`` its
    columns, ``namings`` every naming of the columns that var offers, ``deviation`` the largest distance from an
    integer where counts had to be ``recovered`` from logarithms.
    """

    matrix: sp.csr_matrix
    gene_ids: list[str]
    place: str
    recovered: bool = False
    deviation: float = 0.0
    namings: dict[str, list[str]] = field(default_factory=dict)


def read_h5ad(path: Path, backed: bool = False) -> AnnData:
    """The AnnData of a file that was found harmless; ``backed`` leaves X on disk.

    Raises DataError for a missing file or a folder, FileFormatError for anything that is not a whole, self-contained h5ad.
    """
    check_h5ad(path)
    with readable(path), quiet():
        return anndata.read_h5ad(path, backed="r" if backed else None)


def write_h5ad(adata: AnnData, path: Path) -> None:
    """Write beside the target and rename: a reader sees the old file or the whole new one. The AnnData is not changed.

    Raises StorageError when the disk is full.
    """
    with atomic_file(path) as temporary, FileSink(temporary) as sink, quiet(), h5py.File(sink, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        if adata.X is not None:
            anndata.io.write_elem(file, "X", adata.X)
        if adata.raw is not None:
            anndata.io.write_elem(file, "raw", adata.raw)
        for part in ("obs", "var"):
            anndata.io.write_elem(file, part, _categories(getattr(adata, part)))
        for part in ("obsm", "varm", "obsp", "varp", "layers", "uns"):
            anndata.io.write_elem(file, part, dict(getattr(adata, part)))


def _categories(frame: pd.DataFrame) -> pd.DataFrame:
    """Repeating text columns as categories, as anndata writes them: in a copy."""
    text = {key: pd.Categorical(frame[key]) for key in frame.columns if pd.api.types.infer_dtype(frame[key]) == "string"}
    return frame.assign(**{key: values for key, values in text.items() if len(values.categories) < len(values)})


class FileSink:
    """A file for HDF5 to write into that keeps the first error to itself until HDF5 is done.

    HDF5 cannot close a file after a failed write: it complains at every step and ends the process when that exits.
    """

    def __init__(self, path: Path, mode: Literal["w+b", "r+b"] = "w+b") -> None:
        self._file = path.open(mode, buffering=0)
        self._error: OSError | None = None
        self.read, self.readinto, self.seek, self.tell = self._file.read, self._file.readinto, self._file.seek, self._file.tell
        self.truncate, self.flush = self._file.truncate, self._file.flush

    def write(self, data: Any) -> int:
        """Write all of it, or keep the error for later."""
        view = memoryview(data).cast("B")
        try:
            at = 0
            while self._error is None and at < len(view):
                at += self._file.write(view[at:]) or 0
        except OSError as error:
            self._error = error
        return len(view)

    def __enter__(self) -> FileSink:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._error is not None:
            raise self._error


def check_anndata(data: object) -> None:
    """DataError for anything but an AnnData: a path is to be read first, a table to be made one."""
    if isinstance(data, AnnData):
        return
    found = type(data).__name__
    way = f"read it with anndata.read_h5ad({str(data)!r})" if isinstance(data, str | Path) else "make one: anndata.AnnData(X, obs, var)"
    raise DataError(f"expected an AnnData, got {found}; {way}")


def find_counts(adata: AnnData, keys: DataKeys) -> CountSource:
    """The raw counts of an AnnData, in the order and by the rules of `count_candidates` and `counts.choose`.

    Raises CountsNotFoundError listing every place, ColumnError for a missing layer, DataError for broken values or
    repeated genes. The AnnData is not changed.
    """
    check_anndata(adata)
    places = stored_matrices(adata)
    candidates: list[Candidate] = [
        (place, lambda place=place: canonical(_in_memory(places[place]), place) if place in places else None)  # type: ignore[misc]
        for place in count_candidates(keys, places)
    ]
    choice = choose(candidates, keys.recover_counts, known_totals(adata.obs), tuple(places))
    var = adata.raw.var if choice.place == "raw.X" else adata.var
    namings = gene_namings(var)
    ids = default_naming(namings, keys.repeated_genes)
    return CountSource(choice.matrix, ids, choice.place, choice.recovered, choice.deviation, namings)


def _in_memory(matrix: Any) -> Any:
    if hasattr(matrix, "to_memory"):
        return matrix.to_memory()
    return matrix[:] if isinstance(matrix, h5py.Dataset) else matrix


def column(adata: AnnData, key: str) -> NDArray[np.object_]:
    """An obs column as str objects [n], missing values as None; ColumnError names the nearest columns."""
    check_anndata(adata)
    if key not in adata.obs:
        raise ColumnError(missing_column(key, [str(name) for name in adata.obs.columns]))
    return as_strings(adata.obs[key])


def cell_table(
    adata: AnnData, vocabulary: GeneVocabulary, keys: DataKeys, classes: Sequence[str] | None = None
) -> tuple[CellTable, dict[str, object]]:
    """The cells over a vocabulary, and the report for `uns`: where counts came from, which genes are known.

    ``classes`` turns the labels_key column into positions (-1 = missing or not a class). Raises what `find_counts`,
    `column` and `GeneVocabulary.align` raise.
    """
    source = find_counts(adata, keys)
    naming, alignment = best_naming(source.namings, vocabulary, GeneRules(keys.repeated_genes, keys.ignore_gene_case))
    rows = to_vocabulary(source.matrix, alignment)
    coordinates = None
    if keys.spatial_key is not None:
        if keys.spatial_key not in adata.obsm:
            raise ColumnError(missing_column(keys.spatial_key, list(adata.obsm), "obsm") + "; keys.spatial_key null does without places")
        coordinates = positions(adata.obsm[keys.spatial_key], keys.spatial_key)
    labels = None
    if keys.labels_key is not None and classes is not None:
        labels = class_positions(column(adata, keys.labels_key), classes)
    table = CellTable(
        crow=rows.indptr.astype(np.int64),
        gene=rows.indices.astype(np.int64),
        value=rows.data,
        panel=alignment.panel(),
        batch=None if keys.batch_key is None else complete(column(adata, keys.batch_key), keys.batch_key),
        coordinates=coordinates,
        labels=labels,
        empty=np.diff(source.matrix.indptr) == 0,
    )
    carried = count_share(float(rows.data.sum(dtype=np.float64)), float(source.matrix.data.sum(dtype=np.float64)))
    named = {"gene_naming": naming, "gene_table": alignment.table, **alignment.report()}
    return table, {**count_report(source), **named, "count_share": carried}


def count_share(known: float, total: float) -> float | None:
    """Share of all counts that lie in genes of the vocabulary; None where there are none."""
    return known / total if total > 0 else None


def count_report(source: CountSource) -> dict[str, object]:
    """Where the counts came from, JSON-ready."""
    return {"count_source": source.place, "recovered": source.recovered, "largest_deviation": source.deviation}


def gene_columns(data: AnnData, keys: DataKeys, vocabulary: GeneVocabulary) -> NDArray[np.int64]:
    """Vocabulary position of every column of ``data``, [n_vars]; -1 for a gene without a place."""
    source = find_counts(data, keys)
    alignment = best_naming(source.namings, vocabulary, GeneRules(keys.repeated_genes, keys.ignore_gene_case))[1]
    if source.place != "raw.X":
        return alignment.positions
    place = dict(zip(map(str, data.raw.var_names), alignment.positions.tolist(), strict=True))
    return np.array([place.get(str(name), -1) for name in data.var_names], dtype=np.int64)


def query_keys(data: AnnData, keys: DataKeys) -> DataKeys:
    """The training keys for other data: no labels are read, and a batch column the data do not have is not used, which is said."""
    check_anndata(data)
    if keys.batch_key is not None and keys.batch_key not in data.obs:
        missing = missing_column(keys.batch_key, [str(name) for name in data.obs.columns])
        log.warning("%s: the %d cells are taken as one sample", missing, data.n_obs)
    return known_keys(keys, data.obs, data.obsm)


def known_keys(keys: DataKeys, obs: Container[str], obsm: Container[str]) -> DataKeys:
    """The same for data that have these columns and these entries of obsm."""
    batch = keys.batch_key if keys.batch_key in obs else None
    spatial = keys.spatial_key if keys.spatial_key in obsm else None
    return keys.model_copy(update={"labels_key": None, "batch_key": batch, "spatial_key": spatial})
