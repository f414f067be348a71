"""The training loop: plan, prepare, step, write down, keep. The same for every task, engine and world size.

The loop is a function of (data, configuration, seed): it holds no random state, so a run that was killed and goes on
from a checkpoint takes exactly the steps it would have taken. A thread reads and masks the next step while the present
one is computed; what it prepares depends on the number of the step alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

from cellplane.data.loader import prefetch
from cellplane.data.sentences import StepPlan, deal
from cellplane.data.shards import fault
from cellplane.tracking.journal import Journal
from cellplane.train.checkpoint import Checkpoints
from cellplane.train.config import CheckpointConfig
from cellplane.train.engine import Engine, StepResult
from cellplane.train.objective import Objective, Work, work_of

log = logging.getLogger(__name__)

AfterStep = Callable[[int, StepResult], bool]  # (steps done, result) -> whether to stop


@dataclass(frozen=True)
class Keeping:
    """Where a run writes: checkpoints (all ranks take part, rank 0 writes) and the journal (rank 0 alone; None elsewhere)."""

    checkpoints: Checkpoints
    config: CheckpointConfig
    identity: str
    journal: Journal | None = None


def train(
    engine: Engine,
    objective: Objective,
    plan: StepPlan,
    steps: range,
    keeping: Keeping | None = None,
    after_step: AfterStep | None = None,
) -> int:
    """Runs the steps in ``steps`` (its start = steps already done) and returns how many steps are done in all.

    ``after_step`` sees every result on every rank and may end the run early. Raises TrainingError on a loss that is not
    finite, StorageError when a checkpoint cannot be written.
    """
    dealt = (engine.rank, engine.world_size)
    with closing(prefetch(_prepared(objective, plan, steps, dealt), ahead=1)) as ready:
        began = time.perf_counter()
        for prepared in ready:
            waited = time.perf_counter() - began
            result = engine.step(prepared.works, prepared.total, prepared.step)
            done = prepared.step + 1
            if keeping is not None and keeping.journal is not None:
                seconds = time.perf_counter() - began
                keeping.journal.append(done, _metrics(result, prepared.total / seconds, waited))
            fault(f"step_rank{engine.rank}")
            stop = after_step is not None and after_step(done, result)
            if keeping is not None and (stop or done == steps.stop or done % keeping.config.every_steps == 0):
                keep(engine, keeping, done)
            if stop:
                return done
            began = time.perf_counter()
    return steps.stop


@dataclass(frozen=True)
class _Prepared:
    """This rank's work of a step, and what all ranks' sentences weigh together."""

    step: int
    works: list[Work]
    total: float


def _prepared(objective: Objective, plan: StepPlan, steps: range, dealt: tuple[int, int]) -> Iterator[_Prepared]:
    for step in steps:
        planned = plan.at(step)
        yield _Prepared(step, *work_of(objective, planned, deal(planned, *dealt)))


def keep(engine: Engine, keeping: Keeping, done: int) -> None:
    """Writes a checkpoint: every rank gathers, rank 0 writes."""
    state = engine.state(done, keeping.identity)
    if engine.rank == 0:
        fault("before_checkpoint")
        path = keeping.checkpoints.save(state)
        log.info("kept %s", path.name)


def _metrics(result: StepResult, cells_per_s: float, waited_s: float) -> dict[str, float]:
    parts = {f"train/{name}": value for name, value in result.parts.items()}
    return {
        "train/loss": result.loss,
        **parts,
        "train/grad_norm": result.grad_norm,
        "train/lr": result.lr,
        "train/cells_per_s": cells_per_s,
        "train/data_wait_s": waited_s,  # what the step waited for its cells: 0 unless reading is slower than computing
    }
