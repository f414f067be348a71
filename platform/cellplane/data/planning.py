"""What a conversion will do, decided before any shard is written.

Looks at every source once (its fingerprint, where its counts are, its genes, samples and labels), fixes the vocabulary
and deals the sentences to shards. Everything follows from the sources and the configuration alone; data sets come one
after another and names are numbered by first appearance, so adding a file leaves the shards of the others as they are.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellplane.config import to_plain
from cellplane.data.columns import Names, as_names, missing_column
from cellplane.data.config import UNLABELLED, ConvertConfig, DataKeys
from cellplane.data.files import storage_errors
from cellplane.data.gene_mapping import GeneRules
from cellplane.data.gene_tables import installed_tables
from cellplane.data.guard import check_source
from cellplane.data.inputs import find_inputs, source_sha256
from cellplane.data.looking import look
from cellplane.data.manifest import FORMAT_VERSION, parse_vocabulary
from cellplane.data.naming import best_naming, default_naming, gene_namings, lacking_genes
from cellplane.data.order import sentence_patches, sentence_rows, sentence_runs
from cellplane.data.reader import CellReader
from cellplane.data.shards import choose_encoding
from cellplane.data.tasks import RangeTask, ShardTask, SourceTask, TableTask, safe_name, stamp_of
from cellplane.data.tasks import task_json as task_json
from cellplane.data.work import cut_spans
from cellplane.errors import ColumnError, ConfigError, DataError, VocabularyError, about
from cellplane.genes import GeneAlignment, GeneVocabulary, namespace_of

BYTES_PER_ENTRY, BYTES_PER_CELL = 3, 40
RANGE_BYTES = 32 * 1024**2  # encoded cells of a run
READ_TWICE = 1.5  # times the rows: a source that would be read more often than this takes the way through runs
LEFT_OUT = ("obsm", "varm", "obsp", "varp")
SHARD_NAME = re.compile(r".+-\d{5}-[0-9a-f]{12}\.arrow")
TABLE_NAME = re.compile(r"(obs|var)-.+-[0-9a-f]{12}\.parquet")


@dataclass(frozen=True)
class Source:
    """One input as it was found. ``stamp`` (size, mtime in ns) must still hold when it is read; arrays are per cell [n]."""

    name: str
    path: Path
    stamp: tuple[int, int]
    sha256: str
    place: str
    recovered: bool
    encoding: str
    layout: tuple[str, str, str]  # csr, csc or dense; type of values; type of column indices
    namings: dict[str, list[str]]
    entries: NDArray[np.float64]  # stored values of each cell, estimated where the file does not tell
    batch: Names | None
    labels: Names | None
    groups: Names | None  # what sentences do not cross: sample and field of view
    coordinates: NDArray[np.float32] | None
    left_out: str  # what else the file has, and shards do not keep

    @property
    def cells(self) -> int:
        """Number of cells."""
        return len(self.entries)

    @property
    def stored(self) -> NDArray[np.float64]:
        """Bytes each cell takes in a shard, [n]."""
        value = np.dtype(self.encoding).itemsize
        return (BYTES_PER_ENTRY - 1 + value) * self.entries + BYTES_PER_CELL


@dataclass(frozen=True)
class Plan:
    """All of a conversion. ``tasks`` are the shards; ``ranges`` by data set are what must be there before them."""

    sources: tuple[Source, ...]
    vocabulary: GeneVocabulary
    alignments: tuple[GeneAlignment, ...]
    batch_names: tuple[str, ...]
    label_names: tuple[str, ...]
    tasks: tuple[ShardTask, ...]
    ranges: tuple[tuple[RangeTask, ...], ...]
    tables: tuple[TableTask, ...]


def make_plan(
    config: ConvertConfig,
    staging: Path,
    progress: Callable[[str], None],
    known: Sequence[str] = (),
    real: frozenset[str] = frozenset(),
) -> Plan:
    """Look at the sources and deal their sentences to shards; arrays the workers need are put into ``staging``.

    Data sets of the names ``known`` come first, in that order; those of ``real`` hold values that are not whole.
    """
    sources = []
    names_of_genes: dict[str, list[str]] = {}
    for name, path in ordered_inputs(config, known):
        progress(f"looking at {path}")
        with about(path):
            source = inspect_source(path, name, config, staging)
        source = replace(source, namings=_shared(source.namings, names_of_genes))
        sources.append(_as_real(source) if name in real else source)
    vocabulary, n_known = _vocabulary(config, sources)
    alignments = tuple(_align(source, vocabulary, config.keys) for source in sources)
    names: tuple[list[str], list[str]] = ([], [])
    tasks, ranges, tables = [], [], []
    for index, source in enumerate(sources):
        dealt = _deal(config, source, names)
        folder, digests = _save_arrays(staging, source, {**dealt, "positions": alignments[index].positions})
        genes = vocabulary.gene_ids[: n_known[index]]
        work = _source_task(config, source, (staging, folder), len(genes))
        own = _range_tasks(source, work, staging, digests) if _takes_runs(source, dealt, config) else ()
        facts = {"batches": names[0], "labels": names[1], "dataset": index, **_settings(config)}
        facts |= {"genes": genes, "positions": digests["positions"]}  # an id table moves genes without changing their list
        tasks += list(_shard_tasks(source, work, (staging, dealt), facts, own))
        ranges.append(own)
        tables += _table_tasks(source, work, staging, digests["positions"])
    return Plan(tuple(sources), vocabulary, alignments, tuple(names[0]), tuple(names[1]), tuple(tasks), tuple(ranges), tuple(tables))


def _shared(namings: Mapping[str, list[str]], seen: dict[str, list[str]]) -> dict[str, list[str]]:
    """The same lists of genes, each kept once for all sources that have it: hundreds of files of one panel are the rule."""
    digests = {key: hashlib.sha256("\n".join(names).encode()).hexdigest() for key, names in namings.items()}
    return {key: seen.setdefault(digest, namings[key]) for key, digest in digests.items()}


def ordered_inputs(config: ConvertConfig, known: Sequence[str] = ()) -> list[tuple[str, Path]]:
    """(name, path) of every input, ``known`` names first; ConfigError when two have one name or names do not fit."""
    paths = find_inputs(config.inputs)
    names = config.datasets or tuple(path.stem for path in paths)
    if len(names) != len(paths):
        raise ConfigError(f"{len(names)} dataset names for {len(paths)} inputs: give one each, or none")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two data sets are called {twice[0]!r}; give every input a name of its own in `datasets`")
    place = {name: number for number, name in enumerate(known)}
    return sorted(zip(names, paths, strict=True), key=lambda item: place.get(item[0], len(place)))


def check_inputs(config: ConvertConfig) -> None:
    """What can be told of the inputs in a moment, before a cluster is started for nothing: that they are there, with their columns."""
    keys = config.keys
    for _, path in ordered_inputs(config):
        with CellReader(path) as reader:
            asked = {"obs": (keys.batch_key, keys.labels_key, config.fov_key), "obsm": (keys.spatial_key,)}
            for place, known in (("obs", reader.obs_columns), ("obsm", reader.obsm_keys)):
                for key in asked[place]:
                    if key is not None and key not in known:
                        raise ColumnError(f"{path}: {missing_column(key, known, place)}")


def inspect_source(path: Path, name: str, config: ConvertConfig, staging: Path) -> Source:
    """Everything about a file but its counts. Errors name the file (see `guard.check_source` and `counts.choose`)."""
    keys = config.keys
    check_source(path)
    stamp = stamp_of(path)
    with CellReader(path, _scratch(staging, name, stamp)) as reader:
        if reader.n_cells == 0:
            raise DataError(f"{path} has no cells; there is nothing to convert")
        place, recovered, sample = look(reader, config.keys, any_values=config.values == "any")
        matrix, lengths = reader.matrix(place), reader.entries_per_row(place)
        batch = None if keys.batch_key is None else _complete(as_names(reader.obs(keys.batch_key)), keys.batch_key)
        fov = None if config.fov_key is None else _complete(as_names(reader.obs(config.fov_key)), config.fov_key)
        return Source(
            name=name,
            path=path,
            stamp=stamp,
            sha256=source_sha256(path, config.full_hash),
            place=place,
            recovered=recovered,
            encoding=choose_encoding([sample.data]),
            layout=(matrix.layout, str(matrix.dtype), str(matrix.index_dtype)),
            namings=gene_namings(reader.var(place)),
            entries=np.full(reader.n_cells, sample.nnz / sample.shape[0]) if lengths is None else lengths.astype(np.float64),
            batch=batch,
            labels=None if keys.labels_key is None else labelled(as_names(reader.obs(keys.labels_key))),
            groups=_crossed(batch, fov),
            coordinates=None if keys.spatial_key is None else reader.coordinates(keys.spatial_key),
            left_out=_left_out(reader, place, keys.spatial_key),
        )


def _left_out(reader: CellReader, place: str, spatial_key: str | None) -> str:
    """Names of what an AnnData has beside the counts at ``place``, their tables and the coordinates."""
    parts = {part: [name for name in reader.entries(part) if (part, name) != ("obsm", spatial_key)] for part in LEFT_OUT}
    places = [other for other in reader.places if other != place]
    named = [f"{part}[{name!r}]" for part, names in parts.items() for name in names]
    return ", ".join([*places, *named, *(["uns"] if reader.entries("uns") else [])])


def _scratch(staging: Path, name: str, stamp: tuple[int, int]) -> Path:
    """Where a column-wise matrix is turned: another place for a file that was replaced since a run that was killed."""
    return staging / "columns" / f"{safe_name(name)}-{stamp[0]}-{stamp[1]}"


def labelled(names: Names) -> Names:
    """The labels without the texts that mean none, as everywhere else: "nan" is never a class."""
    kept = tuple(name for name in names.names if name not in UNLABELLED)
    place = {name: position for position, name in enumerate(kept)}
    return Names(kept, np.array([*(place.get(name, -1) for name in names.names), -1], dtype=np.int32)[names.codes])


def _complete(names: Names, key: str) -> Names:
    if missing := int((names.codes < 0).sum()):
        raise DataError(
            f"{missing} of {len(names.codes)} cells have no value in obs[{key!r}]; every cell needs its sample: fill or drop them"
        )
    return names


def _crossed(batch: Names | None, fov: Names | None) -> Names | None:
    if batch is None or fov is None:
        return batch or fov
    pairs, codes = np.unique(batch.codes.astype(np.int64) * len(fov.names) + fov.codes, return_inverse=True)
    names = tuple(f"{batch.names[pair // len(fov.names)]}\x1f{fov.names[pair % len(fov.names)]}" for pair in pairs.tolist())
    return Names(names, codes.astype(np.int32))


def _as_real(source: Source) -> Source:
    return replace(source, encoding="float32" if source.layout[1] in ("float16", "float32") else "float64")


def _vocabulary(config: ConvertConfig, sources: Sequence[Source]) -> tuple[GeneVocabulary, list[int]]:
    """The vocabulary, and for each source how many of its genes were known once that source was added."""
    if config.vocabulary is not None:
        vocabulary = parse_vocabulary(Path(config.vocabulary))
        return vocabulary, [len(vocabulary)] * len(sources)
    genes: dict[str, None] = {}
    known, schemes = [], {}
    for source in sources:
        with about(source.path):
            ids = default_naming(source.namings, config.keys.repeated_genes)
        schemes[source.name] = namespace_of(ids)
        genes |= dict.fromkeys(lacking_genes(ids, tuple(genes)))
        known.append(len(genes))
    refuse_mixed_names(schemes)
    return GeneVocabulary.from_ids(genes), known


def refuse_mixed_names(schemes: Mapping[str, str]) -> None:
    """VocabularyError when data sets name their genes in different schemes (by data set) and no id table joins them."""
    if len({scheme == "symbol" for scheme in schemes.values()}) > 1 and not installed_tables():
        told = ", ".join(f"{name}: {scheme}" for name, scheme in schemes.items())
        raise VocabularyError(f"the inputs name their genes differently ({told}); install an id table, or give a vocabulary")


def _align(source: Source, vocabulary: GeneVocabulary, keys: DataKeys) -> GeneAlignment:
    rules = GeneRules(keys.repeated_genes, keys.ignore_gene_case)
    with about(source.path):
        return best_naming(source.namings, vocabulary, rules)[1]


def _deal(config: ConvertConfig, source: Source, names: tuple[list[str], list[str]]) -> dict[str, NDArray[Any]]:
    """The arrays of a source: its rows in the order of the sentences, the edges between those, names by position."""
    codes = None if source.groups is None else source.groups.codes
    group_names = () if source.groups is None else source.groups.names
    if config.order == "file":
        rows, edges = sentence_runs(codes, source.cells, config.max_cells)
    elif source.coordinates is not None:
        rows, edges = sentence_patches(codes, source.coordinates, config.max_cells)
    else:
        rows, edges = sentence_rows(codes, group_names, source.cells, config.max_cells, config.seed)
    place = np.empty(source.cells, dtype=np.int64)
    place[rows] = np.arange(source.cells)
    samples = source.batch or Names((source.name,), np.zeros(source.cells, dtype=np.int32))
    prefix = "" if source.batch is None else f"{source.name}/"
    labels = source.labels or Names((), np.full(source.cells, -1, dtype=np.int32))
    return {
        "rows": rows,
        "edges": edges,
        "place": place,
        "stored": source.stored[rows].astype(np.float32),
        "batch": _extend(names[0], samples, prefix),
        "label": _extend(names[1], labels, ""),
        **({} if source.coordinates is None else {"coordinates": source.coordinates}),
    }


def _extend(names: list[str], own: Names, prefix: str) -> NDArray[np.int32]:
    """Add the names to the list and return each cell's position in it."""
    there = {name: position for position, name in enumerate(names)}
    for name in own.names:
        if prefix + name not in there:
            there[prefix + name] = len(names)
            names.append(prefix + name)
    return np.array([*(there[prefix + name] for name in own.names), -1], dtype=np.int32)[own.codes]


