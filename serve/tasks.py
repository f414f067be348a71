"""What a model can be asked over the wire, and how an answer is put in columns.

A task has two halves: what the network computes of many requests at once, and how one request's rows are worded by
its own options. The first never depends on the second, so requests with different options share a forward. What is told
of a whole request at once (imputed genes, perturbed populations) is computed for it alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellplane.artifact.folder import ModelFolder
from cellplane.artifact.judgement import UNKNOWN
from cellplane.cells import CellBatch
from cellplane.data.company import SharedStore, near_store, self_store, store_with_panel
from cellplane.data.sentences import MemoryStore, SentenceStore
from cellplane.errors import ConfigError
from cellplane.inference import RATES_PER, BatchedStore, Predictor, batches_of, decoded_in, keys_of
from cellplane.pipelines import imputation_answer, perturbation_answer

from . import imputing, perturbing
from .codec import Align, Cells
from .imputing import Imputation
from .limits import BATCH_JOB, refuse
from .options import DTYPES, Options
from .perturbing import Perturbation

Columns = dict[str, NDArray[Any]]
About = dict[str, Any]
Store = MemoryStore | SharedStore
Kept = imputation_answer.Fitted | perturbation_answer.Fitted
LISTS_KEPT = 8  # of 20,000 names a few megabytes each; callers of one atlas send the same one for days
FITTED: dict[str, Callable[[ModelFolder], Kept]] = {
    "impute": imputation_answer.fitted_from,
    "perturb": perturbation_answer.fitted_from,
}


@dataclass(frozen=True)
class Question:
    """One request: a task, its cells, its options."""

    task: str
    cells: Cells
    options: Options = field(default_factory=Options)


@dataclass(frozen=True)
class Loaded:
    """A model as a replica holds it: its predictor, and what its task keeps beside the network."""

    predictor: Predictor
    kept: Kept | None

    @classmethod
    def of(cls, predictor: Predictor) -> Loaded:
        """The model, what it keeps read once; FileFormatError when that is broken."""
        return cls(predictor, FITTED[predictor.task](predictor.folder) if predictor.task in FITTED else None)

    @cached_property
    def align(self) -> Align:
        """Where genes of a request stand in the vocabulary, each list that is sent again found once. Raises VocabularyError."""
        return lru_cache(LISTS_KEPT)(self.predictor.folder.vocabulary.align)

    @property
    def imputation(self) -> imputation_answer.Fitted:
        """What an imputation keeps."""
        assert isinstance(self.kept, imputation_answer.Fitted)
        return self.kept

    @property
    def perturbation(self) -> perturbation_answer.Fitted:
        """What a perturbation keeps."""
        assert isinstance(self.kept, perturbation_answer.Fitted)
        return self.kept

    @property
    def max_cells(self) -> int:
        """Most of the caller's cells in one sentence."""
        return self.imputation.config.query_cells if self.predictor.task == "impute" else self.predictor.max_cells

    def describe(self) -> About:
        """What a caller can ask this model for by name."""
        task, known, other = self.predictor.task, keys_of(self.predictor.folder.lineage), None
        imputed, perturbations = list[str](), list[str]()
        control: About = {"perturbation_key": None, "control": None}
        if task == "impute":
            known, imputed = self.imputation.config.keys, self.imputation.names.call(self.imputation.wanted)
            other = self.imputation.config.reference_keys
        elif task == "perturb":
            config, perturbations = self.perturbation.config, list(self.perturbation.names)
            known, control = config.keys, {"perturbation_key": config.perturbation_key, "control": config.control}
        panel = self.predictor.panel
        company = {"panel_cells": 0 if panel is None else panel.n_cells, "panel_origin": None if panel is None else panel.origin}
        named = {"imputed_genes": imputed, "perturbations": perturbations, "batches": list(batches_of(self.predictor.folder))}
        read = {"keys": known, "reference_keys": other}
        keys = {name: None if one is None else one.model_dump(mode="json") for name, one in read.items()}
        return {"max_cells": self.max_cells, "reads_places": self.predictor.reads_places, **company, **named, **control, **keys}


