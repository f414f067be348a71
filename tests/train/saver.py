"""Saves two checkpoints in a child process for each scenario, and has it killed at a named point of the second.

`saver.py ROOT MODE/POINT...` with MODE sync, background or remote; the children are forked, because torch takes seconds
to import. Their folders are ROOT/MODE-POINT; the exit codes are printed, one a line.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from cellplane.train.checkpoint import Checkpoints
from cellplane.train.remote import RemoteFolder
from tests.train.states import state_of

STEPS = (10, 20)


def save_twice(folder: Path, mode: str, point: str) -> None:
    """The second save is killed at the point; only one checkpoint stays after a save, so that it also removes."""
    checkpoints = Checkpoints(folder / "here", keep=1, keep_best=False)
    if mode == "background":
        checkpoints.in_background()
    if mode == "remote":
        checkpoints.remote = RemoteFolder((folder / "there").as_uri())
    with checkpoints:
        checkpoints.save(state_of(STEPS[0]))
        checkpoints.wait()
        os.environ["FAULT_AT"] = point
        checkpoints.save(state_of(STEPS[1]))


def main(root: Path, scenarios: list[str]) -> None:
    """Runs every scenario in a child of its own."""
    torch.set_num_threads(1)
    for scenario in scenarios:
        mode, _, point = scenario.partition("/")
        child = os.fork()
        if child == 0:
            save_twice(root / scenario.replace("/", "-").replace(":", "-"), mode, point)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
