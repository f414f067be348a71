"""What a task brings to a fine-tuning job, and what most tasks do alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellplane.data.config import DataKeys
from cellplane.data.sources import CellReader, read_h5ad
from cellplane.errors import ConfigError, about
from cellplane.pipelines.base import Estimator
from cellplane.pipelines.job import Scores
from cellplane.train.finetune import Course


@dataclass(frozen=True)
class Task:
    """A task's classes, a look at its files before any work, how it is fitted and how scored.

    ``config`` is the job's (`JobConfig` and the recipe together), ``recipe`` the part of it that the pipeline takes.
    """

    config: type[Any]
    recipe: type[Any]
    pipeline: type[Estimator]
    check: Callable[[Any], None]
    fit: Callable[[Any, Any, Course], None]  # (pipeline, the job's config, course)
    score: Callable[[Any, Any, Path], Scores | None]  # (fitted pipeline, the job's config, folder for figures)


def check_cells(path: str | None, name: str, keys: DataKeys, columns: tuple[str, ...] = ()) -> None:
    """Before any work begins: ConfigError when no file is named, DataError or ColumnError when it or a column is not there."""
    if not path:
        raise ConfigError(f"{name} is empty: name an h5ad with the cells, e.g. -o {name}=cells.h5ad")
    with CellReader(Path(path)) as reader:
        for column in filter(None, (keys.labels_key, keys.batch_key, *columns)):
            reader.obs(column)


def fit_on_data(pipeline: Any, config: Any, course: Course) -> None:
    """Fits on the job's cells alone."""
    with about(config.data):
        pipeline.fit(read_h5ad(Path(config.data)), progress=course.progress, keeping=course.keeping)
