"""Answers that are tables of their own: imputed genes, perturbed profiles. One h5ad for each input, whole or not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellplane.artifact.folder import load_model
from cellplane.config import home
from cellplane.data.inputs import check_answers
from cellplane.data.sources import AnnData, read_h5ad, write_h5ad
from cellplane.errors import ConfigError
from cellplane.inference import answered
from cellplane.pipelines.imputation import SpatialImputationPipeline
from cellplane.pipelines.perturbation import PerturbationPipeline
from cellplane.results import ONLY_SOME
from cellplane.tracking.registry import resolve_model

PIPELINES: dict[str, type[Any]] = {"impute": SpatialImputationPipeline, "perturb": PerturbationPipeline}


@dataclass(frozen=True)
class Predicted:
    """Files written now, and found done before."""

    written: tuple[Path, ...]
    reused: tuple[Path, ...]


def predict_new(task: str, model: str, files: tuple[Sequence[Path], Path], perturbations: Sequence[str] | None = None) -> Predicted:
    """Asks a model about every input, ``files`` = (inputs, folder of the answers); answers that this model gave are kept.

    With ``perturbations`` nothing is reused. Raises ConfigError for a model of another task, for two inputs of one name and
    for an answer that would overwrite its input, DataError for an input that does not exist.
    """
    inputs, out = files
    folder = load_model(resolve_model(model, None, home() / "cache").path)
    if folder.task != task:
        raise ConfigError(f"{model} is a {folder.task} model, not one to {task} with: cellplane finetune {task} makes one")
    check_answers(inputs, out)
    pipeline = PIPELINES[task]()
    pipeline.adopt(folder)
    answers = [out / path.name for path in inputs]
    done = [perturbations is None and answered(*pair, folder.model_sha256) for pair in zip(inputs, answers, strict=True)]
    for path, answer, reuse in zip(inputs, answers, done, strict=True):
        if not reuse:
            write_h5ad(_ask(pipeline, read_h5ad(path), perturbations), answer)
    pairs = list(zip(answers, done, strict=True))
    return Predicted(tuple(path for path, reuse in pairs if not reuse), tuple(path for path, reuse in pairs if reuse))


def _ask(pipeline: Any, data: AnnData, perturbations: Sequence[str] | None) -> AnnData:
    if perturbations is None:
        return pipeline.predict(data)
    found = pipeline.predict(data, perturbations)
    found.uns["cellplm"][ONLY_SOME] = True
    return found
