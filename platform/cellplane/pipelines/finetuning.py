"""Fine-tuning jobs, one for every task: the same run folder, checkpoints, journal, tracker and registry as pre-training.

A job that was killed goes on when it is started again; one that finished is reused; one of the same name with other
settings begins anew, and that is said. What differs between tasks is one entry of TASKS.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from cellplane.artifact.card import model_card
from cellplane.artifact.folder import load_model, save_model, verify_model
from cellplane.artifact.golden import GOLDEN
from cellplane.config import home, load_config, read_yaml, to_plain
from cellplane.data.files import file_sha256, leaves_nothing
from cellplane.data.sources import read_h5ad
from cellplane.errors import CheckpointError, DataError
from cellplane.model.config import identifying
from cellplane.pipelines import plots
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.config import AnnotationConfig, DenoiseJobConfig, DenoisingConfig, FinetuneConfig, PanelConfig, SmoothingConfig
from cellplane.pipelines.denoising import DenoisingPipeline
from cellplane.pipelines.evaluation import draw_annotation, evaluate_annotation
from cellplane.pipelines.golden import with_golden
from cellplane.pipelines.imputation_job import IMPUTE
from cellplane.pipelines.job import JobReport, Left, Progress, Scores, fresh, job_tags, journal_rows, publish, quiet, run_name
from cellplane.pipelines.panel import panel_card, with_panel
from cellplane.pipelines.perturbation_job import PERTURB
from cellplane.pipelines.task import Task, check_cells, fit_on_data
from cellplane.processes import locked
from cellplane.tracking.journal import Journal
from cellplane.tracking.registry import resolve_model
from cellplane.tracking.runs import MetricPump, RunSpec
from cellplane.train.checkpoint import Checkpoints, checkpoints_of
from cellplane.train.config import GuardConfig, TransferConfig
from cellplane.train.finetune import Course
from cellplane.train.loop import Keeping
from cellplane.train.retention import remove
from cellplane.train.run_folder import RunFolder

log = logging.getLogger(__name__)

ANOTHER_WRITER_S = 5.0  # a job that was killed lets go of its run at once
NOT_THE_MODEL = ("checkpoint", "device")  # keys of every job that say how it is done
# Keys that came later, with what earlier versions did: a finished run of theirs is still found
_ANSWERS = (  # of an annotator
    *("method", "voting", "calibrate", "unknown", "hierarchy", "hierarchy_file"),
    *("gene_start", "components", "members", "linear", "validation", "unlabelled"),
)
LATER: dict[str, Any] = {
    "transfer": to_plain(TransferConfig()),
    "guard": to_plain(GuardConfig()),
    "smoothing": to_plain(SmoothingConfig(share=(0.0,))),
    "panel": to_plain(PanelConfig()),
    **{name: value for name, value in to_plain(AnnotationConfig()).items() if name in _ANSWERS},
}
# Later than the format, and yet part of every identity so far, used or not
ALWAYS = (
    *("local_blocks", "local_neighbours", "local_radius_um", "n_platforms", "kl_warmup_steps", "kl_drop_below", "head_width", "precision"),
    *("gene_mask", "gene_mask_rate", "panel_rate", "panel_min_genes", "targeted_genes", "targeted_mask_scale"),
)


def run_finetune(config: Any, progress: Progress = quiet) -> JobReport:
    """Fine-tunes a model for the task of ``config``, scores it when that is asked for, and keeps it; see the module.

    Raises ConfigError and DataError before any work begins, ServiceError when another process works on this run,
    TrainingError when the numbers cannot be trusted.
    """
    task = TASKS[config.task]
    task.check(config)
    began, folder, identity = time.monotonic(), RunFolder.of(config.run), identity_of(config)
    journal = Journal(folder.journal)
    pipeline = _finished(config, folder.model, identity)
    reused = pipeline is not None
    with (
        leaves_nothing(folder.path, lambda: _has_begun(config, folder)),
        locked(folder.lock, ANOTHER_WRITER_S),
        MetricPump(_spec(config, identity), config.tracking_uri, journal) as pump,
    ):
        if pipeline is None:
            pipeline = _fit(config, folder, identity, progress)
            _save(pipeline, folder.model, identity, None)  # scoring may fail, training is done
        figures = fresh(folder.artifacts / "plots")
        if steps := [row for row in journal_rows(journal) if "train/loss" in row["metrics"]]:  # a fit may find that no step helps
            plots.loss_plot(steps, figures / "loss.png", f"Fine-tuning loss, {config.run}")
        scores = task.score(pipeline, config, figures)
        _save(pipeline, folder.model, identity, scores)
        run_id, version = publish(pump, config, Left(folder.model, folder.artifacts, config.register_as, scores))
    last = max((row.step for row in journal.rows()), default=0)
    return JobReport(folder.model, reused, last, time.monotonic() - began, run_id, version, scores)


def _has_begun(config: Any, folder: RunFolder) -> bool:
    """Whether there is anything to go on with."""
    learned = any(True for _ in Journal(folder.journal).rows())
    return learned or folder.model.is_dir() or bool(checkpoints_of(folder.path, config.checkpoint).steps())


def resumed_job(task: str, run: str, config: str | None, overrides: list[str]) -> Any:
    """The configuration to go on with: the given one, else the one that was stored when the run started.

    Raises CheckpointError when there is nothing to go on from, or it was made with other settings or data.
    """
    folder = RunFolder.of(run)
    if config is None and not folder.config.is_file():
        raise CheckpointError(f"there is nothing to resume: {folder.path} holds no stored configuration; name its file with --config")
    if config is None and (stored := read_yaml(folder.config).get("task")) != task:
        raise CheckpointError(
            f"run {run!r} is {f'of task {stored}' if stored else 'no fine-tuning'}, not of {task}; resume it as what it is"
        )
    loaded = load_config(TASKS[task].config, config or folder.config, "finetune", overrides)
    if not checkpoints_of(folder.path, loaded.checkpoint).steps() and not folder.model.is_dir():
        raise CheckpointError(f"there is nothing to resume: run {run!r} has no checkpoint yet; start it without --resume")
    if (known := _origin(folder)) is not None and known != identity_of(loaded):
        differing = folder.differences(loaded, tuple(to_plain(loaded))) or ["its data were others"]
        raise CheckpointError(f"run {run} was begun with other settings or data: {'; '.join(differing[:3])}; use another run name")
    return loaded


def identity_of(config: Any) -> str:
    """Fingerprint of recipe, data and base model: a finished folder with the same one is reused, a checkpoint fits."""
    plain = to_plain(config)
    plain |= {name: None for name in config.indifferent}
    plain |= _input_hashes(config)
    if config.base_model is not None:
        plain["base_model"] = verify_model(_base(config))["model_sha256"]
    plain |= {name: _identifying(plain[name]) for name in ("model", "masking") if name in plain}
    kept = {name: value for name, value in plain.items() if name not in NOT_THE_MODEL and (name not in LATER or value != LATER[name])}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _input_hashes(config: Any) -> dict[str, str]:
    """sha256 of every input file, by the key that names it."""
    paths = {name: Path(value) for name in config.inputs if (value := getattr(config, name))}
    return {name: _sha256_of(path, path.stat().st_size, path.stat().st_mtime_ns) for name, path in paths.items()}


@lru_cache(maxsize=16)
def _sha256_of(path: Path, _bytes: int, _mtime_ns: int) -> str:
    """A file is asked for by the identity, the tags and a resumed job, and may be large: read it once while it is the same."""
    return file_sha256(path)


def _identifying(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of network or masks that came later count where they are used."""
    return {**identifying(settings), **{name: settings[name] for name in ALWAYS if name in settings}}


