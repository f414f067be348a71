"""What a model can be asked over the wire, the options of each task, and how an answer is put in columns.

A task has two halves: what the network computes of many requests at once, and how one request's rows are worded by
its own options. The first never depends on the second, so requests with different options share a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellplane.artifact.judgement import UNKNOWN
from cellplane.cells import CellBatch
from cellplane.data.sentences import MemoryStore, SentenceStore
from cellplane.errors import ConfigError
from cellplane.inference import RATES_PER, BatchedStore, Predictor, batches_of, decoded_in

from .codec import Cells
from .limits import refuse

Columns = dict[str, NDArray[Any]]
About = dict[str, Any]
Scalar = str | int | float | bool
DTYPES = {"float32": np.float32, "float16": np.float16}


@dataclass(frozen=True)
class Options:
    """How one request wants its answer; what a task does not take keeps its default."""

    threshold: float = 0.0
    top_k: int | None = None
    dtype: str = "float32"
    target_batch: str | None = None


@dataclass(frozen=True)
class Question:
    """One request: a task, its cells, its options."""

    task: str
    cells: Cells
    options: Options = field(default_factory=Options)


@dataclass(frozen=True)
class Computation:
    """What requests must have in common to share a forward."""

    task: str
    batches: tuple[int, ...] | None = None  # decoded in; None: each cell in its own


def read_options(task: str, given: Mapping[str, Scalar]) -> Options:
    """The options of a request, as they came in a URL or a body; ServiceError 404 for no such task, 422 for a wrong option."""
    if task not in OPTIONS:
        raise refuse(404, f"there is no task {task[:40]!r}; tasks are {', '.join(OPTIONS)}")
    readers, found = OPTIONS[task], {}
    for name, value in given.items():
        if name not in readers:
            raise refuse(422, f"{task} takes no parameter {name[:40]!r}; it takes {', '.join(readers) or 'none'}")
        try:
            found[name] = readers[name](value)
        except (TypeError, ValueError) as error:
            raise refuse(422, f"parameter {name!r}: {error}") from None
    return Options(**found)


def _share(value: Scalar) -> float:
    number = float(value)
    if isinstance(value, bool) or not 0 <= number <= 1:
        raise ValueError("expected a number from 0 to 1")
    return number


def _positive(value: Scalar) -> int:
    if isinstance(value, bool) or not str(value).isdecimal() or not int(str(value)[:9]) >= 1:
        raise ValueError("expected a whole number from 1")
    return int(str(value)[:9])


def _dtype(value: Scalar) -> str:
    if value not in DTYPES:
        raise ValueError(f"expected one of {', '.join(DTYPES)}")
    return str(value)


def _text(value: Scalar) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("expected a text")
    return value


OPTIONS: dict[str, dict[str, Callable[[Scalar], Any]]] = {
    "annotate": {"threshold": _share, "top_k": _positive},
    "embed": {"dtype": _dtype},
    "denoise": {"target_batch": _text},
}


@dataclass(frozen=True)
class CellsOfBatches(MemoryStore):
    """Cells that know their batch: ``batch_index`` [n] positions in the decoder's table, -1 = unseen."""

    batch_index: NDArray[np.int64]

    def read(self, sentences: Any) -> CellBatch:
        """See SentenceStore."""
        batch = super().read(sentences)
        index = self.batch_index[batch.row.numpy()]
        return replace(batch, batch_index=batch.row.new_tensor(index.tolist()))


def prepare(predictor: Predictor, store: MemoryStore, question: Question) -> tuple[MemoryStore, Computation]:
    """The cells as the task reads them, and what must be computed; ServiceError 422 for a batch that was not learned."""
    if question.task != "denoise":
        return store, Computation(question.task)
    names = {name: place for place, name in enumerate(batches_of(predictor.folder))}
    own = [names.get(str(name), -1) for name in store.table.batch] if store.table.batch is not None else [-1] * store.table.n_cells
    known = CellsOfBatches(store.table, store.sentences, np.array(own, dtype=np.int64))
    try:
        batches = decoded_in(predictor.folder, BatchedStore(store, known.batch_index), question.options.target_batch)
    except ConfigError as error:
        raise refuse(422, str(error)) from error
    return known, Computation(question.task, batches)


def compute(predictor: Predictor, computation: Computation, store: SentenceStore) -> Columns:
    """What the network says of every cell of the store."""
    return COMPUTED[computation.task](predictor, store, computation)


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


def worded(predictor: Predictor, store: MemoryStore, question: Question, columns: Columns) -> tuple[Columns, About]:
    """One request's rows as it asked for them, and what the answer says about its columns."""
    return WORDED[question.task](predictor, store, question, columns)


def _word_annotation(predictor: Predictor, _: MemoryStore, question: Question, columns: Columns) -> tuple[Columns, About]:
    options, classes = question.options, predictor.folder.classes
    unsure = columns["confidence"] < options.threshold
    answer = {**columns, "cell_type": np.where(unsure, UNKNOWN, columns["cell_type"]).astype(object)}
    if options.top_k is None:
        return answer, {"classes": list(classes)}
    best = np.argsort(-answer.pop("proba"), axis=1, kind="stable")[:, : options.top_k]
    names = np.array(classes, dtype=object)[best]
    return {**answer, "top_cell_type": names, "top_proba": np.take_along_axis(columns["proba"], best, axis=1)}, {"classes": list(classes)}


def _word_embedding(_: Predictor, __: MemoryStore, question: Question, columns: Columns) -> tuple[Columns, About]:
    return {"embedding": columns["embedding"].astype(DTYPES[question.options.dtype])}, {}


def _word_denoised(predictor: Predictor, store: MemoryStore, question: Question, columns: Columns) -> tuple[Columns, About]:
    places = predictor.vocabulary.align(question.cells.gene_ids).positions
    known = [(gene, place) for gene, place in zip(question.cells.gene_ids, places.tolist(), strict=True) if place >= 0]
    rates = np.ascontiguousarray(columns["rate"][:, [place for _, place in known]])
    totals = store.table.totals().astype(np.float32)
    return {"rate": rates, "size_factor": totals}, {"rate_genes": [gene for gene, _ in known], "rates_per": RATES_PER}


WORDED: dict[str, Callable[[Predictor, MemoryStore, Question, Columns], tuple[Columns, About]]] = {
    "annotate": _word_annotation,
    "embed": _word_embedding,
    "denoise": _word_denoised,
}
