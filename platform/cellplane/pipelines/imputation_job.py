"""Imputation as a job: a spatial query, a single-cell reference, and, where it is known, the truth of what was imputed."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from cellplane.data.sources import read_h5ad
from cellplane.pipelines.config import JobConfig
from cellplane.pipelines.imputation import SpatialImputationPipeline
from cellplane.pipelines.imputation_config import ImputationConfig
from cellplane.pipelines.job import MODEL_ROW, Scores
from cellplane.pipelines.task import Task, check_cells
from cellplane.train.finetune import Course


class ImputeJobConfig(ImputationConfig, JobConfig):
    """A fine-tuning job of an imputation; `data` are the spatial cells."""

    inputs: ClassVar[tuple[str, ...]] = ("data", "reference")
    indifferent: ClassVar[tuple[str, ...]] = (*JobConfig.indifferent, "test")

    task: Literal["impute"] = "impute"
    """What is learned."""
    run: str = "impute"
    """Name of the run: its folder under $CELLPLANE_HOME/runs, and its identity in MLflow."""
    reference: str = ""
    """h5ad of single cells that measured the genes to impute."""
    test: str | None = None
    """h5ad of spatial cells whose counts of the imputed genes are known: scored beside kNN and ridge regression."""


def _check(config: ImputeJobConfig) -> None:
    check_cells(config.data, "data", config.keys)
    check_cells(config.reference, "reference", config.reference_keys)
    if config.test is not None:
        check_cells(config.test, "test", config.keys)


def _fit(pipeline: SpatialImputationPipeline, config: ImputeJobConfig, course: Course) -> None:
    query, reference = read_h5ad(Path(config.data)), read_h5ad(Path(config.reference))
    pipeline.fit(query, reference, progress=course.progress, keeping=course.keeping)


def _score(pipeline: SpatialImputationPipeline, config: ImputeJobConfig, _figures: Path) -> Scores | None:
    """Pearson and Spearman, means over genes that vary."""
    if config.test is None:
        return None
    found = pipeline.score(read_h5ad(Path(config.test)))
    rows = {MODEL_ROW: found["model"], "knn": found["knn"], "ridge": found["ridge"]}
    return {name: {metric: float(row[metric]) for metric in ("pearson", "spearman")} for name, row in rows.items()}


IMPUTE = Task(ImputeJobConfig, ImputationConfig, SpatialImputationPipeline, _check, _fit, _score)
