"""Scores of a finished model beside its baselines, and the pictures that go with them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from cellplane.artifact.folder import load_model, verify_model
from cellplane.config import Config, home, to_plain
from cellplane.data.config import DataKeys
from cellplane.data.naming import merged_columns
from cellplane.data.sources import AnnData, column, find_counts, read_h5ad
from cellplane.errors import ConfigError, DataError, about
from cellplane.inference import keys_of, reading_keys
from cellplane.pipelines import plots
from cellplane.pipelines.annotation import UNLABELLED, CellTypeAnnotationPipeline
from cellplane.pipelines.baselines import BASELINES
from cellplane.pipelines.config import DenoiseEvaluation, EvaluateConfig
from cellplane.pipelines.denoising import DenoisingPipeline
from cellplane.pipelines.embedding import CellEmbeddingPipeline
from cellplane.pipelines.job import MODEL_ROW, Scores
from cellplane.pipelines.metrics import annotation_scores, confusion
from cellplane.tracking.promotion import chance_warning
from cellplane.tracking.registry import resolve_model

log = logging.getLogger(__name__)


def run_evaluate(config: EvaluateConfig) -> tuple[Scores, Path]:
    """Scores of a model and of every baseline on held-out cells, and the folder with scores.json and the plots."""
    _check_named(config, ("model", "train", "test"))
    model = resolve_model(config.model, config.tracking_uri, home() / "cache")
    pipeline = CellTypeAnnotationPipeline.load(model.path)
    assert pipeline.folder_ is not None
    pipeline.set_params(config={"keys": reading_keys(keys_of(pipeline.folder_.lineage), config.keys)})
    out = Path(config.out) if config.out else home() / "evaluations" / verify_model(model.path)["model_sha256"][:16]
    with about(f"{config.train} or {config.test}"):
        scores = evaluate_annotation(pipeline, read_h5ad(Path(config.train)), read_h5ad(Path(config.test)), config.seed)
    out.mkdir(parents=True, exist_ok=True)
    draw_annotation(pipeline, read_h5ad(Path(config.test)), out)
    return write_scores(config, scores, out), out


def run_evaluate_denoising(config: DenoiseEvaluation) -> tuple[Scores, Path]:
    """Scores of a denoiser (or base model) by masking and by count splitting, and the folder with scores.json."""
    _check_named(config, ("model", "data"))
    folder = load_model(resolve_model(config.model, config.tracking_uri, home() / "cache").path)
    recipe = config.recipe.model_copy(update={"keys": reading_keys(keys_of(folder.lineage), config.keys), "seed": config.seed})
    data = read_h5ad(Path(config.data))
    pipeline = DenoisingPipeline(folder, recipe)
    scores = pipeline.score(data) if config.refit else pipeline.score_as_it_is(data)
    out = Path(config.out) if config.out else home() / "evaluations" / f"{folder.model_sha256[:16]}-denoise"
    return write_scores(config, scores, out), out


def write_scores(config: Config, scores: Scores, out: Path) -> Scores:
    """Writes scores.json with the configuration that asked for them; the scores."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "scores.json").write_text(json.dumps({"config": to_plain(config), "scores": scores}, indent=1), encoding="utf-8")
    return scores


def _check_named(config: Config, names: tuple[str, ...]) -> None:
    for name in names:
        if not getattr(config, name):
            raise ConfigError(f"{name} is empty: name the {'model folder' if name == 'model' else 'h5ad'}, e.g. -o {name}=...")


def evaluate_annotation(pipeline: CellTypeAnnotationPipeline, train: AnnData, test: AnnData, seed: int) -> Scores:
    """Accuracy and macro-F1 on the labelled test cells: the model first, then every baseline fitted on the same training cells."""
    keys = pipeline.settings().keys
    key = str(keys.labels_key)
    known = _labelled(train, key)
    truth, keep = column(test, key), _labelled(test, key)
    found = {MODEL_ROW: pipeline.predict(test)[keep].astype(str).astype(object)}  # labels are compared as text
    train_counts, test_counts = _same_genes(_by_gene(train, keys), _by_gene(test, keys))
    for name, baseline in BASELINES.items():
        found[name] = baseline(train_counts[known], column(train, key)[known], test_counts[keep], seed)
    rows = {name: annotation_scores(truth[keep], predicted) for name, predicted in found.items()}
    if warning := chance_warning("macro_f1", {name: row["macro_f1"] for name, row in rows.items()}):
        log.warning("%s", warning)
    return {name: {"accuracy": row["accuracy"], "macro_f1": row["macro_f1"]} for name, row in rows.items()}


def draw_annotation(pipeline: CellTypeAnnotationPipeline, test: AnnData, folder: Path) -> list[Path]:
    """Confusion matrix, reliability curve and a UMAP of the model's embedding of the test cells."""
    key = str(pipeline.settings().keys.labels_key)
    truth, keep = column(test, key), _labelled(test, key)
    proba = pipeline.predict_proba(test)
    assert pipeline.folder_ is not None
    predicted = np.array([pipeline.folder_.classes[index] for index in proba.argmax(1)], dtype=object)
    classes = sorted({*pipeline.folder_.classes, *truth[keep].tolist()})
    matrix = confusion(truth[keep], predicted[keep], classes)
    latent = CellEmbeddingPipeline(pipeline.folder_, pipeline.settings().keys).predict(test)
    return [
        plots.confusion_plot(matrix, classes, folder / "confusion.png", "Held-out cells: truth and prediction"),
        plots.reliability_plot(proba.max(1)[keep], predicted[keep] == truth[keep], folder / "reliability.png"),
        plots.umap_plot(latent, truth, folder / "umap.png", "UMAP of X_cellplm, held-out cells"),
    ]


def _labelled(data: AnnData, key: str) -> np.ndarray[Any, Any]:
    return np.array([label is not None and label not in UNLABELLED for label in column(data, key)])


def _by_gene(data: AnnData, keys: DataKeys) -> tuple[Any, list[str]]:
    """Counts with one column for each gene, and the genes."""
    source = find_counts(data, keys)
    return merged_columns(source.matrix, source.gene_ids)


def _same_genes(train: tuple[Any, list[str]], test: tuple[Any, list[str]]) -> tuple[Any, Any]:
    if train[1] == test[1]:
        return train[0], test[0]
    place = {gene: index for index, gene in enumerate(test[1])}
    shared = [gene for gene in train[1] if gene in place]
    if not shared:
        raise DataError("training and test cells share no gene; use the same naming scheme for both files")
    own = {gene: index for index, gene in enumerate(train[1])}
    return train[0][:, [own[gene] for gene in shared]], test[0][:, [place[gene] for gene in shared]]
