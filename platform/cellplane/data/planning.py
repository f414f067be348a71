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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from cellplane.config import to_plain
from cellplane.data.config import ConvertConfig, DataKeys
from cellplane.data.counts import Candidate, choose
from cellplane.data.naming import best_naming, default_naming, gene_namings
from cellplane.data.sentences import contexts
from cellplane.data.shards import FORMAT_VERSION, file_sha256, parse_vocabulary, storage_errors
from cellplane.data.sources import CellReader, as_strings, class_positions, complete, count_candidates
from cellplane.errors import CellplaneError, ConfigError, CountsNotFoundError, DataError, VocabularyError
from cellplane.genes import GeneAlignment, GeneVocabulary, namespace_of

SAMPLE_CELLS = 256  # read at the beginning, the middle and the end to see what a place holds; all are checked when written
BYTES_PER_ENTRY, BYTES_PER_CELL = 3, 40
SHARD_NAME = re.compile(r".+-\d{5}-[0-9a-f]{12}\.arrow")


@dataclass(frozen=True)
class Source:
    """One h5ad as it was found. ``stamp`` = (size, mtime in ns) must still hold when it is read; arrays are per cell [n]."""

    name: str
    path: Path
    stamp: tuple[int, int]
    sha256: str
    place: str
    recovered: bool
    namings: dict[str, list[str]]
    entries: NDArray[np.float64]  # stored values of each cell, estimated where the file does not tell
    batch: NDArray[np.object_] | None
    labels: NDArray[np.object_] | None
    coordinates: NDArray[np.float32] | None

    @property
    def cells(self) -> int:
        """Number of cells."""
        return len(self.entries)


@dataclass(frozen=True)
class Task:
    """One shard to write: plain values, so that it travels to any worker. ``arrays`` is a folder of the plan's arrays."""

    name: str
    out: str
    staging: str
    arrays: str
    path: str
    stamp: tuple[int, int]
    place: str
    recovered: bool
    dataset: int
    first_sentence: int
    end_sentence: int
    n_genes: int
    metadata: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """All of a conversion."""

    sources: tuple[Source, ...]
    vocabulary: GeneVocabulary
    alignments: tuple[GeneAlignment, ...]
    batch_names: tuple[str, ...]
    label_names: tuple[str, ...]
    tasks: tuple[Task, ...]


def make_plan(config: ConvertConfig, staging: Path, progress: Callable[[str], None]) -> Plan:
    """Look at the sources and deal their sentences to shards; arrays the workers need are put into ``staging``."""
    names = dataset_names(config)
    sources = []
    for name, text in zip(names, config.inputs, strict=True):
        progress(f"looking at {text}")
        sources.append(inspect_source(Path(text), name, config.keys))
    vocabulary, known = _vocabulary(config, sources)
    alignments = tuple(_align(source, vocabulary) for source in sources)
    batch_names: list[str] = []
    label_names: list[str] = []
    tasks: list[Task] = []
    for index, source in enumerate(sources):
        batch = _extend(batch_names, source.batch, source)
        label = _extend(label_names, source.labels, None)
        sentences = contexts(None if source.batch is None else list(source.batch), source.cells, config.max_cells, config.seed)
        folder = _save_arrays(staging, source, alignments[index], (sentences, batch, label))
        genes = vocabulary.gene_ids[: known[index]]
        facts = {"batches": batch_names, "labels": label_names, "dataset": index, **_settings(config)}
        tasks += [
            _task(source, span, (staging, folder), {**facts, "number": number, "genes": genes})
            for number, span in enumerate(_spans(source, sentences, config.shard_bytes))
        ]
    return Plan(tuple(sources), vocabulary, alignments, tuple(batch_names), tuple(label_names), tuple(tasks))


def dataset_names(config: ConvertConfig) -> tuple[str, ...]:
    """The names of the inputs: as given, else the files' own; ConfigError when two are the same."""
    names = config.datasets or tuple(Path(text).stem for text in config.inputs)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two data sets are called {twice[0]!r}; give every input a name of its own in `datasets`")
    return tuple(names)


