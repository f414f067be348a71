"""`cellplane finetune TASK | evaluate TASK | tune TASK`: learning a task, scoring what was learned, and finding how to learn it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cellplane.cli.common import ConfigOption, Json, Overrides, answer, given, progress, report_of, scores_table, use_running_stack

finetune_app = typer.Typer(help="Fine-tune a model for a task.", no_args_is_help=True)

Model = Annotated[str | None, typer.Option("--model", help="Model folder or models:/NAME@ALIAS to start from.")]
Resume = Annotated[str | None, typer.Option("--resume", help="Name of a run to go on with; its stored configuration is used.")]
Cells = Annotated[Path | None, typer.Option("--data", help="h5ad with the cells.")]


@finetune_app.command("annotate")
def finetune_annotate(
    config: ConfigOption = None,
    override: Overrides = None,
    data: Annotated[Path | None, typer.Option("--data", help="h5ad with labelled cells.")] = None,
    test: Annotated[Path | None, typer.Option("--test", help="h5ad of held-out labelled cells, scored beside the baselines.")] = None,
    model: Model = None,
    labels_key: Annotated[str | None, typer.Option(help="obs column of the labels.")] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Learn the head alone on a frozen base model: seconds instead of minutes.")
    ] = False,
    resume: Resume = None,
    as_json: Json = False,
) -> None:
    """Learn cell types from labelled cells."""
    head = {"transfer.learn": "head"} if probe else {}
    options = given({"data": data, "test": test, "base_model": model, "keys.labels_key": labels_key, **head})
    _finetune("annotate", config, [*options, *(override or [])], resume, as_json)


@finetune_app.command("denoise")
def finetune_denoise(
    config: ConfigOption = None,
    override: Overrides = None,
    data: Cells = None,
    model: Model = None,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Also score the recipe by hiding counts: two more fits.")] = False,
    resume: Resume = None,
    as_json: Json = False,
) -> None:
    """Learn to recover counts from the same cells, by hiding some."""
    options = given({"data": data, "base_model": model, "evaluate": evaluate})
    _finetune("denoise", config, [*options, *(override or [])], resume, as_json)


@finetune_app.command("impute")
def finetune_impute(
    config: ConfigOption = None,
    override: Overrides = None,
    data: Annotated[Path | None, typer.Option("--data", help="h5ad with the spatial cells.")] = None,
    reference: Annotated[Path | None, typer.Option("--reference", help="h5ad with single cells that measured more genes.")] = None,
    test: Annotated[Path | None, typer.Option("--test", help="h5ad of spatial cells with the truth, scored beside kNN and ridge.")] = None,
    model: Model = None,
    resume: Resume = None,
    as_json: Json = False,
) -> None:
    """Learn to fill in genes that a spatial assay lacks. They are learned from a single-cell reference."""
    options = given({"data": data, "reference": reference, "test": test, "base_model": model})
    _finetune("impute", config, [*options, *(override or [])], resume, as_json)


@finetune_app.command("perturb")
def finetune_perturb(
    config: ConfigOption = None,
    override: Overrides = None,
    data: Annotated[Path | None, typer.Option("--data", help="h5ad with control and perturbed cells.")] = None,
    test: Annotated[
        Path | None, typer.Option("--test", help="h5ad of such cells that were not learned, scored beside the baselines.")
    ] = None,
    model: Model = None,
    perturbed_by: Annotated[str | None, typer.Option(help="knockout, crispri, crispra or stimulation.")] = None,
    resume: Resume = None,
    as_json: Json = False,
) -> None:
    """Learn what perturbations do to control cells."""
    options = given({"data": data, "test": test, "base_model": model, "perturbed_by": perturbed_by})
    _finetune("perturb", config, [*options, *(override or [])], resume, as_json)


def _finetune(task: str, config: str | None, overrides: list[str], resume: str | None, as_json: bool) -> None:
    result = finetune_run(task, config, overrides, resume)
    scores = result.pop("scores")
    answer({**result, "scores": scores} if as_json else result, as_json)
    if scores and not as_json:
        scores_table(scores)


def finetune_run(task: str, config: str | None, overrides: list[str], resume: str | None = None) -> dict[str, Any]:
    """Loads the configuration and fine-tunes; what to print, scores apart."""
    from cellplane.config import load_config
    from cellplane.pipelines.finetuning import TASKS, resumed_job, run_finetune

    use_running_stack()
    if resume is not None:
        loaded = resumed_job(task, resume, config, overrides)
    else:
        loaded = load_config(TASKS[task].config, config or task, "finetune", overrides)
    with progress(f"fine-tuning {loaded.run}", "now scores, of tuned baselines too") as show:
        report = run_finetune(loaded, show)
    return {**report_of(report), "scores": report.scores}
