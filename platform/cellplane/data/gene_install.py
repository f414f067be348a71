"""Installing gene tables from files as GENCODE, HGNC and MGI publish them.

A gene table has lines of id, symbol, version, length, biotype (CZI's excerpts of GENCODE); a symbol table has columns
Symbol and Approved.Symbol (HGNChelper). What a file is, and of which species, is told from its content, since names lie.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import urllib.error
import urllib.request
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from cellplane.data.gene_tables import PREFIXES, TableSource, installed_tables, make_table, table_manifests, write_table
from cellplane.errors import ConfigError, DataError, FileFormatError, IntegrityError, ServiceError

MAX_BYTES = 64 * 1024**2  # of a file, and of what it unpacks to a quarter of: the largest known table has 4 MB, unpacked 14
TIMEOUT_S = 60.0
TABLE_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".txt.gz")
GENE_COLUMNS = ("id", "symbol", "version", "length", "biotype")
ALIAS_COLUMNS = ("Symbol", "Approved.Symbol")
CODING = "protein_coding"
OWN_SYMBOLS = 0.5  # of a species' named genes must be approved symbols of a symbol table for it to be that species'


@dataclass(frozen=True)
class Given:
    """A file to install: its name, content, and what it was found to be. ``species`` "" = not told by the file."""

    name: str
    sha256: str
    kind: str
    species: str
    frame: pd.DataFrame


def install_tables(source: str, species: str | None = None, sha256: str | None = None) -> list[dict[str, Any]]:
    """Installs the tables of a file, folder or https address under $CELLPLANE_HOME/genes; their manifests, by species.

    ``sha256`` is what the one file must have. Raises ConfigError for a wrong argument, DataError for a missing file,
    FileFormatError for one that is no such table, IntegrityError for another checksum, ServiceError for a failed download.
    """
    if species is not None and species not in PREFIXES:
        raise ConfigError(f"no species {species!r}; known: {', '.join(PREFIXES)}")
    given = [parse(name, data, species) for name, data in read_source(source, sha256)]
    genes: dict[str, Given] = {}
    for one in given:
        if one.kind == "genes":
            if one.species in genes:
                raise DataError(f"{genes[one.species].name} and {one.name} are both {one.species} gene tables; install one of them")
            genes[one.species] = one
    aliases = _aliases_by_species([one for one in given if one.kind == "aliases"], genes, species)
    return [_install(name, genes.get(name), aliases.get(name)) for name in sorted({*genes, *aliases})]


def read_source(source: str, sha256: str | None) -> list[tuple[str, bytes]]:
    """(name, bytes) of every table file meant: the address, the file, or the folder's files that are named like one."""
    if "://" in source:
        return [(source.rsplit("/", 1)[-1] or source, checked(source, download(source), sha256))]
    path = Path(source)
    if path.is_file():
        return [(path.name, checked(source, _limited(path), sha256))]
    if not path.is_dir():
        raise DataError(f"{source}: no such file or folder; give a table file, a folder of them, or an https address")
    if sha256 is not None:
        raise ConfigError(f"a sha256 belongs to one file, but {source} is a folder; install its files one by one")
    found = [file for file in sorted(path.iterdir()) if file.name.endswith(TABLE_SUFFIXES)]
    if not found:
        raise DataError(f"{source} holds no table; expected files ending in {', '.join(TABLE_SUFFIXES)}")
    return [(file.name, _limited(file)) for file in found]


def _limited(path: Path) -> bytes:
    if (size := path.stat().st_size) > MAX_BYTES:
        raise FileFormatError(f"{path} has {size} bytes; a gene table has at most {MAX_BYTES}")
    return path.read_bytes()


def checked(name: str, data: bytes, sha256: str | None) -> bytes:
    """The bytes themselves; IntegrityError when they do not have the promised sha256."""
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256.lower():
        raise IntegrityError(f"{name} has sha256 {found}, expected {sha256}: download it again, or ask who told the checksum")
    return data


def download(address: str) -> bytes:
    """What an https address gives, at most MAX_BYTES. ConfigError for another scheme, ServiceError when it cannot be had."""
    if not address.startswith("https://"):
        raise ConfigError(f"{address}: tables are downloaded through https only; give an https address or a file")
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_S) as answer:
            if not answer.geturl().startswith("https://"):
                raise ServiceError(f"{address} leads away from https to {answer.geturl()}; download the file and install it from disk")
            data: bytes = answer.read(MAX_BYTES + 1)
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        raise ServiceError(f"{address} cannot be downloaded: {error}; download it elsewhere and install it from disk") from error
    if len(data) > MAX_BYTES:
        raise FileFormatError(f"{address} gives more than {MAX_BYTES} bytes, the most a gene table has")
    return data


