"""Tables of gene ids and symbols, kept on this machine: no web service is ever asked.

    $CELLPLANE_HOME/genes/human/manifest.json            source, counts, sha256 of the two files and of itself
                               /genes-<sha>.parquet      id, symbol, whether it codes for a protein (from GENCODE)
                               /aliases-<sha>.parquet    previous, alias and Excel-mangled symbol -> approved symbol

Symbols change every month and Excel turns MARCH1 into a date, so data sets of different years name one gene
differently. Whatever has two meanings stays ambiguous here unless exactly one of them codes for a protein.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cellplane.config import home
from cellplane.data.shards import atomic_file, file_sha256
from cellplane.errors import FileFormatError, IntegrityError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PREFIXES = {"human": "ENSG", "mouse": "ENSMUSG"}  # of the species we know
NOWHERE, SEVERAL = -1, -2


@dataclass(frozen=True)
class GeneTable:
    """The genes of one species.

    ``ids``, ``symbols`` [n] str, ``coding`` [n] bool; ``aliases``, ``approved`` [m] str: other names of symbols, none
    of which is itself a symbol of the table. ``fingerprint`` identifies the sources it was made from.
    """

    species: str
    ids: NDArray[np.object_]
    symbols: NDArray[np.object_]
    coding: NDArray[np.bool_]
    aliases: NDArray[np.object_]
    approved: NDArray[np.object_]
    fingerprint: str = ""

    def rows(self, names: pd.Index) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What each name means: its row in the table [n] and the code of its symbol [n]; -1 = unknown, -2 = several.

        A name is looked up as an id, then as a symbol, then as an alias; versions must be stripped before.
        """
        row = self._by_id.get_indexer(names).astype(np.int64)
        code = np.where(row >= 0, self._symbol_of_row[row], self._by_symbol.get_indexer(names)).astype(np.int64)
        if len(self.aliases):
            alias = self._by_alias[0].get_indexer(names[code == NOWHERE])
            code[code == NOWHERE] = np.where(alias >= 0, self._by_alias[1][alias], NOWHERE)
        by_symbol = np.where(code >= 0, self._row_of_symbol[code], code)
        return np.where(row >= 0, row, by_symbol), code

    def only_coding(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """For each symbol the place of its only protein-coding gene that has one among ``places`` [n], else -1.

        CD99 is a gene of X and of Y; a vocabulary that has only one of them means that one.
        """
        there = np.flatnonzero(self.coding & (places >= 0))
        codes = self._symbol_of_row[there]
        only = np.full(self.n_symbols, NOWHERE, dtype=np.int64)
        single = np.bincount(codes, minlength=self.n_symbols)[codes] == 1
        only[codes[single]] = places[there[single]]
        return only

    def known_symbols(self, names: pd.Index) -> int:
        """How many of the names are symbols of this species as they stand."""
        return int((self._by_symbol.get_indexer(names) >= 0).sum())

    @property
    def n_symbols(self) -> int:
        """Different symbols, and so codes."""
        return len(self._by_symbol)

    def symbol(self, codes: NDArray[np.int64]) -> NDArray[np.object_]:
        """The symbols of codes."""
        return np.asarray(self._by_symbol, dtype=object)[codes]

    @cached_property
    def _by_id(self) -> pd.Index:
        return pd.Index(self.ids)

    @cached_property
    def _grouped(self) -> tuple[NDArray[np.int64], pd.Index]:
        codes, unique = pd.factorize(self.symbols)
        return codes.astype(np.int64), pd.Index(unique)

    @property
    def _symbol_of_row(self) -> NDArray[np.int64]:
        return self._grouped[0]

    @property
    def _by_symbol(self) -> pd.Index:
        return self._grouped[1]

    @cached_property
    def _row_of_symbol(self) -> NDArray[np.int64]:
        """The one gene of each symbol: the only one, else the only one that codes for a protein, else SEVERAL."""
        return _only(self._symbol_of_row, np.arange(len(self.ids)), self.coding, self.n_symbols)

    @cached_property
    def _by_alias(self) -> tuple[pd.Index, NDArray[np.int64]]:
        """Every alias, and the code of the symbol it means."""
        target = self._by_symbol.get_indexer(pd.Index(self.approved)).astype(np.int64)
        codes, unique = pd.factorize(self.aliases)
        coding = np.bincount(self._symbol_of_row, weights=self.coding, minlength=self.n_symbols) > 0
        return pd.Index(unique), _only(codes.astype(np.int64), target, coding[target], len(unique))


def _only(groups: NDArray[np.int64], values: NDArray[np.int64], preferred: NDArray[np.bool_], n: int) -> NDArray[np.int64]:
    """The value of each group [n]: its only one, else its only preferred one, else SEVERAL."""
    members, wanted = np.bincount(groups, minlength=n), np.bincount(groups, weights=preferred, minlength=n)
    only = np.full(n, SEVERAL, dtype=np.int64)
    single = members[groups] == 1
    best = (wanted[groups] == 1) & preferred
    only[groups[best]] = values[best]
    only[groups[single]] = values[single]
    return only


def make_table(species: str, genes: pd.DataFrame, aliases: pd.DataFrame, fingerprint: str = "") -> GeneTable:
    """A table of ``genes`` (id, symbol, coding) and ``aliases`` (alias, approved); aliases that say nothing new are left out."""
    symbols = pd.Index(genes["symbol"].unique())
    useful = aliases[aliases["approved"].isin(symbols) & ~aliases["alias"].isin(symbols)].drop_duplicates(["alias", "approved"])
    return GeneTable(
        species=species,
        ids=_texts(genes["id"]),
        symbols=_texts(genes["symbol"]),
        coding=genes["coding"].to_numpy(dtype=bool),
        aliases=_texts(useful["alias"]),
        approved=_texts(useful["approved"]),
        fingerprint=fingerprint,
    )


def _texts(column: pd.Series) -> NDArray[np.object_]:
    return np.asarray(column, dtype=object)


@dataclass(frozen=True)
class TableSource:
    """A file a table was made from: ``kind`` is genes or aliases."""

    kind: str
    name: str
    sha256: str


def tables_home() -> Path:
    """Where tables are installed."""
    return home() / "genes"


def write_table(table: GeneTable, sources: Iterable[TableSource], folder: Path | None = None) -> dict[str, Any]:
    """Installs a table, replacing one of the same species; returns its manifest, which is written last."""
    own = (tables_home() if folder is None else folder) / table.species
    parts = {
        "genes": pa.table({"id": list(table.ids), "symbol": list(table.symbols), "coding": table.coding}),
        "aliases": pa.table({"alias": pa.array(list(table.aliases), pa.string()), "approved": pa.array(list(table.approved), pa.string())}),
    }
    files = {}
    for kind, part in parts.items():
        path = own / f"{kind}-{table.fingerprint[:12]}.parquet"
        with atomic_file(path) as temporary:
            pq.write_table(part, temporary, compression="zstd")
        files[kind] = {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
    manifest = {
        "format_version": FORMAT_VERSION,
        "kind": "cellplane-genes",
        "species": table.species,
        "fingerprint": table.fingerprint,
        "genes": len(table.ids),
        "protein_coding": int(table.coding.sum()),
        "aliases": len(table.aliases),
        "sources": [{"kind": source.kind, "name": source.name, "sha256": source.sha256} for source in sources],
        "files": files,
    }
    with atomic_file(own / MANIFEST) as temporary:
        temporary.write_bytes(_sealed(manifest))
    for path in own.glob("*.parquet"):
        if path.name not in {entry["name"] for entry in files.values()}:
            path.unlink(missing_ok=True)
    return manifest


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    body = json.dumps(manifest, indent=1).encode()
    return json.dumps({**manifest, "manifest_sha256": hashlib.sha256(body).hexdigest()}, indent=1).encode()


def table_manifests(folder: Path | None = None) -> list[dict[str, Any]]:
    """What is installed, by species; IntegrityError for a manifest that is not what was written, with the way out."""
    root = tables_home() if folder is None else folder
    return [_manifest(path) for path in sorted(root.glob(f"*/{MANIFEST}"))]


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        sealed = manifest.pop("manifest_sha256")
    except (ValueError, KeyError, AttributeError) as error:
        raise IntegrityError(f"{path} is damaged; {_again(path)}") from error
    if sealed != hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest():
        raise IntegrityError(f"{path} does not have the sha256 it was written with; {_again(path)}")
    if manifest["format_version"] > FORMAT_VERSION:
        found = f"{path} has format version {manifest['format_version']}, this cellplane reads up to {FORMAT_VERSION}"
        raise FileFormatError(f"{found}; install a newer cellplane")
    return manifest


def _again(path: Path) -> str:
    return f"install the {path.parent.name} table again: cellplane data genes install"


def installed_tables(folder: Path | None = None) -> Mapping[str, GeneTable]:
    """Every installed table by species, its checksums verified when a process first reads it; empty when none is installed.

    Raises IntegrityError naming a file that is missing or whose bytes changed.
    """
    root = tables_home() if folder is None else folder
    return {path.parent.name: _loaded(path, _state(path.parent)) for path in sorted(root.glob(f"*/{MANIFEST}"))}


def _state(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and modification time of a folder's files: the same while nobody touches them."""
    found = ((path.name, path.stat()) for path in sorted(folder.iterdir()) if not path.name.startswith("."))
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)


@lru_cache(maxsize=8)
def _loaded(path: Path, state: tuple[tuple[str, int, int], ...]) -> GeneTable:  # noqa: ARG001 - another state is read again
    manifest = _manifest(path)
    frames = {kind: _read_part(path, entry) for kind, entry in manifest["files"].items()}
    return make_table(manifest["species"], frames["genes"], frames["aliases"], manifest["fingerprint"])


def _read_part(manifest: Path, entry: Mapping[str, Any]) -> pd.DataFrame:
    path = manifest.parent / Path(entry["name"]).name
    if not path.is_file():
        raise IntegrityError(f"{path} is missing; {_again(manifest)}")
    if (found := file_sha256(path)) != entry["sha256"]:
        raise IntegrityError(f"{path} has sha256 {found[:12]}, expected {entry['sha256'][:12]}; {_again(manifest)}")
    frame: pd.DataFrame = pq.read_table(path).to_pandas()
    return frame
