"""Checkpoints that can be trusted: one consolidated format for every engine, ZeRO stage and world size.

    step-00000050/  weights.safetensors  optimizer.safetensors  state.json  manifest.json (written last, sha256 of the rest)

They lie in the run's own folder, or another the configuration names, and are copied to a URL when it names one (remote.py).
Restoring takes the newest one whose every byte verifies, says which, and never goes through Ray, whose own bookkeeping
may be older than the disk and cannot step back over a damaged file (STACK.md 9).
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from cellplane.artifact.folder import FORMAT_VERSION, MANIFEST, READ_SUFFIXES, read_manifest, sealed, staged_folder
from cellplane.config import home
from cellplane.data.shards import fault, sync_folder
from cellplane.errors import CheckpointError, DataError, IntegrityError
from cellplane.train.background import Background, Buffers
from cellplane.train.config import CheckpointConfig
from cellplane.train.remote import RemoteFolder
from cellplane.train.retention import KIND, Entry, best_first, folder_name, folders, look, remove, step_of, surplus, sweep
from cellplane.train.tensors import HashedFile, check_file, read_checked, read_tensors, write_tensors

log = logging.getLogger(__name__)

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
SHARDED = "sharded"  # a manifest's `layout` when DeepSpeed wrote the files (sharded.py)


@dataclass(frozen=True)
class TrainingState:
    """Everything a run needs to go on: ``step`` steps are done; optimizer moments are named `exp_avg:NAME`, `exp_avg_sq:NAME`.

    ``identity`` fingerprints what must not change between save and restore (configuration and data). ``extra`` are small
    JSON values that the loop wants back. ``shards`` is the verified folder of a sharded checkpoint, which the engine reads
    itself: there are no tensors here then.
    """

    step: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    identity: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    shards: Path | None = None


class Checkpoints:
    """The checkpoints of one run, newest last; as made here, each `save` is complete when it returns (else: `checkpoints_of`).

    Whoever saves in the background must `close`, or use it as a context manager.
    """

    def __init__(self, folder: Path, keep: int = 2, keep_best: bool = True) -> None:
        self.folder, self.keep, self.keep_best = Path(folder), keep, keep_best
        self.remote: RemoteFolder | None = None
        self._background: Background | None = None
        self._buffers = {"weights": Buffers(), "optimizer": Buffers()}
        self._swept = False

    def in_background(self) -> Checkpoints:
        """Lets a thread write; `save` then pays for a copy of the state alone."""
        self._background = Background()
        return self

    def save(self, state: TrainingState, score: float | None = None) -> Path:
        """Writes the state in one move, then removes what need not stay; the folder it gets.

        The lowest ``score`` is the best. Raises StorageError when the disk is full or the copy to the URL failed; in the
        background it is that of the save before. All that was complete stays.
        """
        if self._background is None:
            return self._write(state, score)
        self._background.wait()  # before the buffers are used again
        copied = replace(
            state, weights=self._buffers["weights"].copy(state.weights), optimizer=self._buffers["optimizer"].copy(state.optimizer)
        )
        self._background.start(lambda: self._write(copied, score))
        fault("checkpoint_handed_over")
        return self.folder / folder_name(state.step)

    def _write(self, state: TrainingState, score: float | None) -> Path:
        self.begin()
        began = time.perf_counter()
        path = write_checkpoint(self.folder, state, score)
        log.info("checkpoint %s is complete, %.1f s after its step", path.name, time.perf_counter() - began)
        self.complete(state.step)
        return path

    def begin(self) -> None:
        """Removes what an earlier, killed writer of this run left; called before anything is written."""
        if not self._swept:
            sweep(self.folder)
            self._swept = True

    def complete(self, newest: int) -> None:
        """After the checkpoint of a step is complete: copies it to the URL, and removes what need not stay, here and there."""
        fault("after_checkpoint")
        sync_folder(self.folder)
        for entry in self._surplus(list(map(look, self.found())), newest):
            remove(self.folder / entry.name)
        if self.remote is not None:
            self.remote.put(self.folder / folder_name(newest))
            for entry in self._surplus(self.remote.entries(), newest):
                self.remote.remove(entry.name)

    def _surplus(self, entries: Sequence[Entry], newest: int) -> list[Entry]:
        return surplus(entries, newest, self.keep, self.keep_best)

    def found(self) -> list[Path]:
        """Checkpoint folders on disk, oldest first, valid or not; not those that are only at the URL."""
        return folders(self.folder)

    def steps(self) -> list[int]:
        """Steps of all checkpoints, here and at the URL, valid or not, ascending."""
        there = self.remote.entries() if self.remote is not None else []
        return sorted({entry.step for entry in (*map(look, self.found()), *there)})

    def newest_valid(self, identity: str) -> TrainingState | None:
        """The newest state whose bytes verify; None when the run never saved one.

        Damaged ones are skipped with a warning. Raises CheckpointError when checkpoints exist but none is usable: a run
        never starts again from 0 in silence. StorageError when the URL cannot be reached.
        """
        self.wait()
        places = [(step_of(path.name) or 0, 1, self._here(path)) for path in self.found()]
        if self.remote is not None:
            places += [(entry.step, 0, self._there(self.remote, entry)) for entry in self.remote.entries()]
        ordered = [place for _, _, place in sorted(places, key=lambda item: item[:2], reverse=True)]  # of equal steps the near one first
        state = self._first_intact(ordered, identity)
        if state is None and places:
            raise CheckpointError(
                f"none of the {len(places)} checkpoints in {self._where()} is intact; remove them to start anew from step 0"
            )
        return state

    def best_valid(self, identity: str) -> TrainingState | None:
        """The state with the lowest score whose bytes verify; None when none has a score."""
        self.wait()
        here = {entry.step: entry for entry in map(look, self.found()) if entry.whole}
        there = {entry.step: entry for entry in (self.remote.entries() if self.remote is not None else []) if entry.whole}
        ordered: list[_Place] = []
        for entry in best_first(list({**there, **here}.values())):
            if entry.step in here:
                ordered.append(self._here(self.folder / entry.name))
            if self.remote is not None and entry.step in there:
                ordered.append(self._there(self.remote, entry))
        return self._first_intact(ordered, identity)

    def _where(self) -> str:
        return str(self.folder) if self.remote is None else f"{self.folder} and {self.remote.url}"

    def _first_intact(self, places: Sequence[_Place], identity: str) -> TrainingState | None:
        for place in places:
            try:
                state = place.read()
            except DataError as error:
                log.warning("checkpoint %s is damaged and left aside: %s", place.name, error)
                continue
            if state.identity != identity:
                raise CheckpointError(
                    f"{place.name} was made with another configuration or other data; "
                    f"use another run name, or remove {self._where()} to start anew"
                )
            log.info("going on from checkpoint %s", place.name)
            return state
        return None

    def _here(self, path: Path) -> _Place:
        return _Place(str(path), lambda: _read_named(path))

    def _there(self, remote: RemoteFolder, entry: Entry) -> _Place:
        def read() -> TrainingState:
            if not entry.whole:
                raise IntegrityError(f"its copy at {remote.url} is not complete")
            self.folder.mkdir(parents=True, exist_ok=True)
            with remote.fetched(entry.name, self.folder) as path:
                return _read_named(path)

        return _Place(f"{remote.url}/{entry.name}", read)

    def wait(self) -> None:
        """Until nothing is being written; raises the StorageError of what was."""
        if self._background is not None:
            self._background.wait()

    def close(self) -> None:
        """`wait`, and the end of the writing thread."""
        if self._background is not None:
            self._background.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except OSError as late:
            if error is None:
                raise
            log.warning("a checkpoint was not written either: %s", late)  # what ended the run is said first


@dataclass(frozen=True)
class _Place:
    """A checkpoint that may be read: its name for people, and how."""

    name: str
    read: Callable[[], TrainingState]


def checkpoints_of(run: Path, config: CheckpointConfig) -> Checkpoints:
    """The checkpoints of the run whose folder is ``run``, as configured; close it when it was saved to.

    They lie in `checkpoints/` below it, or, when another folder is configured, below that under the run's name. With a
    URL they are written to the run's folder first and then copied there. ConfigError for a URL of an unknown kind.
    """
    folder = run / "checkpoints"
    remote = config.folder is not None and "://" in config.folder
    if config.folder is not None and not remote:
        folder = home() / Path(config.folder).expanduser() / run.name
    checkpoints = Checkpoints(folder, config.keep, config.keep_best)
    if config.folder is not None and remote:
        checkpoints.remote = RemoteFolder(f"{config.folder.rstrip('/')}/{run.name}")
    return checkpoints.in_background() if config.asynchronous else checkpoints


def write_checkpoint(folder: Path, state: TrainingState, score: float | None = None) -> Path:
    """One consolidated checkpoint in ``folder``, complete or absent; StorageError, with nothing left behind, when the disk refuses."""
    path = folder / folder_name(state.step)
    with staged_folder(path, (WEIGHTS, OPTIMIZER, STATE, MANIFEST), KIND) as staging:
        listed: dict[str, Any] = {}
        for name, tensors in ((WEIGHTS, state.weights), (OPTIMIZER, state.optimizer)):
            fault("checkpoint_file")
            with HashedFile(staging / name) as file:
                write_tensors(file, tensors)
            listed[name] = file.entry
        fault("checkpoint_file")
        with HashedFile(staging / STATE) as file:
            file.write(state_json(state))
        write_manifest(staging, {**listed, STATE: file.entry}, state.step, {"score": finite(score)})
    return path


def state_json(state: TrainingState) -> bytes:
    """What a checkpoint's state.json holds."""
    plain: dict[str, Any] = {"step": state.step, "identity": state.identity}
    return json.dumps({**plain, "extra": dict(state.extra)} if state.extra else plain).encode()


