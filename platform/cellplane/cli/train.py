"""`cellplane pretrain | evaluate`: training on shards, and scores; fine-tuning and predicting have files of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cellplane.cli.common import ConfigOption, Json, Overrides, answer, given, progress, report_of, scores_table, table, use_running_stack
from cellplane.cli.protocols import protocol_run

evaluate_app = typer.Typer(help="Score a model beside its baselines.", no_args_is_help=True)


def pretrain(
    config: ConfigOption = None,
    override: Overrides = None,
    shards: Annotated[str | None, typer.Option("--shards", help="Folder or URL written by `cellplane data convert`.")] = None,
    resume: Annotated[str | None, typer.Option("--resume", help="Name of a run to go on with from its newest valid checkpoint.")] = None,
    as_json: Json = False,
) -> None:
    """Pre-train by masking on Ray Train. A run that was stopped goes on when it is started again.

    Without --config: the demo's, and with --resume the one that the run was started with.
    """
    answer(pretrain_run(config, [*given({"shards": shards, "run": resume}), *(override or [])], resume), as_json)


def pretrain_run(config: str | None, overrides: list[str], resume: str | None = None) -> dict[str, Any]:
    """Loads the configuration and pre-trains on whatever Ray there is; what to print."""
    if resume is None:
        _refuse_missing_shards(config or "demo", overrides)
    from cellplane.cluster import local_ray
    from cellplane.config import load_config
    from cellplane.pipelines.jobs import check_pretrain, run_pretrain
    from cellplane.train.checks import resumed_config
    from cellplane.train.config import PretrainConfig

    use_running_stack()
    if resume is not None:
        loaded = resumed_config(resume, config, overrides)
    else:
        loaded = load_config(PretrainConfig, config or "demo", "pretrain", overrides)
    check_pretrain(loaded)  # before a cluster is started for nothing
    with local_ray(log_to_driver=False), progress(f"pre-training {loaded.run}") as show:
        report = run_pretrain(loaded, show)
    return {**report_of(report), **report.summary, "steps": report.steps}


def _refuse_missing_shards(config: str, overrides: list[str]) -> None:
    """DataError when the folder of the shards is none, before anything slow is loaded; a URL is asked later."""
    from cellplane.config import setting
    from cellplane.data.manifest import read_manifest

    shards = setting("shards", config, "pretrain", overrides)
    if isinstance(shards, str) and shards and "://" not in shards:
        read_manifest(Path(shards))


@evaluate_app.command("annotate")
def evaluate_annotate(
    config: ConfigOption = "annotate",
    override: Overrides = None,
    model: Annotated[str | None, typer.Option("--model", help="Model folder or models:/NAME@ALIAS.")] = None,
    train: Annotated[Path | None, typer.Option("--train", help="h5ad the model was fine-tuned on.")] = None,
    test: Annotated[Path | None, typer.Option("--test", help="h5ad of held-out labelled cells.")] = None,
    protocol: Annotated[str | None, typer.Option("--protocol", help="Instead: a full protocol, file or shipped (cpu_annotate).")] = None,
    as_json: Json = False,
) -> None:
    """Accuracy and macro-F1 on held-out cells. Beside majority, PCA + kNN and logistic regression.

    With --protocol the model is fitted too: splits, seeds, tuned baselines, controls; run it again to go on after a stop.
    """
    if protocol is not None:
        if model or train or test:
            raise typer.BadParameter("a protocol fits its own models on its own splits: leave out --model, --train and --test")
        protocol_run("annotate", protocol, override or [], as_json)
        return
    result = evaluate_run(config, [*given({"model": model, "train": train, "test": test}), *(override or [])])
    if as_json:
        answer(result, True)
        return
    scores_table(result["scores"])
    answer({"plots": result["out"]}, False)


def evaluate_run(config: str | None, overrides: list[str]) -> dict[str, Any]:
    """Loads the configuration and evaluates; scores by method and the folder of plots."""
    from cellplane.config import load_config
    from cellplane.pipelines.config import EvaluateConfig
    from cellplane.pipelines.evaluation import run_evaluate

    use_running_stack()
    scores, out = run_evaluate(load_config(EvaluateConfig, config, "evaluate", overrides))
    return {"scores": scores, "out": str(out)}


@evaluate_app.command("embed")
def evaluate_embed(
    protocol: Annotated[str, typer.Option("--protocol", help="File, or the name of a shipped one.")] = "cpu_embed",
    override: Overrides = None,
    as_json: Json = False,
) -> None:
    """Clusters of embeddings and how samples mix in them. Beside principal components and random weights."""
    protocol_run("embed", protocol, override or [], as_json)


@evaluate_app.command("denoise")
def evaluate_denoise(
    config: ConfigOption = "denoise",
    override: Overrides = None,
    model: Annotated[str | None, typer.Option("--model", help="A denoiser or a base model: folder or models:/NAME@ALIAS.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="h5ad of the cells.")] = None,
    refit: Annotated[bool, typer.Option("--refit", help="Fine-tune it on the thinned cells first, as in use.")] = False,
    protocol: Annotated[str | None, typer.Option("--protocol", help="Instead: a full protocol, file or shipped (cpu_denoise).")] = None,
    as_json: Json = False,
) -> None:
    """Errors in foretelling counts that were taken out. By masking and by count splitting, beside gene frequency and kNN.

    With --protocol the model is fitted too: seeds, tuned baselines, over-smoothing; run it again to go on after a stop.
    """
    if protocol is not None:
        if model or data or refit:
            raise typer.BadParameter("a protocol fits its own models on its own data: leave out --model, --data and --refit")
        protocol_run("denoise", protocol, override or [], as_json)
        return
    from cellplane.config import load_config
    from cellplane.pipelines.config import DenoiseEvaluation
    from cellplane.pipelines.evaluation import run_evaluate_denoising

    use_running_stack()
    options = [*given({"model": model, "data": data, "refit": refit}), *(override or [])]
    scores, out = run_evaluate_denoising(load_config(DenoiseEvaluation, config, "evaluate", options))
    if as_json:
        answer({"scores": scores, "out": str(out)}, True)
        return
    scores_table(scores)
    answer({"out": str(out)}, False)


@evaluate_app.command("impute")
def evaluate_impute(
    protocol: Annotated[str, typer.Option("--protocol", help="A full protocol, file or shipped.")] = "cpu_impute",
    override: Overrides = None,
    as_json: Json = False,
) -> None:
    """Shared genes hidden in folds and imputed. Beside tuned baselines and ceilings; run it again to go on after a stop."""
    protocol_run("impute", protocol, override or [], as_json)


@evaluate_app.command("perturb")
def evaluate_perturb(
    protocol: Annotated[str, typer.Option("--protocol", help="A full protocol, file or shipped.")] = "cpu_perturb",
    override: Overrides = None,
    as_json: Json = False,
) -> None:
    """Perturbations left out and predicted. Beside what needs no network; run it again to go on after a stop."""
    protocol_run("perturb", protocol, override or [], as_json)


@evaluate_app.command("unknown")
def evaluate_unknown(
    protocol: Annotated[str, typer.Option("--protocol", help="A full protocol, file or shipped.")] = "cpu_unknown",
    override: Overrides = None,
    as_json: Json = False,
) -> None:
    """Cell types left out in turn and told from known ones. Beside simple scores; run it again to go on after a stop."""
    protocol_run("unknown", protocol, override or [], as_json)


@evaluate_app.command("pretraining")
def evaluate_pretraining(
    model: Annotated[str, typer.Option("--model", help="Model folder or models:/NAME@ALIAS.")],
    shards: Annotated[
        str, typer.Option("--shards", help="Folder or URL written by `cellplane data convert`; those it was trained on will do.")
    ],
    context: Annotated[list[str] | None, typer.Option("--context", help="own, self, shuffled_coordinates, shuffled_neighbours.")] = None,
    max_cells: Annotated[int, typer.Option(min=1, help="At most about so many held-out cells.")] = 20_000,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of scores.json.")] = None,
    as_json: Json = False,
) -> None:
    """Nats of hidden counts that training never saw. By context, beside the genes' means; smaller is better."""
    from cellplane.pipelines.pretraining import PretrainingEvaluation, run_evaluate_pretraining

    use_running_stack()
    config = PretrainingEvaluation(model=model, shards=shards, max_cells=max_cells, out=None if out is None else str(out))
    result = run_evaluate_pretraining(config.model_copy(update={"contexts": tuple(context or config.contexts)}))
    if as_json:
        answer(result, True)
        return
    scores_table(result["scores"])
    gains = [[name, *(f"{gain[part]:.4f}" for part in ("mean", "low", "high"))] for name, gain in result["gains"].items()]
    table(["gain, nats per hidden value", "mean", "2.5 %", "97.5 %"], gains)
    answer({name: result[name] for name in ("sentences", "cells", "hidden_values", "out")}, False)
