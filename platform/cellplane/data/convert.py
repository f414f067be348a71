"""From h5ad files and zarr folders to a folder of shards, with Ray Data.

Expression values never travel through Ray: a task reads its rows from the source, writes a file into a staging folder
and returns a descriptor. A source that is in order is read straight into shards; one whose samples are spread over it is
read once, in row ranges, into runs (`runs.py`), from which the shards are made. When all are there they are renamed into
place and the manifest is written, last. A conversion killed at any moment leaves the folder as it was, and running it
again goes on from the finished files to the same bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from cellplane import config as configuration
from cellplane import errors
from cellplane.data.config import ConvertConfig
from cellplane.data.encode import NotWholeError
from cellplane.data.files import atomic_file, fault, free_bytes, leaves_nothing, storage_errors, sync_folder
from cellplane.data.manifest import (
    MANIFEST,
    DatasetEntry,
    Manifest,
    SentenceRow,
    ShardEntry,
    pack_panel,
    read_manifest,
    write_manifest,
)
from cellplane.data.planning import SHARD_NAME, TABLE_NAME, Plan, make_plan, ordered_inputs
from cellplane.data.remote import is_url, send_shards, shard_folder
from cellplane.data.tasks import ShardTask, TableTask, Task, safe_name, task_json
from cellplane.data.work import descriptor, write_row
from cellplane.data.work import write_part as write_part
from cellplane.errors import ConfigError, DataError, ServiceError, StorageError
from cellplane.logs import duration

log = logging.getLogger(__name__)
STAGING, LOCK = ".staging", ".lock"
VOCABULARY_NAME, LEFT_BEHIND = re.compile(r"vocabulary-[0-9a-f]{12}\.txt"), re.compile(r"\..+\.(arrow|parquet|txt|json)\.\d+\.tmp")
OURS = (SHARD_NAME, TABLE_NAME, VOCABULARY_NAME, LEFT_BEHIND)  # what a conversion may remove; the rest of the folder is not its business


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
    unusable input, StorageError for a full disk, a folder in use or a URL that refuses. Shards for a URL are made in its
    mirror (see `remote.shard_folder`) and copied once they are complete.
    """
    if not ray.is_initialized():
        raise ServiceError("no Ray here: run `cellplane up`, or in Python `ray.init()`, before converting")
    here = config.model_copy(update={"out": str(shard_folder(config.out))})
    report = convert_with(here, lambda tasks: _ray_results(tasks, config.workers), progress or log.info)
    if is_url(config.out):
        send_shards(report.out, config.out)
    return report


def convert_with(config: ConvertConfig, run: Callable[[Sequence[str]], Iterable[str]], progress: Callable[[str], None]) -> ConvertReport:
    """`convert` with any way to ``run`` the tasks: texts of tasks in, texts of results (see `work.write_part`) out."""
    started = time.perf_counter()
    out = Path(config.out).absolute()
    with leaves_nothing(out, lambda: _has_begun(out)), _locked(out):
        _refuse_dropping(config, out)
        known = _keep_descriptors(out)
        real: frozenset[str] = frozenset()
        while True:
            fault("before_plan")
            plan = make_plan(config, out / STAGING, progress, known, real)
            fault("after_plan")
            _check_space(plan, out)
            try:
                shards, tables = _run(plan, run, progress)
                break
            except _RealValues as found:
                real |= {found.dataset}
        manifest = _manifest(config, plan, shards, tables)
        _publish(out, plan, manifest)
    reused = sum(shard.reused for shard in shards)
    progress(f"{len(shards) - reused} new, {reused} reused")
    return _report(out, manifest, len(shards) - reused, time.perf_counter() - started)


def _refuse_dropping(config: ConvertConfig, out: Path) -> None:
    """ConfigError when the folder holds data sets that the inputs do not name, which they would replace."""
    if config.replace or not (out / MANIFEST).is_file():
        return
    held: tuple[DatasetEntry, ...] = ()
    with suppress(DataError):  # a manifest that is not usable is said and replaced later
        held = read_manifest(out).datasets
    named = {name for name, _ in ordered_inputs(config)}
    if dropped := [dataset.name for dataset in held if dataset.name not in named]:
        listed = ", ".join(dropped[:5]) + " ..." * (len(dropped) > 5)
        raise ConfigError(
            f"{config.out} would lose {listed}, which it holds and the inputs do not name: name all files that it is to hold, "
            "or another folder; -o replace=true drops what is not named"
        )