def stamp_of(path: Path) -> tuple[int, int]:
    """Size and modification time: when both are the same, so is the file."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def inspect_source(path: Path, name: str, keys: DataKeys) -> Source:
    """Everything about a file but its counts. Errors name the file (see `sources.read_h5ad` and `find_counts`)."""
    with CellReader(path) as reader:
        stamp = stamp_of(path)
        if reader.n_cells == 0:
            raise DataError(f"{path} has no cells; there is nothing to convert")
        place, recovered, sample = _look(reader, keys)
        entries = reader.entries_per_row(place)
        batch = None if keys.batch_key is None else complete(as_strings(reader.obs(keys.batch_key)), keys.batch_key)
        return Source(
            name=name,
            path=path,
            stamp=stamp,
            sha256=file_sha256(path),
            place=place,
            recovered=recovered,
            namings=gene_namings(reader.var(place)),
            entries=np.full(reader.n_cells, sample.nnz / sample.shape[0]) if entries is None else entries.astype(np.float64),
            batch=batch,
            labels=None if keys.labels_key is None else as_strings(reader.obs(keys.labels_key)),
            coordinates=None if keys.spatial_key is None else reader.coordinates(keys.spatial_key),
        )


def _look(reader: CellReader, keys: DataKeys) -> tuple[str, bool, sp.csr_matrix]:
    """Where the counts are, judged by a sample of rows, and that sample."""
    cells, totals = reader.n_cells, reader.totals()
    starts = sorted({max(0, min(start, cells - SAMPLE_CELLS)) for start in (0, cells // 2, cells - SAMPLE_CELLS)})
    parts = [(start, min(start + SAMPLE_CELLS, cells)) for start in starts]

    def load(place: str) -> sp.csr_matrix | None:
        return sp.vstack([reader.rows(place, *part) for part in parts], format="csr") if place in reader.places else None

    candidates: list[Candidate] = [
        (place, lambda place=place: load(place))  # type: ignore[misc]
        for place in count_candidates(keys, reader.places)
    ]
    known = None if totals is None else np.concatenate([totals[start:stop] for start, stop in parts])
    try:
        choice = choose(candidates, keys.recover_counts, known)
    except CountsNotFoundError as error:
        raise CountsNotFoundError(f"{reader.path}: {error}") from None
    except DataError as error:
        raise type(error)(f"{reader.path}: {error}") from None
    return choice.place, choice.recovered, choice.matrix


def _vocabulary(config: ConvertConfig, sources: Sequence[Source]) -> tuple[GeneVocabulary, list[int]]:
    """The vocabulary, and for each source how many of its genes were known once that source was added."""
    if config.vocabulary is not None:
        vocabulary = parse_vocabulary(Path(config.vocabulary))
        return vocabulary, [len(vocabulary)] * len(sources)
    genes: dict[str, None] = {}
    known, schemes = [], {}
    for source in sources:
        ids = _named(source, lambda source=source: default_naming(source.namings))  # type: ignore[misc]
        schemes[source.name] = namespace_of(ids)
        genes |= dict.fromkeys(ids)
        known.append(len(genes))
    if len({scheme == "symbol" for scheme in schemes.values()}) > 1:
        raise VocabularyError(f"the inputs name their genes differently ({schemes}); give a vocabulary file, or ids of one kind in var")
    return GeneVocabulary.from_ids(genes), known


def _align(source: Source, vocabulary: GeneVocabulary) -> GeneAlignment:
    alignment: GeneAlignment = _named(source, lambda: best_naming(source.namings, vocabulary)[1])
    return alignment


def _named(source: Source, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except CellplaneError as error:
        raise type(error)(f"{source.path}: {error}") from None


def _extend(names: list[str], values: NDArray[np.object_] | None, source: Source | None) -> NDArray[np.int32] | None:
    """Add the values' names to the list and return each cell's position in it; samples are named dataset/sample."""
    if values is None:
        if source is None:
            return None
        names.append(source.name)
        return np.full(source.cells, len(names) - 1, dtype=np.int32)
    prefix = "" if source is None else f"{source.name}/"
    own = [prefix + value for value in sorted({value for value in values if value is not None})]
    there = set(names)
    names += [name for name in own if name not in there]
    return class_positions(np.array([None if value is None else prefix + value for value in values], dtype=object), names).astype(np.int32)


def _save_arrays(staging: Path, source: Source, alignment: GeneAlignment, dealt: tuple[Any, Any, Any]) -> Path:
    """Put the per-cell arrays where every worker can map them: only descriptors travel through Ray."""
    sentences, batch, label = dealt
    folder = staging / "plan" / _safe(source.name)
    arrays = {
        "rows": np.concatenate(sentences),
        "edges": np.concatenate([[0], np.cumsum([len(rows) for rows in sentences])]),
        "positions": alignment.positions,
        "batch": batch,
        "label": np.full(source.cells, -1, dtype=np.int32) if label is None else label,
        **({} if source.coordinates is None else {"coordinates": source.coordinates}),
    }
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array, allow_pickle=False)
    return folder


def _spans(source: Source, sentences: Sequence[NDArray[np.int64]], shard_bytes: int) -> list[tuple[int, int]]:
    """(first sentence, end) of every shard: filled until it would exceed the bytes aimed for."""
    sizes = [BYTES_PER_ENTRY * float(source.entries[rows].sum()) + BYTES_PER_CELL * len(rows) for rows in sentences]
    edges, filled = [0], 0.0
    for index, size in enumerate(sizes):
        if filled and filled + size > shard_bytes:
            edges.append(index)
            filled = 0.0
        filled += size
    edges.append(len(sizes))
    return list(itertools.pairwise(edges))


def _settings(config: ConvertConfig) -> dict[str, Any]:
    plain = to_plain(config)
    return {key: plain[key] for key in ("keys", "max_cells", "seed", "shard_bytes")}


def _task(source: Source, span: tuple[int, int], folders: tuple[Path, Path], facts: dict[str, Any]) -> Task:
    """The task of one shard, its name made from everything that decides its bytes."""
    staging, arrays = folders
    genes: tuple[str, ...] = facts.pop("genes")
    metadata = {
        "vocabulary_genes": str(len(genes)),
        "vocabulary_sha256": hashlib.sha256("\n".join(genes).encode()).hexdigest(),
        "source": source.name,
        "source_size": str(source.stamp[0]),
        "source_sha256": source.sha256,
        "count_source": source.place,
    }
    everything = {**facts, **metadata, "span": span, "recovered": source.recovered, "format": FORMAT_VERSION}
    key = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:12]
    return Task(
        name=f"{_safe(source.name)}-{facts['number']:05d}-{key}.arrow",
        out=str(staging.parent),
        staging=str(staging),
        arrays=str(arrays),
        path=str(source.path.absolute()),
        stamp=source.stamp,
        place=source.place,
        recovered=source.recovered,
        dataset=facts["dataset"],
        first_sentence=span[0],
        end_sentence=span[1],
        n_genes=len(genes),
        metadata=metadata,
    )


def _safe(name: str) -> str:
    """A data set's name as part of a file name; names that differ stay different."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:80].lstrip(".") or "data"
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def task_json(task: Task) -> str:
    """A task as text, for the way to a worker."""
    return json.dumps(asdict(task))


def parse_task(text: str) -> Task:
    """The task of `task_json`."""
    plain = json.loads(text)
    return Task(**{**plain, "stamp": tuple(plain["stamp"])})
