"""Shards: sentences of cells as Arrow IPC files that map straight into memory, and the manifest that vouches for them.

One record batch is one sentence. Counts are a byte each with an escape for the few large ones, genes two bytes, both
in the order of the source: that reads an order of magnitude faster than any compressed layout. No storage format
notices a flipped bit by itself, so the manifest carries a sha256 of every file and of itself, and is written last:
where it stands, the folder is complete.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cellplane.errors import DataError, FileFormatError, IntegrityError, StorageError
from cellplane.genes import GeneVocabulary

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAX_UINT16_GENES = 65_536
DEEP_SHARE = 0.02  # of values that need the byte's escape: beyond it two bytes a value are smaller
ESCAPES = {"uint8": 255, "uint16": 65_535}  # the stored value that says: look it up in x_over
VALUE_TYPES = {"uint8": pa.uint8(), "uint16": pa.uint16(), "float32": pa.float32(), "float64": pa.float64()}
OVER_TYPE = pa.struct([("pos", pa.uint32()), ("value", pa.uint32())])
NO_SPACE = (28, 27, 122)  # ENOSPC, EFBIG, EDQUOT
NO_PERMISSION = (13, 30, 1)  # EACCES, EROFS, EPERM
HASH_CHUNK_BYTES = 1024 * 1024


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
    schema = shard_schema(choose_encoding([block.value for block in blocks]), n_genes, metadata)
    with atomic_file(path) as temporary, pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for block in blocks:
            writer.write_batch(_record_batch(block, schema))


def _record_batch(block: Block, schema: pa.Schema) -> pa.RecordBatch:
    if len(block.value) >= 2**31:
        raise DataError(f"a sentence of {block.n_cells} cells has {len(block.value)} entries, 2^31 at most; use a smaller max_cells")
    offsets = pa.array(block.crow.astype(np.int32))
    encoding = schema.metadata[b"encoding"].decode()
    genes = pa.array(block.gene.astype(_numpy(schema, "gene"), copy=False))
    columns: dict[str, pa.Array] = {"gene": pa.ListArray.from_arrays(offsets, genes)}
    stored = block.value
    if encoding in ESCAPES:
        large = np.flatnonzero(stored >= ESCAPES[encoding])
        columns["x_over"] = _overflow(block, large)
        stored = np.minimum(stored, ESCAPES[encoding])
    columns["x"] = pa.ListArray.from_arrays(offsets, pa.array(stored.astype(_numpy(schema, "x"), copy=False)))
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


def _overflow(block: Block, large: NDArray[np.int64]) -> pa.Array:
    """Exact values that did not fit, each with its position in its row."""
    row = np.searchsorted(block.crow, large, side="right") - 1
    offsets = np.searchsorted(large, block.crow).astype(np.int32)
    position = pa.array((large - block.crow[row]).astype(np.uint32))
    exact = pa.array(block.value[large].astype(np.uint32))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.StructArray.from_arrays([position, exact], fields=list(OVER_TYPE)))


class ShardReader:
    """A shard mapped into memory; blocks are decoded on request. Raises FileFormatError when it is not a whole shard."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = pa.ipc.open_file(pa.memory_map(str(path)))
        except FileNotFoundError:
            raise IntegrityError(f"{path}: the shard is missing; convert again") from None
        except (pa.ArrowInvalid, OSError) as error:
            raise FileFormatError(f"{path} is not a whole Arrow file: {error}; convert again") from error
        self.metadata = {key.decode(): value.decode() for key, value in (self._file.schema.metadata or {}).items()}
        version = self.metadata.get("format_version", "missing")
        if version != str(FORMAT_VERSION):
            raise FileFormatError(f"{path}: shard format {version}, this cellplane reads {FORMAT_VERSION}; use the version that wrote it")
        self.encoding = self.metadata["encoding"]

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
        batch = self._file.get_batch(index)
        crow = batch.column("gene").offsets.to_numpy().astype(np.int64)
        coord, dataset = batch.column("coord"), batch.column("dataset")
        block = Block(
            crow=crow,
            gene=batch.column("gene").flatten().to_numpy(),
            value=batch.column("x").flatten().to_numpy(),
            cell=batch.column("cell").to_numpy(),
            batch=batch.column("batch").to_numpy(),
            label=batch.column("label").to_numpy(),
            platform=batch.column("platform").to_numpy(),
            dataset=int(dataset[0].as_py()) if len(dataset) else -1,
            coord=None if coord.null_count else coord.flatten().to_numpy().reshape(-1, 2),
        )
        if self.encoding not in ESCAPES or len((over := batch.column("x_over")).values) == 0:
            return RawBlock(block, np.zeros(0, np.int64), np.zeros(0, np.uint32))
        rows = np.repeat(np.arange(len(over)), np.diff(over.offsets.to_numpy()))
        return RawBlock(block, crow[rows] + over.values.field("pos").to_numpy(), over.values.field("value").to_numpy())


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``; synced and renamed when the block ends well, removed when it does not.

    A full disk or a missing permission becomes StorageError, whatever the writing library made of it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            fault("before_rename")
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def fault(point: str) -> None:
    """Kill this process at a named point when FAULT_AT=point:n (or point:n:flag_file) asks for it, to test recovery.

    n counts the visits of the point in this process from 0; with a flag file it happens once for all processes.
    """
    asked, _, rest = os.environ.get("FAULT_AT", "").partition(":")
    if asked != point:
        return
    number, _, flag = rest.partition(":")
    _visits[point] = _visits.get(point, -1) + 1
    if _visits[point] != int(number or 0) or (flag and Path(flag).exists()):
        return
    if flag:
        Path(flag).touch()
    os.kill(os.getpid(), signal.SIGKILL)