def _save_arrays(staging: Path, source: Source, arrays: dict[str, NDArray[Any]]) -> tuple[Path, dict[str, str]]:
    """Put the per-cell arrays where every worker can map them: only descriptors travel through Ray. Their folder and sha256."""
    folder = staging / "plan" / safe_name(source.name)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.npy"):
            old.unlink()
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array, allow_pickle=False)
    return folder, {name: hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() for name, array in arrays.items()}


def _source_task(config: ConvertConfig, source: Source, folders: tuple[Path, Path], n_genes: int) -> SourceTask:
    return SourceTask(
        path=str(source.path.absolute()),
        stamp=source.stamp,
        place=source.place,
        recovered=source.recovered,
        arrays=str(folders[1]),
        scratch=str(_scratch(folders[0], source.name, source.stamp)),
        n_genes=n_genes,
        encoding=source.encoding,
        counts=config.values == "counts",
    )


def _takes_runs(source: Source, dealt: dict[str, NDArray[Any]], config: ConvertConfig) -> bool:
    """Whether reading the spans of all shards straight from the source would read its rows too often."""
    if source.recovered:  # the deviation of a shard is that of the rows read for it
        return False
    read = 0
    for first, end in _spans(source, dealt, config.shard_bytes):
        edges = dealt["edges"][first : end + 1]
        for span in cut_spans(edges, dealt):
            rows = dealt["rows"][edges[span[0]] : edges[span[-1] + 1]]
            read += int(rows.max() - rows.min()) + 1
    small = float(source.stored.sum()) <= RANGE_BYTES
    return read > READ_TWICE * source.cells and not small


