"""Checkpoints that can be trusted: one consolidated format for every engine, ZeRO stage and world size.

    step-00000050/  weights.safetensors  optimizer.safetensors  state.json  manifest.json (written last, sha256 of the rest)

They lie in the run's own folder. Restoring takes the newest one whose every byte verifies, says which, and never goes
through Ray, whose own bookkeeping may be older than the disk and cannot step back over a damaged file (STACK.md 9).
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from cellplane.artifact.folder import FORMAT_VERSION, MANIFEST, read_verified, sealed, write_folder
from cellplane.errors import CheckpointError, DataError, IntegrityError

log = logging.getLogger(__name__)

KIND = "cellplane-checkpoint"
WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class TrainingState:
    """Everything a run needs to go on: ``step`` steps are done; optimizer moments are named `exp_avg:NAME`, `exp_avg_sq:NAME`.

    ``identity`` fingerprints what must not change between save and restore (configuration and data).
    """

    step: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    identity: str


class Checkpoints:
    """The checkpoints of one run, newest last; keeps the newest ``keep``."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), keep

    def save(self, state: TrainingState) -> Path:
        """Writes the state in one move and removes all but it and the ``keep`` - 1 before it; StorageError when the disk is full."""
        files = {
            WEIGHTS: save_safetensors({name: tensor.contiguous() for name, tensor in state.weights.items()}),
            OPTIMIZER: save_safetensors({name: tensor.contiguous() for name, tensor in state.optimizer.items()}),
            STATE: json.dumps({"step": state.step, "identity": state.identity}).encode(),
        }
        listed = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
        manifest: dict[str, Any] = {"format_version": FORMAT_VERSION, "kind": KIND, "files": listed}
        path = self.folder / f"step-{state.step:08d}"
        write_folder(path, {**files, MANIFEST: sealed(manifest)})
        found = self.found()
        newest = found.index(path)
        for stale in (*found[: max(newest + 1 - self.keep, 0)], *found[newest + 1 :]):  # a run never goes back: what is newer was damaged
            shutil.rmtree(stale, ignore_errors=True)
        return path

    def found(self) -> list[Path]:
        """Checkpoint folders on disk, oldest first, valid or not."""
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def newest_valid(self, identity: str) -> TrainingState | None:
        """The newest state whose bytes verify; None when the run never saved one.

        Damaged ones are skipped with a warning. Raises CheckpointError when checkpoints exist but none is usable: a run
        never starts again from 0 in silence.
        """
        found = self.found()
        for path in reversed(found):
            try:
                state = read_checkpoint(path)
            except DataError as error:
                log.warning("checkpoint %s is damaged and left aside: %s", path.name, error)
                continue
            if state.identity != identity:
                raise CheckpointError(
                    f"{path} was made with another configuration or other data; use another run name, or remove {self.folder} to start anew"
                )
            log.info("going on from checkpoint %s", path.name)
            return state
        if found:
            raise CheckpointError(f"none of the {len(found)} checkpoints in {self.folder} is intact; remove them to start anew from step 0")
        return None


def read_checkpoint(path: Path) -> TrainingState:
    """The state of one checkpoint folder, verified; DataError when anything is damaged."""
    try:
        _, contents = read_verified(path, KIND)
        state = json.loads(contents[STATE])
        weights, optimizer = load_safetensors(contents[WEIGHTS]), load_safetensors(contents[OPTIMIZER])
        return TrainingState(int(state["step"]), weights, optimizer, str(state["identity"]))
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise IntegrityError(f"{path} is damaged: {type(error).__name__} {error}") from error