def _base(config: Any) -> Path:
    return resolve_model(config.base_model, config.tracking_uri, home() / "cache").path


def _spec(config: Any, identity: str) -> RunSpec:
    hashes = {f"{name}_sha256": sha256 for name, sha256 in _input_hashes(config).items()}
    return RunSpec(
        run_key=f"finetune:{config.run}:{identity[:16]}",
        experiment=f"cellplane/finetune/{config.task}",
        name=run_name(config.task, config.run),
        params=to_plain(config),
        tags=job_tags(config) | hashes | {"base_model": config.base_model or "none"},
    )


def recipe_of(config: Any) -> Any:
    """The part of a job's configuration that its pipeline takes."""
    recipe = TASKS[config.task].recipe
    return recipe.model_validate({name: getattr(config, config.renamed.get(name, name)) for name in recipe.model_fields})


def new_pipeline(config: Any) -> Any:
    """The job's pipeline, nothing learned yet."""
    base = None if config.base_model is None else _base(config)
    return TASKS[config.task].pipeline(base, recipe_of(config))


def _fit(config: Any, folder: RunFolder, identity: str, progress: Progress) -> Any:
    pipeline = new_pipeline(config)
    with checkpoints_of(folder.path, config.checkpoint) as checkpoints:
        _begin(config, folder, identity, checkpoints)
        keeping = Keeping(checkpoints, config.checkpoint, identity, Journal(folder.journal))
        total = config.optimizer.steps
        TASKS[config.task].fit(pipeline, config, Course(lambda done, metrics: progress(done, total, metrics), keeping))
    return pipeline


