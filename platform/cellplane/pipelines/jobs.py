"""Whole jobs, one function each: what the command line, `python -m jobs.X` and the demo all call.

A job reads its configuration, does its work, draws what people expect to see, and leaves a run in the tracker and,
when asked, a version in the registry. Doing it again goes on from, or reuses, what is there. A tracker that is away
costs nothing but the record: the model folder is complete without it.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cellplane.artifact.card import model_card
from cellplane.artifact.folder import ModelFolder, load_model, save_model, verify_model
from cellplane.config import Config, fingerprint, home, to_plain, to_yaml
from cellplane.data.config import DataKeys
from cellplane.data.naming import merged_columns
from cellplane.data.shards import Manifest, file_sha256, read_manifest
from cellplane.data.sources import AnnData, CellReader, column, find_counts, read_h5ad
from cellplane.errors import CellplaneError, ConfigError, DataError, ServiceError
from cellplane.pipelines import plots
from cellplane.pipelines.annotation import UNLABELLED, CellTypeAnnotationPipeline
from cellplane.pipelines.baselines import BASELINES
from cellplane.pipelines.config import AnnotationConfig, EvaluateConfig, FinetuneConfig
from cellplane.pipelines.embedding import CellEmbeddingPipeline
from cellplane.pipelines.metrics import annotation_scores, confusion
from cellplane.tracking.journal import Journal
from cellplane.tracking.registry import register, resolve_model
from cellplane.tracking.runs import MetricPump, RunSpec, TrackedRun, code_tags
from cellplane.train.config import PretrainConfig
from cellplane.train.launch import RunFolder, describe_run, full_model_config, pretrain, run_identity

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


def quiet(done: int, total: int, metrics: Mapping[str, float]) -> None:
    """The Progress that shows nothing."""


def run_pretrain(config: PretrainConfig, progress: Progress = quiet) -> JobReport:
    """Pre-trains on shards, tracked from the first step; see `train.launch.pretrain` for the errors."""
    folder, manifest = RunFolder.of(config.run), check_pretrain(config)
    journal = Journal(folder.journal)
    spec = RunSpec(
        run_key=f"pretrain:{config.run}:{run_identity(config)[:16]}",
        experiment="cellplane/pretrain",
        name=_run_name("pretrain", config.run),
        params=describe_run(config),
        tags=_tags(config) | {"data_fingerprint": manifest.fingerprint, "cells": manifest.cells, "world_size": config.workers.count},
    )
    folder.path.mkdir(parents=True, exist_ok=True)
    with MetricPump(spec, config.tracking_uri, journal) as pump:
        with _watched(journal, config.optimizer.steps, progress):
            outcome = pretrain(config)
        model = _with_card(outcome.model, None)
        figures = _fresh(folder.artifacts / "plots")
        plots.loss_plot(_rows(journal), figures / "loss.png", f"Pre-training loss, {config.run}")
        run_id, version = _publish(pump, config, outcome.model, folder.artifacts, config.register_as)
    log.info("pre-trained %s: %d parameters' network of %d genes", config.run, model.config.width, full_model_config(config).n_genes)
    return JobReport(outcome.model, outcome.steps_now == 0, outcome.steps, outcome.seconds, run_id, version)


def check_pretrain(config: PretrainConfig) -> Manifest:
    """The manifest of the shards to train on, before any cluster is asked; ConfigError or DataError when there is none."""
    if not config.shards:
        raise ConfigError("shards is empty: name the folder that `cellplane data convert` wrote, e.g. -o shards=.cellplane/shards")
    return read_manifest(Path(config.shards))


def run_finetune(config: FinetuneConfig, progress: Progress = quiet) -> JobReport:
    """Fine-tunes an annotator on labelled cells and, when `config.test` is given, scores it beside the baselines."""
    if not config.data:
        raise ConfigError("data is empty: name an h5ad with labelled cells, e.g. -o data=train.h5ad")
    for path in filter(None, (config.data, config.test)):
        _check_labelled(Path(path), config.keys)
    began, folder = time.monotonic(), RunFolder.of(config.run)
    identity = _finetune_identity(config)
    journal = Journal(folder.journal)
    spec = RunSpec(
        run_key=f"finetune:{config.run}:{identity[:16]}",
        experiment="cellplane/finetune/annotate",
        name=_run_name("annotate", config.run),
        params=to_plain(config),
        tags=_tags(config) | {"data_sha256": file_sha256(Path(config.data))},
    )
    pipeline = _finished(folder.model, identity)
    reused = pipeline is not None
    with MetricPump(spec, config.tracking_uri, journal) as pump:
        if pipeline is None:
            pipeline = _fit(config, folder, journal, progress)
            _save(pipeline, folder.model, identity, None)  # scoring may fail, training is done
        figures = _fresh(folder.artifacts / "plots")
        plots.loss_plot(_rows(journal), figures / "loss.png", f"Fine-tuning loss, {config.run}")
        scores = _score_finetuned(pipeline, config, figures) if config.test is not None else None
        _save(pipeline, folder.model, identity, scores)
        run_id, version = _publish(pump, config, folder.model, folder.artifacts, config.register_as, scores)
    steps = max((row.step for row in journal.rows()), default=0)
    return JobReport(folder.model, reused, steps, time.monotonic() - began, run_id, version, scores)


def run_evaluate(config: EvaluateConfig) -> tuple[Scores, Path]:
    """Scores of a model and of every baseline on held-out cells, and the folder with scores.json and the plots."""
    for name in ("model", "train", "test"):
        if not getattr(config, name):
            raise ConfigError(f"{name} is empty: name the {'model folder' if name == 'model' else 'h5ad'}, e.g. -o {name}=...")
    model = resolve_model(config.model, config.tracking_uri, home() / "cache")
    pipeline = CellTypeAnnotationPipeline.load(model.path)
    pipeline.config = AnnotationConfig(keys=config.keys)
    out = Path(config.out) if config.out else home() / "evaluations" / verify_model(model.path)["model_sha256"][:16]
    out.mkdir(parents=True, exist_ok=True)
    scores = evaluate_annotation(pipeline, read_h5ad(Path(config.train)), read_h5ad(Path(config.test)), config.seed)
    draw_annotation(pipeline, read_h5ad(Path(config.test)), out)
    (out / "scores.json").write_text(json.dumps({"config": to_plain(config), "scores": scores}, indent=1), encoding="utf-8")
    return scores, out


def evaluate_annotation(pipeline: CellTypeAnnotationPipeline, train: AnnData, test: AnnData, seed: int) -> Scores:
    """Accuracy and macro-F1 on the labelled test cells: the model first, then every baseline fitted on the same training cells."""
    keys = pipeline.config.keys
    key = str(keys.labels_key)
    known = _labelled(train, key)
    truth, keep = column(test, key), _labelled(test, key)
    found = {MODEL_ROW: pipeline.predict(test)[keep]}
    train_counts, test_counts = _same_genes(_by_gene(train, keys), _by_gene(test, keys))
    for name, baseline in BASELINES.items():
        found[name] = baseline(train_counts[known], column(train, key)[known], test_counts[keep], seed)
    rows = {name: annotation_scores(truth[keep], predicted) for name, predicted in found.items()}
    return {name: {"accuracy": row["accuracy"], "macro_f1": row["macro_f1"]} for name, row in rows.items()}


def draw_annotation(pipeline: CellTypeAnnotationPipeline, test: AnnData, folder: Path) -> list[Path]:
    """Confusion matrix, reliability curve and a UMAP of the model's embedding of the test cells."""
    key = str(pipeline.config.keys.labels_key)
    truth, keep = column(test, key), _labelled(test, key)
    proba = pipeline.predict_proba(test)
    predicted = np.array([pipeline.classes_[index] for index in proba.argmax(1)], dtype=object)
    classes = sorted({*pipeline.classes_, *truth[keep].tolist()})
    matrix = confusion(truth[keep], predicted[keep], classes)
    assert pipeline.folder_ is not None
    latent = CellEmbeddingPipeline(pipeline.folder_, pipeline.config.keys).predict(test)
    return [
        plots.confusion_plot(matrix, classes, folder / "confusion.png", "Held-out cells: truth and prediction"),
        plots.reliability_plot(proba.max(1)[keep], predicted[keep] == truth[keep], folder / "reliability.png"),
        plots.umap_plot(latent, truth, folder / "umap.png", "UMAP of X_cellplm, held-out cells"),
    ]


