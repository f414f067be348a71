"""Everything that would go wrong with a file, before it does: counts, genes, samples, labels, positions, size.

Errors are what a conversion with the same configuration would fail on, found by the same functions; warnings are what
it would accept and a person may regret. Columns that no key names are looked for under their usual names and only
warned about. Cells are read in row ranges: a file of any size needs little memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellplane.data.columns import as_names, missing_column
from cellplane.data.config import ConvertConfig, DataKeys
from cellplane.data.counts import choose, describe
from cellplane.data.gene_mapping import GeneRules, count_shares, gene_namings, species_of
from cellplane.data.gene_tables import installed_tables
from cellplane.data.looking import sample
from cellplane.data.manifest import parse_vocabulary
from cellplane.data.naming import best_naming, default_naming
from cellplane.data.planning import labelled, ordered_inputs, refuse_mixed_names
from cellplane.data.quality import Scan, few_genes, high_totals, quantiles, repeated_cells, scan, spacing
from cellplane.data.reader import CellReader, count_candidates
from cellplane.errors import ColumnError, DataError
from cellplane.genes import GeneVocabulary, namespace_of, without_version

BATCH_NAMES = ("batch", "donor_id", "donor", "sample", "sample_id")
LABEL_NAMES = ("cell_type", "celltype", "label", "labels")
RARE_CELLS = 10  # a class below this can hardly be learned, let alone be split
SHOWN_GROUPS = 50
MANY_DOUBLETS, MANY_POOR = 0.05, 0.1  # shares of cells that are worth a warning
SAME_TOTALS = 0.5  # share of cells with the commonest total: more means that they were made equal
NEAREST_UM = (5.0, 30.0)  # median distance of neighbouring cells in tissue
TYPICAL_UM = 12.0
BYTES_PER_ENTRY, BYTES_PER_CELL = 3, 40  # of a shard (SHARDS.md)
ENTRIES_PER_S, GZIP_ENTRIES_PER_S = 54e6, 27e6  # a CPU: 40 k and 20 k cells of 1,350 entries (SHARDS.md)


@dataclass
class Validation:
    """What was found in a file; every value is JSON-ready, sections are empty where nothing could be looked at.

    A file that is not ``readable`` (missing, damaged, of another kind) has one error, and None for cells in `plain`.
    ``places`` are the matrices, ``counts`` the one that would be used, ``genes`` how its columns are named and map,
    ``columns`` batch and labels, ``spatial`` the positions, ``estimate`` the shards. ``errors`` would stop a conversion.
    """

    path: str
    readable: bool = False
    cells: int = 0
    places: dict[str, dict[str, Any]] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    genes: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    spatial: dict[str, Any] = field(default_factory=dict)
    estimate: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether a conversion would succeed."""
        return not self.errors

    def plain(self) -> dict[str, Any]:
        """All of it as one JSON-ready mapping, the verdict first."""
        return {"ok": self.ok, **asdict(self), "cells": self.cells if self.readable else None}

    @contextmanager
    def noting(self, into: list[str]) -> Iterator[None]:
        """What is wrong with the data inside the block is noted, not raised."""
        try:
            yield
        except DataError as error:
            into.append(str(error).removeprefix(f"{self.path}: "))


@dataclass(frozen=True)
class Verdict:
    """What was found in every input, by itself, and the ``errors`` that only show when they are taken together."""

    files: tuple[Validation, ...]
    errors: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether a conversion would succeed."""
        return not self.errors and all(found.ok for found in self.files)

    def plain(self) -> dict[str, Any]:
        """JSON-ready: of a single file as that file's, else with the ``files`` as a list."""
        if len(self.files) == 1:
            return self.files[0].plain()
        return {"ok": self.ok, "errors": list(self.errors), "files": [found.plain() for found in self.files]}


