"""Shards: sentences of cells as Arrow IPC files that map straight into memory, and the manifest that vouches for them.

One record batch is one sentence. Counts are a byte each with an escape for the few large ones, genes two bytes, both
in the order of the source: that reads an order of magnitude faster than any compressed layout. No storage format
notices a flipped bit by itself, so each file is hashed while it is written, for the manifest (`manifest.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cellplane.data.files import HASH_CHUNK_BYTES as HASH_CHUNK_BYTES
from cellplane.data.files import atomic_file as atomic_file
from cellplane.data.files import fault as fault
from cellplane.data.files import file_sha256 as file_sha256
from cellplane.data.files import free_bytes as free_bytes
from cellplane.data.files import storage_errors as storage_errors
from cellplane.data.files import sync_folder as sync_folder
from cellplane.data.manifest import FORMAT_VERSION as FORMAT_VERSION
from cellplane.data.manifest import MANIFEST as MANIFEST
from cellplane.data.manifest import DatasetEntry as DatasetEntry
from cellplane.data.manifest import Manifest as Manifest
from cellplane.data.manifest import SentenceRow as SentenceRow
from cellplane.data.manifest import ShardEntry as ShardEntry
from cellplane.data.manifest import check_shard as check_shard
from cellplane.data.manifest import pack_panel as pack_panel
from cellplane.data.manifest import parse_vocabulary as parse_vocabulary
from cellplane.data.manifest import read_manifest as read_manifest
from cellplane.data.manifest import read_vocabulary as read_vocabulary
from cellplane.data.manifest import verify_shards as verify_shards
from cellplane.data.manifest import write_manifest as write_manifest
from cellplane.errors import DataError, FileFormatError, IntegrityError

MAX_UINT16_GENES = 65_536
DEEP_SHARE = 0.02  # of values that need the byte's escape: beyond it two bytes a value are smaller
ESCAPES = {"uint8": 255, "uint16": 65_535}  # the stored value that says: look it up in x_over
VALUE_TYPES = {"uint8": pa.uint8(), "uint16": pa.uint16(), "float32": pa.float32(), "float64": pa.float64()}
LARGEST_WRITE = 1 << 30  # Linux writes 2 GiB at most at once
SMALL_COLUMNS = ("cell", "batch", "dataset", "platform", "label")  # one number a cell
NO_ENTRIES, NO_VALUES = np.zeros(0, np.int64), np.zeros(0, np.uint32)
OVER_TYPE = pa.struct([("pos", pa.uint32()), ("value", pa.uint32())])


@dataclass(frozen=True, kw_only=True)
class Block:
    """The cells of one sentence as they are stored.

    CSR rows ``crow`` [n+1], ``gene`` [nnz] vocabulary positions, ``value`` [nnz]; ``cell`` [n] is the row in the
    source; ``batch``, ``label``, ``platform`` [n] int32 are positions in the manifest's lists, -1 = missing; ``coord``
    [n, 2] micrometres or None; all cells are of one ``dataset``.
    """

    crow: NDArray[np.int64]
    gene: NDArray[np.unsignedinteger]
    value: NDArray[Any]
    cell: NDArray[np.int64]
    batch: NDArray[np.int32]
    label: NDArray[np.int32]
    dataset: int
    coord: NDArray[np.float32] | None = None
    platform: NDArray[np.int32] | None = None

    @property
    def n_cells(self) -> int:
        """Cells of the sentence."""
        return len(self.crow) - 1


class RawBlock(NamedTuple):
    """A block as its bytes are: the entries ``at`` hold the escape and stand for ``exact``."""

    block: Block
    at: NDArray[np.int64]
    exact: NDArray[np.uint32]


def choose_encoding(values: Sequence[NDArray[Any]]) -> str:
    """The smallest exact encoding of these values: uint8 or uint16 with escapes for counts, else float32 or float64."""
    total = large = 0
    for array in values:
        whole = array.dtype.kind != "f" or (array == np.rint(array)).all()
        if not whole or (len(array) and (array.min() < 0 or array.max() >= 2**32)):
            return "float32" if all(other.dtype == np.float32 for other in values) else "float64"
        total += len(array)
        large += int((array >= ESCAPES["uint8"]).sum())
    return "uint16" if large > DEEP_SHARE * total else "uint8"


def shard_schema(encoding: str, n_genes: int, metadata: Mapping[str, str]) -> pa.Schema:
    """Columns and metadata of a shard over ``n_genes`` vocabulary genes."""
    fields = [
        ("gene", pa.list_(pa.uint16() if n_genes <= MAX_UINT16_GENES else pa.uint32())),
        ("x", pa.list_(VALUE_TYPES[encoding])),
        *([("x_over", pa.list_(OVER_TYPE))] if encoding in ESCAPES else []),
        ("cell", pa.int64()),
        *((name, pa.int32()) for name in ("batch", "dataset", "platform", "label")),
        ("coord", pa.list_(pa.float32(), 2)),
    ]
    described = {"format_version": str(FORMAT_VERSION), "encoding": encoding, **metadata}
    return pa.schema(fields, metadata=described)


def write_shard(path: Path, blocks: Sequence[Block], n_genes: int, metadata: Mapping[str, str]) -> None:
    """Write the blocks, one record batch each, atomically. The same blocks give the same bytes. Raises StorageError."""
    encoding = choose_encoding([block.value for block in blocks])
    with atomic_file(path) as temporary, ShardWriter(temporary, shard_schema(encoding, n_genes, metadata)) as writer:
        for block in blocks:
            writer.write(_escaped(block, encoding))


def _escaped(block: Block, encoding: str) -> RawBlock:
    if encoding not in ESCAPES:
        return RawBlock(block, NO_ENTRIES, NO_VALUES)
    at = np.flatnonzero(block.value >= ESCAPES[encoding])
    stored = np.minimum(block.value, ESCAPES[encoding]).astype(encoding, copy=False)
    return RawBlock(replace(block, value=stored), at, block.value[at].astype(np.uint32))


class ShardWriter:
    """Writes a shard one sentence after another and hashes it on the way, so that nothing is read again for its checksum.

    ``sha256`` and ``bytes`` are those of the whole file once the with statement is left.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._sink = _HashedFile(path)
        self._writer = pa.ipc.new_file(pa.PythonFile(self._sink, mode="w"), schema)

    def write(self, raw: RawBlock) -> None:
        """Append a sentence whose values are in the schema's encoding already. Raises DataError from 2^31 entries on."""
        value = raw.block.value  # Arrow adds bytes up four times faster than NumPy
        total = int(pc.sum(pa.array(value)).as_py() or 0) if value.dtype.kind in "ui" else float(value.sum(dtype=np.float64))
        if len(raw.at):
            total += int(raw.exact.sum(dtype=np.int64)) - len(raw.at) * int(value[raw.at[0]])
        facts = {"nnz": str(len(raw.block.gene)), "sum": str(total)}
        self._writer.write_batch(_record_batch(raw, self._schema), custom_metadata=facts)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._writer.close()
        finally:
            self._sink.close()

    @property
    def sha256(self) -> str:
        """sha256 of what was written."""
        return self._sink.digest.hexdigest()

    @property
    def bytes(self) -> int:
        """Bytes written."""
        return self._sink.tell()


