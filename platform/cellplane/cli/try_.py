"""`cellplane try TASK FILE`: should I use it on my data?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cellplane.cli.common import ConfigOption, Json, Overrides, answer, given, live, use_running_stack

try_app = typer.Typer(
    help="Find out whether to use it on your data. A part is hidden; the model and simple methods look for it.", no_args_is_help=True
)
File = Annotated[Path | None, typer.Argument(help="h5ad of your cells; it is never changed.")]
Model = Annotated[str | None, typer.Option("--model", "--base-model", help="Base model to start from: folder or models:/NAME@ALIAS.")]
Auto = Annotated[bool, typer.Option("--auto", help="Also write the winner's answer, whichever won.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the report and the answer.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Of what is hidden, and of the fits.")]
BatchKey = Annotated[str | None, typer.Option(help="obs column of the sample or slide.")]
LabelsKey = Annotated[str | None, typer.Option(help="obs column of the cell types (cell_type).")]


@try_app.command("annotate")
def try_annotate(
    file: File = None,
    reference: Annotated[Path | None, typer.Option("--reference", help="Labelled h5ad to learn from instead of the file's labels.")] = None,
    labels_key: LabelsKey = None,
    batch_key: BatchKey = None,
    model: Model = None,
    auto: Auto = False,
    out: Out = None,
    seed: Seed = None,
    config: ConfigOption = "annotate",
    override: Overrides = None,
    as_json: Json = False,
) -> None:
    """Hide cell types and name them again. --auto names the cells that have none."""
    options = {"data": file, "reference": reference, "base_model": model, "auto": auto, "out": out, "seed": seed}
    options |= {"recipe.keys.labels_key": labels_key, "recipe.keys.batch_key": batch_key}
    _try("annotate", config, [*given(options), *(override or [])], as_json)


@try_app.command("impute")
def try_impute(
    file: File = None,
    reference: Annotated[Path | None, typer.Option("--reference", help="h5ad of single cells that measured more genes.")] = None,
    model: Model = None,
    auto: Auto = False,
    out: Out = None,
    seed: Seed = None,
    config: ConfigOption = "impute",
    override: Overrides = None,
    as_json: Json = False,
) -> None:
    """Hide genes and fill them in from a reference. --auto fills in those that the file lacks."""
    options = {"data": file, "reference": reference, "base_model": model, "auto": auto, "out": out, "seed": seed}
    _try("impute", config, [*given(options), *(override or [])], as_json)


@try_app.command("denoise")
def try_denoise(
    file: File = None,
    batch_key: BatchKey = None,
    model: Model = None,
    auto: Auto = False,
    out: Out = None,
    seed: Seed = None,
    config: ConfigOption = "denoise",
    override: Overrides = None,
    as_json: Json = False,
) -> None:
    """Take counts out and foretell them; --auto denoises all cells."""
    options = {"data": file, "base_model": model, "auto": auto, "out": out, "seed": seed, "recipe.keys.batch_key": batch_key}
    _try("denoise", config, [*given(options), *(override or [])], as_json)


@try_app.command("embed")
def try_embed(
    file: File = None,
    labels_key: LabelsKey = None,
    batch_key: BatchKey = None,
    model: Model = None,
    auto: Auto = False,
    out: Out = None,
    seed: Seed = None,
    config: ConfigOption = "embed",
    override: Overrides = None,
    as_json: Json = False,
) -> None:
    """Place cells by a base model and judge it by their types. --auto writes obsm["X_auto"]."""
    options = {"data": file, "base_model": model, "auto": auto, "out": out, "seed": seed}
    options |= {"keys.labels_key": labels_key, "keys.batch_key": batch_key}
    _try("embed", config, [*given(options), *(override or [])], as_json)


@try_app.command("perturb")
def try_perturb(
    file: File = None,
    labels_key: Annotated[str | None, typer.Option(help="obs column of the cell types; needed below three perturbations.")] = None,
    batch_key: BatchKey = None,
    model: Model = None,
    auto: Auto = False,
    out: Out = None,
    seed: Seed = None,
    config: ConfigOption = "perturb",
    override: Overrides = None,
    as_json: Json = False,
) -> None:
    """Leave perturbations out and foretell them from control cells. --auto keeps the model, where it won."""
    options = {"data": file, "base_model": model, "auto": auto, "out": out, "seed": seed}
    options |= {"recipe.keys.labels_key": labels_key, "recipe.keys.batch_key": batch_key}
    _try("perturb", config, [*given(options), *(override or [])], as_json)


def _try(task: str, config: str | None, overrides: list[str], as_json: bool) -> None:
    result = try_run(task, config, overrides)
    if not as_json:
        typer.echo(result["verdict"])
        result = {name: value for name, value in result.items() if name in ("answer", "report")}
    answer(result, as_json)


def try_run(task: str, config: str | None, overrides: list[str]) -> dict[str, Any]:
    """Loads the configuration and tries; what to print."""
    from dataclasses import asdict

    from cellplane.config import load_config
    from cellplane.pipelines.trying import TASKS, run_try

    use_running_stack()
    loaded = load_config(TASKS[task].config, config, "try", overrides)
    with live() as tell:
        report = run_try(loaded, tell)
    verdict = report.verdict
    found = {"verdict": verdict.text, "decision": verdict.decision, "winner": verdict.winner, **asdict(verdict), "report": report.page}
    return {**found, "answer": f"{report.told}: {report.answer}" if report.answer else report.told} if loaded.auto else found