@dataclass(frozen=True)
class Computation:
    """What requests must have in common to share a forward; ``own`` work is of one request and never shared."""

    task: str
    batches: tuple[int, ...] | None = None  # decoded in; None: each cell in its own
    own: Imputation | Perturbation | None = None


@dataclass(frozen=True)
class Prepared:
    """A request ready to be computed: its cells, the work, whose rows are answered (None: everybody's), who reads whom."""

    store: Store
    computation: Computation
    rows: NDArray[np.int64] | None = None
    context: About = field(default_factory=dict)


@dataclass(frozen=True)
class CellsOfBatches(MemoryStore):
    """Cells that know their batch: ``batch_index`` [n] positions in the decoder's table, -1 = unseen."""

    batch_index: NDArray[np.int64]

    def read(self, sentences: Any) -> CellBatch:
        """See SentenceStore."""
        batch = super().read(sentences)
        index = self.batch_index[batch.row.numpy()]
        return replace(batch, batch_index=batch.row.new_tensor(index.tolist()))


def prepare(loaded: Loaded, store: MemoryStore, question: Question, max_bytes: int) -> Prepared:
    """The cells as the task reads them, and what must be computed for an answer of at most ``max_bytes``.

    ServiceError 413 for too large an answer, 422 for options the model cannot follow; DataError for cells it cannot answer about.
    """
    return PREPARED.get(question.task, _prepare_plain)(loaded, store, question, max_bytes)


def _prepare_plain(loaded: Loaded, store: MemoryStore, question: Question, max_bytes: int) -> Prepared:  # noqa: ARG001  (same call)
    given = question.cells.sentence is not None
    company: Store = store
    policy = "sentences of the request" if given else "request, by batch"
    if not given and loaded.predictor.reads_places and not isinstance(store, CellsOfBatches):
        company = near_store(store.table, loaded.max_cells)
    if question.options.context == "self":
        company, policy = self_store(store.table, 1), "every cell alone"
    elif question.options.context == "panel":
        predictor = loaded.predictor
        sentences = store.sentences if given else None
        company, _ = store_with_panel(store.table, predictor.panel_table, predictor.max_cells, sentences)
        policy += ", with the model's reference panel in every sentence"
    said = {"policy": policy, "choice": question.options.context, "sentences": len(company.sentences)}
    return Prepared(company, Computation(question.task), context=said)


def _prepare_denoising(loaded: Loaded, store: MemoryStore, question: Question, max_bytes: int) -> Prepared:
    folder = loaded.predictor.folder
    if store.table.n_cells * len(folder.vocabulary) * 4 > max_bytes:
        raise refuse(413, f"{store.table.n_cells} cells of {len(folder.vocabulary)} rates exceed {max_bytes} bytes; {BATCH_JOB}")
    names = {name: place for place, name in enumerate(batches_of(folder))}
    own = [names.get(str(name), -1) for name in store.table.batch] if store.table.batch is not None else [-1] * store.table.n_cells
    known = CellsOfBatches(store.table, store.sentences, np.array(own, dtype=np.int64))
    try:
        batches = decoded_in(folder, BatchedStore(store, known.batch_index), question.options.target_batch)
    except ConfigError as error:
        raise refuse(422, str(error)) from error
    return replace(_prepare_plain(loaded, known, question, max_bytes), computation=Computation(question.task, batches))


def _prepare_imputation(loaded: Loaded, store: MemoryStore, question: Question, max_bytes: int) -> Prepared:
    work = imputing.imputation_of(loaded.imputation, store, question.cells, _imputation_asked(question.options), max_bytes)
    return Prepared(store, Computation(question.task, own=work), work.rows, work.context)


def _imputation_asked(options: Options) -> imputing.Asked:
    return imputing.Asked(options.genes, options.reference, options.min_correlation)


def _prepare_perturbation(loaded: Loaded, store: MemoryStore, question: Question, max_bytes: int) -> Prepared:
    options = question.options
    asked = perturbing.Asked(options.perturbation, options.kind, options.by_group, options.fallback)
    work = perturbing.perturbation_of(loaded.perturbation, store, question.cells, asked, max_bytes)
    return Prepared(store, Computation(question.task, own=work), np.zeros(0, dtype=np.int64), work.context)


