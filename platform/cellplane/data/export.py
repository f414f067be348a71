"""From a folder of shards back to h5ad files, one for each data set: the proof that nothing was lost.

Cells come back in the rows of their file, in memory that does not grow with it. With the file's own genes as vocabulary
the matrix is the one that was converted: layout, types, order of entries and explicit zeros; obs and var come from the
tables beside the shards. Genes that the vocabulary did not have are gone, and so is what shards never hold: uns, other
layers, obsm entries but the coordinates, obsp, varm and varp; a warning names it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from cellplane.data.encode import Encoded, gathered
from cellplane.data.files import atomic_file
from cellplane.data.guard import quiet
from cellplane.data.manifest import DatasetEntry, Manifest, read_vocabulary, verify_shards
from cellplane.data.shards import ShardReader
from cellplane.data.sources import FileSink
from cellplane.data.tables import POSITION, read_table
from cellplane.data.tasks import safe_name
from cellplane.errors import ConfigError, IntegrityError

log = logging.getLogger(__name__)
EXACT_IN_FLOAT16 = 2048  # every whole number up to here
WINDOW_ENTRIES = 4 * 1024**2
CHUNK_ENTRIES = 2**17
NO_TABLES = {"layout": "csr", "dtype": "float32", "index_dtype": "int32"}  # what older conversions did not note


def export(
    folder: Path,
    out: Path,
    datasets: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write the data sets (all, where none is named) as ``out``/NAME.h5ad, each atomically; the files.

    Every byte is verified first. ``progress`` hears (cells written, cells in all). Raises IntegrityError, ConfigError for
    a name that is not there or a file that is (it may be the source, which holds more; ``overwrite`` replaces it),
    StorageError when the disk is full.
    """
    manifest = verify_shards(folder)
    names = [entry.name for entry in manifest.datasets]
    if unknown := sorted(set(datasets) - set(names)):
        raise ConfigError(f"no data set {unknown[0]!r} in {folder}; it has {', '.join(names)}")
    chosen = [number for number, name in enumerate(names) if name in datasets or not datasets]
    paths = {number: out / f"{safe_name(names[number])}.h5ad" for number in chosen}
    if not overwrite and (there := next((path for path in paths.values() if path.exists()), None)):
        raise ConfigError(
            f"{there} is there already, and may hold more than shards do; choose another folder, or replace it with --overwrite"
        )
    total, done, written = sum(manifest.datasets[number].cells for number in chosen), 0, []
    for number, path in paths.items():
        cells = _Cells(folder, manifest, number)
        _warn(cells.entry)
        with atomic_file(path) as temporary, FileSink(temporary) as sink, quiet(), h5py.File(sink, "w") as file:
            for so_far in _write(file, cells):
                if progress is not None:
                    progress(done + so_far, total)
        done += manifest.datasets[number].cells
        written.append(path)
    return written


def _warn(entry: DatasetEntry) -> None:
    """Says what the file had and the export does not."""
    if entry.left_out != "":
        lost = "whatever it had beside counts, obs, var and coordinates" if entry.left_out is None else entry.left_out
        log.warning("%s comes back without %s: shards do not hold it", entry.name, lost)
    if dropped := int(entry.genes.get("n_dropped", 0)):
        log.warning("%s comes back without %d genes that the vocabulary did not have", entry.name, dropped)


@dataclass(frozen=True)
class _Genes:
    """The columns of a data set: its gene table, and where each vocabulary position stands in it, [G] (-1 = nowhere)."""

    var: pd.DataFrame
    column: NDArray[np.int64]


