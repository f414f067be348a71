"""One AnnData file read for conversion: columns of the cells one by one, the matrix by row ranges.

h5ad and zarr (formats 2 and 3) look alike from here. Nothing grows with the file but a few numbers a cell, except for
old files whose tables are compound datasets, which are loaded whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from numpy.typing import NDArray

from cellplane.data.columns import TOTAL_COLUMNS, known_totals, missing_column, positions
from cellplane.data.config import DataKeys
from cellplane.data.guard import check_source, is_zarr, quiet, readable
from cellplane.data.matrices import RawRows, StoredMatrix, open_matrix
from cellplane.errors import ColumnError, IntegrityError

CHUNK_CACHE_BYTES = 16 * 1024**2  # HDF5's cache of decompressed chunks


def count_candidates(keys: DataKeys, has: Iterable[str]) -> list[str]:
    """Places to look for counts, in order: the named layer alone, else layers['counts'], raw.X, X. ``has`` = what exists."""
    existing = set(has)
    if keys.layer is None:
        return ["layers['counts']", "raw.X", "X"]
    place = {"X": "X", "raw": "raw.X"}.get(keys.layer, f"layers['{keys.layer}']")
    if place not in existing:
        raise ColumnError(f"no {place}; this file has {', '.join(sorted(existing)) or 'no matrix at all'}")
    return [place]


def stored_matrices(adata: anndata.AnnData) -> dict[str, Any]:
    """Every matrix of an AnnData by its place."""
    places = {f"layers['{name}']": layer for name, layer in adata.layers.items()}
    if adata.raw is not None:
        places["raw.X"] = adata.raw.X
    if adata.X is not None:
        places["X"] = adata.X
    return places


class CellReader:
    """One h5ad or zarr folder read in chunks of rows: obs by the column, X by the row range.

    ``scratch`` is a folder for turning large column-compressed matrices; without it they are loaded. Close it, or use it
    in a with statement. Raises what `guard.check_source` raises.
    """

    def __init__(self, path: Path, scratch: Path | None = None) -> None:
        check_source(path)
        self.path, self._scratch = path, scratch
        self._file: Any = zarr.open_group(str(path), mode="r") if is_zarr(path) else h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE_BYTES)
        old = not hasattr(self._file["obs"], "keys") or "__categories" in self._file["obs"]
        self._adata = self._load() if old else None
        self.places = stored_matrices(self._adata) if self._adata is not None else self._places()
        self._open: dict[str, StoredMatrix] = {}

    def _load(self) -> anndata.AnnData:
        with readable(self.path), quiet():
            return anndata.read_zarr(self.path) if is_zarr(self.path) else anndata.read_h5ad(self.path)

    def __enter__(self) -> CellReader:
        return self

    def __exit__(self, *_: object) -> None:
        if isinstance(self._file, h5py.File):
            self._file.close()

    def _places(self) -> dict[str, Any]:
        places = {f"layers['{name}']": self._file["layers"][name] for name in self._file.get("layers", {})}
        for place, name in (("raw.X", "raw/X"), ("X", "X")):
            if name in self._file and self._file[name].attrs.get("encoding-type") != "null":
                places[place] = self._file[name]
        return places

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        if self._adata is not None:
            return int(self._adata.n_obs)
        with readable(self.path):
            obs = self._file["obs"]
            return int(obs[obs.attrs.get("_index", "_index")].shape[0])

    @property
    def obs_columns(self) -> list[str]:
        """Names of the obs columns, in their order."""
        if self._adata is not None:
            return [str(name) for name in self._adata.obs.columns]
        obs = self._file["obs"]
        if "column-order" in obs.attrs:  # the columns, as anndata sees it: what else lies there may be a part of "a/b"
            return [str(name) for name in obs.attrs["column-order"]]
        return [name for name in obs if not name.startswith("_") and name != obs.attrs.get("_index")]

    def obs(self, key: str) -> pd.Series:
        """One obs column; ColumnError names the nearest."""
        if key not in (known := self.obs_columns):
            raise ColumnError(f"{self.path}: {missing_column(key, known)}")
        return pd.Series(self._adata.obs[key] if self._adata is not None else self._of_cells(f"obs/{key}"))

    def obs_rows(self, start: int, stop: int) -> pd.DataFrame:
        """All obs columns of these cells, as anndata would read them."""
        if self._adata is not None:
            return pd.DataFrame(self._adata.obs.iloc[start:stop])
        obs = self._file["obs"]
        name = str(obs.attrs.get("_index", "_index"))
        with readable(self.path), quiet():
            columns = {key: self._part(obs[key], start, stop) for key in self.obs_columns}
            index = pd.Index(self._part(obs[name], start, stop), name=None if name == "_index" else name)
        return pd.DataFrame(columns, index=index)

    def _part(self, node: Any, start: int, stop: int) -> Any:
        """Rows of one column; kinds that are not sliced here are loaded."""
        encoding = node.attrs.get("encoding-type", "")
        if encoding == "categorical":
            categories = anndata.io.read_elem(node["categories"])
            return pd.Categorical.from_codes(node["codes"][start:stop], categories, ordered=bool(node.attrs["ordered"]))
        if encoding == "array" and node.dtype.kind in "biuf":
            return node[start:stop]
        if encoding == "string-array":
            return np.asarray(node.asstr()[start:stop] if isinstance(node, h5py.Dataset) else node[start:stop], dtype=object)
        return pd.Series(anndata.io.read_elem(node)).iloc[start:stop].array

    def cell_names(self, start: int, stop: int) -> NDArray[np.object_]:
        """Names of these cells, [stop - start]."""
        if self._adata is not None:
            return np.asarray(self._adata.obs_names[start:stop], dtype=object)
        obs = self._file["obs"]
        with readable(self.path), quiet():
            return np.asarray(self._part(obs[str(obs.attrs.get("_index", "_index"))], start, stop), dtype=object)

    @property
    def obsm_keys(self) -> list[str]:
        """Names of the obsm entries."""
        return self.entries("obsm")

    def entries(self, part: str) -> list[str]:
        """Names of what lies in obsm, varm, obsp, varp or uns."""
        return [str(name) for name in (getattr(self._adata, part) if self._adata is not None else self._file.get(part, {}))]

    def totals(self) -> NDArray[np.float64] | None:
        """See `columns.known_totals`."""
        found = [key for key in TOTAL_COLUMNS if key in self.obs_columns]
        return known_totals({found[0]: self.obs(found[0])}) if found else None

    def coordinates(self, key: str) -> NDArray[np.float32]:
        """The obsm entry as coordinates (see `columns.positions`)."""
        if key not in (known := self.obsm_keys):
            raise ColumnError(f"{self.path}: {missing_column(key, known, 'obsm')}")
        return positions(self._adata.obsm[key] if self._adata is not None else self._of_cells(f"obsm/{key}"), key)

    def var(self, place: str) -> pd.DataFrame:
        """The gene table that belongs to this place."""
        if self._adata is not None:
            return pd.DataFrame(self._adata.raw.var if place == "raw.X" else self._adata.var)
        var, columns = pd.DataFrame(self._element("raw/var" if place == "raw.X" else "var")), self.matrix(place).shape[1]
        if len(var) != columns:
            raise IntegrityError(f"{self.path}: {len(var)} genes are named for the {columns} columns of {place}; write the file again")
        return var

    @property
    def gene_names(self) -> list[str]:
        """Names of var, which X and the layers have, whether or not there is an X."""
        return [str(name) for name in (self._adata.var if self._adata is not None else self._element("var")).index]

    def _of_cells(self, name: str) -> Any:
        found = self._element(name)
        if len(found) != self.n_cells:
            raise IntegrityError(
                f"{self.path}: {name} has {len(found)} values for {self.n_cells} cells; write the file again from its source"
            )
        return found

    def _element(self, name: str) -> Any:
        with readable(self.path), quiet():
            return anndata.io.read_elem(self._file[name])

    def matrix(self, place: str) -> StoredMatrix:
        """The matrix at a place, opened once."""
        if place not in self._open:
            with readable(self.path):
                self._open[place] = open_matrix(self.places[place], place, self.n_cells, self._scratch)
        return self._open[place]

    def entries_per_row(self, place: str) -> NDArray[np.int64] | None:
        """Stored entries of each row where the file tells them without reading the matrix, [n]."""
        with readable(self.path):
            return self.matrix(place).lengths()

    def rows(self, place: str, start: int, stop: int) -> sp.csr_matrix:
        """These rows, canonical CSR."""
        matrix = self.matrix(place)
        with readable(self.path):
            return matrix.read(start, stop).matrix(matrix.shape[1], place)

    def parts(self, place: str, start: int, stop: int) -> Iterator[tuple[int, RawRows]]:
        """(first row, rows as they are stored) of these rows, some tens of MB at a time."""
        matrix = self.matrix(place)
        with readable(self.path):
            cuts = matrix.cuts(start, stop)
            for low, high in itertools.pairwise(cuts):
                yield low, matrix.read(low, high)