def _labelled(data: AnnData, key: str) -> np.ndarray[Any, Any]:
    return np.array([label is not None and label not in UNLABELLED for label in column(data, key)])


def _by_gene(data: AnnData, keys: DataKeys) -> tuple[Any, list[str]]:
    """Counts with one column for each gene, and the genes."""
    source = find_counts(data, keys)
    return merged_columns(source.matrix, source.gene_ids)


def _same_genes(train: tuple[Any, list[str]], test: tuple[Any, list[str]]) -> tuple[Any, Any]:
    if train[1] == test[1]:
        return train[0], test[0]
    place = {gene: index for index, gene in enumerate(test[1])}
    shared = [gene for gene in train[1] if gene in place]
    if not shared:
        raise DataError("training and test cells share no gene; use the same naming scheme for both files")
    own = {gene: index for index, gene in enumerate(train[1])}
    return train[0][:, [own[gene] for gene in shared]], test[0][:, [place[gene] for gene in shared]]


def _check_labelled(path: Path, keys: DataKeys) -> None:
    """DataError or ColumnError before any work begins, when a file or its label column is not there."""
    with CellReader(path) as reader:
        if keys.labels_key is not None:
            reader.obs(keys.labels_key)


def _fit(config: FinetuneConfig, folder: RunFolder, journal: Journal, progress: Progress) -> CellTypeAnnotationPipeline:
    base = None if config.base_model is None else resolve_model(config.base_model, config.tracking_uri, home() / "cache").path
    recipe = AnnotationConfig.model_validate({name: getattr(config, name) for name in AnnotationConfig.model_fields})
    pipeline = CellTypeAnnotationPipeline(base, recipe)
    data = read_h5ad(Path(config.data))
    folder.path.mkdir(parents=True, exist_ok=True)
    journal.cut(0)

    def seen(done: int, metrics: Mapping[str, float]) -> None:
        journal.append(done, metrics)
        progress(done, config.optimizer.steps, metrics)

    return pipeline.fit(data, progress=seen)


