"""`cellplane pretrain | finetune | evaluate | predict`: everything that runs a model over cells."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cellplane.cli.common import ConfigOption, Json, Overrides, answer, given, progress, table, use_running_stack

finetune_app = typer.Typer(help="Fine-tune a model for a task.", no_args_is_help=True)
evaluate_app = typer.Typer(help="Score a model beside its baselines.", no_args_is_help=True)
predict_app = typer.Typer(help="Ask a model about the cells of h5ad files.", no_args_is_help=True)


def pretrain(
    config: ConfigOption = "demo",
    override: Overrides = None,
    shards: Annotated[Path | None, typer.Option("--shards", help="Folder written by `cellplane data convert`.")] = None,
    resume: Annotated[str | None, typer.Option("--resume", help="Name of a run to go on with from its newest valid checkpoint.")] = None,
    as_json: Json = False,
) -> None:
    """Pre-train by masking on Ray Train; a run that was stopped goes on when it is started again."""
    answer(pretrain_run(config, [*given({"shards": shards, "run": resume}), *(override or [])], resume is not None), as_json)


def pretrain_run(config: str | None, overrides: list[str], must_exist: bool = False) -> dict[str, Any]:
    """Loads the configuration and pre-trains on whatever Ray there is; what to print."""
    from cellplane.cluster import local_ray
    from cellplane.config import load_config
    from cellplane.errors import CheckpointError
    from cellplane.pipelines.jobs import check_pretrain, run_pretrain
    from cellplane.train.checkpoint import Checkpoints
    from cellplane.train.config import PretrainConfig
    from cellplane.train.launch import RunFolder

    use_running_stack()
    loaded = load_config(PretrainConfig, config, "pretrain", overrides)
    if must_exist and not Checkpoints(RunFolder.of(loaded.run).checkpoints).found():
        raise CheckpointError(f"there is nothing to resume: run {loaded.run!r} has no checkpoint in {RunFolder.of(loaded.run).checkpoints}")
    check_pretrain(loaded)  # before a cluster is started for nothing
    with local_ray(log_to_driver=False), progress(f"pre-training {loaded.run}") as show:
        report = run_pretrain(loaded, show)
    return _report(report)


@finetune_app.command("annotate")
def finetune_annotate(
    config: ConfigOption = "annotate",
    override: Overrides = None,
    data: Annotated[Path | None, typer.Option("--data", help="h5ad with labelled cells.")] = None,
    test: Annotated[Path | None, typer.Option("--test", help="h5ad of held-out labelled cells, scored beside the baselines.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Model folder or models:/NAME@ALIAS to start from.")] = None,
    labels_key: Annotated[str | None, typer.Option(help="obs column of the labels.")] = None,
    as_json: Json = False,
) -> None:
    """Learn cell types from labelled cells."""
    options = given({"data": data, "test": test, "base_model": model, "keys.labels_key": labels_key})
    result = finetune_run(config, [*options, *(override or [])])
    scores = result.pop("scores")
    answer({**result, "scores": scores} if as_json else result, as_json)
    if scores and not as_json:
        _scores(scores)


def finetune_run(config: str | None, overrides: list[str]) -> dict[str, Any]:
    """Loads the configuration and fine-tunes; what to print, scores apart."""
    from cellplane.config import load_config
    from cellplane.pipelines.config import FinetuneConfig
    from cellplane.pipelines.jobs import run_finetune

    use_running_stack()
    loaded = load_config(FinetuneConfig, config, "finetune", overrides)
    with progress(f"fine-tuning {loaded.run}") as show:
        report = run_finetune(loaded, show)
    return {**_report(report), "scores": report.scores}


@evaluate_app.command("annotate")
def evaluate_annotate(
    config: ConfigOption = "annotate",
    override: Overrides = None,
    model: Annotated[str | None, typer.Option("--model", help="Model folder or models:/NAME@ALIAS.")] = None,
    train: Annotated[Path | None, typer.Option("--train", help="h5ad the model was fine-tuned on.")] = None,
    test: Annotated[Path | None, typer.Option("--test", help="h5ad of held-out labelled cells.")] = None,
    as_json: Json = False,
) -> None:
    """Accuracy and macro-F1 on held-out cells, beside majority, PCA + kNN and logistic regression."""
    result = evaluate_run(config, [*given({"model": model, "train": train, "test": test}), *(override or [])])
    if as_json:
        answer(result, True)
        return
    _scores(result["scores"])
    answer({"plots": result["out"]}, False)


def evaluate_run(config: str | None, overrides: list[str]) -> dict[str, Any]:
    """Loads the configuration and evaluates; scores by method and the folder of plots."""
    from cellplane.config import load_config
    from cellplane.pipelines.config import EvaluateConfig
    from cellplane.pipelines.jobs import run_evaluate

    use_running_stack()
    scores, out = run_evaluate(load_config(EvaluateConfig, config, "evaluate", overrides))
    return {"scores": scores, "out": str(out)}


@predict_app.command("annotate")
def predict_annotate(
    inputs: Annotated[list[Path] | None, typer.Argument(help="h5ad files.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Model folder or models:/NAME@ALIAS.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the answers.")] = None,
    config: ConfigOption = "annotate",
    override: Overrides = None,
    as_json: Json = False,
) -> None:
    """Name the cell type of every cell."""
    _predict(config, [*given({"task": "annotate", "inputs": inputs, "model": model, "out": out}), *(override or [])], as_json)


@predict_app.command("embed")
def predict_embed(
    inputs: Annotated[list[Path] | None, typer.Argument(help="h5ad files.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Model folder or models:/NAME@ALIAS.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the answers.")] = None,
    config: ConfigOption = "annotate",
    override: Overrides = None,
    as_json: Json = False,
) -> None:
    """Embed every cell: obsm["X_cellplm"]."""
    _predict(config, [*given({"task": "embed", "inputs": inputs, "model": model, "out": out}), *(override or [])], as_json)


def _predict(config: str | None, overrides: list[str], as_json: bool) -> None:
    result, failed = predict_run(config, overrides)
    answer(result, as_json)
    if failed:
        from cellplane.errors import DataError

        reasons = "; ".join(reason if reason.startswith(name) else f"{name}: {reason}" for name, reason in failed.items())
        rest = ", the others are complete" if result["new"] or result["reused"] else ""
        raise DataError(f"{len(failed)} of the files could not be done{rest}: {reasons}")


def predict_run(config: str | None, overrides: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Loads the configuration and predicts on whatever Ray there is; what to print, and what failed."""
    from cellplane.batch import PredictConfig, check_predict, predict_files
    from cellplane.cluster import local_ray
    from cellplane.config import load_config

    use_running_stack()
    loaded = load_config(PredictConfig, config, "predict", overrides)
    check_predict(loaded)  # before a cluster is started for nothing
    with local_ray(log_to_driver=False):
        report = predict_files(loaded)
    files = ", ".join(str(path) for path in report.written)
    result = {"written": files or "nothing new", "new": len(report.written), "reused": len(report.reused), "cells": report.cells}
    return result, report.failed


def _report(report: Any) -> dict[str, Any]:
    return {
        "model": report.model,
        "steps": report.steps,
        "reused": report.reused,
        "seconds": round(report.seconds, 1),
        "run_id": report.run_id or "not tracked",
        "version": report.version or "not registered",
    }


def _scores(scores: dict[str, dict[str, float]]) -> None:
    metrics = list(next(iter(scores.values())))
    table(["method", *metrics], [[method, *(f"{row[metric]:.3f}" for metric in metrics)] for method, row in scores.items()])
