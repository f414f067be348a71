"""Searching for a better recipe: trials drawn from a seed, run side by side, kept, compared, the best one written down.

Trial 0 is the base configuration as it stands; the others are a function of (space, seed, number), so a search that was
killed knows what is missing. A trial that ended is never run again, one that was running goes on from its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cellplane.config import find_config, home, load_config, to_plain, to_yaml
from cellplane.data.files import atomic_file
from cellplane.errors import CheckpointError, ConfigError, ServiceError, TrainingError
from cellplane.pipelines.finetuning import ANOTHER_WRITER_S, TASKS, identity_of, new_pipeline
from cellplane.pipelines.job import Progress, job_tags, quiet, run_name
from cellplane.pipelines.tune_config import TuneConfig, check_space, overrides_of
from cellplane.processes import locked
from cellplane.seeds import keyed_seed
from cellplane.tracking.journal import Journal
from cellplane.tracking.runs import RunSpec, TrackedRun
from cellplane.train.checkpoint import checkpoints_of
from cellplane.train.finetune import Course
from cellplane.train.loop import Keeping
from cellplane.train.run_folder import RunFolder

log = logging.getLogger(__name__)

RESULT, JOURNAL, BEST = "result.json", "journal.jsonl", "best.yaml"
LOOK_S = 2.0  # between two looks at which trials ended
EXPERIMENT = "cellplane/tune"


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended: ``status`` finished or stopped, ``score`` in the metric's own direction, after ``steps``."""

    name: str
    status: str
    score: float
    steps: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class TuneReport:
    """What a search found: its trials, best first, and the configuration file of the best."""

    best: Path
    results: tuple[TrialResult, ...]
    new: int
    seconds: float
    run_id: str | None = None
    failed: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Plan:
    """A search, resolved: the job of every trial, and where it lies."""

    config: TuneConfig
    folder: RunFolder
    jobs: Mapping[str, Any]
    values: Mapping[str, Mapping[str, Any]]
    identity: str

    def place(self, name: str) -> Path:
        """Folder of a trial."""
        return self.folder.path / "trials" / name

    def result(self, name: str) -> TrialResult | None:
        """How a trial ended; None when it has not."""
        file = self.place(name) / RESULT
        return TrialResult(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None

    def results(self) -> list[TrialResult]:
        """Of all trials that ended, best first; of equals the one drawn first."""
        found = [result for name in self.jobs if (result := self.result(name)) is not None]
        sign = -1 if self.config.mode == "max" else 1
        return sorted(found, key=lambda result: (sign * result.score, result.name))


def plan_search(config: TuneConfig) -> Plan:
    """The trials of a search, every configuration checked, before any cluster is asked; ConfigError or DataError otherwise."""
    check_space(config)
    if config.task not in TASKS:
        raise ConfigError(f"no task {config.task!r}; there are {', '.join(TASKS)}")
    file, fixed = find_config(config.base, "finetune"), overrides_of(config.fixed)
    values: dict[str, dict[str, Any]] = {}
    for number in range(config.trials):
        rng = np.random.default_rng(keyed_seed(config.seed, "trial", number))
        drawn = {key: space.draw(rng) for key, space in config.space.items()} if number else {}
        values[f"{number:04d}"] = drawn
    jobs = {}
    for name, drawn in values.items():
        settings = [f"{key}={json.dumps(value)}" for key, value in {**fixed, **drawn}.items()]
        jobs[name] = load_config(TASKS[config.task].config, file, "finetune", settings)
    TASKS[config.task].check(jobs["0000"])
    plain = to_plain(config)
    about = {**{name: plain[name] for name in config.once}, "base": identity_of(jobs["0000"])}
    identity = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return Plan(config, RunFolder.of(config.run), jobs, values, identity)


def run_tune(config: TuneConfig, progress: Progress = quiet) -> TuneReport:
    """Runs what is missing of a search and says which trial is best; needs an initialised Ray.

    Raises CheckpointError when the folder holds another search, TrainingError when every trial failed.
    """
    from cellplane.train.tune import Search, run_trials

    began, plan = time.monotonic(), plan_search(config)
    with locked(plan.folder.lock, ANOTHER_WRITER_S):
        _begin(plan)
        missing = [name for name in plan.jobs if plan.result(name) is None]
        steps = max(job.optimizer.steps for job in plan.jobs.values())
        search = Search(
            folder=plan.folder.path,
            most_steps=steps,
            grace_steps=config.grace_steps,
            reduction=config.reduction,
            concurrent=config.concurrent,
            cpus=config.cpus,
            gpus=config.gpus,
        )
        failed = {}
        with _told(plan, progress) as tell:
            if missing:
                failed = run_trials(partial(fit_trial, _settings(plan)), missing, search, partial(write_result, _settings(plan)))
        results = plan.results()
        if not results:
            raise TrainingError(f"none of the {len(failed)} trials ended: {next(iter(failed.values()), 'no reason known')}")
        best = _write_best(plan, results[0])
        run_id = tell(best)
    return TuneReport(best, tuple(results), len(missing) - len(failed), time.monotonic() - began, run_id, failed)


def _begin(plan: Plan) -> None:
    before = plan.folder.origin().get("identity")
    if before is not None and before != plan.identity:
        differing = plan.folder.differences(plan.config, plan.config.once) or ["its data were others"]
        raise CheckpointError(
            f"run {plan.config.run} holds another search: {'; '.join(differing[:3])}; use another run name, or remove {plan.folder.path}"
        )
    plan.folder.remember(plan.config, json.dumps({"identity": plan.identity, "vocabulary_fingerprint": "", "n_genes": 0}))


def _settings(plan: Plan) -> dict[str, Any]:
    """What a worker needs to know, in plain values."""
    return {
        "task": plan.config.task,
        "jobs": {name: to_plain(job) for name, job in plan.jobs.items()},
        "values": {name: dict(values) for name, values in plan.values.items()},
        "folder": str(plan.folder.path),
        "metric": plan.config.metric,
        "sign": 1.0 if plan.config.mode == "max" else -1.0,
        "cpus": plan.config.cpus,
        "home": str(home()),
    }


def fit_trial(settings: Mapping[str, Any], name: str, report: Callable[[int, float], None]) -> None:
    """One trial in a worker: a fit that keeps its state in the trial's folder and reports its best look so far."""
    import torch

    os.environ["CELLPLANE_HOME"] = settings["home"]
    torch.set_num_threads(settings["cpus"])
    task = TASKS[settings["task"]]
    job = task.config.model_validate(settings["jobs"][name])
    place, metric, sign = Path(settings["folder"]) / "trials" / name, settings["metric"], settings["sign"]
    place.mkdir(parents=True, exist_ok=True)
    journal = Journal(place / JOURNAL)
    best = max((sign * row.metrics[metric] for row in journal.rows() if metric in row.metrics), default=-np.inf)

    def seen(done: int, metrics: Mapping[str, float]) -> None:
        nonlocal best
        if metric in metrics:
            best = max(best, sign * metrics[metric])
            report(done, best)

    with checkpoints_of(place, job.checkpoint) as checkpoints:
        keeping = Keeping(checkpoints, job.checkpoint, identity_of(job), journal)
        task.fit(new_pipeline(job), job, Course(seen, keeping))
    rows = journal.rows()
    if rows and np.isfinite(best):
        report(rows[-1].step, best)  # also when nothing was left to do
    if not np.isfinite(best):
        raise ConfigError(f"no look told of {metric}; a {settings['task']} fit tells {', '.join(_told_of(rows))}")


def _told_of(rows: list[Any]) -> list[str]:
    return sorted({key for row in rows for key in row.metrics if key.startswith("val/")})


def write_result(settings: Mapping[str, Any], name: str, status: str, score: float, steps: int) -> None:
    """Writes down, in the driver, that a trial ended; it is never run again."""
    result = TrialResult(name, status, settings["sign"] * score, steps, settings["values"][name])
    _write(Path(settings["folder"]) / "trials" / name / RESULT, json.dumps(asdict(result)))


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _write_best(plan: Plan, result: TrialResult) -> Path:
    job = plan.jobs[result.name].model_copy(update={"run": f"{plan.config.run}-best"})
    head = (
        f"# The best of {len(plan.results())} trials of {plan.config.run}: {plan.config.metric} {result.score:.4g}, trial {result.name}.\n"
    )
    path = plan.folder.path / BEST
    _write(path, head + to_yaml(job))
    return path


@contextmanager
def _told(plan: Plan, progress: Progress) -> Iterator[Callable[[Path], str | None]]:
    """Tells the person and the tracker of every trial that ends; the yielded function ends the search's own run."""
    recorder, over = _Recorder(plan), threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_S):
            results = plan.results()
            progress(len(results), len(plan.jobs), {plan.config.metric: results[0].score} if results else {})
            recorder.record()

    thread = threading.Thread(target=watch, name="trials", daemon=True)
    thread.start()
    try:
        yield recorder.finish
    finally:
        over.set()
        thread.join(30)


