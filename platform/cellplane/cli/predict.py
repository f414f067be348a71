"""`cellplane predict`: a model's answers about the cells of files, here or from an endpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cellplane.cli.common import ConfigOption, Json, Overrides, answer, given, progress, use_running_stack

if TYPE_CHECKING:
    from cellplane.batch import PredictReport
    from cellplane.remote import Remote

Inputs = Annotated[list[Path] | None, typer.Argument(help="h5ad files.")]
AskedModel = Annotated[str | None, typer.Option("--model", help="Model folder or models:/NAME@ALIAS; with --via its NAME there.")]
Answers = Annotated[Path | None, typer.Option("--out", help="Folder of the answers.")]
Via = Annotated[str | None, typer.Option("--via", help="Ask the endpoint at this URL instead; its key comes from $CELLPLANE_API_KEY.")]

predict_app = typer.Typer(help="Ask a model about the cells of h5ad files.", no_args_is_help=True)


def _verb(task: str, told: str) -> Callable[..., None]:
    def verb(
        inputs: Inputs = None,
        model: AskedModel = None,
        out: Answers = None,
        via: Via = None,
        config: ConfigOption = "annotate",
        override: Overrides = None,
        as_json: Json = False,
    ) -> None:
        named = given({"task": task, "inputs": inputs, "model": model, "out": out})
        _show(*_run(config, [*named, *(override or [])], via), as_json)

    verb.__doc__ = told
    return predict_app.command(task)(verb)


predict_annotate = _verb("annotate", "Name the cell type of every cell.")
predict_embed = _verb("embed", 'Embed every cell: obsm["X_cellplm"].')
predict_denoise = _verb("denoise", 'Denoise every cell: layers["cellplm_denoised"]. Expected counts, as rates per 10,000.')


@predict_app.command("impute")
def predict_impute(
    inputs: Annotated[list[Path], typer.Argument(help="h5ad files of spatial cells.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the answers.")],
    model: AskedModel = None,
    via: Via = None,
    as_json: Json = False,
) -> None:
    """Impute genes that the cells lack. One h5ad of cells x imputed genes for each input."""
    _predict_new("impute", (inputs, model, out), None, via, as_json)


@predict_app.command("perturb")
def predict_perturb(
    inputs: Annotated[list[Path], typer.Argument(help="h5ad files of control cells.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the answers.")],
    model: AskedModel = None,
    perturbation: Annotated[list[str] | None, typer.Option("--perturbation", help="Its name; may be repeated. None: all learned.")] = None,
    via: Via = None,
    as_json: Json = False,
) -> None:
    """Foretell what perturbed cells become. One h5ad of perturbations x genes for each input."""
    _predict_new("perturb", (inputs, model, out), perturbation, via, as_json)


def _predict_new(
    task: Literal["impute", "perturb"],
    what: tuple[list[Path], str | None, Path],
    perturbations: list[str] | None,
    via: str | None,
    as_json: bool,
) -> None:
    from cellplane.data.guard import refuse_if_none_opens
    from cellplane.errors import ConfigError

    inputs, model, out = what
    refuse_if_none_opens(inputs)
    if via is not None:
        from cellplane.remote import Remote

        names = None if perturbations is None else tuple(perturbations)
        _show(*_remote(Remote(via, task, model or "", perturbations=names), inputs, out), as_json)
        return
    if model is None:
        raise ConfigError("name the model with --model, or an endpoint that serves one with --via")
    from cellplane.pipelines.prediction import predict_new

    use_running_stack()
    report = predict_new(task, model, (inputs, out), perturbations)
    answer({"written": ", ".join(map(str, report.written)) or "nothing new", "reused": len(report.reused)}, as_json)


def _run(config: str | None, overrides: list[str], via: str | None) -> tuple[dict[str, Any], Mapping[str, str]]:
    return predict_run(config, overrides) if via is None else remote_run(config, overrides, via)


def _show(result: dict[str, Any], failed: Mapping[str, str], as_json: bool) -> None:
    if result["new"] or result["reused"] or not failed:
        answer(result, as_json)
    if failed:
        from cellplane.errors import DataError

        reasons = "; ".join(reason if reason.startswith(name) else f"{name}: {reason}" for name, reason in failed.items())
        rest = ", the others are complete" if result["new"] or result["reused"] else ""
        raise DataError(f"{len(failed)} of the files could not be done{rest}: {reasons}")


def predict_run(config: str | None, overrides: list[str]) -> tuple[dict[str, Any], Mapping[str, str]]:
    """Loads the configuration and predicts on whatever Ray there is; what to print, and what failed."""
    refuse_unreadable(config, overrides)
    from cellplane.batch import PredictConfig, predict_files, refuse_if_none_answerable
    from cellplane.cluster import local_ray
    from cellplane.config import load_config

    use_running_stack()
    loaded = load_config(PredictConfig, config, "predict", overrides)
    refuse_if_none_answerable(loaded)  # before a cluster is started for nothing
    with local_ray(log_to_driver=False):
        report = predict_files(loaded)
    return _told(report), report.failed


def refuse_unreadable(config: str | None, overrides: list[str]) -> None:
    """DataError when not one input opens as an h5ad, before anything slow is loaded."""
    from cellplane.config import setting
    from cellplane.data.guard import refuse_if_none_opens

    inputs = setting("inputs", config, "predict", overrides)
    if isinstance(inputs, list):
        refuse_if_none_opens([Path(str(path)) for path in inputs])


def remote_run(config: str | None, overrides: list[str], via: str) -> tuple[dict[str, Any], Mapping[str, str]]:
    """The same, asking an endpoint."""
    refuse_unreadable(config, overrides)
    from cellplane.batch import PredictConfig
    from cellplane.config import load_config
    from cellplane.data.answer_tables import SUFFIX
    from cellplane.errors import ConfigError
    from cellplane.remote import Remote

    loaded = load_config(PredictConfig, config, "predict", overrides)
    for name in ("inputs", "out"):
        if not getattr(loaded, name):
            raise ConfigError(f"{name} is empty: set it in the config or with -o {name}=...")
    if loaded.format != "h5ad" or loaded.out.endswith(SUFFIX):
        raise ConfigError("an endpoint's answers are written as h5ad files: name a folder with --out, or leave out --via")
    options = {} if loaded.context == "own" else {"context": loaded.context}
    return _remote(Remote(via, loaded.task, loaded.model, loaded.keys, options), [Path(path) for path in loaded.inputs], Path(loaded.out))


def _remote(remote: Remote, inputs: list[Path], out: Path) -> tuple[dict[str, Any], Mapping[str, str]]:
    from cellplane.remote import predict_remote

    with progress(f"asking {remote.url}") as show:
        report = predict_remote(remote, inputs, out, lambda done, total: show(done, total, {}))
    return _told(report), report.failed


def _told(report: PredictReport) -> dict[str, Any]:
    files = ", ".join(str(path) for path in report.written)
    return {"written": files or "nothing new", "new": len(report.written), "reused": len(report.reused), "cells": report.cells}
