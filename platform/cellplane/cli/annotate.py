"""`cellplane annotate FOLDER --reference ATLAS.h5ad`: a whole folder, and one report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cellplane.cli.common import ConfigOption, Json, Overrides, answer, given, live, progress, use_running_stack


def annotate(
    folder: Annotated[Path | None, typer.Argument(help="Folder whose h5ad files are annotated; they are never changed.")] = None,
    reference: Annotated[Path | None, typer.Option("--reference", help="h5ad of labelled cells to learn from.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the annotated copies and the report.")] = None,
    labels_key: Annotated[str | None, typer.Option(help="obs column of the reference's labels (cell_type).")] = None,
    batch_key: Annotated[str | None, typer.Option(help="obs column of the files' samples, for the report.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Base model to fine-tune: folder or models:/NAME@ALIAS.")] = None,
    config: ConfigOption = "folder",
    override: Overrides = None,
    as_json: Json = False,
) -> None:
    """Name the cell types of every h5ad of a folder. Finished files are kept when it is run again."""
    options = {"folder": folder, "reference": reference, "out": out, "base_model": model}
    options |= {"recipe.keys.labels_key": labels_key, "keys.batch_key": batch_key}
    result, failed = annotate_run(config, [*given(options), *(override or [])])
    answer(result, as_json)
    if failed:
        from cellplane.errors import DataError

        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        rest = ", the others are complete" if result["new"] or result["reused"] else ""
        raise DataError(f"{len(failed)} of the files could not be annotated{rest}: {reasons}")


def annotate_run(config: str | None, overrides: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Loads the configuration and annotates; what to print, and what failed."""
    from cellplane.config import load_config
    from cellplane.pipelines.folder_annotation import AnnotateConfig, annotate_folder, check_folder, learn_reference
    from cellplane.pipelines.folder_report import write_folder_report

    use_running_stack()
    loaded = load_config(AnnotateConfig, config, "annotate", overrides)
    check_folder(loaded)
    with progress("learning the reference") as show:
        learned = learn_reference(loaded, show)
    with live() as tell:
        report = annotate_folder(loaded, learned, tell)
    page = write_folder_report(report)
    samples = [sample for summary in report.summaries.values() for sample in summary.samples.values()]
    cells, unknown, agree = (sum(sample[name] for sample in samples) for name in ("cells", "unknown", "agree"))
    shares = {"unknown": f"{unknown / cells:.1%}", "second_opinion_agrees": f"{agree / cells:.1%}"} if cells else {}
    counted = {"cells": cells, **shares, "new": len(report.written), "reused": len(report.reused), "skipped": len(report.failed)}
    return {**counted, "annotator": report.model.model, "report": page}, dict(report.failed)
