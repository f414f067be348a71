"""Cell type annotation: learn cell types from labelled cells, name those of others.

    pipeline = CellTypeAnnotationPipeline("models:/cellplm-tiny@champion").fit(train, label_fields=["cell_type"])
    labels = pipeline.predict(query)

The released recipe (an `ae` latent, a linear head, dropped cells and hidden genes) with its faults mended: validation
cells are training cells only, query cells never enter the training context, and a saved pipeline loads again. What the
validation cells teach about the answers themselves (see `pipelines.judging`) is kept in the model, so that a notebook, a
job and an endpoint answer alike.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from cellplane.artifact.folder import ModelFolder
from cellplane.artifact.members import pack_members
from cellplane.cells import CellBatch
from cellplane.config import fingerprint
from cellplane.data.company import READ_ONLY, Context, SharedStore, near_store, store_beside
from cellplane.data.config import UNLABELLED as UNLABELLED
from cellplane.data.confounding import confounding
from cellplane.data.sentences import CellTable, MemoryStore, PlanConfig, StepPlan, memory_store
from cellplane.data.sources import AnnData, cell_table, column
from cellplane.errors import ConfigError, DataError
from cellplane.inference import UNKNOWN, Annotation, Read, query_keys, read_cells, record, write_annotation, write_flags
from cellplane.model.cellplm import CellPLM, new_model
from cellplane.pipelines.base import (
    Estimator,
    base_name,
    check_transfer,
    known_labels,
    starting_model,
    stratified_split,
    take_over,
)
from cellplane.pipelines.components import begin_at_components
from cellplane.pipelines.config import AnnotationConfig
from cellplane.pipelines.judging import asked_judgement, check_judging, judged
from cellplane.pipelines.metrics import AnnotationScores, annotation_scores
from cellplane.pipelines.neighbours import voting_network
from cellplane.pipelines.probe import Probe, ProbeObjective, shifted, stacked, without_counts
from cellplane.pipelines.splits import block_validation
from cellplane.results import WARNINGS
from cellplane.seeds import keyed_seed
from cellplane.train.config import TransferConfig
from cellplane.train.finetune import Best, Course, Look, Progress, device_named, finetune
from cellplane.train.loop import Keeping
from cellplane.train.objective import MaskedObjective

log = logging.getLogger(__name__)

HALF = 0.5
LABEL_TYPES: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "bool": "True".__eq__}  # from the text that a model keeps
Store = MemoryStore | SharedStore
Split = tuple[MemoryStore, Store]  # training and validation cells
TRANSFERRED = ("embedder.", "encoder.")  # what a fine-tuned model takes over from its base


class CellTypeAnnotationPipeline(Estimator):
    """fit / predict / predict_proba / score / save / load on AnnData; learned attributes end in an underscore.

    ``model`` is a model folder or registry URI to start from (None: from scratch); ``pretrain_prefix`` with
    ``pretrain_directory`` names an official CellPLM checkpoint instead.
    """

    task = "annotate"
    recipe = AnnotationConfig
    config: AnnotationConfig

    def __init__(
        self,
        model: str | Path | ModelFolder | None = None,
        config: AnnotationConfig | Mapping[str, Any] | None = None,
        *,
        pretrain_prefix: str | None = None,
        pretrain_directory: str | Path | None = None,
    ) -> None:
        super().__init__(model, config, pretrain_prefix=pretrain_prefix, pretrain_directory=pretrain_directory)
        self._told: AnnotationConfig = self.configured(None)  # what a fit learns by, until the next one

    @property
    def classes_(self) -> tuple[Any, ...]:
        """The cell types learned, sorted as text, in the type the labels had: str, int, float or bool; DataError before fit."""
        return tuple(map(self._label, self._fitted().folder.classes))

    def _label(self, text: str) -> Any:
        """A label in the type it was learned in; a model itself keeps text."""
        kind = self._fitted().folder.lineage.get("label_type")
        return text if kind is None or text not in self._fitted().folder.classes else LABEL_TYPES[kind](text)

    def fit(
        self,
        data: AnnData,
        config: AnnotationConfig | Mapping[str, Any] | None = None,
        label_fields: Sequence[str] | None = None,
        progress: Progress | None = None,
        keeping: Keeping | None = None,
    ) -> CellTypeAnnotationPipeline:
        """Learns the labels in ``label_fields[0]`` (default: config.keys.labels_key); cells without a label or counts are left out.

        The AnnData is not changed. With a ``keeping`` a fit that was killed goes on where it was. Raises DataError for
        fewer than two cell types, and with `unknown.reject` for one called "unknown"; ColumnError for an unknown column.
        """
        if label_fields is not None and len(label_fields) != 1:
            raise ConfigError(f"one label field can be learned at a time, found {list(label_fields)}")
        self._told = self.configured(config)
        check_transfer(self._told.transfer, self.base, new=("latent",))
        keys = self._told.keys if label_fields is None else self._told.keys.model_copy(update={"labels_key": label_fields[0]})
        self._told = self._told.model_copy(update={"keys": keys})
        if keys.labels_key is None:
            raise ConfigError("no label column is named: pass label_fields=[...] or set keys.labels_key")
        classes = label_classes(column(data, keys.labels_key), keys.labels_key)
        check_judging(self._told, classes)
        kind = label_type(data.obs[keys.labels_key], keys.labels_key)
        start, vocabulary = starting_model(self.base, data, keys, self._told.new_genes)
        table, report = cell_table(data, vocabulary, keys, classes)
        warned = confounding(data, keys)
        if table.labels is None:
            raise DataError(f"no labels were read from obs[{keys.labels_key!r}]")
        warn_of_left_out(report, self.base)
        table, sizes = counted_cells(self._usable(table)), (len(vocabulary), len(classes))
        stores = self._split(table)
        network = self._begun(start, stores[0].table, sizes)
        best = untrained(network) if self._votes else self._learn(network, stores, Course(progress, keeping))
        common = stores if self._told.unknown.reject else None
        others = [self._member(number, start, (table, common), sizes) for number in range(1, 1 if self._votes else self._told.members)]
        self.history_ = best.history
        folder = ModelFolder(
            config=network.config,
            weights={**network.cpu().state_dict(), **best.weights},
            vocabulary=vocabulary,
            task="annotate",
            max_cells=self._told.max_cells,
            classes=classes,
            lineage=self._lineage(best, stores, report)
            | ({"label_type": kind} if kind in LABEL_TYPES else {})
            | ({} if warned is None else {WARNINGS: warned}),
        )
        members = pack_members(others)
        answering = folder if common is None else replace(folder, attachments=members)  # else the others know the validation cells
        judgement = judged(answering, (with_labels(stores[0]), stores[1]), self._told).attachments
        self._answer_with(replace(folder, attachments={**judgement, **members}), self._told)
        return self

    def predict(
        self,
        data: AnnData,
        config: Mapping[str, Any] | None = None,
        *,
        key_added: str | None = None,
        context: Context | AnnData = "own",
    ) -> NDArray[np.object_]:
        """Cell type of every cell, [n], in the order of ``data``: one of ``classes_``, or "unknown" without counts the model knows.

        ``context`` says in whose company cells are read, see `read_cells`; by default sentences are built from ``data``
        alone. Strangers are "unknown" and unsure cells get a broader name where the model was fitted so; ``config`` may ask
        otherwise: {"unknown": {"reject": True, "refusal_rate": 0.1}}, {"hierarchy": {"parents": {...}}}. With ``key_added``
        (e.g. "cellplm") the answer is also written into ``data``: obs[key_cell_type] (text), obs[key_confidence],
        obs[key_unknown_score], obsm[key_cell_type_proba], uns["cellplm"], and for cells without counts the reason in
        obs[key_flag].
        """
        annotation, read = self._annotate(data, config, context)
        if key_added is not None:
            self._write(data, annotation, read, key_added)
        typed: NDArray[np.object_] = np.empty(len(annotation.labels), dtype=object)
        typed[:] = [self._label(text) for text in annotation.labels]
        return typed

    def annotate(self, data: AnnData, key_added: str = "cellplm") -> CellTable:
        """Writes into ``data`` what `predict` does with this key; returns its cells as they were read, over the model's genes."""
        annotation, read = self._annotate(data, None, "own")
        self._write(data, annotation, read, key_added)
        return read.store.table

    def _write(self, data: AnnData, annotation: Annotation, read: Read, key_added: str) -> None:
        write_flags(data, read.store.table, key_added)
        write_annotation(data, annotation, key_added)
        data.uns["cellplm"] = record(self._fitted().folder, read.report)

    def predict_proba(
        self, data: AnnData, config: Mapping[str, Any] | None = None, *, context: Context | AnnData = "own"
    ) -> NDArray[np.float32]:
        """Calibrated probability of every class, [n, n_classes], columns as in ``classes_``."""
        return self._annotate(data, config, context)[0].proba

    def unknown_scores(self, data: AnnData, *, context: Context | AnnData = "own") -> NDArray[np.float32]:
        """How strange every cell is, [n], larger is stranger; DataError for a model saved before that was learned."""
        scores = self._annotate(data, None, context)[0].unknown_score
        if scores is None:
            raise DataError("this model was fitted before strangers could be told from known types; fit it again")
        return scores

    def score(self, data: AnnData, label_fields: Sequence[str] | None = None, *, context: Context | AnnData = "own") -> AnnotationScores:
        """Accuracy, macro-F1, precision, recall and per-class F1 on labelled cells.

        Labels not learned count as wrong, and so do refused cells and broader names where the model gives such.
        """
        key = label_fields[0] if label_fields else self.settings().keys.labels_key
        if key is None:
            raise ConfigError("no label column is named: pass label_fields=[...]")
        truth, labelled = known_labels(data, key)
        new = [label for label in truth[labelled] if label not in self._fitted().folder.classes]
        if new:
            names = ", ".join(sorted(set(new))[:5])
            log.warning("%d of %d cells have labels that were never learned and count as wrong: %s", len(new), labelled.sum(), names)
        answers = self._annotate(data, None, context)[0].labels[labelled]
        if refused := int((answers == UNKNOWN).sum()):
            log.warning("%d of %d labelled cells were answered unknown and count as wrong", refused, len(answers))
        return annotation_scores(truth[labelled], answers)

    def _annotate(self, data: AnnData, config: Mapping[str, Any] | None, context: Context | AnnData) -> tuple[Annotation, Read]:
        predictor = self._fitted()
        keys = self.settings(config).keys
        judgement = asked_judgement(predictor.judgement, self._since(config), predictor.folder.classes)
        company = predictor.company(context)
        read = read_cells(data, predictor.folder.vocabulary, query_keys(data, keys), predictor.folder.max_cells, context=company)
        return predictor.annotate(read.store, judgement), read

    @property
    def _votes(self) -> bool:
        return self._told.method == "neighbours"

    def _usable(self, table: CellTable) -> CellTable:
        """The labelled cells, and where they are wanted as company the others too; says how many have no label."""
        assert table.labels is not None
        known = np.flatnonzero(table.labels >= 0)
        if len(known) == table.n_cells:
            return table
        company = self._told.unlabelled == "company" and not self._votes
        told = "and are read as company of the others (transductive)" if company else "and are left out"
        missing, key = table.n_cells - len(known), self._told.keys.labels_key
        log.warning("%d of %d cells have no label in obs[%r] %s", missing, table.n_cells, key, told)
        return table if company else table.rows(known)

    def _split(self, table: CellTable) -> Split:
        """Training and validation cells, each with sentences of their own; cells without a label are with the training cells.

        DataError when nobody is left to validate with.
        """
        assert table.labels is not None
        known = np.flatnonzero(table.labels >= 0)
        _, held_out = self._validation(table.rows(known))
        if len(held_out) == 0:
            raise DataError(
                f"a validation_share of {self._told.validation_share} holds out none of {len(known)} labelled cells, but some must "
                "choose the best step; raise it, or label more cells of each type"
            )
        validation = table.rows(known[held_out])
        training = table.rows(np.setdiff1d(np.arange(table.n_cells), known[held_out]))
        most, config = self._told.max_cells, self._told.model if self.base is None else self.base.config
        if not config.reads_places or table.coordinates is None:
            return with_some_label(memory_store(training, most)), memory_store(validation, most)
        learned = with_some_label(near_store(training, most))
        if self._told.transfer.learn == "head" or most < 2:  # a probe reads plain sentences
            return learned, near_store(validation, most)
        return learned, store_beside(validation, training, most)[0]  # as dense as the tissue that will be asked about

    def _validation(self, table: CellTable) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows of labelled cells to learn from, and to validate with."""
        assert table.labels is not None
        share, seed = self._told.validation_share, self._told.seed
        if self._told.validation == "random":
            return stratified_split(table.labels, share, seed)
        nowhere = np.full((table.n_cells, 2), np.nan, dtype=np.float32)
        return block_validation(nowhere if table.coordinates is None else table.coordinates, table.batch, table.labels, share, seed)

    def _begun(self, start: ModelFolder | None, table: CellTable, sizes: tuple[int, int]) -> CellPLM:
        """The network as training finds it; ``sizes`` = (genes, classes)."""
        network = self._network(start, *sizes)
        if start is None and self._told.gene_start == "components":
            begin_at_components(network, table, self._told.components, self._told.seed)
        return network

    def _member(
        self, number: int, start: ModelFolder | None, cells: tuple[CellTable, Split | None], sizes: tuple[int, int]
    ) -> dict[str, torch.Tensor]:
        """Weights of another network of this recipe, from another seed and with validation cells of its own, or the common split.

        It is not resumable.
        """
        seed = keyed_seed(self._told.seed, "member", number) % 2**31
        other = CellTypeAnnotationPipeline(start, self._told.model_copy(update={"seed": seed}))
        table, common = cells
        stores = other._split(table) if common is None else common
        network = other._begun(start, stores[0].table, sizes)
        best = other._learn(network, stores, Course())
        return {**network.cpu().state_dict(), **best.weights}

    def _network(self, start: ModelFolder | None, n_genes: int, n_classes: int) -> CellPLM:
        if self._votes:
            return voting_network(start)
        config = self._told.model if start is None else start.config
        config = replace(config, latent="ae", decoder="none", n_genes=n_genes, n_classes=n_classes, n_batches=0, n_datasets=0)
        network = new_model(replace(config, head_dropout=self._told.head_dropout), self._told.seed)
        if start is not None:
            take_over(network, start, TRANSFERRED)
        return network

    def _learn(self, network: CellPLM, stores: Split, course: Course) -> Best:
        config, (training, validation) = self._told, stores
        plan = StepPlan(training.sizes, PlanConfig(seed=config.seed, cells_per_micro_batch=config.max_cells, micro_batches_per_step=1))
        if config.transfer.learn == "head":
            return self._probe(network, stores, plan, course)
        objective = MaskedObjective(training, config.masking, sentence_weights=labelled_cells(training))
        seen = ValidationCells(network, labelled(validation))
        return finetune(network, objective, plan, config, seen, course)

    def _probe(self, network: CellPLM, stores: Split, plan: StepPlan, course: Course) -> Best:
        """Only the projection and the head, on what the frozen encoder says of the cells."""
        whole = [store for store in stores if isinstance(store, MemoryStore)]  # both, see `_split`
        training, validation = map(without_counts, whole)
        probe = Probe(network, stacked(network, whole, device_named(self._told.device)))
        batch = shifted(labelled(validation), training.table.n_cells)
        everything = self._told.model_copy(update={"transfer": TransferConfig()})
        return finetune(probe, ProbeObjective(training), plan, everything, ValidationCells(probe, batch), course)

    def _lineage(self, best: Best, stores: Split, report: Mapping[str, Any]) -> dict[str, str]:
        learned = [with_labels(stores[0]).table.n_cells, stores[1].table.n_cells]
        company = stores[0].table.n_cells - learned[0]
        return {
            **({"mode": f"transductive: {company} cells without a label in the training sentences"} if company else {}),
            "base_model": base_name(self.base),
            "labels_key": str(self._told.keys.labels_key),
            "training_cells": str(sum(learned)),
            "counts": str(report.get("count_source", "")),
            "config_sha256": fingerprint(self._told),
            "best_step": str(best.step),
            "keys": self._told.keys.model_dump_json(),
        }


def untrained(network: nn.Module) -> Best:
    """What training would leave, where there is none."""
    return Best({name: tensor.detach() for name, tensor in network.state_dict().items()}, 0, (), [], 0)


class ValidationCells:
    """A look at labelled cells that are not trained on: macro-F1, and the loss among equals."""

    def __init__(self, network: nn.Module, batch: CellBatch) -> None:
        assert batch.labels is not None
        self.network, self.batch = network, batch
        self.known = batch.labels >= 0  # not those that are only there as company
        self.truth = batch.labels[self.known].numpy().astype(str)

    def __call__(self) -> Look:
        """What the network says of them as it is now."""
        with torch.inference_mode():
            output = self.network(self.batch.to(next(self.network.parameters()).device))
        scores = annotation_scores(self.truth, output.logits.argmax(-1).cpu()[self.known].numpy().astype(str))
        loss = float(output.loss.total.mean())
        metrics = {"val/loss": loss, "val/macro_f1": scores["macro_f1"], "val/accuracy": scores["accuracy"]}
        return Look(metrics, (round(scores["macro_f1"], 6), -loss))


def labelled(store: Store) -> CellBatch:
    """All sentences of a store; read-only cells have no label."""
    batch = store.read(range(len(store.sizes)))
    if batch.labels is not None:
        return batch
    assert store.table.labels is not None
    row = batch.row
    return replace(batch, labels=torch.where(row == READ_ONLY, -1, torch.from_numpy(store.table.labels)[row.clamp(min=0)]))


def labelled_cells(store: MemoryStore) -> NDArray[np.float64]:
    """How many cells of every sentence have a label, [S]."""
    assert store.table.labels is not None
    return np.array([float((store.table.labels[rows] >= 0).sum()) for rows in store.sentences])


def with_some_label(store: MemoryStore) -> MemoryStore:
    """The store without sentences that have no labelled cell, which teach nothing, and without their cells."""
    kept = [rows for rows, known in zip(store.sentences, labelled_cells(store), strict=True) if known]
    return only(store, np.sort(np.concatenate(kept)))


def with_labels(store: MemoryStore) -> MemoryStore:
    """The store without cells that are only there as company."""
    assert store.table.labels is not None
    return only(store, np.flatnonzero(store.table.labels >= 0))


def only(store: MemoryStore, kept: NDArray[np.int64]) -> MemoryStore:
    """The store with these of its cells alone, in their sentences; itself where they are all."""
    if len(kept) == store.table.n_cells:
        return store
    place = np.full(store.table.n_cells, -1)
    place[kept] = np.arange(len(kept))
    sentences = [place[rows][place[rows] >= 0] for rows in store.sentences]
    return MemoryStore(store.table.rows(kept), [rows for rows in sentences if len(rows)])


def warn_of_left_out(report: Mapping[str, Any], base: ModelFolder | None) -> None:
    """Says so where a base model's genes carry less than half of the counts, and the others are left out."""
    share = report.get("count_share")
    if base is not None and share is not None and share < HALF:
        log.warning(
            "the base model's genes carry %.0f %% of the counts; the others are left out: new_genes add lets a fit learn them", 100 * share
        )


