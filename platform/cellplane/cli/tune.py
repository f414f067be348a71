"""`cellplane tune TASK`: finding how a task is best learned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cellplane.cli.common import ConfigOption, Json, Overrides, answer, given, progress, table, use_running_stack

tune_app = typer.Typer(help="Search for a better fine-tuning recipe.", no_args_is_help=True)
SHOWN = 5  # trials printed

Data = Annotated[Path | None, typer.Option("--data", help="h5ad with the training cells.")]
Model = Annotated[str | None, typer.Option("--model", help="Model folder or models:/NAME@ALIAS to start from.")]
Trials = Annotated[int | None, typer.Option("--trials", help="How many recipes to try.")]


@tune_app.command("annotate")
def tune_annotate(
    config: ConfigOption = "annotate",
    override: Overrides = None,
    data: Data = None,
    model: Model = None,
    trials: Trials = None,
    as_json: Json = False,
) -> None:
    """Search for a better annotator. What ended is kept, so a search that was stopped goes on."""
    _tune("annotate", config, [*given({"fixed.data": data, "fixed.base_model": model, "trials": trials}), *(override or [])], as_json)


@tune_app.command("denoise")
def tune_denoise(
    config: ConfigOption = "denoise",
    override: Overrides = None,
    data: Data = None,
    model: Model = None,
    trials: Trials = None,
    as_json: Json = False,
) -> None:
    """Search for a better denoiser."""
    _tune("denoise", config, [*given({"fixed.data": data, "fixed.base_model": model, "trials": trials}), *(override or [])], as_json)


def _tune(task: str, config: str | None, overrides: list[str], as_json: bool) -> None:
    result, rows = tune_run(task, config, overrides)
    if as_json:
        answer({**result, "trials": rows}, True)
        return
    table(["trial", "score", "steps", "status", "drawn"], rows[:SHOWN])
    answer(result, False)


def tune_run(task: str, config: str | None, overrides: list[str]) -> tuple[dict[str, Any], list[list[Any]]]:
    """Loads the configuration and searches on whatever Ray there is; what to print, and a row for each trial, best first."""
    from cellplane.cluster import local_ray
    from cellplane.config import load_config
    from cellplane.errors import ConfigError
    from cellplane.pipelines.tune_config import TuneConfig
    from cellplane.pipelines.tuning import plan_search, run_tune

    use_running_stack()
    loaded = load_config(TuneConfig, config, "tune", overrides)
    if loaded.task != task:
        raise ConfigError(f"the configuration searches for task {loaded.task}, not {task}: cellplane tune {loaded.task}")
    plan_search(loaded)  # before a cluster is started for nothing
    with local_ray(log_to_driver=False), progress(f"tuning {loaded.run}") as show:
        report = run_tune(loaded, show)
    rows = [[r.name, f"{r.score:.4g}", r.steps, r.status, ", ".join(f"{k}={v}" for k, v in r.values.items())] for r in report.results]
    result = {
        "best": report.best,
        "next": f"cellplane finetune {task} --config {report.best}",
        "ended": f"{len(report.results)} trials, {report.new} now",
        "failed": report.failed or "none",
        "run_id": report.run_id or "not tracked",
    }
    return result, rows
