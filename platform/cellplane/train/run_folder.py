"""Where everything of a run lies, and what is remembered there: its configuration, its starts, its end.

    $CELLPLANE_HOME/runs/RUN/  config.yaml  origin.json  starts.jsonl  journal.jsonl  checkpoints/  stacks/  artifacts/  model/

The configuration is stored when a run starts, so that `cellplane pretrain --resume RUN` needs nothing else, and so that
a run that is started again with other settings can say which ones differ.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cellplane.config import Config, home, read_yaml, to_plain, to_yaml
from cellplane.data.files import atomic_file
from cellplane.errors import ConfigError, StorageError


@dataclass(frozen=True)
class Start:
    """One group of workers: when it began (milliseconds since 1970), how many, after which step, and why."""

    time_ms: int
    workers: int
    step: int
    because: str


@dataclass(frozen=True)
class RunFolder:
    """Where everything of a run lies: checkpoints, journal, artifacts, the finished model."""

    path: Path

    @classmethod
    def of(cls, run: str) -> RunFolder:
        """The folder of a run name, under $CELLPLANE_HOME/runs; ConfigError for a name that is not a plain file name."""
        if not run or Path(run).name != run or run.startswith("."):
            raise ConfigError(f"run {run!r} cannot be a folder's name: use letters, digits, '-', '_' and '.'")
        return cls(home() / "runs" / run)

    @property
    def checkpoints(self) -> Path:
        """Checkpoint folders."""
        return self.path / "checkpoints"

    @property
    def journal(self) -> Path:
        """Metrics of every step, JSON lines."""
        return self.path / "journal.jsonl"

    @property
    def model(self) -> Path:
        """The finished model folder."""
        return self.path / "model"

    @property
    def artifacts(self) -> Path:
        """Files for the tracker: configuration, plots, report."""
        return self.path / "artifacts"

    @property
    def stacks(self) -> Path:
        """Where every rank stood when a step did not end in time."""
        return self.path / "stacks"

    @property
    def config(self) -> Path:
        """The configuration the run was started with."""
        return self.path / "config.yaml"

    @property
    def lock(self) -> Path:
        """Held by the one worker that writes."""
        return self.path / "run.lock"

    @property
    def _origin(self) -> Path:
        return self.path / "origin.json"

    @property
    def _starts(self) -> Path:
        return self.path / "starts.jsonl"

    def remember(self, config: Config, origin: str) -> None:
        """Stores the configuration of a run that starts, and what it was made from (JSON); StorageError when the disk refuses."""
        self._write(self._origin, origin)
        self._write(self.config, to_yaml(config))

    def origin(self) -> dict[str, Any]:
        """The `identity`, `vocabulary_fingerprint` and `n_genes` the run was begun with; empty when it is of an earlier version."""
        try:
            found: dict[str, Any] = json.loads(self._origin.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if {"identity", "vocabulary_fingerprint", "n_genes"} <= found.keys() else {}

    def _write(self, path: Path, text: str) -> None:
        try:
            with atomic_file(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            raise _refused(path, error) from error

    def differences(self, config: Config, sections: tuple[str, ...]) -> list[str]:
        """`optimizer.lr is 0.001 there and 0.01 here` for every key of these sections; nothing when none is stored."""
        if not self.config.is_file():
            return []
        stored, given = read_yaml(self.config), to_plain(config)
        there = _flat({name: stored.get(name) for name in sections})
        here = _flat({name: given.get(name) for name in sections})
        return [f"{key} is {there[key]!r} there and {here[key]!r} here" for key in here if key in there and there[key] != here[key]]

    def started(self, workers: int, step: int, because: str) -> None:
        """Writes down that a group of workers starts after ``step``; StorageError when the disk refuses."""
        line = json.dumps(asdict(Start(int(time.time() * 1000), workers, step, because)))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self._starts.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise _refused(self._starts, error) from error

    def starts(self) -> list[Start]:
        """Every group of workers so far, oldest first."""
        if not self._starts.is_file():
            return []
        found = []
        for line in self._starts.read_text(encoding="utf-8").splitlines():
            try:
                found.append(Start(**json.loads(line)))
            except (ValueError, TypeError):  # a line torn by a full disk or a power cut: it is only a note
                continue
        return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
            continue
        flat[f"{prefix}{key}"] = value
    return flat


def _refused(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {path}: {error.strerror or error}; free some space or choose another CELLPLANE_HOME")
