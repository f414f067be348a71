"""Reading AnnData safely and helpfully: the only module that touches anndata and h5py.

An HDF5 file can point at other files and declare matrices far larger than itself, so its structure is looked at before
anything is read. Counts are searched where people keep them, and the choice is reported; genes are taken under the
naming scheme that the vocabulary knows best.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData as AnnData  # the one door to anndata: others take the type from here
from numpy.typing import NDArray

from cellplane.data.config import DataKeys
from cellplane.data.counts import Candidate, canonical, check_structure, choose
from cellplane.data.naming import best_naming, default_naming, gene_namings, to_vocabulary
from cellplane.data.sentences import CellTable
from cellplane.data.shards import atomic_file
from cellplane.errors import CellplaneError, ColumnError, DataError, FileFormatError, IntegrityError
from cellplane.genes import GeneVocabulary

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
OTHER_SIGNATURES = {b"PK\x03\x04": "a zip archive", b"\x89PNG": "a PNG image", b"\x1f\x8b": "gzip data", b"ARROW1": "an Arrow file"}
BOMB_BYTES, BOMB_RATIO = 64 * 1024**2, 1100  # deflate cannot shrink by more than 1032
TOTAL_COLUMNS = ("n_counts", "total_counts")


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
    with _readable(path), quiet():
        return anndata.read_h5ad(path, backed="r" if backed else None)


def write_h5ad(adata: AnnData, path: Path) -> None:
    """Write beside the target and rename: a reader sees the old file or the whole new one. The AnnData is not changed.

    Raises StorageError when the disk is full.
    """
    with atomic_file(path) as temporary, _Sink(temporary) as sink, quiet(), h5py.File(sink, "w") as file:
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


class _Sink:
    """A file for HDF5 to write into that keeps the first error to itself until HDF5 is done.

    HDF5 cannot close a file after a failed write: it complains at every step and ends the process when that exits.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b", buffering=0)
        self._error: OSError | None = None
        self.read, self.readinto, self.seek, self.tell = self._file.read, self._file.readinto, self._file.seek, self._file.tell
        self.truncate, self.flush = self._file.truncate, self._file.flush

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            at = 0
            while self._error is None and at < len(view):
                at += self._file.write(view[at:]) or 0
        except OSError as error:
            self._error = error
        return len(view)

    def __enter__(self) -> _Sink:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._error is not None:
            raise self._error