def label_classes(labels: NDArray[np.object_], key: str) -> tuple[str, ...]:
    """The sorted cell types of a column, unlabelled cells aside; DataError for fewer than two."""
    classes = tuple(sorted({label for label in labels if label is not None and label not in UNLABELLED}))
    if len(classes) < 2:
        raise DataError(f"obs[{key!r}] has {len(classes)} cell types ({', '.join(classes)}); at least two are needed to learn from")
    return classes


def counted_cells(table: CellTable) -> CellTable:
    """The cells that show counts in genes the model knows; DataError when none does."""
    counted = np.flatnonzero(table.totals() > 0)
    if len(counted) == 0:
        raise DataError(f"none of {table.n_cells} labelled cells has counts in genes the model knows: there is nothing to learn from")
    if empty := table.n_cells - len(counted):
        log.warning("%d of %d labelled cells have no counts in genes the model knows and are left out", empty, table.n_cells)
        return table.rows(counted)
    return table


def label_type(labels: Any, key: str) -> str:
    """What the labels of a column are: int, float, bool, or str for all else; DataError when they are of several types."""
    distinct = pd.unique(pd.Series(labels).dropna().astype(object))
    known = [label.item() if isinstance(label, np.generic) else label for label in distinct if label not in UNLABELLED]
    kinds = sorted({type(label).__name__ for label in known})
    if len(kinds) > 1:
        raise DataError(
            f"obs[{key!r}] holds labels of several types ({', '.join(kinds)}): 1 and '1' would be one class; make them one type"
        )
    return kinds[0] if kinds and kinds[0] in LABEL_TYPES else "str"