def write_manifest(staging: Path, listed: Mapping[str, Any], step: int, more: Mapping[str, Any]) -> None:
    """The marker that makes a checkpoint of the files ``listed`` (name -> bytes, sha256) beside it."""
    fault("before_checkpoint_manifest")
    manifest = {"format_version": FORMAT_VERSION, "kind": KIND, "step": step, "files": dict(listed), **more}
    with HashedFile(staging / MANIFEST) as file:
        file.write(sealed(manifest))
    sync_folder(staging)
    fault("before_checkpoint_rename")


def finite(score: float | None) -> float | None:
    """The score, or None when it is no number that others can be compared with."""
    return None if score is None or not math.isfinite(score) else float(score)


def _read_named(path: Path) -> TrainingState:
    """`read_checkpoint` of a folder whose name must say the step that is inside."""
    state = read_checkpoint(path)
    if path.name != folder_name(state.step):
        raise IntegrityError(f"{path} holds step {state.step}; it was renamed or copied over another")
    return state


def read_checkpoint(path: Path) -> TrainingState:
    """The state of one checkpoint folder, verified; DataError when anything is damaged."""
    try:
        manifest = read_manifest(path, KIND)
        listed: Mapping[str, Any] = manifest["files"]
        _check_nothing_else(path, listed)
        state = json.loads(read_checked(path / STATE, listed[STATE]))
        head = TrainingState(int(state["step"]), {}, {}, str(state["identity"]), dict(state.get("extra", {})))
        if manifest.get("step", head.step) != head.step:
            raise IntegrityError(f"{path}: the manifest is of step {manifest['step']}, the state of step {head.step}")
        if manifest.get("layout") == SHARDED:
            for name, expected in listed.items():
                check_file(path / name, expected)
            return replace(head, shards=path)
        weights, optimizer = (read_tensors(read_checked(path / name, listed[name])) for name in (WEIGHTS, OPTIMIZER))
        return replace(head, weights=weights, optimizer=optimizer)
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
        raise IntegrityError(f"{path} is damaged: {type(error).__name__} {error}") from error


def _check_nothing_else(path: Path, listed: Mapping[str, Any]) -> None:
    names = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.suffix in READ_SUFFIXES)
    if extra := sorted(name for name in names if name not in listed and name != MANIFEST):
        raise IntegrityError(f"{path} holds {extra[0]}, which its manifest does not know; remove it, or the checkpoint")
    if outside := [name for name in listed if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise IntegrityError(f"{path}: the manifest names {outside[0]!r}, which lies outside of it")