PREPARED: dict[str, Callable[[Loaded, MemoryStore, Question, int], Prepared]] = {
    "denoise": _prepare_denoising,
    "impute": _prepare_imputation,
    "perturb": _prepare_perturbation,
}


def compute(loaded: Loaded, computation: Computation, store: SentenceStore) -> Columns:
    """What the network says of every cell of the store, or of the one request whose own work it is."""
    if isinstance(computation.own, Imputation):
        return imputing.impute(loaded.predictor.model, loaded.imputation, computation.own)
    if isinstance(computation.own, Perturbation):
        return perturbing.perturb(loaded.predictor.model, loaded.perturbation, computation.own)
    return COMPUTED[computation.task](loaded.predictor, store, computation)


def _annotate(predictor: Predictor, store: SentenceStore, _: Computation) -> Columns:
    answer = predictor.annotate(store)
    strange = 1 - answer.confidence if answer.unknown_score is None else answer.unknown_score  # models of earlier versions have none
    return {"cell_type": answer.labels, "confidence": answer.confidence, "unknown_score": strange, "proba": answer.proba}


def _embed(predictor: Predictor, store: SentenceStore, _: Computation) -> Columns:
    return {"embedding": predictor.embed(store)}


def _denoise(predictor: Predictor, store: SentenceStore, computation: Computation) -> Columns:
    rates = np.zeros((int(store.sizes.sum()), len(predictor.vocabulary)), dtype=np.float32)
    for rows, shares in predictor.rates(store, computation.batches):
        rates[rows] = RATES_PER * shares
    return {"rate": rates}


COMPUTED: dict[str, Callable[[Predictor, SentenceStore, Computation], Columns]] = {
    "annotate": _annotate,
    "embed": _embed,
    "denoise": _denoise,
}


def worded(loaded: Loaded, prepared: Prepared, question: Question, columns: Columns) -> tuple[Columns, About]:
    """One request's rows as it asked for them, and what the answer says about its columns."""
    own = prepared.computation.own
    if isinstance(own, Imputation):
        return columns, imputing.told(loaded.imputation, own, _imputation_asked(question.options))
    if isinstance(own, Perturbation):
        return columns, perturbing.told(loaded.perturbation)
    return WORDED[question.task](loaded, prepared.store, question, columns)


def _word_annotation(loaded: Loaded, _: Store, question: Question, columns: Columns) -> tuple[Columns, About]:
    options, classes = question.options, loaded.predictor.folder.classes
    told = {"classes": list(classes), "unknown_rule": loaded.predictor.judgement.rule is not None}
    unsure = columns["confidence"] < options.threshold
    answer = {**columns, "cell_type": np.where(unsure, UNKNOWN, columns["cell_type"]).astype(object)}
    if options.top_k is None:
        return answer, told
    best = np.argsort(-answer.pop("proba"), axis=1, kind="stable")[:, : options.top_k]
    names = np.array(classes, dtype=object)[best]
    return {**answer, "top_cell_type": names, "top_proba": np.take_along_axis(columns["proba"], best, axis=1)}, told


def _word_embedding(_: Loaded, __: Store, question: Question, columns: Columns) -> tuple[Columns, About]:
    return {"embedding": columns["embedding"].astype(DTYPES[question.options.dtype])}, {}


def _word_denoised(loaded: Loaded, store: Store, question: Question, columns: Columns) -> tuple[Columns, About]:
    places = loaded.align(tuple(question.cells.gene_ids)).positions
    known = [(gene, place) for gene, place in zip(question.cells.gene_ids, places.tolist(), strict=True) if place >= 0]
    rates = np.ascontiguousarray(columns["rate"][:, [place for _, place in known]])
    totals = store.table.totals().astype(np.float32)
    return {"rate": rates, "size_factor": totals}, {"rate_genes": [gene for gene, _ in known], "rates_per": RATES_PER}


WORDED: dict[str, Callable[[Loaded, Store, Question, Columns], tuple[Columns, About]]] = {
    "annotate": _word_annotation,
    "embed": _word_embedding,
    "denoise": _word_denoised,
}