class _HashedFile:
    """A file that hashes what goes into it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self.digest = hashlib.sha256()
        self._at = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        written = 0
        while written < len(view):
            written += self._file.write(view[written : written + LARGEST_WRITE]) or 0
        self._at += len(view)
        return len(view)

    def tell(self) -> int:
        return self._at

    def flush(self) -> None:
        """Nothing is held back."""

    @property
    def closed(self) -> bool:
        return self._file.closed

    def close(self) -> None:
        self._file.close()


def _record_batch(raw: RawBlock, schema: pa.Schema) -> pa.RecordBatch:
    block = raw.block
    if len(block.value) >= 2**31:
        raise DataError(f"a sentence of {block.n_cells} cells has {len(block.value)} entries, 2^31 at most; use a smaller max_cells")
    offsets = pa.array(block.crow.astype(np.int32))
    genes = pa.array(block.gene.astype(_numpy(schema, "gene"), copy=False))
    columns: dict[str, pa.Array] = {"gene": pa.ListArray.from_arrays(offsets, genes)}
    if schema.metadata[b"encoding"].decode() in ESCAPES:
        columns["x_over"] = _overflow(raw)
    columns["x"] = pa.ListArray.from_arrays(offsets, pa.array(block.value.astype(_numpy(schema, "x"), copy=False)))
    missing = np.full(block.n_cells, -1, dtype=np.int32)
    columns["cell"] = pa.array(block.cell.astype(np.int64, copy=False))
    columns |= {"batch": pa.array(block.batch), "label": pa.array(block.label)}
    columns["dataset"] = pa.array(np.full(block.n_cells, block.dataset, dtype=np.int32))
    columns["platform"] = pa.array(missing if block.platform is None else block.platform)
    coord_type = schema.field("coord").type
    columns["coord"] = (
        pa.nulls(block.n_cells, coord_type)
        if block.coord is None
        else pa.FixedSizeListArray.from_arrays(pa.array(block.coord.astype(np.float32).ravel()), type=coord_type)
    )
    return pa.record_batch([columns[name] for name in schema.names], schema=schema)


def _numpy(schema: pa.Schema, name: str) -> np.dtype[np.generic]:
    dtype: np.dtype[np.generic] = np.dtype(schema.field(name).type.value_type.to_pandas_dtype())
    return dtype


def _overflow(raw: RawBlock) -> pa.Array:
    """Exact values that did not fit, each with its position in its row."""
    crow, at = raw.block.crow, raw.at
    row = np.searchsorted(crow, at, side="right") - 1
    offsets = np.searchsorted(at, crow).astype(np.int32)
    position = pa.array((at - crow[row]).astype(np.uint32))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.StructArray.from_arrays([position, pa.array(raw.exact)], fields=list(OVER_TYPE)))


class ShardReader:
    """A shard mapped into memory; blocks are decoded on request. Raises FileFormatError when it is not a whole shard."""

    def __init__(self, path: Path) -> None:
        try:
            # the mapping as a buffer: through the file, pyarrow advises the kernel at every block, a tenth of the time of reading
            self._file = pa.ipc.open_file(pa.memory_map(str(path)).read_buffer())
        except FileNotFoundError:
            raise IntegrityError(f"{path}: the shard is missing; convert again") from None
        except (pa.ArrowInvalid, OSError) as error:
            raise FileFormatError(f"{path} is not a whole Arrow file: {error}; convert again") from error
        self.metadata = {key.decode(): value.decode() for key, value in (self._file.schema.metadata or {}).items()}
        version = self.metadata.get("format_version", "missing")
        if version != str(FORMAT_VERSION):
            raise FileFormatError(f"{path}: shard format {version}, this cellplane reads {FORMAT_VERSION}; use the version that wrote it")
        self.encoding = self.metadata["encoding"]
        self._place = {name: place for place, name in enumerate(self._file.schema.names)}
        self._small = [self._place[name] for name in SMALL_COLUMNS]

    def __len__(self) -> int:
        return int(self._file.num_record_batches)

    def block(self, index: int, into: tuple[NDArray[Any], NDArray[Any]] | None = None) -> Block:
        """One sentence; its genes and values are decoded into the arrays given, [nnz] of any wide enough type.

        Without them ``gene`` and (where nothing had to be escaped) ``value`` are views of the mapped file.
        """
        block, at, exact = self.raw(index)
        gene, value = (block.gene, block.value) if into is None else into
        if into is not None:
            np.copyto(gene, block.gene, casting="unsafe")
            np.copyto(value, block.value, casting="unsafe")
        if len(at):
            value = value.astype(np.uint32) if value.dtype.itemsize < 4 else value
            value[at] = exact
        return replace(block, gene=gene, value=value)

    def raw(self, index: int) -> RawBlock:
        """One sentence in the bytes of the mapped file, escapes unresolved."""
        columns = self._file.get_batch(index).columns  # all at once, by number: reading by name costs twice as much
        gene, x = columns[self._place["gene"]], columns[self._place["x"]]
        crow = gene.offsets.to_numpy().astype(np.int64)
        cell, batch, dataset, platform, label = (columns[place].to_numpy() for place in self._small)
        coord = columns[self._place["coord"]]
        block = Block(
            crow=crow,
            gene=gene.values.to_numpy(),
            value=x.values.to_numpy(),
            cell=cell,
            batch=batch,
            label=label,
            platform=platform,
            dataset=int(dataset[0]) if len(dataset) else -1,
            coord=None if coord.null_count else coord.flatten().to_numpy().reshape(-1, 2),
        )
        if self.encoding not in ESCAPES or len(values := (over := columns[self._place["x_over"]]).values) == 0:
            return RawBlock(block, NO_ENTRIES, NO_VALUES)
        rows = np.repeat(np.arange(len(over)), np.diff(over.offsets.to_numpy()))
        return RawBlock(block, crow[rows] + values.field("pos").to_numpy(), values.field("value").to_numpy())