class _Recorder:
    """One run for the search and one nested in it for each trial; a tracker that is away costs nothing but the record."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.away = plan, False
        self.parent: TrackedRun | None = None
        self.done: set[str] = set()
        self._lock = threading.Lock()

    def record(self) -> None:
        """Tells of the trials that ended since."""
        with self._lock:
            try:
                self._record()
                self.away = False
            except ServiceError as error:
                log.log(logging.DEBUG if self.away else logging.WARNING, "the tracker has not heard of the trials yet: %s", error)
                self.away = True

    def _record(self) -> None:
        plan = self.plan
        parent = self._parent()
        for result in plan.results():
            if result.name in self.done:
                continue
            spec = RunSpec(
                run_key=f"tune:{plan.config.run}:{plan.identity[:16]}:{result.name}",
                experiment=EXPERIMENT,
                name=f"{plan.config.run}-{result.name}",
                params={**to_plain(plan.jobs[result.name]), "drawn": result.values},
                tags={"mlflow.parentRunId": parent.run_id, "trial": result.name, "status": result.status},
            )
            run = TrackedRun.open(spec, plan.config.tracking_uri)
            run.replay(Journal(plan.place(result.name) / JOURNAL))
            run.finish()
            self.done.add(result.name)

    def _parent(self) -> TrackedRun:
        if self.parent is None:
            config = self.plan.config
            key, tags = f"tune:{config.run}:{self.plan.identity[:16]}", job_tags(config) | {"task": config.task}
            spec = RunSpec(
                run_key=key, experiment=EXPERIMENT, name=run_name(f"tune-{config.task}", config.run), params=to_plain(config), tags=tags
            )
            self.parent = TrackedRun.open(spec, config.tracking_uri)
        return self.parent

    def finish(self, best: Path) -> str | None:
        """Everything that is left, the best configuration and the end of the run; None without a tracker."""
        self.record()
        if self.away or self.parent is None:
            return None
        with self._lock:
            self.parent.log_file(best)
            self.parent.set_tags({"best_trial": self.plan.results()[0].name, "best_score": self.plan.results()[0].score})
            self.parent.finish()
            return self.parent.run_id
