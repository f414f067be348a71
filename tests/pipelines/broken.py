"""Broken cells, by the numbers of the catalogue of bad inputs (RELIABILITY.md, C1 to C54), and what a call left behind.

Every maker takes fresh cells of `small_cells` and gives back what a person might hand to a pipeline. What damages files
rather than cells (C48 to C54) is in tests/data/test_bad_inputs.py.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterable
from functools import cache
from itertools import pairwise
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellplane.data.config import KnockoutConfig, SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData

N_CELLS, N_GENES = 60, 40
AT = (3, 7)  # cell and gene of a single broken value
Maker = Callable[[AnnData], AnnData]


def small_cells(seed: int = 0) -> AnnData:
    """60 cells of 40 genes under Ensembl ids: three types, two batches, controls and two knock-outs, positions; always a new copy."""
    return _small_cells(seed).copy()


@cache
def _small_cells(seed: int) -> AnnData:
    knockouts = KnockoutConfig(n_genes=2, n_targets=5, control_share=0.4)
    cells = simulate(
        SimulateConfig(n_cells=N_CELLS, n_genes=N_GENES, n_types=3, spatial=True, field_cells=30, knockouts=knockouts, seed=seed)
    )
    ids = dict(zip(cells.var_names, ensembl("ENSG")(list(cells.var_names)), strict=True))
    cells.obs["perturbation"] = [ids.get(name, name) for name in cells.obs["perturbation"].astype(str)]
    cells.var_names = list(ids.values())
    return cells


def digest(cells: AnnData) -> str:
    """Changes when anything in the AnnData does, the order of sparse entries and the flags of its arrays' types included."""
    parts: list[Any] = [cells.obs, cells.var, dict(cells.uns), list(cells.obs.columns)]
    tables: Iterable[Any] = (cells.X, cells.raw and cells.raw.X, *cells.layers.values(), *cells.obsm.values())
    for stored in tables:
        table = stored.to_memory() if hasattr(stored, "to_memory") else stored
        if sp.issparse(table):
            compressed = table.format in ("csr", "csc")
            parts += [table.format, table.data, *((table.indices, table.indptr) if compressed else (table.row, table.col))]
        elif isinstance(table, np.ma.MaskedArray):
            parts += [table.data, table.mask]
        else:
            parts.append(None if table is None else np.asarray(table))
    return hashlib.sha256(pickle.dumps(parts)).hexdigest()


def dense(cells: AnnData) -> np.ndarray[Any, Any]:
    """The counts as a table of their own."""
    counts: np.ndarray[Any, Any] = cells.X.toarray()
    return counts


def with_counts(cells: AnnData, counts: Any) -> AnnData:
    """The cells with another X."""
    cells.X = counts
    return cells


def with_value(value: float) -> Maker:
    """One entry is this value."""

    def broken(cells: AnnData) -> AnnData:
        counts = dense(cells)
        counts[AT] = value
        return with_counts(cells, sp.csr_matrix(counts))

    return broken


def scaled_rows(cells: AnnData) -> np.ndarray[Any, Any]:
    """Every cell's counts as shares of ten thousand."""
    counts = dense(cells)
    found: np.ndarray[Any, Any] = (counts / counts.sum(axis=1, keepdims=True) * 1e4).astype(np.float32)
    return found


def z_scored(cells: AnnData) -> AnnData:
    """Mean 0 and spread 1 of every gene."""
    logs = np.log1p(scaled_rows(cells))
    return with_counts(cells, ((logs - logs.mean(axis=0)) / (logs.std(axis=0) + 1e-6)).astype(np.float32))


def named_genes(names: Callable[[list[str]], list[str]]) -> Maker:
    """The genes are called otherwise."""

    def broken(cells: AnnData) -> AnnData:
        cells.var_names = names(list(cells.var_names))
        return cells

    return broken


def named_cells(names: Callable[[int], Any]) -> Maker:
    """The cells are called otherwise."""

    def broken(cells: AnnData) -> AnnData:
        cells.obs.index = pd.Index([names(row) for row in range(cells.n_obs)])
        return cells

    return broken


def without_counts(rows: slice, genes: slice = slice(None)) -> Maker:
    """No counts in these cells and genes."""

    def broken(cells: AnnData) -> AnnData:
        counts = dense(cells)
        counts[rows, genes] = 0
        return with_counts(cells, sp.csr_matrix(counts))

    return broken


def stored_as(kind: Callable[[Any], Any]) -> Maker:
    """The counts as another kind of table."""
    return lambda cells: with_counts(cells, kind(cells.X))


def own_matrix(cells: AnnData) -> Any:
    """Data, column indices and row starts that nobody else holds."""
    return cells.X.data.copy(), cells.X.indices.copy(), cells.X.indptr.copy()