def validate_inputs(config: ConvertConfig, progress: Callable[[str, int, int], None] | None = None) -> Verdict:
    """`validate` of every input of a conversion, and whether they go together.

    ``progress`` hears (file, its cells read, all its cells). Raises ConfigError for names that do not fit the inputs,
    DataError for a folder, glob or URL that means nothing.
    """
    files = []
    for name, path in ordered_inputs(config):
        own = config.model_copy(update={"inputs": (str(path),), "datasets": (name,)})
        files.append(validate(own, None if progress is None else partial(progress, path.name)))
    errors: list[str] = []
    if config.vocabulary is None:
        try:
            refuse_mixed_names({found.path: found.genes["namespace"] for found in files if "namespace" in found.genes})
        except DataError as error:
            errors.append(str(error))
    return Verdict(tuple(files), tuple(errors))


def validate(config: ConvertConfig, progress: Callable[[int, int], None] | None = None) -> Validation:
    """Look at the first input of a conversion as the conversion would; nothing is written, and no bad data raise.

    ``progress`` hears (cells read, all cells). Raises ConfigError for an unreadable vocabulary file.
    """
    path = Path(config.inputs[0])
    found = Validation(str(path))
    with found.noting(found.errors), CellReader(path) as reader:
        found.cells = reader.n_cells
        found.readable = True
        if reader.n_cells == 0:
            found.errors.append("no cells; there is nothing to convert")
            return found
        _look_at_places(found, reader)
        groups = _look_at_columns(found, reader, config)
        _look_at_positions(found, reader, config.keys, groups)
        _look_at_counts(found, reader, config, lambda done: None if progress is None else progress(done, reader.n_cells))
        if repeated := repeated_cells(reader):
            found.warnings.append(f"{repeated} cells have the name of another one; they are told apart by position only")
    return found


def _look_at_places(found: Validation, reader: CellReader) -> None:
    """What each matrix holds, judged by a sample of its rows."""
    for place in sorted(reader.places):
        seen: list[str] = []
        with found.noting(seen):
            matrix, rows = reader.matrix(place), sample(reader, place)
            found.places[place] = {"layout": matrix.layout, "dtype": str(matrix.dtype), "genes": matrix.shape[1]}
            seen.append(describe(rows, place) or "counts")
            finite = rows.data[np.isfinite(rows.data)] if rows.data.dtype.kind == "f" else rows.data
            if len(finite):
                whole = float((finite == np.rint(finite)).mean()) if finite.dtype != bool else 1.0
                found.places[place] |= {"integer_share": whole, "smallest": float(finite.min()), "largest": float(finite.max())}
        found.places.setdefault(place, {})["holds"] = seen[0]


def _look_at_counts(found: Validation, reader: CellReader, config: ConvertConfig, progress: Callable[[int], None]) -> None:
    """The counts a conversion would take, all of them, and their genes."""
    keys = config.keys
    with found.noting(found.errors):
        if config.values == "any":
            place = count_candidates(keys, reader.places)[-1]
            if place not in reader.places:
                raise ColumnError(f"no {place}; this file has {', '.join(sorted(reader.places)) or 'no matrix at all'}")
            found.counts = {"place": place, "recovered": False}
            found.warnings.append(f"values=any: {place} is stored as it stands, whether counts or not; its cells were not looked at")
            return
        load = {place: (lambda place=place: sample(reader, place)) for place in reader.places}
        candidates = [(place, load.get(place, lambda: None)) for place in count_candidates(keys, reader.places)]
        choice = choose(candidates, keys.recover_counts, None, tuple(reader.places))
        result = scan(reader, choice.place, choice.recovered, progress)
        found.counts = {"place": choice.place, "recovered": choice.recovered, "largest_deviation": result.deviation}
        if result.wrong is not None:
            raise DataError(f"{result.wrong}; use raw counts")
        _judge_cells(found, result)
        _estimate(found, reader, choice.place, result, config.shard_bytes)
        _look_at_genes(found, reader.var(choice.place), result, config)


