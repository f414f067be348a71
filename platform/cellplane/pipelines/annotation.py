"""Cell type annotation: learn cell types from labelled cells, name those of others.

    pipeline = CellTypeAnnotationPipeline("models:/cellplm-tiny@champion").fit(train, label_fields=["cell_type"])
    labels = pipeline.predict(query)

The released recipe (an `ae` latent, a linear head, dropped cells and hidden genes) with its faults mended: validation
cells are training cells only, query cells never enter the training context, and a saved pipeline loads again.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cellplane.artifact.folder import ModelFolder, load_model, save_model
from cellplane.artifact.genes import with_genes
from cellplane.config import fingerprint
from cellplane.data.config import DataKeys
from cellplane.data.gene_mapping import genes_without_place
from cellplane.data.gene_tables import installed_tables
from cellplane.data.sentences import MemoryStore, PlanConfig, StepPlan, memory_store
from cellplane.data.sources import AnnData, cell_table, column, find_counts
from cellplane.errors import ConfigError, DataError
from cellplane.genes import GeneVocabulary
from cellplane.inference import Annotation, Predictor, build_network, query_keys, read_cells, record, write_annotation
from cellplane.model.cellplm import CellPLM, new_model
from cellplane.pipelines.base import as_config, open_model, stratified_split
from cellplane.pipelines.config import AnnotationConfig
from cellplane.pipelines.metrics import AnnotationScores, annotation_scores
from cellplane.train.engine import StepResult, TorchEngine
from cellplane.train.loop import train
from cellplane.train.objective import MaskedObjective

log = logging.getLogger(__name__)

UNLABELLED = ("", "nan", "NA", "None")  # never a cell type
TRANSFERRED = ("embedder.", "encoder.")  # what a fine-tuned model takes over from its base
Progress = Callable[[int, Mapping[str, float]], None]  # (steps done, metrics)


class CellTypeAnnotationPipeline:
    """fit / predict / predict_proba / score / save / load on AnnData; learned attributes end in an underscore.

    ``model`` is a model folder or registry URI to start from (None: from scratch); ``pretrain_prefix`` with
    ``pretrain_directory`` names an official CellPLM checkpoint instead.
    """

    def __init__(
        self,
        model: str | Path | ModelFolder | None = None,
        config: AnnotationConfig | Mapping[str, Any] | None = None,
        *,
        pretrain_prefix: str | None = None,
        pretrain_directory: str | Path | None = None,
    ) -> None:
        self.base = open_model(model, pretrain_prefix, pretrain_directory)
        self.config: AnnotationConfig = as_config(AnnotationConfig, config, AnnotationConfig())
        self.folder_: ModelFolder | None = None
        self.history_: list[dict[str, float]] = []
        self._predictor: Predictor | None = None
        self._best_step = 0

    @property
    def classes_(self) -> tuple[str, ...]:
        """The cell types learned, sorted; DataError before fit."""
        return self._fitted().folder.classes

    def fit(
        self,
        data: AnnData,
        config: AnnotationConfig | Mapping[str, Any] | None = None,
        label_fields: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> CellTypeAnnotationPipeline:
        """Learns the labels in ``label_fields[0]`` (default: config.keys.labels_key); cells without a label are left out.

        The AnnData is not changed. Raises DataError for fewer than two cell types, ColumnError for an unknown column.
        """
        if label_fields is not None and len(label_fields) != 1:
            raise ConfigError(f"one label field can be learned at a time, found {list(label_fields)}")
        self.config = as_config(AnnotationConfig, config, self.config)
        keys = self.config.keys if label_fields is None else self.config.keys.model_copy(update={"labels_key": label_fields[0]})
        self.config = self.config.model_copy(update={"keys": keys})
        if keys.labels_key is None:
            raise ConfigError("no label column is named: pass label_fields=[...] or set keys.labels_key")
        classes = label_classes(column(data, keys.labels_key), keys.labels_key)
        start = self._start(data, keys)
        vocabulary = start.vocabulary if start is not None else GeneVocabulary.from_ids(dict.fromkeys(find_counts(data, keys).gene_ids))
        table, report = cell_table(data, vocabulary, keys, classes)
        if table.labels is None:
            raise DataError(f"no labels were read from obs[{keys.labels_key!r}]")
        known = np.flatnonzero(table.labels >= 0)
        if len(known) < table.n_cells:
            missing = table.n_cells - len(known)
            log.warning("%d of %d cells have no label in obs[%r] and are left out", missing, table.n_cells, keys.labels_key)
        kept, held_out = stratified_split(table.labels[known], self.config.validation_share, self.config.seed)
        if len(held_out) == 0:
            raise DataError(
                f"a validation_share of {self.config.validation_share} holds out none of {len(known)} labelled cells, but some must choose "
                "the best step; raise it, or label more cells of each type"
            )
        network = self._network(start, len(vocabulary), len(classes))
        stores = tuple(memory_store(table.rows(known[rows]), self.config.max_cells) for rows in (kept, held_out))
        weights = self._train(network, stores, progress)
        self.folder_ = ModelFolder(
            config=network.config,
            weights=weights,
            vocabulary=vocabulary,
            task="annotate",
            max_cells=self.config.max_cells,
            classes=classes,
            lineage=self._lineage(len(known), report),
        )
        self._predictor = Predictor(self.folder_)
        return self

    def predict(self, data: AnnData, config: Mapping[str, Any] | None = None, *, key_added: str | None = None) -> NDArray[np.object_]:
        """Cell type of every cell, [n] str, in the order of ``data``.

        Sentences are built from ``data`` alone. With ``key_added`` (e.g. "cellplm") the answer is also written into
        ``data``: obs[key_cell_type], obs[key_confidence], obsm[key_cell_type_proba], uns["cellplm"].
        """
        annotation, report = self._annotate(data, config)
        if key_added is not None:
            write_annotation(data, annotation, key_added)
            data.uns["cellplm"] = record(self._fitted().folder, report)
        return annotation.labels

    def predict_proba(self, data: AnnData, config: Mapping[str, Any] | None = None) -> NDArray[np.float32]:
        """Probability of every class, [n, n_classes], columns as in ``classes_``."""
        return self._annotate(data, config)[0].proba

    def score(self, data: AnnData, label_fields: Sequence[str] | None = None) -> AnnotationScores:
        """Accuracy, macro-F1, precision, recall and per-class F1 on labelled cells; labels not learned count as wrong."""
        key = label_fields[0] if label_fields else self.config.keys.labels_key
        if key is None:
            raise ConfigError("no label column is named: pass label_fields=[...]")
        truth = column(data, key)
        labelled = np.array([label is not None and label not in UNLABELLED for label in truth])
        return annotation_scores(truth[labelled], self.predict(data)[labelled])

    def save(self, directory: str | Path) -> Path:
        """Writes the model folder (manifest with checksums, weights, vocabulary, classes)."""
        return save_model(self._fitted().folder, Path(directory))

    @classmethod
    def load(cls, directory: str | Path) -> CellTypeAnnotationPipeline:
        """A saved pipeline, ready to predict; every file is verified."""
        pipeline = cls()
        pipeline.folder_ = load_model(Path(directory))
        if pipeline.folder_.task != "annotate":
            raise DataError(f"{directory} holds a {pipeline.folder_.task} model, not an annotation pipeline")
        pipeline._predictor = Predictor(pipeline.folder_)
        return pipeline

    def _fitted(self) -> Predictor:
        if self._predictor is None:
            raise DataError("this pipeline has not learned anything yet: call fit, or load a saved one")
        return self._predictor

    def _annotate(self, data: AnnData, config: Mapping[str, Any] | None) -> tuple[Annotation, Mapping[str, Any]]:
        predictor = self._fitted()
        keys = self.config.keys if config is None else as_config(AnnotationConfig, config, self.config).keys
        read = read_cells(data, predictor.folder.vocabulary, query_keys(data, keys), predictor.folder.max_cells)
        return predictor.annotate(read.store), read.report

    def _start(self, data: AnnData, keys: DataKeys) -> ModelFolder | None:
        """The base model, with rows for the data's new genes when these are to be learned."""
        if self.base is None or self.config.new_genes == "leave_out":
            return self.base
        new = genes_without_place(find_counts(data, keys).gene_ids, self.base.vocabulary, installed_tables())
        log.info("%d genes that the base model does not know begin as the mean of its genes", len(new))
        return with_genes(self.base, new)

    def _network(self, start: ModelFolder | None, n_genes: int, n_classes: int) -> CellPLM:
        config = self.config.model if start is None else start.config
        config = replace(config, latent="ae", decoder="none", n_genes=n_genes, n_classes=n_classes, n_batches=0, n_datasets=0)
        config = replace(config, head_dropout=self.config.head_dropout)
        network = new_model(config, self.config.seed)
        if start is not None:
            taken = {name: tensor for name, tensor in build_network(start).state_dict().items() if name.startswith(TRANSFERRED)}
            missing, unexpected = network.load_state_dict(taken, strict=False)
            if unexpected or any(name.startswith(TRANSFERRED) for name in missing):
                raise DataError(f"the base model does not fit: missing {missing}, unexpected {unexpected}")
        return network

    def _train(self, network: CellPLM, stores: tuple[MemoryStore, ...], progress: Progress | None) -> dict[str, torch.Tensor]:
        config, (training, validation) = self.config, stores
        objective = MaskedObjective(training, config.masking, sentence_weights=training.sizes.astype(np.float64))
        plan = StepPlan(training.sizes, PlanConfig(seed=config.seed, cells_per_micro_batch=config.max_cells, micro_batches_per_step=1))
        best = Best(network, validation, config, progress)
        self.history_ = best.history
        train(TorchEngine(network, config.optimizer), objective, plan, range(config.optimizer.steps), after_step=best)
        self._best_step = best.step
        return best.weights

    def _lineage(self, cells: int, report: Mapping[str, Any]) -> dict[str, str]:
        base = "none" if self.base is None else (self.base.model_sha256 or self.base.lineage.get("source", "unsaved"))
        return {
            "base_model": base,
            "labels_key": str(self.config.keys.labels_key),
            "training_cells": str(cells),
            "counts": str(report.get("count_source", "")),
            "config_sha256": fingerprint(self.config),
            "best_step": str(self._best_step),
        }


