"""Whole jobs, one function each: what the command line, `python -m jobs.X` and the demo all call.

A job reads its configuration, does its work, draws what people expect to see, and leaves a run in the tracker and,
when asked, a version in the registry. Doing it again goes on from, or reuses, what is there. A tracker that is away
costs nothing but the record: the model folder is complete without it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from cellplane.artifact.card import model_card
from cellplane.artifact.folder import ModelFolder, load_model, save_model
from cellplane.artifact.golden import GOLDEN
from cellplane.data.shards import Manifest
from cellplane.errors import CellplaneError
from cellplane.pipelines.evaluation import run_evaluate as run_evaluate
from cellplane.pipelines.finetuning import run_finetune as run_finetune
from cellplane.pipelines.golden import with_golden
from cellplane.pipelines.job import MODEL_ROW as MODEL_ROW
from cellplane.pipelines.job import JobReport as JobReport
from cellplane.pipelines.job import Left, Progress, Scores, fresh, publish, quiet, run_name
from cellplane.pipelines.record import (
    closing_tags,
    draw_pretraining,
    held_out_scores,
    pretraining_spec,
    report_line,
    report_of,
    write_report,
)
from cellplane.pipelines.report import as_markdown, summary_of
from cellplane.tracking.journal import Journal
from cellplane.tracking.runs import MetricPump
from cellplane.train.checkpoint import checkpoints_of
from cellplane.train.checks import check_run, warn_about
from cellplane.train.config import PretrainConfig
from cellplane.train.launch import pretrain, ray_job_id
from cellplane.train.run_folder import RunFolder

log = logging.getLogger(__name__)


def run_pretrain(config: PretrainConfig, progress: Progress = quiet) -> JobReport:
    """Pre-trains on shards, tracked from the first step; see `train.launch.pretrain` for the errors."""
    folder, manifest = RunFolder.of(config.run), check_pretrain(config)
    warn_about(config, manifest)
    journal = Journal(folder.journal)
    spec = pretraining_spec(config, manifest, run_name("pretrain", config.run), ray_job_id())
    folder.path.mkdir(parents=True, exist_ok=True)
    with MetricPump(spec, config.tracking_uri, journal) as pump:
        with _watched(journal, config.optimizer.steps, progress):
            outcome = pretrain(config)
        model = _with_card(outcome.model, held_out_scores(journal))
        draw_pretraining(journal, fresh(folder.artifacts / "plots"), config.run)
        report = report_of(folder, model.config)
        write_report(report, folder.artifacts)
        told = summary_of(report, checkpoints_of(folder.path, config.checkpoint).found(), outcome.model)
        (folder.artifacts / "report.md").write_text(as_markdown(config.run, told), encoding="utf-8")
        run_id, version = publish(pump, config, Left(outcome.model, folder.artifacts, config.register_as, tags=closing_tags(report)))
    log.info("pre-trained %s: %s", config.run, report_line(report))
    return JobReport(outcome.model, outcome.steps_now == 0, outcome.steps, outcome.seconds, run_id, version, summary=told)


def check_pretrain(config: PretrainConfig) -> Manifest:
    """The manifest of the shards to train on, before any cluster is asked; see `train.checks.check_run` for the errors."""
    return check_run(config)


def _with_card(path: Path, scores: Scores | None) -> ModelFolder:
    model = load_model(path)
    model = replace(model, card=model_card(model, scores))
    model = model if GOLDEN in model.attachments else with_golden(model)  # those of the day it was trained stay
    save_model(model, path)
    return model


@contextmanager
def _watched(journal: Journal, total: int, progress: Progress) -> Iterator[None]:
    """Calls ``progress`` from a thread whenever the journal, written by a worker process, has grown."""
    done = threading.Event()

    def watch() -> None:
        last = -1
        while not done.wait(0.5):
            try:
                rows = journal.rows()
            except CellplaneError:
                continue
            if rows and rows[-1].step != last:
                last = rows[-1].step
                progress(last, total, rows[-1].metrics)

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(5)
        if rows := journal.rows():
            progress(rows[-1].step, total, rows[-1].metrics)
