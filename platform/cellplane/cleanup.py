"""What may go from CELLPLANE_HOME: checkpoints a finished run needs no more, leftovers of what was killed, old caches, old runs.

A survey lists; removing is a step of its own and looks again before each piece. Nothing outside of the home is touched,
no link is followed, nothing that a living process holds or that was changed within the hour, and no run that the registry,
a tag, another model or a file named KEEP in its folder refers to.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR
from typing import Any

from cellplane.artifact.folder import MANIFEST, read_manifest
from cellplane.config import home
from cellplane.errors import DataError, ServiceError
from cellplane.tracking.references import References, references
from cellplane.train.retention import LEFTOVERS, folders, look, surplus

log = logging.getLogger(__name__)

HOUR_S, DAY_S = 3600.0, 86400.0
RECENT_S = HOUR_S  # changed so lately counts as in use
KEEP_FILE = "KEEP"  # in a run's folder: it stays
RUN_LOCKS = ("run.lock",)  # held by the worker that writes a run
CONVERSION_LOCK, STAGING = ".lock", ".staging"
REMOVED = ".removed"  # ends the hidden name of what is being removed
CONVERSION_DEPTH = 4  # folders below the home in which shards are looked for


@dataclass(frozen=True)
class Item:
    """Something that may go: what it is, where, how large, and why."""

    kind: str
    path: Path
    bytes: int
    why: str


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How old (days without a change) what is listed must be; None does not list that kind at all."""

    runs_days: float | None = None
    """Finished runs that nothing refers to."""
    unfinished_days: float | None = None
    """Runs that never wrote a model."""
    caches_days: float = 30.0
    """Downloaded inputs and models, environments of other packages; each is made again when it is needed."""


