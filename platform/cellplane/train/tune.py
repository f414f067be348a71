"""Trials of a search side by side, the hopeless ones stopped early: Ray Tune's ASHA, and a word on every trial that ended.

ASHA (Li et al., "A system for massively parallel hyperparameter tuning", MLSys 2020) lets a trial go on past a rung only
while it is among the best that reached it. Ray's own records are not used to go on: what ended is written down by us.
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from cellplane.errors import ServiceError

Report = Callable[[int, float], None]  # (steps done, score so far, larger is better)
Trial = Callable[[str, Report], None]  # (name, report): runs in a worker, reports and returns
Ended = Callable[[str, str, float, int], None]  # (name, finished or stopped, score, steps); runs in the driver
FINISHED, STOPPED = "finished", "stopped"
SCORE, STEP = "score", "step"


@dataclass(frozen=True, kw_only=True)
class Search:
    """How trials share a cluster, and when ASHA looks at them: first after ``grace_steps``, then ``reduction`` times later each time."""

    folder: Path
    most_steps: int
    grace_steps: int
    reduction: float = 3.0
    concurrent: int | None = None
    cpus: int = 1
    gpus: float = 0.0


def run_trials(trial: Trial, names: Sequence[str], search: Search, ended: Ended) -> dict[str, str]:
    """Runs every trial until it returns or is stopped; errors by the name of the trial that failed.

    ``trial`` and ``ended`` must pickle. Needs an initialised Ray: ServiceError without.
    """
    if not ray.is_initialized():
        raise ServiceError("tuning needs Ray: start a local cluster with `cellplane up`, or set RAY_ADDRESS")
    tuner = tune.Tuner(
        tune.with_resources(_trainable(trial), {"cpu": search.cpus, "gpu": search.gpus}),
        param_space={"name": tune.grid_search(list(names))},
        tune_config=tune.TuneConfig(
            metric=SCORE, mode="max", scheduler=RecordingASHA(ended, search), max_concurrent_trials=search.concurrent
        ),
        run_config=tune.RunConfig(name=uuid.uuid4().hex[:8], storage_path=str(search.folder / "ray"), verbose=0),
    )
    with _quietly():
        results = tuner.fit()
    shutil.rmtree(search.folder / "ray", ignore_errors=True)
    return {str(result.config["name"]): _last_line(result.error) for result in results if result.error is not None}


@contextmanager
def _quietly() -> Iterator[None]:
    """Ray Tune without files of its own for every trial (the journals say more), and without words about those."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    logger = logging.getLogger("ray.tune")
    before = logger.level
    logger.setLevel(logging.CRITICAL)  # what failed is answered
    try:
        yield
    finally:
        logger.setLevel(before)


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _trainable(trial: Trial) -> Callable[[dict[str, Any]], None]:
    def work(config: dict[str, Any]) -> None:
        trial(config["name"], lambda step, score: tune.report({SCORE: score, STEP: step}))

    return work


class RecordingASHA(ASHAScheduler):  # type: ignore[misc]
    """ASHA that tells of every trial it stops, and of every one that returns."""

    def __init__(self, ended: Ended, search: Search) -> None:
        grace = min(search.grace_steps, search.most_steps)
        super().__init__(time_attr=STEP, max_t=search.most_steps + 1, grace_period=grace, reduction_factor=search.reduction)
        self.ended = ended
        self.stopped: set[str] = set()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Ray's call for every report."""
        decision = str(super().on_trial_result(tune_controller, trial, result))
        if decision == TrialScheduler.STOP:
            self.stopped.add(trial.config["name"])
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Ray's call for a trial that returned, or was stopped."""
        super().on_trial_complete(tune_controller, trial, result)
        name = trial.config["name"]
        if SCORE in result:
            self.ended(name, STOPPED if name in self.stopped else FINISHED, float(result[SCORE]), int(result[STEP]))