def _has_begun(out: Path) -> bool:
    """Whether a folder holds anything but the lock and the empty staging folder."""
    return any(path.name not in (LOCK, STAGING) for path in out.glob("*")) or any((out / STAGING).glob("*"))


class _RealValues(Exception):
    """A data set that looked whole holds other values: it is planned again."""

    def __init__(self, dataset: str) -> None:
        super().__init__(dataset)
        self.dataset = dataset


def _run(
    plan: Plan, run: Callable[[Sequence[str]], Iterable[str]], progress: Callable[[str], None]
) -> tuple[list[Written], dict[str, str]]:
    """The shards in the order of their tasks, and the sha256 of every table."""
    first: list[Task] = [*plan.tables, *(task for own in _missing_ranges(plan) for task in own)]
    cells = sum(source.cells for source in plan.sources)
    watch = _Watch(progress, cells + sum(task.stop - task.start for own in _missing_ranges(plan) for task in own))
    tables: dict[str, str] = {}
    results: dict[str, Written] = {}
    for text in run([task_json(task) for task in first]):
        done = _parse_result(text, plan)
        if done["kind"] == "table":
            tables[done["name"]] = done["sha256"]
        else:
            watch.add(done["cells"], "read")
    for text in run([task_json(task) for task in plan.tasks]):
        done = _parse_result(text, plan)
        entry = ShardEntry(**done["entry"])
        results[entry.name] = Written(entry, tuple(done["nnz"]), tuple(done["cells"]), done["reused"])
        watch.add(entry.cells, f"{len(results)} of {len(plan.tasks)} shards,")
    return [results[task.name] for task in plan.tasks], tables


def _missing_ranges(plan: Plan) -> list[tuple[Any, ...]]:
    """The ranges of every data set that has a shard to write from them."""
    unfinished = {task.dataset for task in plan.tasks if not _seems_finished(task)}
    return [own for dataset, own in enumerate(plan.ranges) if dataset in unfinished]


def _seems_finished(task: ShardTask) -> bool:
    """Whether a finished file of the right size is there; the task itself looks closer."""
    if not descriptor(task).is_file():
        return False
    size = json.loads(descriptor(task).read_bytes())["entry"]["bytes"]
    places = (Path(task.out) / task.name, Path(task.staging) / task.name)
    return any(path.is_file() and path.stat().st_size == size for path in places)


class _Watch:
    """Says how far a conversion is, how fast it goes and how long it will take."""

    def __init__(self, say: Callable[[str], None], total: int) -> None:
        self._say, self._total, self._done, self._began = say, total, 0, time.perf_counter()

    def add(self, cells: int, doing: str) -> None:
        """Some more cells were read, or written."""
        self._done += cells
        rate = self._done / max(time.perf_counter() - self._began, 1e-9)
        left = (self._total - self._done) / rate
        self._say(f"{doing} {100 * self._done / self._total:.0f} % done, {rate:,.0f} cells/s, {duration(left)} left")


def _ray_results(tasks: Sequence[str], workers: int | None) -> Iterator[str]:
    if not tasks:
        return
    with quiet_ray_data():
        asked = os.environ.get("FAULT_AT", "")  # workers were started earlier, with another environment
        rows = ray.data.from_items([{"task": task, "fault": asked} for task in tasks], override_num_blocks=len(tasks))
        for row in rows.map(write_row, num_cpus=1, concurrency=workers).iter_rows():
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


def _parse_result(text: str, plan: Plan) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(text)
    if plain.get("error") == NotWholeError.__name__:
        raise _RealValues(next(source.name for source in plan.sources if safe_name(source.name) == plain["dataset"]))
    if "error" in plain:
        raise getattr(errors, plain["error"])(plain["message"])
    return plain