@dataclass(frozen=True)
class Survey:
    """What may go, what is in use and therefore stays, and what a person should know about the survey."""

    items: tuple[Item, ...]
    in_use: tuple[Path, ...]
    notes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Of all items."""
        return sum(item.bytes for item in self.items)


def survey(wanted: Wanted, tracking_uri: str | None = None) -> Survey:
    """Looks through CELLPLANE_HOME and changes nothing."""
    root = home()
    runs = [path for path in _children(root / "runs") if path.is_dir()]
    folders_of_shards = list(_conversions(root))
    busy = [folder for folder in (*runs, *folders_of_shards) if is_in_use(folder)]
    idle = [run for run in runs if run not in busy]
    whole, notes = _unreferred(idle, wanted, tracking_uri)
    gone = {item.path for item in whole}
    inside = [item for run in idle if run not in gone for item in _inside_run(run)]
    staging = [item for folder in folders_of_shards if folder not in busy for item in _staging(folder)]
    caches = list(_old_caches(root / "cache", wanted.caches_days))
    halves = [item for folder in (root / "runs", root / "cache", *_nested(root / "cache")) for item in _half_removed(folder)]
    return Survey((*whole, *inside, *staging, *caches, *halves), tuple(busy), tuple(notes))


def remove(items: Sequence[Item]) -> tuple[list[Item], list[tuple[Item, str]]]:
    """Removes what is listed if it still may go: (removed, [(kept, why)])."""
    removed: list[Item] = []
    kept: list[tuple[Item, str]] = []
    for item in items:
        if reason := _must_stay(item):
            kept.append((item, reason))
            continue
        try:
            with _held(_owner(item)):
                _remove(item.path)
            removed.append(item)
        except BlockingIOError:
            kept.append((item, "in use since it was listed"))
        except OSError as error:
            kept.append((item, error.strerror or str(error)))
    return removed, kept


def _must_stay(item: Item) -> str:
    """Why an item may not go after all; empty when it may."""
    if not item.path.exists() or item.path.is_symlink():
        return "not there any more"
    if home().resolve() not in item.path.resolve().parents:
        return "outside of CELLPLANE_HOME"
    return "in use since it was listed" if _age_s(item.path) < RECENT_S else ""


def _owner(item: Item) -> Path:
    """The folder whose lock and changes say whether an item is in use: the run, the shards, or the item itself."""
    if item.kind == "staging":
        return item.path.parent
    runs = home() / "runs"
    return runs / item.path.relative_to(runs).parts[0] if runs in item.path.parents else item.path


def _remove(path: Path) -> None:
    """Takes the name away first, so that nobody ever finds half of it (of a staging folder each file counts by itself)."""
    if path.name == STAGING:
        shutil.rmtree(path)
        return
    hidden = path.with_name(f".{path.name.lstrip('.')}{REMOVED}")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    if hidden.is_dir():
        shutil.rmtree(hidden)
    else:
        hidden.unlink()


def is_in_use(folder: Path) -> bool:
    """Whether a living process holds the folder's lock, or something in it was changed within the hour."""
    try:
        with _held(folder):
            return _age_s(folder) < RECENT_S
    except BlockingIOError:
        return True


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Holds the folder's locks, as far as there are any; BlockingIOError when a living process has one."""
    files = []
    try:
        for name in (*RUN_LOCKS, CONVERSION_LOCK):
            if (folder / name).is_file() and not (folder / name).is_symlink():
                files.append((folder / name).open("rb"))
                fcntl.flock(files[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        for file in files:
            file.close()


def _inside_run(run: Path) -> Iterator[Item]:
    """What a run that is not in use needs no more, while the run itself stays."""
    checkpoints = run / "checkpoints"
    for leftover in sorted(checkpoints.glob(LEFTOVERS)):
        yield _item("leftover", leftover, "of a checkpoint that was not finished or was being removed")
    yield from _half_removed(run)
    if (run / "ray").is_dir():
        yield _item("ray", run / "ray", "Ray's own records of the run; it never goes on from them")
    if is_finished(run):
        entries = [look(path) for path in folders(checkpoints)]
        newest = max((entry.step for entry in entries if entry.whole), default=None)
        for entry in [] if newest is None else surplus(entries, newest, keep=1, keep_best=True):
            yield _item("checkpoint", checkpoints / entry.name, "neither the newest nor the best of a finished run")


def _half_removed(folder: Path) -> Iterator[Item]:
    for leftover in sorted(folder.glob(f".*{REMOVED}")):
        if leftover.name.removesuffix(REMOVED) and not leftover.is_symlink():
            yield _item("leftover", leftover, "being removed when the remover was killed")


def is_finished(run: Path) -> bool:
    """Whether the run wrote its model."""
    return _model_manifest(run) is not None


def _model_manifest(run: Path) -> dict[str, Any] | None:
    try:
        return read_manifest(run / "model", "cellplane-model")
    except DataError:
        return None


def _unreferred(runs: Sequence[Path], wanted: Wanted, tracking_uri: str | None) -> tuple[list[Item], list[str]]:
    """Whole runs that are old enough and that nothing refers to; none when the tracker cannot be asked."""
    if wanted.runs_days is None and wanted.unfinished_days is None:
        return [], []
    try:
        known = references(tracking_uri)
    except ServiceError as error:
        return [], [f"no run is listed, because the tracker may refer to any: {error}"]
    models = {run: _model_manifest(run) for run in _children(home() / "runs")}
    items = []
    for run in runs:
        days = wanted.unfinished_days if models.get(run) is None else wanted.runs_days
        if days is None or _age_s(run) < days * DAY_S or _is_referred(run, models, known):
            continue
        what = "never wrote a model" if models.get(run) is None else "nothing refers to its model"
        items.append(_item("run", run, f"{what}, untouched for {_age_s(run) / DAY_S:.0f} days"))
    return items, []


def _is_referred(run: Path, models: dict[Path, dict[str, Any] | None], known: References) -> bool:
    if (run / KEEP_FILE).exists() or run.name in known.run_names:
        return True
    own = models.get(run)
    if own is None:
        return False
    sha256 = str(own.get("model_sha256"))
    others = [model for other, model in models.items() if other != run and model is not None]
    return sha256 in known.model_sha256 or any(sha256 in json.dumps(model.get("lineage", {})) for model in others)


def _conversions(root: Path) -> Iterator[Path]:
    """Folders of shards that have a staging folder, not too deep below the home; the rooms of runs and caches hold none."""
    skipped = {root / "runs", root / "cache", root / "artifacts"}
    level = [root]
    for _ in range(CONVERSION_DEPTH):
        level = [child for folder in level for child in _children(folder) if child.is_dir() and child not in skipped]
        yield from (folder for folder in level if (folder / STAGING).is_dir() and (folder / CONVERSION_LOCK).exists())


def _staging(folder: Path) -> Iterator[Item]:
    if _age_s(folder / STAGING) > DAY_S:
        why = "left by a finished conversion" if (folder / MANIFEST).is_file() else "an interrupted conversion would go on from it"
        yield _item("staging", folder / STAGING, why)


def _old_caches(cache: Path, days: float) -> Iterator[Item]:
    nested = _nested(cache)
    for entry in sorted([*(child for folder in nested for child in _children(folder)), *_children(cache)]):
        if entry not in nested and entry.name != "verified" and (age := _age_s(entry, read=True)) > max(days * DAY_S, RECENT_S):
            yield _item("cache", entry, f"not read for {age / DAY_S:.0f} days; fetched or made again when needed")


def _nested(cache: Path) -> list[Path]:
    """Folders of the cache whose children are its entries; beside them lie registered models by their sha256."""
    return [cache / "inputs", cache / "environments"]


def _children(folder: Path) -> list[Path]:
    """What lies in a folder, links and hidden names left out."""
    if not folder.is_dir() or folder.is_symlink():
        return []
    return sorted(path for path in folder.iterdir() if not path.is_symlink() and not path.name.startswith("."))


def _item(kind: str, path: Path, why: str) -> Item:
    return Item(kind, path, sum(stat.st_size for stat in _stats(path)), why)


def _age_s(path: Path, read: bool = False) -> float:
    """Seconds since a file in the folder was changed, or also ``read``; folders count only where there is no file.

    Their time changes when something is removed from them.
    """
    stats = list(_stats(path))
    files = [stat for stat in stats if not S_ISDIR(stat.st_mode)] or stats
    return time.time() - max((max(stat.st_mtime, stat.st_atime) if read else stat.st_mtime for stat in files), default=0.0)


def _stats(path: Path) -> Iterator[os.stat_result]:
    """Of a file, or of everything below a folder and itself; a file that goes meanwhile is left out."""
    for place in (path, *(path.rglob("*") if path.is_dir() and not path.is_symlink() else ())):
        try:
            yield place.lstat()
        except FileNotFoundError:
            continue