def _judge_cells(found: Validation, result: Scan) -> None:
    floor, poor = few_genes(result.detected, len(result.gene_totals))
    doublets, empty = high_totals(result.totals), int((result.totals == 0).sum())
    commonest = float(np.unique(result.totals, return_counts=True)[1].max() / len(result.totals))
    found.counts |= {
        "entries": result.entries,
        "largest": result.largest,
        "library_size": quantiles(result.totals),
        "genes_per_cell": quantiles(result.detected),
        "empty_cells": empty,
        "doublet_like_share": doublets,
        "few_genes_floor": floor,
        "few_genes_share": poor,
    }
    hints = (
        (empty > 0, f"{empty} cells have no counts at all; they carry no information: drop them"),
        (doublets > MANY_DOUBLETS, f"{doublets:.1%} of the cells have far more counts than the others: doublets?"),
        (poor > MANY_POOR, f"{poor:.1%} of the cells show fewer than {floor} genes: empty droplets or a shallow experiment?"),
        (
            commonest > SAME_TOTALS and len(result.totals) >= RARE_CELLS and empty < len(result.totals) / 2,
            f"{commonest:.1%} of the cells have the same total: counts were made equal or rounded after normalising",
        ),
    )
    found.warnings += [text for applies, text in hints if applies]


def _estimate(found: Validation, reader: CellReader, place: str, result: Scan, shard_bytes: int) -> None:
    """Bytes on disk, shards and CPU seconds of a conversion, from the entries it has to move."""
    node = reader.places[place]
    stored = node["data"] if hasattr(node, "keys") else node
    packed = bool(getattr(stored, "compression", None))
    size = BYTES_PER_ENTRY * result.entries + BYTES_PER_CELL * found.cells
    seconds = result.entries / (GZIP_ENTRIES_PER_S if packed else ENTRIES_PER_S)
    found.estimate = {
        "bytes": size,
        "shards": -(-size // shard_bytes),
        "cpu_s": round(seconds, 2),
        "compressed_source": packed,
        "source_bytes": _size(reader.path),
    }


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size


def _look_at_genes(found: Validation, var: Any, result: Scan, config: ConvertConfig) -> None:
    """How the genes are named, and which of them a vocabulary (else the installed table of their species) knows."""
    namings = gene_namings(var)
    names = list(var.index.astype(str))
    repeated = len(names) - len(set(names))
    seen = int((result.gene_totals > 0).sum())
    found.genes = {"genes": len(names), "seen": seen, "namings": sorted(namings), "repeated_names": repeated}
    ids = default_naming(namings, config.keys.repeated_genes)
    naming = next(key for key in reversed(namings) if [without_version(name) for name in namings[key]] == ids)
    stripped = sum(written != used for written, used in zip(namings[naming], ids, strict=True))
    found.genes |= {"naming": naming, "namespace": namespace_of(ids), "versions_stripped": stripped, "summed": len(ids) - len(set(ids))}
    if repeated:
        found.warnings.append(f"{repeated} genes have the name of another one in var_names; {naming} tells them apart")
    if config.vocabulary is not None:
        _map(found, namings, result, config.keys, (parse_vocabulary(Path(config.vocabulary)), config.vocabulary))
        return
    tables = installed_tables()
    species = species_of(ids, tables)
    if (table := tables.get(species or "")) is not None:
        with found.noting(found.warnings):
            _map(found, namings, result, config.keys, (GeneVocabulary.from_ids(table.ids), f"the installed {species} table"))


def _map(found: Validation, namings: dict[str, list[str]], result: Scan, keys: DataKeys, target: tuple[GeneVocabulary, str]) -> None:
    vocabulary, name = target
    naming, alignment = best_naming(namings, vocabulary, GeneRules(keys.repeated_genes, keys.ignore_gene_case))
    shares = count_shares(alignment, result.gene_totals)
    found.genes |= {"vocabulary": name, "mapped_naming": naming, **alignment.report(), "count_shares": shares}
    if (lost := 1.0 - shares["mapped"] - shares["renamed"]) > MANY_POOR and result.entries:
        found.warnings.append(f"{lost:.1%} of all counts are of genes without a place in {name}")


def _look_at_columns(found: Validation, reader: CellReader, config: ConvertConfig) -> list[NDArray[np.int64]]:
    """Sizes of samples and classes; the cells of each sample."""
    everything = [np.arange(found.cells)]
    batch = _column(found, reader, "batch", config.keys.batch_key, BATCH_NAMES)
    _column(found, reader, "labels", config.keys.labels_key, LABEL_NAMES)
    _column(found, reader, "fov", config.fov_key, ())
    if batch is None:
        return everything
    order = np.argsort(batch, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(batch[order])) + 1)


