"""The training loop: plan, prepare, step, write down, keep. The same for every task, engine and world size.

The loop is a function of (data, configuration, seed): it holds no random state, so a run that was killed and goes on
from a checkpoint takes exactly the steps it would have taken. A thread reads and masks the next step while the present
one is computed; what it prepares depends on the number of the step alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

from cellplane.data.loader import prefetch
from cellplane.data.sentences import StepPlan, deal
from cellplane.data.shards import fault
from cellplane.errors import ConfigError
from cellplane.tracking.journal import Journal
from cellplane.train.checkpoint import Checkpoints
from cellplane.train.config import CheckpointConfig
from cellplane.train.guard import check_finite
from cellplane.train.objective import Objective, Work, work_of
from cellplane.train.sharded import save_sharded
from cellplane.train.step import Engine, ShardingEngine, StepResult

log = logging.getLogger(__name__)

AfterStep = Callable[[int, StepResult], bool]  # (steps done, result) -> whether to stop


class Meter(Protocol):
    """Tells how fast a run is."""

    def metrics(self, cells: int, seconds: float) -> Mapping[str, float]:
        """Of a step of so many planned cells, those of all ranks and those that were dropped included; names as in the journal."""


@dataclass(frozen=True)
class Looking:
    """What is looked at every ``every_steps`` steps and after the last one: ``look`` of how many are done gives metrics `val/...`.

    Every rank looks, at the same steps.
    """

    every_steps: int
    look: Callable[[int], Mapping[str, float]]

    def metrics(self, done: int, last: int) -> Mapping[str, float]:
        """Those of this step; none when it is not its turn."""
        return self.look(done) if done == last or done % self.every_steps == 0 else {}


@dataclass(frozen=True)
class Keeping:
    """Where a run writes: checkpoints (all ranks take part, rank 0 writes) and the journal (rank 0 alone; None elsewhere).

    What is looked at and measured on the way stands in the row of its step; `val/loss` is the checkpoint's score.
    """

    checkpoints: Checkpoints
    config: CheckpointConfig
    identity: str
    journal: Journal | None = None
    looking: Looking | None = None
    meter: Meter | None = None

    def looked(self, done: int, last: int) -> Mapping[str, float]:
        """Metrics of a look, where it is its turn."""
        return {} if self.looking is None else self.looking.metrics(done, last)


def train(
    engine: Engine,
    objective: Objective,
    plan: StepPlan,
    steps: range,
    keeping: Keeping | None = None,
    after_step: AfterStep | None = None,
) -> int:
    """Runs the steps in ``steps`` (its start = steps already done) and returns how many steps are done in all.

    ``after_step`` sees every result on every rank and may end the run early. Raises TrainingError when the guard gives up
    or the state is not finite, StorageError when a checkpoint cannot be written.
    """
    dealt = (engine.rank, engine.world_size)
    with closing(prefetch(_prepared(objective, plan, steps, dealt), ahead=1)) as ready:
        began = time.perf_counter()
        for prepared in ready:
            waited = time.perf_counter() - began
            result = engine.step(prepared.works, prepared.total, prepared.step)
            done, seconds = prepared.step + 1, time.perf_counter() - began
            looked = {} if keeping is None else keeping.looked(done, steps.stop)
            if keeping is not None and keeping.journal is not None:
                speed = _speed(keeping.meter, prepared.cells, seconds)
                keeping.journal.append(done, {**_metrics(result, waited), **speed, **looked})
            fault(f"step_rank{engine.rank}")
            stop = after_step is not None and after_step(done, result)
            last = stop or done == steps.stop
            if keeping is not None and (last or done % keeping.config.every_steps == 0):
                keep(engine, keeping, done, looked.get("val/loss"), last)
            if stop:
                return done
            began = time.perf_counter()
    return steps.stop


@dataclass(frozen=True)
class _Prepared:
    """This rank's work of a step, and what all ranks' sentences weigh together, and how many cells they have."""

    step: int
    cells: int
    works: list[Work]
    total: float


def _prepared(objective: Objective, plan: StepPlan, steps: range, dealt: tuple[int, int]) -> Iterator[_Prepared]:
    for step in steps:
        planned = plan.at(step)
        cells = sum(int(plan.sizes[list(micro_batch.sentences)].sum()) for micro_batch in planned)
        yield _Prepared(step, cells, *work_of(objective, planned, deal(planned, *dealt)))


def keep(engine: Engine, keeping: Keeping, done: int, score: float | None = None, last: bool = True) -> None:
    """Writes a checkpoint: every rank gathers, rank 0 writes; where it is sharded, every rank writes its own part.

    The lowest ``score`` is the best. The ``last`` one is never sharded: the finished model is made of it. A state that is
    not finite is never written: TrainingError.
    """
    if keeping.config.format == "sharded" and not last:
        _keep_shards(engine, keeping, done, score)
        return
    state = engine.state(done, keeping.identity)
    if engine.rank == 0:
        check_finite(state)
        fault("before_checkpoint")
        path = keeping.checkpoints.save(state, score)
        log.info("kept %s", path.name)


def _keep_shards(engine: Engine, keeping: Keeping, done: int, score: float | None) -> None:
    if not isinstance(engine, ShardingEngine):
        raise ConfigError("checkpoint.format sharded are DeepSpeed's own files: take engine.name deepspeed, or format consolidated")
    head = engine.head(done, keeping.identity)
    if engine.rank == 0:
        fault("before_checkpoint")
    path = save_sharded(keeping.checkpoints, head, engine.group, engine.write_shards, score)
    if engine.rank == 0:
        log.info("kept %s", path.name)


def _speed(meter: Meter | None, cells: int, seconds: float) -> Mapping[str, float]:
    return {"train/cells_per_s": cells / max(seconds, 1e-9)} if meter is None else meter.metrics(cells, seconds)


def _metrics(result: StepResult, waited_s: float) -> dict[str, float]:
    parts = {f"train/{name}": value for name, value in result.parts.items()}
    return {
        "train/loss": result.loss,
        **parts,
        "train/grad_norm": result.grad_norm,
        "train/lr": result.lr,
        "train/nan_skips": float(result.skips),
        "train/data_wait_s": waited_s,  # what the step waited for its cells: 0 unless reading is slower than computing
    }
