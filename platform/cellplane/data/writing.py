"""Writing an h5ad a few cells at a time: memory is bounded by a part, however many cells there are.

anndata can only write what is whole in memory. The layout here is its own (encoding 0.1.0 of 0.12), so that anything
that reads AnnData reads these files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellplane.data.shards import atomic_file
from cellplane.data.sources import AnnData, FileSink
from cellplane.errors import DataError

LARGEST_CHUNK = 2**18  # entries of an HDF5 chunk: 1 to 2 MB
CACHE_BYTES = 32 * 1024**2  # HDF5's cache of half-filled chunks
VERSIONS = {"csr_matrix": "0.1.0", "dataframe": "0.2.0", "categorical": "0.2.0", "array": "0.2.0", "string-array": "0.2.0"}


def write_in_parts(path: Path, parts: Iterable[AnnData], progress: Callable[[int], None], gzip: bool = False) -> int:
    """Write the parts below one another, atomically, and return the number of cells; ``progress`` hears it as it grows.

    X must be CSR; obs, obsm and layers are appended and must look alike in every part; var, varm and uns are the first's.
    Raises DataError when they differ or there is none, StorageError when the disk is full.
    """
    cells = 0
    with atomic_file(path) as temporary, FileSink(temporary) as sink, h5py.File(sink, "w", rdcc_nbytes=CACHE_BYTES) as file:
        for part in parts:
            if cells == 0:
                _begin(file, part, "gzip" if gzip else None)
            _append(file, part)
            cells += part.n_obs
            progress(cells)
        if cells == 0:
            raise DataError(f"no cells to write to {path}; at least one is needed")
    return cells


def _begin(file: h5py.File, part: AnnData, compression: str | None) -> None:
    """The empty file: every dataset with no rows yet, in the types of the first part."""
    file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    for name, value in (("var", part.var), *((key, dict(getattr(part, key))) for key in ("varm", "uns", "obsm", "layers", "obsp", "varp"))):
        anndata.io.write_elem(file, name, {} if name in ("obsm", "layers") else value)
    group = _marked(file.create_group("X"), "csr_matrix")
    group.attrs["shape"] = (0, part.n_vars)
    for name, dtype in (("data", part.X.dtype), ("indices", np.int32), ("indptr", np.int64)):
        _growing(group, name, np.zeros(part.X.nnz if name != "indptr" else part.n_obs, dtype=dtype), compression)
    _extend(group["indptr"], np.zeros(1, dtype=np.int64))
    obs = _marked(file.create_group("obs"), "dataframe")
    obs.attrs.update({"_index": "_index", "column-order": np.array(list(part.obs.columns), dtype=object)})
    _marked(_growing(obs, "_index", part.obs_names.to_numpy(dtype=object), compression), "string-array")
    for key, column in part.obs.items():
        if isinstance(column.dtype, pd.CategoricalDtype):
            category = _marked(obs.create_group(str(key)), "categorical")
            category.attrs["ordered"] = bool(column.cat.ordered)
            anndata.io.write_elem(category, "categories", column.cat.categories.to_numpy())
            _marked(_growing(category, "codes", column.cat.codes.to_numpy(), compression), "array")
        else:
            _marked(_growing(obs, str(key), column.to_numpy(), compression), "array")
    for place in ("obsm", "layers"):
        for key, array in getattr(part, place).items():
            _marked(_growing(file[place], key, np.asarray(array), compression), "array")


def _marked(node: Any, encoding: str) -> Any:
    node.attrs.update({"encoding-type": encoding, "encoding-version": VERSIONS[encoding]})
    return node


def _growing(group: h5py.Group, name: str, like: np.ndarray, compression: str | None) -> h5py.Dataset:
    """An empty dataset for rows such as these."""
    rows = max(1, min(len(like), LARGEST_CHUNK // max(1, int(np.prod(like.shape[1:])))))
    dtype = h5py.string_dtype() if like.dtype == object else like.dtype
    return group.create_dataset(
        name, (0, *like.shape[1:]), dtype=dtype, maxshape=(None, *like.shape[1:]), chunks=(rows, *like.shape[1:]), compression=compression
    )


def _extend(dataset: h5py.Dataset, rows: np.ndarray) -> None:
    start = len(dataset)
    dataset.resize(start + len(rows), axis=0)
    dataset[start:] = rows


def _append(file: h5py.File, part: AnnData) -> None:
    matrix = sp.csr_matrix(part.X)
    group = file["X"]
    stored = len(group["data"])
    for name, rows in (("data", matrix.data), ("indices", matrix.indices), ("indptr", matrix.indptr[1:].astype(np.int64) + stored)):
        _extend(group[name], rows)
    group.attrs["shape"] = (int(group.attrs["shape"][0]) + part.n_obs, part.n_vars)
    obs = file["obs"]
    _same(list(obs.attrs["column-order"]), list(part.obs.columns), "obs columns")
    _extend(obs["_index"], part.obs_names.to_numpy(dtype=object))
    for key, column in part.obs.items():
        if isinstance(column.dtype, pd.CategoricalDtype):
            _same([_text(name) for name in obs[key]["categories"][:]], list(column.cat.categories), f"categories of {key}")
            _extend(obs[key]["codes"], column.cat.codes.to_numpy())
        else:
            _extend(obs[key], column.to_numpy())
    for place in ("obsm", "layers"):
        _same(sorted(file[place]), sorted(getattr(part, place)), f"keys of {place}")
        for key, array in getattr(part, place).items():
            _extend(file[place][key], np.asarray(array))


def _text(name: Any) -> Any:
    return name.decode() if isinstance(name, bytes) else name


def _same(first: list[Any], now: list[Any], what: str) -> None:
    if first != now:
        raise DataError(f"the parts of a file must look alike, but {what} are {first[:8]} in the first and {now[:8]} in a later one")