def _score_finetuned(pipeline: CellTypeAnnotationPipeline, config: FinetuneConfig, figures: Path) -> Scores:
    test = read_h5ad(Path(str(config.test)))
    draw_annotation(pipeline, test, figures)
    return evaluate_annotation(pipeline, read_h5ad(Path(config.data)), test, config.seed)


def _finetune_identity(config: FinetuneConfig) -> str:
    """Fingerprint of recipe, data and base model: a finished folder with the same one is reused."""
    indifferent = {"test": None, "tracking_uri": None, "register_as": None}
    determining = config.model_copy(update={**indifferent, "data": file_sha256(Path(config.data))})
    if config.base_model is not None:
        path = resolve_model(config.base_model, config.tracking_uri, home() / "cache").path
        determining = determining.model_copy(update={"base_model": verify_model(path)["model_sha256"]})
    return fingerprint(determining)


def _finished(path: Path, identity: str) -> CellTypeAnnotationPipeline | None:
    """The pipeline of an earlier, complete run of the same job; None when there is none or it is damaged."""
    try:
        if load_model(path).lineage.get("job_identity") != identity:
            return None
        pipeline = CellTypeAnnotationPipeline.load(path)
    except DataError:
        return None
    labels_key = pipeline.folder_.lineage["labels_key"] if pipeline.folder_ else None
    keys = json.loads(pipeline.folder_.lineage["keys"]) if pipeline.folder_ else {}
    pipeline.config = AnnotationConfig.model_validate({"keys": {**keys, "labels_key": labels_key}})
    return pipeline


def _save(pipeline: CellTypeAnnotationPipeline, path: Path, identity: str, scores: Scores | None) -> None:
    assert pipeline.folder_ is not None
    keys = pipeline.config.keys.model_dump_json()
    folder = replace(pipeline.folder_, lineage={**pipeline.folder_.lineage, "job_identity": identity, "keys": keys})
    pipeline.folder_ = replace(folder, card=model_card(folder, scores))
    save_model(pipeline.folder_, path)


def _with_card(path: Path, scores: Scores | None) -> ModelFolder:
    model = load_model(path)
    model = replace(model, card=model_card(model, scores))
    save_model(model, path)
    return model


def _publish(
    pump: MetricPump, config: Config, model: Path, artifacts: Path, register_as: str | None, scores: Scores | None = None
) -> tuple[str | None, int | None]:
    """Ends the run with its artifacts and its version. Without a tracker the model folder is all there is, and that is said."""
    artifacts.mkdir(parents=True, exist_ok=True)
    (artifacts / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    if scores is not None:
        (artifacts / "scores.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
        final = {f"test/{method}/{name}": value for method, row in scores.items() for name, value in row.items()}
        steps = [row.step for row in pump.journal.rows()]
        pump.journal.append(max(steps, default=0), final)
    try:
        run = pump.run or TrackedRun.open(pump.spec, pump.uri)
        run.log_artifacts(artifacts, "")
        run.log_artifacts(model, "model")
        version = None
        if register_as is not None:
            sha = verify_model(model)["model_sha256"]
            version = register(model, run.run_id, register_as, pump.uri, {"model_sha256": sha, "config_sha256": fingerprint(config)})
    except ServiceError as error:
        pump.close(timeout_s=1)  # it has been tried, and the journal keeps the metrics
        if register_as is not None:
            raise ServiceError(f"the model is complete in {model}, but it could not be registered: {error}", error.status) from error
        log.warning("the model is complete in %s; the tracker has not heard of it: %s", model, error)
        return None, None
    pump.close("FINISHED")
    return run.run_id, version


def _tags(config: Config) -> dict[str, object]:
    return {**code_tags(), "config_sha256": fingerprint(config)}


def _run_name(task: str, run: str) -> str:
    commit = str(code_tags().get("git_commit", ""))[:7]
    return f"{task}-{run}-{commit}" if commit else f"{task}-{run}"


def _rows(journal: Journal) -> list[dict[str, Any]]:
    return [{"step": row.step, "metrics": dict(row.metrics)} for row in journal.rows()]


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


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
