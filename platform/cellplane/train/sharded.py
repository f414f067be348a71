"""`checkpoint.format: sharded`: DeepSpeed's own files, for networks whose state no single worker can hold (above ~3 B parameters).

Every rank writes its part into one staging folder, hashes its share of the files, and rank 0 puts our manifest around them
and moves the folder into place: DeepSpeed has no checksums, writes its `latest` in place, and starts again from nothing in
silence where it is missing. Its files are pickles and are read only when the manifest verifies, by a group of the same size
and ZeRO stage. The folder must be one that all workers see.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cellplane.artifact.folder import read_manifest
from cellplane.data.shards import fault, storage_errors, sync_folder
from cellplane.errors import CheckpointError
from cellplane.train.checkpoint import SHARDED, STATE, Checkpoints, TrainingState, finite, state_json, write_manifest
from cellplane.train.retention import KIND, folder_name, remove
from cellplane.train.tensors import HashedFile, hash_file

TAG = "deepspeed"  # the folder that DeepSpeed makes inside ours
DIGESTS = "digests-{}.json"  # what each rank found, until the manifest says it


@dataclass(frozen=True)
class Group:
    """Who trains: this worker's rank, how many workers, and what ZeRO shards over them. Shards fit an equal group only."""

    rank: int
    world_size: int
    zero_stage: int


def save_sharded(
    checkpoints: Checkpoints, head: TrainingState, group: Group, write: Callable[[Path], None], score: float | None = None
) -> Path:
    """Writes a sharded checkpoint; every rank must call it. ``head`` is the state without tensors.

    ``write`` lets DeepSpeed write this rank's files into a folder. Raises StorageError when the disk refuses.
    """
    path = checkpoints.folder / folder_name(head.step)
    staging = checkpoints.folder / f".{path.name}.sharded"
    with storage_errors(path):
        if group.rank == 0:
            checkpoints.begin()
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        _meet(group)
        write(staging)
        _meet(group)
        fault("checkpoint_file")
        _hash_share(staging, group)
        _meet(group)
        if group.rank == 0:
            _seal(staging, head, group, score)
            if path.exists():
                remove(path)  # of this step, from before the run fell back: it was damaged
            staging.rename(path)
            checkpoints.complete(head.step)
    return path


def save_shards(engine: Any, folder: Path) -> None:
    """Lets a DeepSpeed engine write this rank's files into ``folder``."""
    engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)


def load_shards(engine: Any, state: TrainingState, group: Group) -> None:
    """Puts a verified sharded state into a DeepSpeed engine; CheckpointError when it is of another group, or DeepSpeed finds nothing."""
    assert state.shards is not None
    described = read_manifest(state.shards, KIND)
    there = (described.get("world_size"), described.get("zero_stage"))
    if there != (group.world_size, group.zero_stage):
        raise CheckpointError(
            f"{state.shards} was written by {there[0]} workers at ZeRO stage {there[1]} and fits no other group; this one has "
            f"{group.world_size} at stage {group.zero_stage}. Start as many at that stage, or train with checkpoint.format=consolidated"
        )
    loaded, _ = engine.load_checkpoint(str(state.shards), tag=TAG, load_lr_scheduler_states=False)
    if loaded is None:
        raise CheckpointError(f"DeepSpeed found nothing to go on from in {state.shards}; remove it to fall back to the one before")


def _hash_share(staging: Path, group: Group) -> None:
    """Each rank hashes some of the files, whoever wrote them, and leaves what it found for rank 0."""
    files = sorted(file for file in (staging).rglob("*") if file.is_file())
    found = {file.relative_to(staging).as_posix(): hash_file(file) for file in files[group.rank :: group.world_size]}
    _meet(group)  # all have listed before the first note appears
    (staging / DIGESTS.format(group.rank)).write_text(json.dumps(found), encoding="utf-8")


def _seal(staging: Path, head: TrainingState, group: Group, score: float | None) -> None:
    listed: dict[str, Any] = {}
    for rank in range(group.world_size):
        note = staging / DIGESTS.format(rank)
        listed |= json.loads(note.read_text(encoding="utf-8"))
        note.unlink()
    for folder in {(staging / name).parent for name in listed}:
        sync_folder(folder)
    with HashedFile(staging / STATE) as file:
        file.write(state_json(head))
    more = {"layout": SHARDED, "world_size": group.world_size, "zero_stage": group.zero_stage, "score": finite(score)}
    write_manifest(staging, {**listed, STATE: file.entry}, head.step, more)


def _meet(group: Group) -> None:
    if group.world_size > 1:
        dist.barrier()
