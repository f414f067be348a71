"""From h5ad files to a folder of shards, with Ray Data: one task writes one shard.

Expression values never travel through Ray: a task reads its rows from the source, writes its shard into a staging
folder and returns a descriptor. When all are there they are renamed into place and the manifest is written, last. A
conversion killed at any moment leaves the folder as it was, and running it again goes on from the finished shards.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from cellplane import config as configuration
from cellplane import errors
from cellplane.data.config import ConvertConfig
from cellplane.data.counts import describe, recover
from cellplane.data.naming import to_vocabulary
from cellplane.data.planning import BYTES_PER_CELL, BYTES_PER_ENTRY, SHARD_NAME, Plan, Task, make_plan, parse_task, stamp_of, task_json
from cellplane.data.shards import (
    MANIFEST,
    MAX_UINT16_GENES,
    Block,
    DatasetEntry,
    Manifest,
    SentenceRow,
    ShardEntry,
    atomic_file,
    check_shard,
    fault,
    file_sha256,
    free_bytes,
    pack_panel,
    read_manifest,
    storage_errors,
    sync_folder,
    write_manifest,
    write_shard,
)
from cellplane.data.sources import CellReader
from cellplane.errors import CellplaneError, DataError, IntegrityError, ServiceError, StorageError
from cellplane.genes import GeneAlignment

log = logging.getLogger(__name__)
STAGING, LOCK = ".staging", ".lock"
READ_CELLS = 4096  # rows read at once: some tens of MB


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did. ``gene_report`` is by data set; ``nnz`` are stored entries; ``largest_deviation`` of recovered counts."""

    out: Path
    cells: int
    genes: int
    nnz: int
    sentences: int
    shards_new: int
    shards_reused: int
    count_source: dict[str, str]
    recovered: bool
    largest_deviation: float
    gene_report: dict[str, dict[str, int | float]]
    seconds: float

    @property
    def cells_per_s(self) -> float:
        """Cells of the folder by the seconds it took, reused ones included."""
        return self.cells / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class Written:
    """A finished shard: its entry, stored values of each of its sentences, whether it was there before."""

    entry: ShardEntry
    nnz: tuple[int, ...]
    cells: tuple[int, ...]
    reused: bool


def convert(config: ConvertConfig, progress: Callable[[str], None] | None = None) -> ConvertReport:
    """Convert the inputs into ``config.out`` on the running Ray; what is there already is checked and reused.

    ``progress`` hears a sentence now and then. Raises ServiceError without Ray, DataError (naming the file) for an
    unusable input, StorageError for a full disk or a folder in use.
    """
    if not ray.is_initialized():
        raise ServiceError("no Ray here: run `cellplane up`, or in Python `ray.init()`, before converting")
    return convert_with(config, lambda tasks: _ray_results(tasks, config.workers), progress or log.info)


def convert_with(
    config: ConvertConfig, run: Callable[[Sequence[str]], Iterable[str]], progress: Callable[[str], None]
) -> ConvertReport:
    """`convert` with any way to ``run`` the tasks: texts of tasks in, texts of results (see `write_part`) out."""
    started = time.perf_counter()
    out = Path(config.out).absolute()
    with _locked(out):
        plan = make_plan(config, out / STAGING, progress)
        _check_space(plan, out)
        results: dict[str, Written] = {}
        for text in run([task_json(task) for task in plan.tasks]):
            written = _parse_result(text)
            results[written.entry.name] = written
            progress(f"{len(results)} of {len(plan.tasks)} shards, {sum(done.entry.cells for done in results.values())} cells")
        shards = [results[task.name] for task in plan.tasks]
        manifest = _manifest(config, plan, shards)
        _publish(out, plan, manifest)
    reused = sum(shard.reused for shard in shards)
    progress(f"{len(shards) - reused} new, {reused} reused")
    return _report(out, manifest, len(shards) - reused, time.perf_counter() - started)


