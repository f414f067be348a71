"""Full evaluation protocols from the command line: splits, seeds, tuned baselines and controls in one resumable run."""

from __future__ import annotations

import importlib
from typing import Any

import typer

from cellplane.cli.common import answer, say, table, use_running_stack

PROTOCOLS = {  # task -> its configuration, and what runs it
    "annotate": ("protocol_config.AnnotationProtocol", "cellplane.pipelines.annotation_evaluation", "run_annotation_protocol"),
    "denoise": ("task_protocols.DenoisingProtocol", "cellplane.pipelines.denoising_protocol", "run_denoising_protocol"),
    "embed": ("protocol_config.EmbeddingProtocol", "cellplane.pipelines.embedding_evaluation", "run_embedding_protocol"),
    "impute": ("task_protocols.ImputationProtocol", "cellplane.pipelines.imputation_protocol", "run_imputation_protocol"),
    "perturb": ("task_protocols.PerturbationProtocol", "cellplane.pipelines.perturbation_protocol", "run_perturbation_protocol"),
    "unknown": ("task_protocols.UnknownProtocol", "cellplane.pipelines.unknown_protocol", "run_unknown_protocol"),
}


def protocol_run(task: str, name: str, overrides: list[str], as_json: bool) -> None:
    """Runs a protocol file (or a shipped one, by name) and prints its tables; lines of progress go to standard error."""
    from cellplane.config import load_config

    schema, module, function = PROTOCOLS[task]
    use_running_stack()
    where, _, kind = schema.partition(".")
    config = load_config(getattr(importlib.import_module(f"cellplane.pipelines.{where}"), kind), name, "evaluate", overrides)
    finished = getattr(importlib.import_module(module), function)(config, say)
    evaluation = finished.evaluation
    if as_json:
        answer({**evaluation.plain(), "report": finished.report.html, "run_id": finished.run_id or "not tracked"}, True)
        return
    for dataset, protocol in evaluation.tables():
        typer.echo(f"\n{dataset}, {protocol}")
        table(["method", "kind", *evaluation.metrics_of(dataset, protocol), "lead"], _rows(evaluation, dataset, protocol))
    typer.echo("")
    answer({"report": finished.report.html, "run_id": finished.run_id or "not tracked"}, False)


def _rows(evaluation: Any, dataset: str, protocol: str) -> list[list[str]]:
    """Every method with its scores, and our lead over it in words."""
    from cellplane.pipelines.evaluation_report import cells_of

    rows = [cells_of(evaluation, (dataset, protocol), row) for row in evaluation.rows(dataset, protocol)]
    return [[f"{text} {verdict}".strip() for text, verdict in row] for row in rows]
