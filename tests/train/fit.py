"""A small fit, whole or killed: what tests of fine-tuning share, and a program that is killed at named points.

`python -m tests.train.fit ROOT POINT...` forks a child for each point, because torch takes seconds to import; the exit
codes are printed, one a line, and each child's folder is ROOT/POINT.
"""

# C cells

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cellplane.data.sentences import CellTable, MemoryStore, PlanConfig, StepPlan, memory_store
from cellplane.model.cellplm import new_model
from cellplane.model.config import MaskingConfig
from cellplane.tracking.journal import Journal
from cellplane.train.checkpoint import Checkpoints
from cellplane.train.config import CheckpointConfig, FitConfig, OptimizerConfig
from cellplane.train.finetune import Best, Course, Look, Progress, finetune
from cellplane.train.loop import Keeping
from cellplane.train.objective import MaskedObjective
from tests.tiny import ANNOTATOR, N_GENES, random_counts

STEPS, LOOK_EVERY, SAVE_EVERY = 12, 2, 3
RECIPE = FitConfig(optimizer=OptimizerConfig(steps=STEPS, lr=2e-2, warmup_steps=1), validate_every=LOOK_EVERY, patience=20, device="cpu")


def labelled(n_cells: int, seed: int) -> MemoryStore:
    """Cells of three classes in sentences of ten; each class counts more of its own eight genes."""
    counts, labels = random_counts(n_cells, seed=seed), np.arange(n_cells) % 3
    for cell, label in enumerate(labels):
        counts[cell, 8 * label : 8 * label + 8] *= 2
    cell, gene = counts.nonzero(as_tuple=True)
    crow = np.concatenate([[0], np.cumsum((counts != 0).sum(1).numpy())])
    table = CellTable(crow, gene.numpy(), counts[cell, gene].numpy(), np.ones(N_GENES, dtype=bool), labels=labels)
    return memory_store(table, 10)


class Held:
    """A look at held-out cells: the loss alone."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.batch = network, labelled(30, seed=1).read(range(3))
        self.asked = 0

    def __call__(self) -> Look:
        self.asked += 1
        with torch.inference_mode():
            loss = float(self.network(self.batch).loss.total.mean())
        return Look({"val/loss": loss}, (-loss,))


def keeping_in(folder: Path) -> Keeping:
    """Checkpoints every three steps and a journal in a folder."""
    config = CheckpointConfig(every_steps=SAVE_EVERY, keep=1, keep_best=False, asynchronous=False)
    return Keeping(Checkpoints(folder / "checkpoints", 1, keep_best=False), config, "a fit", Journal(folder / "journal.jsonl"))


def task() -> tuple[MaskedObjective, StepPlan]:
    """What is learned, and in which steps."""
    store = labelled(60, seed=0)
    objective = MaskedObjective(store, MaskingConfig(drop_cell_rate=0.2, cell_mask_rate=0.5), store.sizes.astype(np.float64))
    return objective, StepPlan(store.sizes, PlanConfig(cells_per_micro_batch=20, micro_batches_per_step=1))


def fit(folder: Path | None = None, recipe: FitConfig = RECIPE, progress: Progress | None = None, network: nn.Module | None = None) -> Best:
    """A fit from the beginning, or from where a folder left it."""
    network = new_model(ANNOTATOR, 0) if network is None else network
    objective, plan = task()
    keeping = None if folder is None else keeping_in(folder)
    return finetune(network, objective, plan, recipe, Held(network), Course(progress, keeping))


def main(root: Path, points: list[str]) -> None:
    """Runs a fit for every point in a child that is killed there."""
    torch.set_num_threads(1)
    for point in points:
        child = os.fork()
        if child == 0:
            os.environ["FAULT_AT"] = point
            fit(root / point.replace(":", "-"))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