class _Cells:
    """The cells of one data set by their row in its file, wherever in the shards they lie."""

    def __init__(self, folder: Path, manifest: Manifest, number: int) -> None:
        self.entry: DatasetEntry = manifest.datasets[number]
        self._folder, self._manifest = folder, manifest
        self._sentences = [row for row in manifest.sentences if row.dataset == number]
        self._readers = {shard: ShardReader(folder / manifest.shards[shard].name) for shard in {row.shard for row in self._sentences}}
        n = self.entry.cells
        self.nnz, self.batch, self.label = (np.full(n, -1, dtype=np.int64) for _ in range(3))
        self._sentence, self._at = (np.full(n, -1, dtype=np.int64) for _ in range(2))
        self.coordinates: NDArray[np.float32] | None = np.full((n, 2), np.nan, dtype=np.float32)
        self._largest = 0
        for place, row in enumerate(self._sentences):
            raw = self._readers[row.shard].raw(row.index)
            block = raw.block
            if block.value.dtype.kind == "u":
                self._largest = max(self._largest, int((raw.exact if len(raw.exact) else block.value).max(initial=0)))
            self._sentence[block.cell], self._at[block.cell] = place, np.arange(block.n_cells)
            self.nnz[block.cell], self.batch[block.cell], self.label[block.cell] = np.diff(block.crow), block.batch, block.label
            if block.coord is not None and self.coordinates is not None:
                self.coordinates[block.cell] = block.coord
            else:
                self.coordinates = None
        if (self._sentence < 0).any():
            raise IntegrityError(f"{folder}: {int((self._sentence < 0).sum())} cells of {self.entry.name} are in no shard; convert again")

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the source's values, or wide enough for what was added up or recovered from them."""
        own = np.dtype(self.entry.dtype or NO_TABLES["dtype"]).newbyteorder("=")
        most = np.iinfo(own).max if own.kind in "iu" else {1: 1, 2: EXACT_IN_FLOAT16}.get(own.itemsize, np.inf)  # bool, float16
        if self._largest <= most:
            return own
        return np.promote_types(own, np.float32 if own.kind == "f" else np.uint32)

    def genes(self) -> _Genes:
        """The gene table and what it is for."""
        n_genes = self._manifest.n_genes
        column = np.full(n_genes, -1, dtype=np.int64)
        if self.entry.var_file is None:
            measured = np.flatnonzero(self._manifest.panels()[self._manifest.datasets.index(self.entry)])
            column[measured] = np.arange(len(measured))
            ids = read_vocabulary(self._folder, self._manifest).gene_ids
            return _Genes(pd.DataFrame(index=[ids[gene] for gene in measured]), column)
        var = read_table(self._folder / self.entry.var_file)
        positions = var.pop(POSITION).to_numpy()
        kept = np.flatnonzero((positions >= 0) & ~pd.Series(positions).duplicated())  # of columns that were added up, the first
        column[positions[kept]] = np.arange(len(kept))
        return _Genes(var if len(kept) == len(var) else var.iloc[kept], column)

    def obs(self) -> pd.DataFrame:
        """The cell table as the file had it; samples and labels alone from an older conversion."""
        if self.entry.obs_file is not None:
            return read_table(self._folder / self.entry.obs_file)
        columns = {"batch": (self.batch, self._manifest.batch_names), "label": (self.label, self._manifest.label_names)}
        found = {key: pd.Categorical.from_codes(codes, pd.Index(names)) for key, (codes, names) in columns.items() if names}
        return pd.DataFrame(found, index=[f"cell_{row}" for row in range(self.entry.cells)])

    def windows(self) -> Iterator[tuple[int, int]]:
        """Rows (first, end) of some millions of entries, one row at least."""
        filled = np.cumsum(self.nnz)
        cuts = np.flatnonzero(np.diff(filled // WINDOW_ENTRIES) > 0) + 1
        edges = [0, *cuts.tolist(), self.entry.cells]
        yield from itertools.pairwise(edges)

    def rows(self, start: int, stop: int) -> Encoded:
        """These rows as the shards hold them."""
        parts, found = [], []
        for place in np.unique(self._sentence[start:stop]).tolist():
            wanted = np.flatnonzero(self._sentence[start:stop] == place)
            sentence = self._sentences[place]
            raw = self._readers[sentence.shard].raw(sentence.index)
            parts.append(Encoded(raw.block.crow, raw.block.gene, raw.block.value, raw.exact).take(self._at[start:stop][wanted]))
            found.append(wanted)
        return gathered(parts, np.argsort(np.concatenate(found)))


def _write(file: h5py.File, cells: _Cells) -> Iterator[int]:
    """Fill the file; yields the number of cells written so far."""
    genes = cells.genes()
    layout = cells.entry.layout or NO_TABLES["layout"]
    file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    yield from WRITERS[layout](file, cells, genes)
    anndata.io.write_elem(file, "obs", cells.obs())
    anndata.io.write_elem(file, "var", genes.var)
    obsm = {} if cells.coordinates is None else {cells.entry.spatial_key or "spatial": cells.coordinates}
    for name, content in (("obsm", obsm), *((part, {}) for part in ("varm", "obsp", "varp", "layers", "uns"))):
        anndata.io.write_elem(file, name, content)


def _decoded(cells: _Cells, genes: _Genes, start: int, stop: int) -> sp.csr_matrix:
    """These rows in the types and columns of the source."""
    found = cells.rows(start, stop)
    value = found.x.astype(cells.dtype)
    value[found.escaped()] = found.exact.astype(value.dtype)
    column = genes.column[found.gene].astype(np.int32)
    return sp.csr_matrix((value, column, found.crow), shape=(stop - start, len(genes.var)))


def _write_csr(file: h5py.File, cells: _Cells, genes: _Genes) -> Iterator[int]:
    entries = int(cells.nnz.sum())
    index_type = np.dtype(cells.entry.index_dtype or NO_TABLES["index_dtype"]).newbyteorder("=")
    group = file.create_group("X")
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (cells.entry.cells, len(genes.var))})
    indptr = np.concatenate([[0], np.cumsum(cells.nnz)])
    group["indptr"] = indptr.astype(index_type if entries < np.iinfo(index_type).max else np.int64)
    chunks = (min(CHUNK_ENTRIES, max(entries, 1)),)
    data = group.create_dataset("data", (entries,), dtype=cells.dtype, chunks=chunks)
    indices = group.create_dataset("indices", (entries,), dtype=index_type, chunks=chunks)
    for start, stop in cells.windows():
        rows = _decoded(cells, genes, start, stop)
        if rows.nnz:
            data[indptr[start] : indptr[stop]] = rows.data
            indices[indptr[start] : indptr[stop]] = rows.indices
        yield stop


def _write_dense(file: h5py.File, cells: _Cells, genes: _Genes) -> Iterator[int]:
    shape = (cells.entry.cells, len(genes.var))
    dense = file.create_dataset("X", shape, dtype=cells.dtype)
    dense.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    step = max(1, WINDOW_ENTRIES // max(1, shape[1]))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        dense[start:stop] = _decoded(cells, genes, start, stop).toarray()
        yield stop


def _write_csc(file: h5py.File, cells: _Cells, genes: _Genes) -> Iterator[int]:
    """In memory: a column needs every cell."""
    matrix: Any = sp.vstack([_decoded(cells, genes, start, stop) for start, stop in cells.windows()], format="csr")
    anndata.io.write_elem(file, "X", sp.csc_matrix(matrix))
    yield cells.entry.cells


WRITERS: dict[str, Callable[[h5py.File, _Cells, _Genes], Iterator[int]]] = {"csr": _write_csr, "csc": _write_csc, "dense": _write_dense}
