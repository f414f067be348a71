"""The manifest of a folder of shards: every file with its checksum, every sentence, every source.

No storage format notices a flipped bit by itself, so the manifest carries a sha256 of every file and of itself, and is
written last: where it stands, the folder is complete.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellplane.data.files import atomic_file, file_sha256
from cellplane.errors import DataError, FileFormatError, IntegrityError
from cellplane.genes import GeneVocabulary

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MODEL_VOCABULARY = "vocabulary.json"  # in a model folder


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
    layout: str | None = None  # of the counts in the source: csr, csc or dense; this and the rest unknown to older conversions
    dtype: str | None = None
    index_dtype: str | None = None
    obs_file: str | None = None
    obs_sha256: str | None = None
    var_file: str | None = None
    var_sha256: str | None = None
    spatial_key: str | None = None  # the obsm entry its coordinates are from
    left_out: str | None = None  # what its file had that no shard holds, e.g. "uns, obsm['X_pca']"

    def tables(self) -> dict[str, str]:
        """sha256 of the Parquet files of its cells and genes."""
        files = ((self.obs_file, self.obs_sha256), (self.var_file, self.var_sha256))
        return {name: sha256 for name, sha256 in files if name is not None and sha256 is not None}


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
        plain["datasets"] = [{key: value for key, value in entry.items() if value is not None} for entry in plain["datasets"]]
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
    if not folder.is_dir():
        raise DataError(f"{folder}: {'a file' if folder.exists() else 'no such folder'}; expected a folder written by data convert")
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
    try:
        return _parsed(plain)
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{path} is whole but of another make: {error}; use the newer cellplane that wrote it") from None


def _parsed(plain: dict[str, Any]) -> Manifest:
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
    ids = path.read_bytes().decode().removesuffix("\n").split("\n")  # as they were written: a blank id is a gene too
    return GeneVocabulary.from_ids(ids)


def parse_vocabulary(path: Path) -> GeneVocabulary:
    """The vocabulary of a text file of gene ids, one a line, of a model folder or of shards. Raises DataError, FileFormatError."""
    if (path / MANIFEST).is_file() and not (path / MODEL_VOCABULARY).is_file():
        return read_vocabulary(path, read_manifest(path))
    if (path / MODEL_VOCABULARY).is_file():
        try:
            return GeneVocabulary.from_ids(json.loads((path / MODEL_VOCABULARY).read_bytes())["gene_ids"])
        except (ValueError, KeyError, TypeError) as error:
            raise FileFormatError(f"{path / MODEL_VOCABULARY} is damaged: {error!r}; expected a model folder") from None
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


def check_table(path: Path, sha256: str) -> None:
    """IntegrityError unless this table of cells or genes has this checksum."""
    if not path.is_file():
        raise IntegrityError(f"table {path.name} is missing in {path.parent}; convert again")
    if (got := file_sha256(path)) != sha256:
        raise IntegrityError(f"table {path.name} has sha256 {got}, expected {sha256}; convert again")


def verify_shards(folder: Path) -> Manifest:
    """The manifest, once every byte of the folder was found as promised. Raises IntegrityError naming what is not."""
    manifest = read_manifest(folder)
    read_vocabulary(folder, manifest)
    for entry in manifest.shards:
        check_shard(folder / entry.name, entry)
    for dataset in manifest.datasets:
        for name, sha256 in dataset.tables().items():
            check_table(folder / name, sha256)
    known = {entry.name for entry in manifest.shards} | {name for dataset in manifest.datasets for name in dataset.tables()}
    ours = ("*.arrow", "obs-*.parquet", "var-*.parquet")
    if extra := {path.name for pattern in ours for path in folder.glob(pattern)} - known:
        raise IntegrityError(f"{folder} holds {min(extra)!r}, which its manifest does not know: run the conversion again to finish it")
    return manifest