class Best:
    """Looks at the validation cells every few steps, keeps the best weights, and says when to stop."""

    def __init__(self, network: CellPLM, validation: MemoryStore, config: AnnotationConfig, progress: Progress | None) -> None:
        self.network, self.validation, self.config, self.progress = network, validation, config, progress
        self.batch = validation.read(range(len(validation.sizes)))
        self.history: list[dict[str, float]] = []
        self.weights: dict[str, torch.Tensor] = copy.deepcopy(network.state_dict())
        self.step = 0  # after which the best weights were seen
        self._best, self._waited = (-1.0, float("inf")), 0

    def __call__(self, done: int, result: StepResult) -> bool:
        """True when ``patience`` looks brought nothing better."""
        metrics = {"train/loss": result.loss, "train/lr": result.lr, "train/grad_norm": result.grad_norm}
        if done % self.config.validate_every == 0 or done == self.config.optimizer.steps:
            metrics |= self._look()
            self._judge(done, metrics)
        self.history.append({"step": float(done), **metrics})
        if self.progress is not None:
            self.progress(done, metrics)
        return self._waited >= self.config.patience

    def _look(self) -> dict[str, float]:
        with torch.inference_mode():
            output = self.network(self.batch)
        assert output.logits is not None
        assert output.loss is not None
        assert self.batch.labels is not None
        scores = annotation_scores(self.batch.labels.numpy().astype(str), output.logits.argmax(-1).numpy().astype(str))
        return {"val/loss": float(output.loss.total.mean()), "val/macro_f1": scores["macro_f1"], "val/accuracy": scores["accuracy"]}

    def _judge(self, done: int, metrics: Mapping[str, float]) -> None:
        found = (round(metrics["val/macro_f1"], 6), -metrics["val/loss"])
        if found > (self._best[0], -self._best[1]):
            self._best, self._waited = (found[0], metrics["val/loss"]), 0
            self.weights, self.step = copy.deepcopy(self.network.state_dict()), done
        else:
            self._waited += 1


def label_classes(labels: NDArray[np.object_], key: str) -> tuple[str, ...]:
    """The sorted cell types of a column, unlabelled cells aside; DataError for fewer than two."""
    classes = tuple(sorted({label for label in labels if label is not None and label not in UNLABELLED}))
    if len(classes) < 2:
        raise DataError(f"obs[{key!r}] has {len(classes)} cell types ({', '.join(classes)}); at least two are needed to learn from")
    return classes