def _begin(config: Any, folder: RunFolder, identity: str, checkpoints: Checkpoints) -> None:
    """Remembers what the run is; what another fine-tuning left under this name goes."""
    before = _origin(folder)
    if before is not None and before != identity:
        differing = folder.differences(config, tuple(to_plain(config))) or ["its data were others"]
        log.warning("run %s was another fine-tuning and begins anew: %s", config.run, "; ".join(differing[:3]))
        for path in checkpoints.found():
            remove(path)
    origin = {"identity": identity, "vocabulary_fingerprint": "", "n_genes": 0}  # the genes follow from data and base model
    folder.remember(config, json.dumps(origin))


def _origin(folder: RunFolder) -> str | None:
    known = folder.origin().get("identity")
    return None if known is None else str(known)


def _finished(config: Any, path: Path, identity: str) -> Any:
    """The pipeline of an earlier, complete run of the same job; None when there is none or it is damaged."""
    try:
        if load_model(path).lineage.get("job_identity") != identity:
            return None
        return TASKS[config.task].pipeline.load(path)
    except DataError:
        return None


def _save(pipeline: Any, path: Path, identity: str, scores: Scores | None) -> None:
    folder = replace(pipeline.folder_, lineage={**pipeline.folder_.lineage, "job_identity": identity})
    folder = replace(folder, card=model_card(folder, scores) + panel_card(folder))
    pipeline.folder_ = folder if GOLDEN in folder.attachments else with_golden(folder)  # those of the day it was trained stay
    save_model(pipeline.folder_, path)


def _check_annotation(config: FinetuneConfig) -> None:
    check_cells(config.data, "data", config.keys)
    if config.test is not None:
        check_cells(config.test, "test", config.keys.model_copy(update={"batch_key": None}))


def _score_annotation(pipeline: CellTypeAnnotationPipeline, config: FinetuneConfig, figures: Path) -> Scores | None:
    if config.test is None:
        return None
    test = read_h5ad(Path(config.test))
    draw_annotation(pipeline, test, figures)
    return evaluate_annotation(pipeline, read_h5ad(Path(config.data)), test, config.seed)


def _score_denoising(_: DenoisingPipeline, config: DenoiseJobConfig, _figures: Path) -> Scores | None:
    """The whole recipe's score, fitted anew on thinned cells; the fitted pipeline has seen what would be hidden."""
    return new_pipeline(config).score(read_h5ad(Path(config.data))) if config.evaluate else None


def _fit_annotation(pipeline: CellTypeAnnotationPipeline, config: FinetuneConfig, course: Course) -> None:
    """On the job's cells, of which a panel may stay with the model."""
    fit_on_data(pipeline, config, course)
    assert pipeline.folder_ is not None
    if config.panel.cells:
        pipeline.adopt(with_panel(pipeline.folder_, read_h5ad(Path(config.data)), config.keys, config.panel))


TASKS: Mapping[str, Task] = {
    "annotate": Task(FinetuneConfig, AnnotationConfig, CellTypeAnnotationPipeline, _check_annotation, _fit_annotation, _score_annotation),
    "denoise": Task(
        DenoiseJobConfig,
        DenoisingConfig,
        DenoisingPipeline,
        lambda config: check_cells(config.data, "data", config.keys),
        fit_on_data,
        _score_denoising,
    ),
    "impute": IMPUTE,
    "perturb": PERTURB,
}
