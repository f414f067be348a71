"""What a worker of a conversion does: write one run, one shard or one table, and describe it in a few hundred bytes.

Nothing here knows the plan, Ray or torch: a worker holds a piece of the source and a few sentences, and little else.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellplane.data.counts import recover
from cellplane.data.encode import Encoded, Encoder, gathered
from cellplane.data.files import atomic_file, fault, file_sha256, keep_memory
from cellplane.data.manifest import ShardEntry, check_shard, check_table
from cellplane.data.matrices import RawRows
from cellplane.data.reader import CellReader
from cellplane.data.runs import Run, gather, write_run
from cellplane.data.shards import Block, RawBlock, ShardWriter, shard_schema
from cellplane.data.tables import POSITION, ROWS_AT_ONCE, write_table
from cellplane.data.tasks import RangeTask, ShardTask, SourceTask, TableTask, parse_task
from cellplane.errors import CellplaneError, DataError, IntegrityError

SPAN_BYTES = 32 * 1024**2  # encoded cells held at once
WIDE_SPAN = 1.5  # times SPAN_BYTES, where that spares reading rows twice: a sample of 10,000 cells
GAP_CELLS = 4096  # rows nobody wants are skipped from this many on


def write_part(text: str) -> str:
    """Do one task (or find it done) and describe it, as JSON; our own errors come back as text, not as a Ray failure."""
    keep_memory()
    task = parse_task(text)
    try:
        return json.dumps(_do(task))
    except CellplaneError as error:
        return json.dumps({"error": type(error).__name__, "message": str(error), "dataset": Path(task.source.arrays).name})


def write_row(row: dict[str, str]) -> dict[str, str]:
    """`write_part` as Ray Data calls it."""
    os.environ["FAULT_AT"] = row["fault"]
    return {"result": write_part(row["task"])}


def _do(task: RangeTask | ShardTask | TableTask) -> dict[str, Any]:
    if isinstance(task, RangeTask):
        return _write_range(task)
    return _finished(task) or (_write_shard(task) if isinstance(task, ShardTask) else _write_table(task))


def descriptor(task: ShardTask | TableTask) -> Path:
    """Where a finished shard or table is described, for the run that goes on from it."""
    return Path(task.staging) / f"{task.name}.json"


def _finished(task: ShardTask | TableTask) -> dict[str, Any] | None:
    """The description of this file if an earlier run wrote it and its bytes are still right."""
    described = descriptor(task)
    if not described.is_file():
        return None
    plain: dict[str, Any] = json.loads(described.read_bytes())
    for folder in (Path(task.out), Path(task.staging)):
        try:
            if isinstance(task, ShardTask):
                check_shard(folder / task.name, ShardEntry(**plain["entry"]))
            else:
                check_table(folder / task.name, plain["sha256"])
        except IntegrityError:
            continue
        return {**plain, "reused": True}
    return None


def _describe(task: ShardTask | TableTask, plain: dict[str, Any]) -> dict[str, Any]:
    with atomic_file(descriptor(task)) as temporary:
        temporary.write_text(json.dumps(plain), encoding="utf-8")
    return {**plain, "reused": False}


def _arrays(source: SourceTask) -> dict[str, NDArray[Any]]:
    return {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in Path(source.arrays).glob("*.npy")}


def _write_range(task: RangeTask) -> dict[str, Any]:
    path = Path(task.staging) / task.name
    done = {"kind": "range", "cells": task.stop - task.start}
    if _is_run(path):
        return done
    fault("before_range")
    task.source.check_unchanged()
    arrays = _arrays(task.source)
    with CellReader(Path(task.source.path), Path(task.source.scratch)) as reader:
        cells = Encoded.join([part for _, part, _ in _encoded(task.source, arrays, reader, task.start, task.stop)])
    task.source.check_unchanged()
    fault("before_run")
    write_run(path, cells, np.asarray(arrays["place"][task.start : task.stop]))
    fault("after_range")
    return done


def _is_run(path: Path) -> bool:
    """Whether an earlier try left this run; it is written whole or not at all, but a disk may have cut it since."""
    try:
        Run(path)
    except (OSError, ValueError, KeyError, IntegrityError):
        return False
    return True


def _encoded(
    source: SourceTask, arrays: dict[str, NDArray[Any]], reader: CellReader, start: int, stop: int
) -> Iterator[tuple[int, Encoded, float]]:
    """(first row, cells, largest deviation of recovered counts) of these rows, part by part."""
    encode = Encoder(np.asarray(arrays["positions"]), source.n_genes, source.encoding, source.counts, f"{source.path}: {source.place}")
    totals = reader.totals() if source.recovered else None
    for first, raw in reader.parts(source.place, start, stop):
        if not source.recovered:
            yield first, encode(raw, first), 0.0
            continue
        end = first + len(raw.indptr) - 1
        again = recover(raw.matrix(len(arrays["positions"]), source.place), None if totals is None else totals[first:end])
        if again is None:
            raise DataError(f"{source.path}: counts of cells {first} to {end} in {source.place} do not come back exactly; use raw counts")
        rows = again.matrix
        yield first, encode(RawRows(rows.indptr.astype(np.int64), rows.indices, rows.data), first), again.deviation


def _write_shard(task: ShardTask) -> dict[str, Any]:
    fault("before_shard")
    arrays = _arrays(task.source)
    edges = np.asarray(arrays["edges"][task.first_sentence : task.end_sentence + 1])
    staged = Path(task.staging) / task.name
    nnz: list[int] = []
    deviation = 0.0
    with ExitStack() as stack:
        paths = sorted(Path(task.staging).glob(task.runs)) if task.runs else []
        runs, reader = [], None
        if paths and len(paths) == task.n_runs:
            runs = [Run(path, int(edges[0]), int(edges[-1])) for path in paths]
        else:  # small, in order, or all there but this shard
            task.source.check_unchanged()
            reader = stack.enter_context(CellReader(Path(task.source.path), Path(task.source.scratch)))
        temporary = stack.enter_context(atomic_file(staged))
        with ShardWriter(temporary, shard_schema(task.source.encoding, task.source.n_genes, task.metadata)) as writer:
            for span in cut_spans(edges, arrays):
                low, high = int(edges[span[0]]), int(edges[span[-1] + 1])
                rows = np.asarray(arrays["rows"][low:high])
                cells, off = (gather(runs, low, high), 0.0) if reader is None else _read(task.source, arrays, reader, rows)
                deviation = max(deviation, off)
                for block in _sentences(task, arrays, cells, rows, edges[span[0] : span[-1] + 2] - low):
                    writer.write(block)
                    nnz.append(len(block.block.gene))
                    fault("in_shard")
        if reader is not None:
            task.source.check_unchanged()
        fault("shard_written")
    fault("after_shard")
    sizes = np.diff(edges).tolist()
    entry = ShardEntry(task.name, writer.bytes, writer.sha256, sum(sizes), sum(nnz), task.dataset, deviation)
    return _describe(task, {"kind": "shard", "entry": asdict(entry), "nnz": nnz, "cells": sizes})


def cut_spans(edges: NDArray[np.int64], arrays: dict[str, NDArray[Any]]) -> list[NDArray[np.int64]]:
    """The sentences between ``edges`` [n + 1] dealt to spans that are held in memory together, by the stored bytes of their cells.

    A span ends, if it can, where everything before it stands before everything after it in the source: then reading it
    reads no row of another span.
    """
    low, high = int(edges[0]), int(edges[-1])
    starts, rows = edges[:-1] - low, np.asarray(arrays["rows"][low:high])
    filled = np.concatenate([[0.0], np.cumsum(np.asarray(arrays["stored"][low:high], dtype=np.float64))])[edges - low]
    last_before = np.maximum.accumulate(np.maximum.reduceat(rows, starts))[:-1]
    first_after = np.minimum.accumulate(np.minimum.reduceat(rows, starts)[::-1])[::-1][1:]
    apart = np.concatenate([np.flatnonzero(last_before < first_after) + 1, [len(starts)]])
    cuts = [0]
    while cuts[-1] < len(starts):
        end, farthest = (
            max(int(np.searchsorted(filled, filled[cuts[-1]] + most, "right")) - 1, cuts[-1] + 1)
            for most in (SPAN_BYTES, WIDE_SPAN * SPAN_BYTES)
        )
        good = apart[(apart > cuts[-1]) & (apart <= farthest)]
        near = good[good <= end]
        cuts.append(int(near[-1] if len(near) else good[0] if len(good) else end))
    return [np.arange(start, stop) for start, stop in itertools.pairwise(cuts)]


def _read(source: SourceTask, arrays: dict[str, NDArray[Any]], reader: CellReader, rows: NDArray[np.int64]) -> tuple[Encoded, float]:
    """These rows, in their order, straight from the source; and the largest deviation of recovered counts."""
    ascending = np.sort(rows)
    kept, deviation = [], 0.0
    for near in np.split(ascending, np.flatnonzero(np.diff(ascending) > GAP_CELLS) + 1):
        for first, cells, off in _encoded(source, arrays, reader, int(near[0]), int(near[-1]) + 1):
            wanted = near[slice(*np.searchsorted(near, [first, first + cells.n_cells]))] - first
            kept.append(cells.take(wanted))
            deviation = max(deviation, off)
    return gathered(kept, np.searchsorted(ascending, rows)), deviation


def _sentences(
    task: ShardTask, arrays: dict[str, NDArray[Any]], cells: Encoded, rows: NDArray[np.int64], edges: NDArray[np.int64]
) -> Iterator[RawBlock]:
    """The cells cut into sentences at these edges, each with its columns."""
    escaped = cells.escaped()
    for start, end in itertools.pairwise(edges.tolist()):
        own, low, high = rows[start:end], int(cells.crow[start]), int(cells.crow[end])
        over = slice(*np.searchsorted(escaped, [low, high]))
        block = Block(
            crow=cells.crow[start : end + 1] - low,
            gene=cells.gene[low:high],
            value=cells.x[low:high],
            cell=own,
            batch=arrays["batch"][own],
            label=arrays["label"][own],
            dataset=task.dataset,
            coord=arrays["coordinates"][own] if "coordinates" in arrays else None,
        )
        yield RawBlock(block, escaped[over] - low, cells.exact[over])


def _write_table(task: TableTask) -> dict[str, Any]:
    fault("before_table")
    task.source.check_unchanged()
    staged = Path(task.staging) / task.name
    with CellReader(Path(task.source.path), Path(task.source.scratch)) as reader, atomic_file(staged) as temporary:
        write_table(temporary, _obs(reader) if task.part == "obs" else [_var(task.source, reader)])
        task.source.check_unchanged()
    fault("after_table")
    return _describe(task, {"kind": "table", "name": task.name, "bytes": staged.stat().st_size, "sha256": file_sha256(staged)})


def _obs(reader: CellReader) -> Iterator[pd.DataFrame]:
    for start in range(0, reader.n_cells, ROWS_AT_ONCE):
        yield reader.obs_rows(start, min(start + ROWS_AT_ONCE, reader.n_cells))


def _var(source: SourceTask, reader: CellReader) -> pd.DataFrame:
    var = reader.var(source.place)
    return pd.concat([pd.DataFrame({POSITION: np.asarray(_arrays(source)["positions"])}, index=var.index), var], axis=1)