def _column(found: Validation, reader: CellReader, role: str, key: str | None, usual: tuple[str, ...]) -> NDArray[np.int32] | None:
    known = reader.obs_columns
    name = key if key is not None else next((one for one in usual if one in known), None)
    if name is None:
        return None
    if name not in known:
        found.errors.append(missing_column(name, known))
        return None
    column = labelled(as_names(reader.obs(name))) if role == "labels" else as_names(reader.obs(name))
    sizes = np.bincount(column.codes[column.codes >= 0], minlength=len(column.names))
    missing = int((column.codes < 0).sum())
    largest = np.argsort(-sizes, kind="stable")[:SHOWN_GROUPS]
    rare = [column.names[group] for group in np.flatnonzero(sizes < RARE_CELLS)]
    found.columns[role] = {
        "key": name,
        "chosen": key is not None,
        "groups": len(column.names),
        "sizes": {column.names[group]: int(sizes[group]) for group in largest},
        "missing": missing,
        "rare": rare[:SHOWN_GROUPS],
        "n_rare": len(rare),
    }
    if missing and role != "labels":
        into = found.errors if key is not None else found.warnings
        into.append(f"{missing} of {found.cells} cells have no value in obs[{name!r}]; every cell needs its sample: fill or drop them")
    elif missing:
        found.warnings.append(f"{missing} of {found.cells} cells have no value in obs[{name!r}]; they count as unlabelled")
    if rare:
        found.warnings.append(
            f"{len(rare)} of {len(column.names)} groups of obs[{name!r}] have fewer than {RARE_CELLS} cells, e.g. {rare[:3]}"
        )
    return column.codes


def _look_at_positions(found: Validation, reader: CellReader, keys: DataKeys, groups: list[NDArray[np.int64]]) -> None:
    """The unit of the coordinates, told by how far neighbouring cells lie apart."""
    key = keys.spatial_key if keys.spatial_key is not None else "spatial"
    if keys.spatial_key is None and key not in reader.obsm_keys:
        return
    with found.noting(found.warnings if keys.spatial_key is None else found.errors):
        if key not in reader.obsm_keys:
            raise ColumnError(missing_column(key, reader.obsm_keys, "obsm"))
        distance, doubled = spacing(reader.coordinates(key), groups)
        found.spatial = {"key": key, "nearest_neighbour": distance if np.isfinite(distance) else None, "same_place_share": doubled}
        if not np.isfinite(distance):
            found.warnings.append(f"obsm[{key!r}]: all cells of a sample lie at one place, so positions say nothing")
        elif not NEAREST_UM[0] <= distance <= NEAREST_UM[1]:
            scale = _scale(distance)
            found.spatial["suggested_scale"] = scale
            seen = f"neighbouring cells lie {distance:.4g} apart (median), {NEAREST_UM[0]:.0f} to {NEAREST_UM[1]:.0f} micrometres are usual"
            guess = f"pixels, millimetres, or only some of the cells? times {scale:g} would bring them to {distance * scale:.0f}"
            found.warnings.append(f"obsm[{key!r}]: {seen}: {guess}")
        if doubled > 0:
            found.warnings.append(f"obsm[{key!r}]: {doubled:.1%} of the cells lie at the very place of another one")


def _scale(distance: float) -> float:
    """A factor to micrometres: that of millimetres where it fits, else the one that makes neighbours lie a cell apart."""
    if NEAREST_UM[0] <= distance * 1000 <= NEAREST_UM[1]:
        return 1000.0
    return float(f"{TYPICAL_UM / distance:.2g}")