def _ray_results(tasks: Sequence[str], workers: int | None) -> Iterator[str]:
    with quiet_ray_data():
        asked = os.environ.get("FAULT_AT", "")  # workers were started earlier, with another environment
        rows = ray.data.from_items([{"task": task, "fault": asked} for task in tasks], override_num_blocks=len(tasks))
        for row in rows.map(_write_row, num_cpus=1, concurrency=workers).iter_rows():
            yield row["result"]


@contextmanager
def quiet_ray_data() -> Iterator[None]:
    """Ray Data without its plans and bars: they are not what a person waits for."""
    context = ray.data.DataContext.get_current()
    bars, context.enable_progress_bars = context.enable_progress_bars, False
    for noisy in ("ray.data", "ray.data._internal.execution.streaming_executor", "ray.data._internal.progress"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = bars


def _write_row(row: dict[str, str]) -> dict[str, str]:
    os.environ["FAULT_AT"] = row["fault"]
    return {"result": write_part(row["task"])}


def write_part(text: str) -> str:
    """Write one shard (or find it finished) and describe it, as JSON; our own errors come back as text, not as a Ray failure."""
    task = parse_task(text)
    try:
        return json.dumps(_finished(task) or _write(task))
    except CellplaneError as error:
        return json.dumps({"error": type(error).__name__, "message": str(error)})


def _parse_result(text: str) -> Written:
    plain = json.loads(text)
    if "error" in plain:
        raise getattr(errors, plain["error"])(plain["message"])
    entry = ShardEntry(**plain["entry"])
    return Written(entry, tuple(plain["nnz"]), tuple(plain["cells"]), plain["reused"])


def _finished(task: Task) -> dict[str, Any] | None:
    """The description of this shard if an earlier run wrote it and its bytes are still right."""
    described = _descriptor(task)
    if not described.is_file():
        return None
    plain: dict[str, Any] = json.loads(described.read_bytes())
    entry = ShardEntry(**plain["entry"])
    for folder in (Path(task.out), Path(task.staging)):
        try:
            check_shard(folder / task.name, entry)
        except IntegrityError:
            continue
        return {**plain, "reused": True}
    return None


def _descriptor(task: Task) -> Path:
    return Path(task.staging) / f"{task.name}.json"


def _write(task: Task) -> dict[str, Any]:
    fault("before_shard")
    path, staged = Path(task.path), Path(task.staging) / task.name
    _check_unchanged(task)
    with CellReader(path) as reader:
        blocks, deviation = _blocks(task, reader)
    _check_unchanged(task)
    nnz, cells = [len(block.gene) for block in blocks], [block.n_cells for block in blocks]
    write_shard(staged, blocks, task.n_genes, {**task.metadata, "cells": str(sum(cells)), "nnz": str(sum(nnz))})
    fault("after_shard")
    entry = ShardEntry(task.name, staged.stat().st_size, file_sha256(staged), sum(cells), sum(nnz), task.dataset, deviation)
    plain = {"entry": asdict(entry), "nnz": nnz, "cells": cells, "reused": False}
    with atomic_file(_descriptor(task)) as temporary:
        temporary.write_text(json.dumps(plain), encoding="utf-8")
    return plain


def _check_unchanged(task: Task) -> None:
    path = Path(task.path)
    if not path.exists() or stamp_of(path) != tuple(task.stamp):
        raise DataError(f"{path} changed while it was converted; let its writer finish and convert again")


def _blocks(task: Task, reader: CellReader) -> tuple[list[Block], float]:
    """The shard's sentences, read in ascending row ranges whatever their order; and the largest deviation of recovered counts."""
    arrays = {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in Path(task.arrays).glob("*.npy")}
    edges = np.asarray(arrays["edges"][task.first_sentence : task.end_sentence + 1])
    rows = np.asarray(arrays["rows"][edges[0] : edges[-1]])
    ascending = np.sort(rows)
    cells, deviation = _read_cells(task, reader, ascending, np.asarray(arrays["positions"]))
    blocks = []
    for start, end in zip(edges[:-1] - edges[0], edges[1:] - edges[0], strict=True):
        wanted = rows[start:end]
        crow, gene, value = cells.take(np.searchsorted(ascending, wanted))
        blocks.append(
            Block(
                crow=crow,
                gene=gene,
                value=value,
                cell=wanted,
                batch=arrays["batch"][wanted],
                label=arrays["label"][wanted],
                dataset=task.dataset,
                coord=arrays["coordinates"][wanted] if "coordinates" in arrays else None,
            )
        )
    return blocks, deviation


@dataclass(frozen=True)
class _Cells:
    """CSR rows in narrow types."""

    crow: NDArray[np.int64]
    gene: NDArray[Any]
    value: NDArray[Any]

    def take(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[Any]]:
        lengths = self.crow[rows + 1] - self.crow[rows]
        crow = np.concatenate([[0], np.cumsum(lengths)])
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
            span = slice(int(self.crow[rows[0]]), int(self.crow[rows[-1] + 1]))
            return crow, self.gene[span], self.value[span]
        entry = np.arange(crow[-1]) - np.repeat(crow[:-1] - self.crow[rows], lengths)
        return crow, self.gene[entry], self.value[entry]


def _read_cells(task: Task, reader: CellReader, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> tuple[_Cells, float]:
    """These ascending rows over the vocabulary, every value checked to be a count, or made one again."""
    alignment = GeneAlignment(positions, task.n_genes, "")
    totals = reader.totals() if task.recovered else None
    gene_type = np.uint16 if task.n_genes <= MAX_UINT16_GENES else np.uint32
    lengths, genes, values, deviation = [], [], [], 0.0
    at = 0
    while at < len(rows):
        end = int(np.searchsorted(rows, rows[at] + READ_CELLS))
        wanted = rows[at:end]
        low, high = int(wanted[0]), int(wanted[-1]) + 1
        matrix = reader.rows(task.place, low, high)
        if task.recovered:
            again = recover(matrix, None if totals is None else totals[low:high])
            if again is None:
                raise DataError(f"{task.path}: counts of cells {low} to {high} in {task.place} do not come back exactly; use raw counts")
            matrix, deviation = again.matrix, max(deviation, again.deviation)
        elif finding := describe(matrix, f"{task.path}: {task.place}, cells from {low}"):
            raise DataError(f"{task.path}: {task.place} looked like counts, but cells {low} to {high} hold {finding}; use raw counts")
        part = to_vocabulary(matrix if len(wanted) == high - low else matrix[wanted - low], alignment)
        lengths.append(np.diff(part.indptr))
        genes.append(part.indices.astype(gene_type))
        values.append(part.data.astype(np.min_scalar_type(int(part.data.max())) if len(part.data) else np.uint8))
        at = end
    crow = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    return _Cells(crow, np.concatenate(genes), np.concatenate(values)), deviation


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One conversion per folder; the lock dies with its process."""
    with storage_errors(out):
        (out / STAGING).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        _take(descriptor, out)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StorageError(f"{out} is in use by another conversion; wait for it, or choose another folder") from None


def _check_space(plan: Plan, out: Path) -> None:
    _keep_descriptors(out)
    entries = sum(float(source.entries.sum()) for source in plan.sources)
    cells = sum(source.cells for source in plan.sources)
    there = sum(path.stat().st_size for folder in (out, out / STAGING) for path in folder.glob("*.arrow"))
    needed, free = int(BYTES_PER_ENTRY * entries + BYTES_PER_CELL * cells) - there, free_bytes(out)
    if needed > free:
        raise StorageError(f"no room for the shards in {out}: about {needed} bytes needed, {free} free; free some or choose another folder")


def _keep_descriptors(out: Path) -> None:
    """Describe the shards of a finished conversion in the staging folder, where the next run looks for them."""
    if not (out / MANIFEST).is_file():
        return
    try:
        manifest = read_manifest(out)
    except DataError as error:
        log.warning("the manifest of %s is not usable and will be replaced: %s", out, error)
        return
    for number, entry in enumerate(manifest.shards):
        own = [row for row in manifest.sentences if row.shard == number]
        plain = {"entry": asdict(entry), "nnz": [row.nnz for row in own], "cells": [row.cells for row in own]}
        with atomic_file(out / STAGING / f"{entry.name}.json") as temporary:
            temporary.write_text(json.dumps(plain), encoding="utf-8")


def _manifest(config: ConvertConfig, plan: Plan, shards: Sequence[Written]) -> Manifest:
    datasets = []
    for index, (source, alignment) in enumerate(zip(plan.sources, plan.alignments, strict=True)):
        deviation = max(shard.entry.deviation for shard in shards if shard.entry.dataset == index)
        panel = pack_panel(alignment.panel())
        found = (source.place, source.recovered, deviation, alignment.report())
        datasets.append(DatasetEntry(source.name, source.path.name, source.stamp[0], source.sha256, source.cells, panel, *found))
    return Manifest(
        vocabulary_file=f"vocabulary-{plan.vocabulary.fingerprint[:12]}.txt",
        vocabulary_sha256=hashlib.sha256(_vocabulary_text(plan)).hexdigest(),
        vocabulary_fingerprint=plan.vocabulary.fingerprint,
        n_genes=len(plan.vocabulary),
        max_cells=config.max_cells,
        config_fingerprint=configuration.fingerprint(config.model_copy(update={"out": "", "workers": None})),  # what shapes the data
        datasets=tuple(datasets),
        shards=tuple(shard.entry for shard in shards),
        sentences=_sentence_rows(plan, shards),
        batch_names=plan.batch_names,
        label_names=plan.label_names,
    )


def _vocabulary_text(plan: Plan) -> bytes:
    return ("\n".join(plan.vocabulary.gene_ids) + "\n").encode()


def _sentence_rows(plan: Plan, shards: Sequence[Written]) -> tuple[SentenceRow, ...]:
    rows: list[SentenceRow] = []
    first = 0
    for number, (task, shard) in enumerate(zip(plan.tasks, shards, strict=True)):
        arrays = Path(task.arrays)
        edges = np.load(arrays / "edges.npy", mmap_mode="r")
        batch = np.load(arrays / "batch.npy", mmap_mode="r")
        order = np.load(arrays / "rows.npy", mmap_mode="r")
        for index, (cells, nnz) in enumerate(zip(shard.cells, shard.nnz, strict=True)):
            key = int(batch[order[edges[task.first_sentence + index]]])
            rows.append(SentenceRow(number, index, cells, nnz, key, task.dataset, first))
            first += cells
    return tuple(rows)


def _publish(out: Path, plan: Plan, manifest: Manifest) -> None:
    """Move finished shards into place, write the manifest, then remove what it does not name any more."""
    names = {task.name for task in plan.tasks}
    for task in plan.tasks:
        fault("before_move")
        if (staged := out / STAGING / task.name).is_file():
            os.replace(staged, out / task.name)
    sync_folder(out)
    with atomic_file(out / manifest.vocabulary_file) as temporary:
        temporary.write_bytes(_vocabulary_text(plan))
    fault("before_manifest")
    write_manifest(out, manifest)
    fault("before_cleanup")
    shutil.rmtree(out / STAGING)
    for path in out.glob(".*.tmp"):  # left by a killed run
        path.unlink()
    for path in (*out.glob("*.arrow"), *out.glob("vocabulary-*.txt")):
        if path.name not in names | {manifest.vocabulary_file} and (path.suffix == ".txt" or SHARD_NAME.fullmatch(path.name)):
            path.unlink()


def _report(out: Path, manifest: Manifest, new: int, seconds: float) -> ConvertReport:
    return ConvertReport(
        out=out,
        cells=manifest.cells,
        genes=manifest.n_genes,
        nnz=manifest.nnz,
        sentences=len(manifest.sentences),
        shards_new=new,
        shards_reused=len(manifest.shards) - new,
        count_source={entry.name: entry.count_source for entry in manifest.datasets},
        recovered=any(entry.recovered for entry in manifest.datasets),
        largest_deviation=max(entry.deviation for entry in manifest.datasets),
        gene_report={entry.name: entry.genes for entry in manifest.datasets},
        seconds=seconds,
    )
