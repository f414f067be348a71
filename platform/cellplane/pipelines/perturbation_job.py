"""Perturbation as a job: control and perturbed cells to learn from, and others, where there are any, to score on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from cellplane.data.sources import read_h5ad
from cellplane.pipelines.config import JobConfig
from cellplane.pipelines.job import MODEL_ROW, Scores
from cellplane.pipelines.perturbation import PerturbationPipeline
from cellplane.pipelines.perturbation_config import Kind, PerturbationConfig
from cellplane.pipelines.perturbation_scores import MEASURES
from cellplane.pipelines.task import Task, check_cells, fit_on_data


class PerturbJobConfig(JobConfig, PerturbationConfig):  # in this order: `kind` is the file's, see `renamed`
    """A fine-tuning job of a perturbation model."""

    renamed: ClassVar[Mapping[str, str]] = {"kind": "perturbed_by"}
    indifferent: ClassVar[tuple[str, ...]] = (*JobConfig.indifferent, "test")

    task: Literal["perturb"] = "perturb"
    """What is learned."""
    run: str = "perturb"
    """Name of the run: its folder under $CELLPLANE_HOME/runs, and its identity in MLflow."""
    perturbed_by: Kind = "knockout"
    """What the perturbations are."""
    test: str | None = None
    """h5ad of control and perturbed cells that were not learned: scored beside the baselines."""


def _check(config: PerturbJobConfig) -> None:
    check_cells(config.data, "data", config.keys, (config.perturbation_key,))
    if config.test is not None:
        check_cells(config.test, "test", config.keys, (config.perturbation_key,))


def _score(pipeline: PerturbationPipeline, config: PerturbJobConfig, _figures: Path) -> Scores | None:
    """Means over the perturbations whose change can be measured at all."""
    if config.test is None:
        return None
    found = pipeline.score(read_h5ad(Path(config.test)))
    rows = {name: row for name, row in found.items() if isinstance(row, dict) and row.keys() >= set(MEASURES)}
    return {MODEL_ROW if name == "model" else name: {metric: float(row[metric]) for metric in MEASURES} for name, row in rows.items()}


PERTURB = Task(PerturbJobConfig, PerturbationConfig, PerturbationPipeline, _check, fit_on_data, _score)