def _spans(source: Source, dealt: dict[str, NDArray[Any]], shard_bytes: int) -> list[tuple[int, int]]:
    """(first sentence, end) of every shard: filled until it would exceed the bytes aimed for."""
    sizes = np.diff(np.concatenate([[0.0], np.cumsum(source.stored[dealt["rows"]])])[dealt["edges"]])
    edges, filled = [0], 0.0
    for index, size in enumerate(sizes.tolist()):
        if filled and filled + size > shard_bytes:
            edges.append(index)
            filled = 0.0
        filled += size
    edges.append(len(sizes))
    return list(itertools.pairwise(edges))


def _range_tasks(source: Source, work: SourceTask, staging: Path, digests: dict[str, str]) -> tuple[RangeTask, ...]:
    """The source's rows in ranges of some tens of MB, one row at least."""
    facts = [source.name, source.sha256, work.place, work.encoding, work.n_genes, work.counts, digests["place"], digests["positions"]]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    filled = np.cumsum(source.stored)
    cuts = np.concatenate([[0], np.flatnonzero(np.diff(filled // RANGE_BYTES) > 0) + 1, [source.cells]])
    return tuple(
        RangeTask(f"runs/{safe_name(source.name)}-{start:012d}-{key}.run", str(staging), work, start, stop)
        for start, stop in itertools.pairwise(cuts.tolist())
    )


def _settings(config: ConvertConfig) -> dict[str, Any]:
    plain = to_plain(config)
    return {key: plain[key] for key in ("keys", "max_cells", "seed", "shard_bytes", "values", "order", "fov_key")}


def _shard_tasks(
    source: Source, work: SourceTask, folders: tuple[Path, dict[str, NDArray[Any]]], facts: dict[str, Any], ranges: tuple[RangeTask, ...]
) -> Iterator[ShardTask]:
    """The tasks of the shards, each name made from everything that decides the file's bytes."""
    staging, dealt = folders
    genes: tuple[str, ...] = facts.pop("genes")
    runs = re.sub(r"-\d{12}-", "-*-", ranges[0].name) if ranges else ""
    for number, span in enumerate(_spans(source, dealt, facts["shard_bytes"])):
        edges = dealt["edges"][span[0] : span[1] + 1]
        rows = dealt["rows"][edges[0] : edges[-1]]
        metadata = {
            "vocabulary_genes": str(len(genes)),
            "vocabulary_sha256": hashlib.sha256("\n".join(genes).encode()).hexdigest(),
            "source": source.name,
            "source_size": str(source.stamp[0]),
            "source_sha256": source.sha256,
            "count_source": source.place,
            "cells": str(len(rows)),
        }
        cells = hashlib.sha256()
        for array in (rows, edges, *(dealt[name][rows] for name in ("batch", "label", "coordinates") if name in dealt)):
            cells.update(np.ascontiguousarray(array).data)
        everything = {**facts, **metadata, "number": number, "span": span, "array": cells.hexdigest(), "format": FORMAT_VERSION}
        everything |= {"recovered": source.recovered, "encoding": source.encoding}
        key = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:12]
        name = f"{safe_name(source.name)}-{number:05d}-{key}.arrow"
        yield ShardTask(name, str(staging.parent), str(staging), work, facts["dataset"], span[0], span[1], runs, len(ranges), metadata)


def _table_tasks(source: Source, work: SourceTask, staging: Path, positions: str) -> list[TableTask]:
    keys = {"obs": [source.sha256], "var": [source.sha256, source.place, positions]}
    digests = {part: hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12] for part, key in keys.items()}
    return [
        TableTask(f"{part}-{safe_name(source.name)}-{digest}.parquet", str(staging.parent), str(staging), work, part)  # type: ignore[arg-type]
        for part, digest in digests.items()
    ]