@contextmanager
def quiet() -> Iterator[None]:
    """Old files are welcome: anndata's notes about their age are not for our users."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        yield


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (CellplaneError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        way_out = "; it is cut short: copy or download it again" if "truncated" in reason else ""
        found = f"{path} ({_size(path)} bytes) cannot be read as AnnData"
        raise FileFormatError(f"{found}: {type(error).__name__}: {reason}{way_out}") from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def check_h5ad(path: Path) -> None:
    """Refuse what is not a whole, self-contained h5ad, without reading any data (see `read_h5ad` for the errors)."""
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if path.is_dir():
        raise FileFormatError(f"{path} is a folder{' (zarr)' if (path / '.zgroup').exists() else ''}; expected an .h5ad file")
    with _readable(path):
        if not h5py.is_hdf5(path):
            raise FileFormatError(f"{path} ({_size(path)} bytes) is not an HDF5 file but {_detected(path)}; expected an .h5ad file")
        with h5py.File(path, "r") as file:
            _refuse_unsafe(path, file)
            if not {"obs", "var"} <= set(file):
                raise FileFormatError(
                    f"{path} ({_size(path)} bytes) is HDF5 but not AnnData: it holds {sorted(file)[:8]}, expected obs and var "
                    f"(encoding-type {file.attrs.get('encoding-type', 'missing')!r})"
                )


def _detected(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        return "empty"
    if head.startswith(HDF5_SIGNATURE):
        return "a damaged HDF5 file"
    for signature, name in OTHER_SIGNATURES.items():
        if head.startswith(signature):
            return name
    return "text" if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head) else "unknown data"


def _refuse_unsafe(path: Path, file: h5py.File) -> None:
    todo, seen = [("", file["/"])], set()
    while todo:
        prefix, group = todo.pop()
        for name in group:
            place = f"{prefix}/{name}"
            link = group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                found = f"{place} is a {type(link).__name__}, which may point anywhere"
                raise FileFormatError(f"{path}: {found}; expected a self-contained file")
            node = group[name]
            address = h5py.h5o.get_info(node.id).addr
            if isinstance(node, h5py.Dataset):
                _refuse_dataset(path, place, node)
            elif address not in seen:
                todo.append((place, node))
            seen.add(address)


def _refuse_dataset(path: Path, place: str, node: h5py.Dataset) -> None:
    if node.external or node.is_virtual:
        raise FileFormatError(f"{path}: the data of {place} lie in other files; expected a self-contained file")
    declared, stored = int(node.size or 0) * node.dtype.itemsize, node.id.get_storage_size()
    if declared > BOMB_BYTES and declared > BOMB_RATIO * max(stored, 1):
        raise FileFormatError(f"{path}: {place} declares {declared} bytes but stores {stored}; refused, it would fill the memory")


def count_candidates(keys: DataKeys, has: Iterable[str]) -> list[str]:
    """Places to look for counts, in order: the named layer alone, else layers['counts'], raw.X, X. ``has`` = what exists."""
    existing = set(has)
    if keys.layer is None:
        return ["layers['counts']", "raw.X", "X"]
    place = {"X": "X", "raw": "raw.X"}.get(keys.layer, f"layers['{keys.layer}']")
    if place not in existing:
        raise ColumnError(f"no {place}; this file has {', '.join(sorted(existing)) or 'no matrix at all'}")
    return [place]


def find_counts(adata: AnnData, keys: DataKeys) -> CountSource:
    """The raw counts of an AnnData, in the order and by the rules of `count_candidates` and `counts.choose`.

    Raises CountsNotFoundError listing every place, ColumnError for a missing layer, DataError for broken values or
    repeated genes. The AnnData is not changed.
    """
    places = _matrices(adata)
    candidates: list[Candidate] = [
        (place, lambda place=place: canonical(_in_memory(places[place]), place) if place in places else None)  # type: ignore[misc]
        for place in count_candidates(keys, places)
    ]
    choice = choose(candidates, keys.recover_counts, known_totals(adata.obs))
    var = adata.raw.var if choice.place == "raw.X" else adata.var
    namings = gene_namings(var)
    return CountSource(choice.matrix, default_naming(namings), choice.place, choice.recovered, choice.deviation, namings)


def known_totals(obs: Any) -> NDArray[np.float64] | None:
    """Counts of each cell over all genes as obs n_counts or total_counts tells them, [n]; None where it does not."""
    for key in TOTAL_COLUMNS:
        if key in obs:
            totals = np.asarray(obs[key], dtype=np.float64)
            return totals if np.isfinite(totals).all() else None
    return None


def _matrices(adata: AnnData) -> dict[str, Any]:
    places = {f"layers['{name}']": layer for name, layer in adata.layers.items()}
    if adata.raw is not None:
        places["raw.X"] = adata.raw.X
    if adata.X is not None:
        places["X"] = adata.X
    return places


def _in_memory(matrix: Any) -> Any:
    if hasattr(matrix, "to_memory"):
        return matrix.to_memory()
    return matrix[:] if isinstance(matrix, h5py.Dataset) else matrix


def column(adata: AnnData, key: str) -> NDArray[np.object_]:
    """An obs column as str objects [n], missing values as None; ColumnError names the nearest columns."""
    if key not in adata.obs:
        raise ColumnError(missing_column(key, [str(name) for name in adata.obs.columns]))
    return as_strings(adata.obs[key])


def as_strings(values: Any) -> NDArray[np.object_]:
    """Any column as str objects, missing values as None."""
    series = pd.Series(values)
    strings = np.array([str(value) for value in series], dtype=object)
    strings[series.isna().to_numpy()] = None
    return strings


def missing_column(key: str, known: Sequence[str], place: str = "obs") -> str:
    """The sentence that says a key is not there, and which are near."""
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {', '.join(sorted(known)[:12]) or 'none'}"
    return f"no {key!r} in {place}; {hint}"


def complete(values: NDArray[np.object_], key: str) -> NDArray[np.object_]:
    """The column itself; DataError when a cell has no value in it."""
    if missing := sum(value is None for value in values):
        raise DataError(f"{missing} of {len(values)} cells have no value in obs[{key!r}]; every cell needs its sample: fill or drop them")
    return values


def positions(values: Any, key: str) -> NDArray[np.float32]:
    """Coordinates [n, 2] float32; DataError for another shape or values that are not finite."""
    array = np.asarray(values)
    if array.ndim != 2 or array.shape[1] != 2:
        raise DataError(f"obsm[{key!r}] has shape {array.shape}; two coordinates in micrometres per cell are needed: [n, 2]")
    if wrong := int((~np.isfinite(array.astype(np.float64))).any(axis=1).sum()):
        raise DataError(f"obsm[{key!r}] has {wrong} cells with NaN or infinite coordinates; drop them first")
    return array.astype(np.float32)


def cell_table(
    adata: AnnData, vocabulary: GeneVocabulary, keys: DataKeys, classes: Sequence[str] | None = None
) -> tuple[CellTable, dict[str, object]]:
    """The cells over a vocabulary, and the report for `uns`: where counts came from, which genes are known.

    ``classes`` turns the labels_key column into positions (-1 = missing or not a class). Raises what `find_counts`,
    `column` and `GeneVocabulary.align` raise.
    """
    source = find_counts(adata, keys)
    naming, alignment = best_naming(source.namings, vocabulary)
    rows = to_vocabulary(source.matrix, alignment)
    coordinates = None
    if keys.spatial_key is not None:
        if keys.spatial_key not in adata.obsm:
            raise ColumnError(missing_column(keys.spatial_key, list(adata.obsm), "obsm"))
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
    )
    return table, {**count_report(source), "gene_naming": naming, **alignment.report()}


def class_positions(labels: NDArray[np.object_], classes: Sequence[str]) -> NDArray[np.int64]:
    """Position of each label among the classes, [n] int64; -1 = missing or not a class."""
    known = {name: position for position, name in enumerate(classes)}
    return np.array([known.get(label, -1) for label in labels], dtype=np.int64)


def count_report(source: CountSource) -> dict[str, object]:
    """Where the counts came from, JSON-ready."""
    return {"count_source": source.place, "recovered": source.recovered, "largest_deviation": source.deviation}


class CellReader:
    """One h5ad read in chunks of rows, for conversion: obs by the column, X by the row range.

    Old files whose tables are compound datasets, and column-compressed matrices, are loaded whole. Close it, or use it
    in a with statement. Raises what `read_h5ad` raises.
    """

    def __init__(self, path: Path) -> None:
        check_h5ad(path)
        self.path = path
        self._file = h5py.File(path, "r")
        old = not isinstance(self._file["obs"], h5py.Group) or "__categories" in self._file["obs"]
        self._adata = read_h5ad(path) if old else None
        self.places = _matrices(self._adata) if self._adata is not None else self._places()
        self._open: dict[str, _Rows] = {}

    def __enter__(self) -> CellReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _places(self) -> dict[str, Any]:
        places = {f"layers['{name}']": node for name, node in self._file.get("layers", {}).items()}
        for place, name in (("raw.X", "raw/X"), ("X", "X")):
            if name in self._file and self._file[name].attrs.get("encoding-type") != "null":
                places[place] = self._file[name]
        return places

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        if self._adata is not None:
            return int(self._adata.n_obs)
        obs = self._file["obs"]
        return len(obs[obs.attrs.get("_index", "_index")])

    def obs(self, key: str) -> pd.Series:
        """One obs column; ColumnError names the nearest."""
        known = list(self._adata.obs.columns) if self._adata is not None else [k for k in self._file["obs"] if not k.startswith("_")]
        if key not in known:
            raise ColumnError(f"{self.path}: {missing_column(key, [str(name) for name in known])}")
        return pd.Series(self._adata.obs[key] if self._adata is not None else self._element(f"obs/{key}"))

    def totals(self) -> NDArray[np.float64] | None:
        """See `known_totals`."""
        found = [key for key in TOTAL_COLUMNS if key in (self._adata.obs if self._adata is not None else self._file["obs"])]
        return known_totals({found[0]: self.obs(found[0])}) if found else None

    def coordinates(self, key: str) -> NDArray[np.float32]:
        """The obsm entry as coordinates (see `positions`)."""
        known = list(self._adata.obsm if self._adata is not None else self._file.get("obsm", {}))
        if key not in known:
            raise ColumnError(f"{self.path}: {missing_column(key, known, 'obsm')}")
        return positions(self._adata.obsm[key] if self._adata is not None else self._element(f"obsm/{key}"), key)

    def var(self, place: str) -> pd.DataFrame:
        """The gene table that belongs to this place."""
        if self._adata is not None:
            return pd.DataFrame(self._adata.raw.var if place == "raw.X" else self._adata.var)
        return pd.DataFrame(self._element("raw/var" if place == "raw.X" else "var"))

    def _element(self, name: str) -> Any:
        with _readable(self.path), quiet():
            return anndata.io.read_elem(self._file[name])

    def rows(self, place: str, start: int, stop: int) -> sp.csr_matrix:
        """These rows as they stand in the file, canonical CSR."""
        with _readable(self.path):
            if place not in self._open:
                self._open[place] = _Rows(self.places[place], place, self.n_cells)
            return self._open[place].read(start, stop)

    def entries_per_row(self, place: str) -> NDArray[np.int64] | None:
        """Stored entries of each row where the file tells them without reading the matrix, [n]."""
        self.rows(place, 0, 0)
        return self._open[place].lengths


class _Rows:
    """Row ranges of one stored matrix."""

    def __init__(self, node: Any, place: str, n_cells: int) -> None:
        self._node, self._place, self._indptr = node, place, None
        self.lengths: NDArray[np.int64] | None = None
        if isinstance(node, h5py.Group):
            kind = str(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "")))
            self._shape = tuple(int(n) for n in node.attrs.get("shape", node.attrs.get("h5sparse_shape", (0, 0))))
            if kind.startswith("csc"):
                arrays = (node["data"][:], node["indices"][:], node["indptr"][:])
                check_structure(arrays[2], arrays[1], (self._shape[1], self._shape[0]), place)
                self._node = canonical(sp.csc_matrix(arrays, shape=self._shape, copy=False), place)
            else:
                self._indptr = node["indptr"][:].astype(np.int64)
                check_structure(self._indptr, np.zeros(0, dtype=np.int64), self._shape, place, n_entries=len(node["indices"]))
                self.lengths = np.diff(self._indptr)
        elif sp.issparse(node):
            self._node = canonical(node, place)
        if (found := int((self._shape if isinstance(node, h5py.Group) else node.shape)[0])) != n_cells:
            raise IntegrityError(f"{place} has {found} rows for {n_cells} cells; write the file again from its source")

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows start to stop."""
        if self._indptr is None:
            return canonical(self._node[start:stop], self._place)
        low, high = int(self._indptr[start]), int(self._indptr[stop])
        indices, indptr = self._node["indices"][low:high], self._indptr[start : stop + 1] - low
        shape = (stop - start, self._shape[1])
        check_structure(indptr, indices, shape, self._place)
        return canonical(sp.csr_matrix((self._node["data"][low:high], indices, indptr), shape=shape, copy=False), self._place)