def parse(name: str, data: bytes, species: str | None = None) -> Given:
    """A table recognised by its content; FileFormatError when it is none, DataError when it is another species' than asked."""
    text = _text(name, data)
    first = text.split("\n", 1)[0].rstrip("\r")
    digest = hashlib.sha256(data).hexdigest()
    if tuple(first.split("\t")[:2]) == ALIAS_COLUMNS:
        frame = _frame(name, text, "\t", None)[list(ALIAS_COLUMNS)].set_axis(["alias", "approved"], axis=1)
        return Given(name, digest, "aliases", species or "", frame)
    separator = "," if first.count(",") >= first.count("\t") else "\t"
    if not first.startswith("ENS") or len(first.split(separator)) != len(GENE_COLUMNS):
        raise FileFormatError(
            f"{name} is no gene table: its first line is {first[:60]!r}; expected lines of {', '.join(GENE_COLUMNS)} "
            f"(GENCODE) or a header {' '.join(ALIAS_COLUMNS)} (HGNChelper)"
        )
    frame = _frame(name, text, separator, list(GENE_COLUMNS))
    return Given(name, digest, "genes", _species(name, frame, species), frame.assign(coding=frame["biotype"] == CODING))


def _text(name: str, data: bytes) -> str:
    try:
        if data.startswith(b"\x1f\x8b"):
            with gzip.open(io.BytesIO(data)) as file:
                data = file.read(4 * MAX_BYTES + 1)
        if len(data) > 4 * MAX_BYTES:
            raise FileFormatError(f"{name} unpacks to more than {4 * MAX_BYTES} bytes; no gene table is that large")
        return data.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise FileFormatError(f"{name} cannot be read as text: {error}; it is cut short or no table: get it again") from error


def _frame(name: str, text: str, separator: str, columns: Sequence[str] | None) -> pd.DataFrame:
    header, names = (0, None) if columns is None else (None, list(columns))
    try:
        frame: pd.DataFrame = pd.read_csv(
            io.StringIO(text), sep=separator, dtype=str, keep_default_na=False, quoting=csv.QUOTE_NONE, header=header, names=names
        )
        return frame
    except (ValueError, pd.errors.ParserError) as error:
        raise FileFormatError(f"{name} is no table: {error}; get it again from its source") from error


def _species(name: str, frame: pd.DataFrame, asked: str | None) -> str:
    ids = frame["id"].str.extract(r"^(ENS[A-Z]*G)\d+$")[0]
    found = [species for species, prefix in PREFIXES.items() if (ids == prefix).all()]
    if not found:
        kinds = sorted(set(ids.fillna("no Ensembl id")))[:4]
        raise FileFormatError(f"{name} holds ids of the kinds {kinds}; expected one of {', '.join(PREFIXES.values())} throughout")
    if asked not in (None, found[0]):
        raise DataError(f"{name} holds {found[0]} genes ({PREFIXES[found[0]]}), but --species {asked} was asked for")
    if frame["id"].duplicated().any():
        raise FileFormatError(f"{name} names {frame['id'][frame['id'].duplicated()].iloc[0]} twice; ids must be unique")
    return found[0]


def _aliases_by_species(given: Sequence[Given], genes: Mapping[str, Given], asked: str | None) -> dict[str, Given]:
    installed = installed_tables()
    named = {species: frozenset(table.symbols[table.symbols != table.ids]) for species, table in installed.items()}
    named |= {species: frozenset(one.frame.loc[one.frame["symbol"] != one.frame["id"], "symbol"]) for species, one in genes.items()}
    found: dict[str, Given] = {}
    for one in given:
        approved = set(one.frame["approved"])
        shares = {species: len(symbols & approved) / max(len(symbols), 1) for species, symbols in named.items()}
        best = max(shares, key=lambda species: shares[species], default=None)
        if best is None or shares[best] < OWN_SYMBOLS or asked not in (None, best):
            seen = ", ".join(f"{share:.0%} of the {species} symbols" for species, share in shares.items()) or "no gene table yet"
            raise DataError(f"{one.name} belongs to no installed gene table ({seen}); install that species' gene table first, or with it")
        if best in found:
            raise DataError(f"{found[best].name} and {one.name} are both {best} symbol tables; install one of them")
        found[best] = one
    return found


def _install(species: str, genes: Given | None, aliases: Given | None) -> dict[str, Any]:
    """Writes a species' table; what is not given stays as installed."""
    sources = {kind: TableSource(kind, one.name, one.sha256) for kind, one in (("genes", genes), ("aliases", aliases)) if one is not None}
    before = next((manifest for manifest in table_manifests() if manifest["species"] == species), None)
    if before is not None and len(sources) == 1:
        sources = {entry["kind"]: TableSource(entry["kind"], entry["name"], entry["sha256"]) for entry in before["sources"]} | sources
    fingerprint = hashlib.sha256("\n".join(sources[kind].sha256 for kind in sorted(sources)).encode()).hexdigest()
    table = installed_tables().get(species)
    if genes is not None:
        gene_frame = genes.frame
    else:
        assert table is not None  # _aliases_by_species found it
        gene_frame = pd.DataFrame({"id": table.ids, "symbol": table.symbols, "coding": table.coding})
    if aliases is not None:
        alias_frame = aliases.frame
    elif table is not None:
        alias_frame = pd.DataFrame({"alias": table.aliases, "approved": table.approved})
    else:
        alias_frame = pd.DataFrame({"alias": [], "approved": []}, dtype=str)
    return write_table(make_table(species, gene_frame, alias_frame, fingerprint), list(sources.values()))
