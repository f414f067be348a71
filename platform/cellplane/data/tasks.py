"""What the workers of a conversion are told: plain values that travel as text.

A range task writes the run of some rows of a source, a shard task one shard, a table task the table of a source's cells
or genes. Per-cell arrays wait in a folder that every worker can map, so that a task stays a few hundred bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cellplane.errors import DataError


@dataclass(frozen=True)
class SourceTask:
    """Where to read and how to store it. ``stamp`` must still hold; ``arrays`` is a folder of the plan's arrays."""

    path: str
    stamp: tuple[int, int]
    place: str
    recovered: bool
    arrays: str
    scratch: str
    n_genes: int
    encoding: str
    counts: bool

    def check_unchanged(self) -> None:
        """DataError when the source is not what it was when the conversion was planned."""
        path = Path(self.path)
        if not path.exists() or stamp_of(path) != tuple(self.stamp):
            raise DataError(f"{path} changed while it was converted; let its writer finish and convert again")


@dataclass(frozen=True)
class RangeTask:
    """Write rows ``start`` to ``stop`` as a run."""

    name: str
    staging: str
    source: SourceTask
    start: int
    stop: int


@dataclass(frozen=True)
class ShardTask:
    """Write some sentences as a shard: from ``n_runs`` files of the pattern ``runs``, or from the source where they are not."""

    name: str
    out: str
    staging: str
    source: SourceTask
    dataset: int
    first_sentence: int
    end_sentence: int
    runs: str
    n_runs: int
    metadata: dict[str, str]


@dataclass(frozen=True)
class TableTask:
    """Write the Parquet table of a source's cells or genes."""

    name: str
    out: str
    staging: str
    source: SourceTask
    part: Literal["obs", "var"]


Task = RangeTask | ShardTask | TableTask
KINDS: dict[str, type[Task]] = {"range": RangeTask, "shard": ShardTask, "table": TableTask}


def stamp_of(path: Path) -> tuple[int, int]:
    """Size and modification time (of a zarr folder: of all its files): when both are the same, so is the source."""
    stats = [path.stat()] if path.is_file() else [file.stat() for file in path.rglob("*") if file.is_file()]
    return sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)


def task_json(task: Task) -> str:
    """A task as text, for the way to a worker."""
    kind = next(name for name, cls in KINDS.items() if isinstance(task, cls))
    return json.dumps({"kind": kind, **asdict(task)})


def parse_task(text: str) -> Task:
    """The task of `task_json`."""
    plain: dict[str, Any] = json.loads(text)
    cls = KINDS[plain.pop("kind")]
    source = plain.pop("source")
    return cls(**{**plain, "source": SourceTask(**{**source, "stamp": tuple(source["stamp"])})})


def safe_name(name: str) -> str:
    """A data set's name as part of a file name; names that differ stay different."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:80].lstrip(".") or "data"
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