_visits: dict[str, int] = {}


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what libraries say about a full disk or a missing permission into StorageError with the free space."""
    try:
        yield
    except StorageError:
        raise
    except (OSError, RuntimeError, pa.ArrowInvalid) as error:
        number, text = getattr(error, "errno", None), str(error)
        if number in NO_SPACE or any(hint in text for hint in ("No space left", "File too large", "Disk quota")):
            raise StorageError(f"no room to write {path}: {free_bytes(path)} bytes free; free some or choose another folder") from error
        if number in NO_PERMISSION:
            raise StorageError(f"{path} may not be written: {os.strerror(int(number or 0))}; choose another folder") from error
        raise


def free_bytes(path: Path) -> int:
    """Free bytes of the file system that holds ``path`` (or will)."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    stat = os.statvfs(existing)
    return int(stat.f_bavail * stat.f_frsize)


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest promises of one shard file."""

    name: str
    bytes: int
    sha256: str
    cells: int
    nnz: int
    dataset: int
    deviation: float = 0.0


@dataclass(frozen=True)
class DatasetEntry:
    """One source: its fingerprint (``size``, ``sha256``), its ``cells``, the genes it measured and where its counts were."""

    name: str
    source: str
    size: int
    sha256: str
    cells: int
    panel: str  # base64 of the packed bits over the vocabulary
    count_source: str
    recovered: bool
    deviation: float
    genes: dict[str, int | float]


@dataclass(frozen=True)
class SentenceRow:
    """One record batch: where it lies, how large it is, whose cells it holds; ``first_cell`` counts cells in manifest order."""

    shard: int
    index: int
    cells: int
    nnz: int
    batch: int
    dataset: int
    first_cell: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A folder of shards by itself: files with checksums, sentences, sources, names of batches and labels."""

    vocabulary_file: str
    vocabulary_sha256: str
    vocabulary_fingerprint: str
    n_genes: int
    max_cells: int
    config_fingerprint: str
    datasets: tuple[DatasetEntry, ...]
    shards: tuple[ShardEntry, ...]
    sentences: tuple[SentenceRow, ...]
    batch_names: tuple[str, ...]
    label_names: tuple[str, ...]
    format_version: int = FORMAT_VERSION

    @property
    def cells(self) -> int:
        """Cells of all data sets."""
        return sum(shard.cells for shard in self.shards)

    @property
    def nnz(self) -> int:
        """Stored entries of all shards."""
        return sum(shard.nnz for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """sha256 of the whole manifest, and so of every byte it vouches for."""
        return str(self.to_json()["manifest_sha256"])

    def panels(self) -> NDArray[np.bool_]:
        """[P, G] bool: the genes each data set measured."""
        rows = [np.unpackbits(np.frombuffer(base64.b64decode(entry.panel), dtype=np.uint8), count=self.n_genes) for entry in self.datasets]
        return np.array(rows, dtype=bool).reshape(len(self.datasets), self.n_genes)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, with the checksum of the rest; the sentences by the column, to stay small."""
        plain = asdict(self)
        plain["sentences"] = {f.name: [getattr(row, f.name) for row in self.sentences] for f in fields(SentenceRow)}
        return {**plain, "manifest_sha256": _json_sha256(plain)}


def pack_panel(panel: NDArray[np.bool_]) -> str:
    """A panel [G] bool as the manifest stores it."""
    return base64.b64encode(np.packbits(panel).tobytes()).decode()


def _json_sha256(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """The last write of a conversion: from here on the folder is complete."""
    with atomic_file(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest.to_json(), indent=1), encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder; DataError when there is none, FileFormatError or IntegrityError when it is damaged or newer."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} holds no {MANIFEST}: it is no shard folder, or its conversion did not finish; run data convert (again)")
    try:
        plain = json.loads(path.read_bytes())
        version = plain["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise FileFormatError(f"{path} ({path.stat().st_size} bytes) is damaged: {error!r}; convert again") from None
    if version != FORMAT_VERSION:
        raise FileFormatError(f"{path}: format version {version}, expected {FORMAT_VERSION}; use a newer cellplane or convert again")
    promised = plain.pop("manifest_sha256", None)
    if promised != (got := _json_sha256(plain)):
        raise IntegrityError(f"{path}: sha256 {got}, it says {promised}; it was changed after it was written: convert again")
    columns = plain.pop("sentences")
    rows = zip(*(columns[f.name] for f in fields(SentenceRow)), strict=True)
    plain["sentences"] = tuple(SentenceRow(*row) for row in rows)
    plain["datasets"] = tuple(DatasetEntry(**entry) for entry in plain["datasets"])
    plain["shards"] = tuple(ShardEntry(**entry) for entry in plain["shards"])
    return Manifest(**{**plain, "batch_names": tuple(plain["batch_names"]), "label_names": tuple(plain["label_names"])})


def read_vocabulary(folder: Path, manifest: Manifest) -> GeneVocabulary:
    """The genes of a shard folder; IntegrityError when the file is not the one the manifest names."""
    path = folder / manifest.vocabulary_file
    if not path.is_file():
        raise IntegrityError(f"{path} is missing; convert again")
    if (got := file_sha256(path)) != manifest.vocabulary_sha256:
        raise IntegrityError(f"vocabulary {path.name} has sha256 {got}, expected {manifest.vocabulary_sha256}; convert again")
    return parse_vocabulary(path)


def parse_vocabulary(path: Path) -> GeneVocabulary:
    """A text file of gene ids, one a line, as a vocabulary. Raises DataError, FileFormatError."""
    try:
        lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
        return GeneVocabulary.from_ids(line for line in lines if line)
    except OSError as error:
        raise DataError(f"{path}: no readable vocabulary file: {error.strerror}; expected one gene id a line") from None
    except UnicodeDecodeError:
        raise FileFormatError(f"{path} is not text; expected one gene id a line") from None


def check_shard(path: Path, entry: ShardEntry) -> None:
    """IntegrityError unless this file's bytes are those of the entry."""
    if not path.is_file():
        raise IntegrityError(f"shard {entry.name} is missing in {path.parent}; convert again")
    if (size := path.stat().st_size) != entry.bytes:
        raise IntegrityError(f"shard {entry.name} has {size} bytes, expected {entry.bytes}; convert again")
    if (got := file_sha256(path)) != entry.sha256:
        raise IntegrityError(f"shard {entry.name} has sha256 {got}, expected {entry.sha256}; convert again")


def verify_shards(folder: Path) -> Manifest:
    """The manifest, once every byte of the folder was found as promised. Raises IntegrityError naming what is not."""
    manifest = read_manifest(folder)
    read_vocabulary(folder, manifest)
    for entry in manifest.shards:
        check_shard(folder / entry.name, entry)
    extra = {path.name for path in folder.glob("*.arrow")} - {entry.name for entry in manifest.shards}
    if extra:
        raise IntegrityError(f"{folder} holds {min(extra)!r}, which its manifest does not know: run the conversion again to finish it")
    return manifest
