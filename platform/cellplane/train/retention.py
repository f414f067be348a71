"""Which checkpoints stay: the newest few and the best, counting only those that look whole; and removing the others safely."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellplane.artifact.folder import MANIFEST, parse_manifest
from cellplane.data.shards import fault
from cellplane.errors import DataError

KIND = "cellplane-checkpoint"
STEP_NAME = re.compile(r"step-(\d{8,})")
LEFTOVERS = ".step-*"  # what a killed writer, reader or removal leaves behind


@dataclass(frozen=True)
class Entry:
    """A checkpoint as a listing sees it: ``whole`` when its manifest is right and its files have their sizes; ``score`` of a validation."""

    step: int
    whole: bool
    score: float | None = None

    @property
    def name(self) -> str:
        """Name of its folder."""
        return folder_name(self.step)


def folder_name(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a folder's name says; None for a name that no checkpoint has."""
    match = STEP_NAME.fullmatch(name)
    return int(match[1]) if match and folder_name(int(match[1])) == name else None


def folders(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first, whole or not."""
    if not folder.is_dir():
        return []
    found = {path: step for path in folder.iterdir() if (step := step_of(path.name)) is not None and path.is_dir()}
    return sorted(found, key=found.__getitem__)


def look(path: Path) -> Entry:
    """The entry of a checkpoint folder, without reading its tensors."""
    manifest = path / MANIFEST
    sizes = {file.relative_to(path).as_posix(): file.stat().st_size for file in path.rglob("*") if file.is_file()}
    return entry_of(path.name, manifest.read_bytes() if manifest.is_file() else b"", sizes)


def entry_of(name: str, manifest: bytes, sizes: Mapping[str, int]) -> Entry:
    """The entry of a checkpoint from its name, its manifest's bytes and the sizes of its files."""
    step = step_of(name)
    assert step is not None
    try:
        described = parse_manifest(manifest, KIND, name)
    except DataError:
        return Entry(step, whole=False)
    whole = all(sizes.get(file) == expected["bytes"] for file, expected in described["files"].items())
    return Entry(step, whole and described.get("step", step) == step, _score(described.get("score")))


def _score(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def surplus(entries: Sequence[Entry], newest: int, keep: int, keep_best: bool) -> list[Entry]:
    """What may go once the checkpoint of step ``newest`` is complete.

    The newest ``keep`` whole ones stay, and the whole one with the lowest score (the earlier of equals). What is newer
    than ``newest`` goes: a run never goes back, so it was damaged. What is damaged neither counts nor goes before its time.
    """
    whole = [entry for entry in entries if entry.whole and entry.step <= newest]
    kept = sorted(whole, key=lambda entry: entry.step)[-keep:]
    best = best_first(whole)[:1] if keep_best else []
    oldest = min((entry.step for entry in kept), default=0) if len(kept) == keep else 0
    return [entry for entry in entries if entry.step > newest or (entry.step < oldest and entry not in best)]


def best_first(entries: Sequence[Entry]) -> list[Entry]:
    """Whole entries that have a score, the lowest first."""
    scored = [(entry.score, entry.step, entry) for entry in entries if entry.whole and entry.score is not None]
    return [entry for _, _, entry in sorted(scored, key=lambda item: item[:2])]


def remove(path: Path) -> None:
    """Removes a checkpoint folder; killed at any moment it leaves the folder whole, or only what `sweep` removes."""
    fault("before_removal")
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    fault("in_removal")
    shutil.rmtree(hidden, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Removes what killed writers and removals left; only for the one who writes there."""
    for leftover in folder.glob(LEFTOVERS):
        shutil.rmtree(leftover, ignore_errors=True)
