"""What all jobs share: their report, the files they leave for people, and the one place that tells the tracker how they ended."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cellplane.artifact.folder import verify_model
from cellplane.config import Config, fingerprint, to_yaml
from cellplane.errors import ServiceError
from cellplane.tracking.journal import Journal
from cellplane.tracking.registry import register
from cellplane.tracking.runs import MetricPump, TrackedRun, code_tags

log = logging.getLogger(__name__)

Progress = Callable[[int, int, Mapping[str, float]], None]  # (steps done, steps in all, newest metrics)
Scores = dict[str, dict[str, float]]  # {"cellplm": {"accuracy": ..., "macro_f1": ...}, "pca_knn": ...}
MODEL_ROW = "cellplm"


@dataclass(frozen=True)
class JobReport:
    """What a job left behind. ``run_id`` and ``version`` are None without a tracker or a name to register."""

    model: Path
    reused: bool
    steps: int
    seconds: float
    run_id: str | None = None
    version: int | None = None
    scores: Scores | None = None
    summary: Mapping[str, str] = field(default_factory=dict)


def quiet(done: int, total: int, metrics: Mapping[str, float]) -> None:
    """The Progress that shows nothing."""


@dataclass(frozen=True)
class Left:
    """What a finished job leaves for the tracker."""

    model: Path
    artifacts: Path
    register_as: str | None
    scores: Scores | None = None
    tags: Mapping[str, object] = field(default_factory=dict)


def publish(pump: MetricPump, config: Config, left: Left) -> tuple[str | None, int | None]:
    """Ends the run with its artifacts and its version. Without a tracker the model folder is all there is, and that is said."""
    left.artifacts.mkdir(parents=True, exist_ok=True)
    (left.artifacts / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    if left.scores is not None:
        (left.artifacts / "scores.json").write_text(json.dumps(left.scores, indent=1), encoding="utf-8")
        final = {f"test/{method}/{name}": value for method, row in left.scores.items() for name, value in row.items()}
        steps = [row.step for row in pump.journal.rows()]
        pump.journal.append(max(steps, default=0), final)
    try:
        run = pump.run or TrackedRun.open(pump.spec, pump.uri)
        run.set_tags(left.tags)
        run.log_artifacts(left.artifacts, "")
        run.log_artifacts(left.model, "model")
        version = None
        if left.register_as is not None:
            tags = {"model_sha256": verify_model(left.model)["model_sha256"], "config_sha256": fingerprint(config)}
            version = register(left.model, run.run_id, left.register_as, pump.uri, tags)
    except ServiceError as error:
        pump.close(timeout_s=1)  # it has been tried, and the journal keeps the metrics
        if left.register_as is not None:
            raise ServiceError(f"the model is complete in {left.model}, but it could not be registered: {error}", error.status) from error
        log.warning("the model is complete in %s; the tracker has not heard of it: %s", left.model, error)
        return None, None
    pump.close("FINISHED")
    return run.run_id, version


def job_tags(config: Config) -> dict[str, object]:
    """Tags that say which code and which configuration a run is of."""
    return {**code_tags(), "config_sha256": fingerprint(config)}


def run_name(task: str, run: str) -> str:
    """Name of a run in the tracker: task, run and the first digits of the commit."""
    commit = str(code_tags().get("git_commit", ""))[:7]
    return f"{task}-{run}-{commit}" if commit else f"{task}-{run}"


def journal_rows(journal: Journal) -> list[dict[str, Any]]:
    """The journal as the plots take it."""
    return [{"step": row.step, "metrics": dict(row.metrics)} for row in journal.rows()]


def fresh(folder: Path) -> Path:
    """The folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
