"""The journal of a run: every metric, written beside the checkpoints before any tracker hears of it.

Training appends one JSON line per step, {"step": 12, "time_ms": 1700000000000, "metrics": {"train/loss": 0.5}}, and
goes on; another thread replays the lines to MLflow with these original times (tracking/runs.py). A tracker that is
down therefore costs nothing, and the journal stays the truth. After a restart it is cut at the restored step.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from cellplane.errors import IntegrityError, StorageError


@dataclass(frozen=True)
class JournalRow:
    """Metrics of one optimizer step; ``time_ms`` is when they were measured, milliseconds since 1970."""

    step: int
    time_ms: int
    metrics: Mapping[str, float]


class Journal:
    """An append-only file of metrics with one writer and any number of readers, also in other processes.

    A last line torn by a crash is never read and is removed before the next write. Values that are not finite are
    written as Python's JSON does (NaN, Infinity). Raises StorageError when the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._seen: dict[str, set[int]] | None = None  # steps journalled for each key; None = look at the file first

    def append(self, step: int, metrics: Mapping[str, float], time_ms: int | None = None) -> bool:
        """True when something was written: a (key, step) that is already there is left as it is."""
        with self._lock:
            seen = self._known()
            fresh = {key: float(value) for key, value in metrics.items() if step not in seen.get(key, ())}
            if not fresh:
                return False
            row = JournalRow(int(step), int(time.time() * 1000) if time_ms is None else time_ms, fresh)
            self._write_line(row)
            for key in fresh:
                seen.setdefault(key, set()).add(row.step)
        return True

    def cut(self, step: int) -> None:
        """Forget everything after the restored ``step``, at once or not at all."""
        with self._lock:
            kept = [row for row in self._scan()[0] if row.step <= step]
            temporary = self.path.with_name(self.path.name + ".tmp")
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with temporary.open("wb") as file:
                    file.writelines(map(_line, kept))
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self.path)
            except OSError as error:
                raise _storage_error(self.path, error) from error
            self._seen = _steps_by_key(kept)

    def rows(self) -> list[JournalRow]:
        """All complete rows in the order they were written; none when there is no file yet.

        Raises IntegrityError when a line before the last one is not a row.
        """
        with self._lock:
            return self._scan()[0]

    def _known(self) -> dict[str, set[int]]:
        """What is journalled already; the first call also removes a torn last line."""
        if self._seen is None:
            rows, complete_bytes = self._scan()
            if self.path.exists() and self.path.stat().st_size > complete_bytes:
                os.truncate(self.path, complete_bytes)
            self._seen = _steps_by_key(rows)
        return self._seen

    def _write_line(self, row: JournalRow) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(_line(row))
        except OSError as error:
            self._seen = None  # half a line may be there: look again before the next write
            raise _storage_error(self.path, error) from error

    def _scan(self) -> tuple[list[JournalRow], int]:
        """The complete rows, and the bytes they take from the start of the file."""
        try:
            *lines, torn = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return [], 0
        rows: list[JournalRow] = []
        for number, line in enumerate(lines, start=1):
            row = _parse(line)
            if row is None and number == len(lines) and not torn:
                return rows, sum(len(line) + 1 for line in lines[:-1])
            if row is None:
                raise IntegrityError(f"{self.path}: line {number} of {len(lines)} is not a journal row; something else changed the file")
            rows.append(row)
        return rows, sum(len(line) + 1 for line in lines)


def _line(row: JournalRow) -> bytes:
    return (json.dumps(asdict(row), separators=(",", ":")) + "\n").encode()


def _parse(line: bytes) -> JournalRow | None:
    try:
        raw = json.loads(line)
        return JournalRow(int(raw["step"]), int(raw["time_ms"]), {str(key): float(value) for key, value in raw["metrics"].items()})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _steps_by_key(rows: Iterable[JournalRow]) -> dict[str, set[int]]:
    steps: dict[str, set[int]] = {}
    for row in rows:
        for key in row.metrics:
            steps.setdefault(key, set()).add(row.step)
    return steps


def _storage_error(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write the journal {path}: {error.strerror or error}; free some space or choose another CELLPLANE_HOME")