def refuse_file(out: Path) -> None:
    """ConfigError when a file stands where the folder of shards, or one above it, should be."""
    blocking = next(path for path in (out, *out.parents) if path.exists())
    if not blocking.is_dir():
        raise ConfigError(f"{blocking} is a file, so no shards can be written to {out}; name a folder")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One conversion per folder; the lock dies with its process."""
    refuse_file(out)
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        _take(descriptor, out)
        with storage_errors(out):
            (out / STAGING).mkdir(exist_ok=True)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StorageError(f"{out} is in use by another conversion; wait for it, or choose another folder") from None


def _check_space(plan: Plan, out: Path) -> None:
    there = sum(path.stat().st_size for folder in (out, out / STAGING, out / STAGING / "runs") for path in folder.glob("*.[ar]*"))
    passes = [2 if own else 1 for own in plan.ranges]
    needed = int(sum(number * float(source.stored.sum()) for number, source in zip(passes, plan.sources, strict=True))) - there
    if needed > (free := free_bytes(out)):
        raise StorageError(f"no room for the shards in {out}: about {needed} bytes needed, {free} free; free some or choose another folder")


def _keep_descriptors(out: Path) -> list[str]:
    """Describe the files of a finished conversion in the staging folder, where this run looks for them. Its data sets."""
    if not (out / MANIFEST).is_file():
        return []
    try:
        manifest = read_manifest(out)
    except DataError as error:
        log.warning("the manifest of %s is not usable and will be replaced: %s", out, error)
        return []
    rows: list[list[SentenceRow]] = [[] for _ in manifest.shards]
    for row in manifest.sentences:
        rows[row.shard].append(row)
    for entry, own in zip(manifest.shards, rows, strict=True):
        plain = {"kind": "shard", "entry": asdict(entry), "nnz": [row.nnz for row in own], "cells": [row.cells for row in own]}
        _keep(out, entry.name, plain)
    for dataset in manifest.datasets:
        for name, sha256 in dataset.tables().items():
            _keep(out, name, {"kind": "table", "name": name, "sha256": sha256})
    return [dataset.name for dataset in manifest.datasets]


def _keep(out: Path, name: str, plain: dict[str, Any]) -> None:
    with atomic_file(out / STAGING / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(plain), encoding="utf-8")


def _manifest(config: ConvertConfig, plan: Plan, shards: Sequence[Written], tables: dict[str, str]) -> Manifest:
    datasets = []
    for index, (source, alignment) in enumerate(zip(plan.sources, plan.alignments, strict=True)):
        deviation = max(shard.entry.deviation for shard in shards if shard.entry.dataset == index)
        panel = pack_panel(alignment.panel())
        found = (source.place, source.recovered, deviation, alignment.report(), *source.layout)
        files = [part for task in plan.tables[2 * index : 2 * index + 2] for part in (task.name, tables[task.name])]
        entry = DatasetEntry(source.name, source.path.name, source.stamp[0], source.sha256, source.cells, panel, *found, *files)
        spatial_key = None if source.coordinates is None else config.keys.spatial_key
        datasets.append(replace(entry, spatial_key=spatial_key, left_out=source.left_out))
    return Manifest(
        vocabulary_file=f"vocabulary-{plan.vocabulary.fingerprint[:12]}.txt",
        vocabulary_sha256=hashlib.sha256(_vocabulary_text(plan)).hexdigest(),
        vocabulary_fingerprint=plan.vocabulary.fingerprint,
        n_genes=len(plan.vocabulary),
        max_cells=config.max_cells,
        config_fingerprint=configuration.fingerprint(
            config.model_copy(update={"out": "", "inputs": (), "workers": None})
        ),  # what shapes the data
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
        arrays = Path(task.source.arrays)
        edges = np.load(arrays / "edges.npy", mmap_mode="r")
        batch = np.load(arrays / "batch.npy", mmap_mode="r")
        order = np.load(arrays / "rows.npy", mmap_mode="r")
        for index, (cells, nnz) in enumerate(zip(shard.cells, shard.nnz, strict=True)):
            key = int(batch[order[edges[task.first_sentence + index]]])
            rows.append(SentenceRow(number, index, cells, nnz, key, task.dataset, first))
            first += cells
    return tuple(rows)


def _publish(out: Path, plan: Plan, manifest: Manifest) -> None:
    """Move finished files into place, write the manifest, then remove what it does not name any more."""
    moved: tuple[ShardTask | TableTask, ...] = (*plan.tasks, *plan.tables)
    for task in moved:
        fault("before_move")
        if (staged := out / STAGING / task.name).is_file():
            os.replace(staged, out / task.name)
    fault("after_moves")
    sync_folder(out)
    with atomic_file(out / manifest.vocabulary_file) as temporary:
        temporary.write_bytes(_vocabulary_text(plan))
    fault("before_manifest")
    write_manifest(out, manifest)
    fault("before_cleanup")
    shutil.rmtree(out / STAGING)
    fault("in_cleanup")
    kept = {task.name for task in moved} | {manifest.vocabulary_file}
    for path in out.iterdir():
        if path.name not in kept and any(pattern.fullmatch(path.name) for pattern in OURS):
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