def corrupt(part: int, value: int) -> Maker:
    """One number of the sparse structure is wrong; scipy would refuse to build it so."""

    def broken(cells: AnnData) -> AnnData:
        arrays = own_matrix(cells)
        cells.X = sp.csr_matrix(arrays, shape=cells.shape)
        arrays = (cells.X.data, cells.X.indices, cells.X.indptr)
        arrays[part][7] = value
        return cells

    return broken


def unsorted(cells: AnnData) -> AnnData:
    """The entries of every row backwards, the first count split over two entries."""
    data, indices, indptr = own_matrix(cells)
    order = np.concatenate([np.arange(start, end)[::-1] for start, end in pairwise(indptr)])
    data, indices = data[order], indices[order]
    most = int(np.argmax(data))
    data[most] -= 1
    indptr[np.searchsorted(indptr, most, side="right") :] += 1
    matrix = sp.csr_matrix((np.insert(data, most, 1), np.insert(indices, most, indices[most]), indptr), shape=cells.shape)
    return with_counts(cells, matrix)


def long_row(cells: AnnData) -> AnnData:
    """A row of 10,000 entries, all of one gene."""
    data, indices, indptr = own_matrix(cells)
    more = 10_000
    data = np.concatenate([np.ones(more, data.dtype), data])
    indices = np.concatenate([np.zeros(more, indices.dtype), indices])
    return with_counts(cells, sp.csr_matrix((data, indices, np.concatenate([indptr[:1], indptr[1:] + more])), shape=cells.shape))


def only_raw(cells: AnnData) -> AnnData:
    """Logarithms of few genes in X, the counts of all in raw."""
    raw = ad.AnnData(X=cells.X.copy(), var=cells.var.copy(), obs=cells.obs[[]])
    few = with_counts(cells, np.log1p(scaled_rows(cells)))[:, :12].copy()
    few.raw = raw
    return few


def in_a_layer(cells: AnnData) -> AnnData:
    """No X, the counts in a layer of an unusual name."""
    cells.layers["spliced"] = cells.X.copy()
    cells.X = None
    return cells


def with_column(key: str, values: Callable[[pd.Series[Any]], Any]) -> Maker:
    """A column of obs says something else."""

    def broken(cells: AnnData) -> AnnData:
        cells.obs[key] = values(cells.obs[key])
        return cells

    return broken


def without_column(*keys: str) -> Maker:
    """Columns of obs have a slip of the pen in their names."""
    return lambda cells: _with_obs(cells, cells.obs.rename(columns={key: key[:-2] + key[-1] + key[-2] for key in keys}))


def _with_obs(cells: AnnData, obs: pd.DataFrame) -> AnnData:
    cells.obs = obs
    return cells


def missing_in(values: pd.Series[Any]) -> pd.Series[Any]:
    """The first five are missing."""
    found = values.astype(object)
    found.iloc[:5] = np.nan
    return found


def placed(positions: Callable[[np.ndarray[Any, Any]], Any]) -> Maker:
    """The cells lie elsewhere."""

    def broken(cells: AnnData) -> AnnData:
        cells.obsm["spatial"] = positions(np.array(cells.obsm["spatial"]))
        return cells

    return broken


def with_nan(positions: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Two cells are nowhere."""
    positions[:2] = np.nan
    return positions


def unplaced(cells: AnnData) -> AnnData:
    """Nobody knows where the cells lie."""
    del cells.obsm["spatial"]
    return cells


def huge_obs(cells: AnnData) -> AnnData:
    """2,000 columns that no pipeline asks for, one of objects nobody could read."""
    more = pd.DataFrame(np.zeros((cells.n_obs, 2000)), index=cells.obs.index, columns=[f"junk{n}" for n in range(2000)])
    return _with_obs(cells, pd.concat([cells.obs, more.assign(odd=[{"row": row} for row in range(cells.n_obs)])], axis=1))


def ensembl(prefix: str, version: str = "") -> Callable[[list[str]], list[str]]:
    """Names like those of Ensembl."""
    return lambda names: [f"{prefix}{number:011d}{version}" for number in range(len(names))]


def symbols(names: list[str]) -> list[str]:
    """Names such as people give."""
    return [f"GENE{number}" for number in range(len(names))]


def ids_in_a_column(cells: AnnData) -> AnnData:
    """Symbols as names, the Ensembl ids in a column."""
    cells.var["gene_ids"] = list(cells.var_names)
    cells.var_names = symbols(list(cells.var_names))
    return cells


def strangers(known: int) -> Callable[[list[str]], list[str]]:
    """All but some genes are of another kind."""
    return lambda names: [*names[:known], *(f"ENSG99{number:09d}" for number in range(len(names) - known))]


def counts_elsewhere(cells: AnnData) -> AnnData:
    """Counts only in genes that no model knows; twelve that it does know are there, without counts."""
    return named_genes(strangers(12))(without_counts(slice(None), slice(0, 12))(cells))


def one_control(cells: AnnData) -> AnnData:
    """A single cell, unperturbed."""
    return cells[[list(cells.obs["perturbation"]).index("control")]].copy()
