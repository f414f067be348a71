"""How cells become sentences, and sentences become the micro-batches of a step.

A sentence is a set of cells of one sample that attend to one another. The micro-batch is the atom of training: which
sentences a step holds, in which order and with which seeds, is a function of (manifest, seed, epoch, step) alone. The
number of workers only deals micro-batches out, so one worker and many see the same global batches, and a resumed run
continues exactly: the whole state of a loader is the seed and the number of the step (SHARDS.md).
"""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from cellplane.cells import CellBatch
from cellplane.config import Config
from cellplane.data.columns import as_names
from cellplane.data.order import sentence_rows
from cellplane.errors import ConfigError, DataError
from cellplane.seeds import keyed_seed


class SentenceStore(Protocol):
    """Cells grouped into sentences, wherever they lie; a sentence is named by its position."""

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Cells of every sentence, [n_sentences]."""

    def read(self, sentences: Sequence[int]) -> CellBatch:
        """These sentences packed in the order asked for; `sentence_seed` is 0 throughout, for the caller to fill."""


def contexts(keys: Sequence[str] | None, n_cells: int, max_cells: int, seed: int = 0) -> list[NDArray[np.int64]]:
    """The rows of every sentence, each ascending: one key per sentence, at most ``max_cells`` cells.

    A longer key is shuffled by (seed, key) and split evenly, so that each part is a random sample of it. ``keys`` [n]
    names each cell's sample; None makes all cells one sample. The same input gives the same sentences, always.
    """
    if max_cells < 1:
        raise DataError(f"max_cells is {max_cells}; a sentence needs room for at least one cell")
    groups: dict[str, list[int]] = {}
    for row in range(n_cells):
        groups.setdefault("" if keys is None else str(keys[row]), []).append(row)
    sentences: list[NDArray[np.int64]] = []
    for key, members in groups.items():
        rows = np.asarray(members, dtype=np.int64)
        parts = -(-len(rows) // max_cells)
        if parts > 1:
            rows = np.random.default_rng(keyed_seed(seed, key)).permutation(rows)
        sentences.extend(np.sort(part) for part in np.array_split(rows, parts))
    return sentences


@dataclass(frozen=True)
class CellTable:
    """n cells in memory, columns already vocabulary positions.

    ``crow`` [n+1], ``gene`` [nnz], ``value`` [nnz] are CSR; ``panel`` [G] bool says which genes were measured;
    ``batch`` [n] str, ``coordinates`` [n, 2] micrometres and ``labels`` [n] (-1 = unlabelled) may be None, as may
    ``empty`` [n] bool: the cell had no counts at all, in whatever genes.
    """

    crow: NDArray[np.int64]
    gene: NDArray[np.int64]
    value: NDArray[np.float32]
    panel: NDArray[np.bool_]
    batch: NDArray[np.object_] | None = None
    coordinates: NDArray[np.float32] | None = None
    labels: NDArray[np.int64] | None = None
    empty: NDArray[np.bool_] | None = None

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.crow) - 1

    def totals(self) -> NDArray[np.float64]:
        """Counts of each cell in the vocabulary's genes, [n]."""
        cell = np.repeat(np.arange(self.n_cells), np.diff(self.crow))
        return np.bincount(cell, weights=self.value, minlength=self.n_cells).astype(np.float64, copy=False)

    def rows(self, rows: NDArray[np.int64]) -> CellTable:
        """These cells only, in this order."""
        lengths = np.diff(self.crow)[rows]
        crow = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        entry = np.arange(crow[-1]) - np.repeat(crow[:-1] - self.crow[:-1][rows], lengths)
        names = ("batch", "coordinates", "labels", "empty")
        optional = {name: column[rows] for name in names if (column := getattr(self, name)) is not None}
        return replace(self, crow=crow, gene=self.gene[entry], value=self.value[entry], **optional)


@dataclass(frozen=True)
class MemoryStore:
    """A SentenceStore over a CellTable; ``sentences`` holds the rows of each sentence."""

    table: CellTable
    sentences: Sequence[NDArray[np.int64]]

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Cells of every sentence."""
        return np.array([len(rows) for rows in self.sentences], dtype=np.int64)

    @cached_property
    def _panels(self) -> torch.Tensor:
        return torch.from_numpy(self.table.panel)[None, :]

    def read(self, sentences: Sequence[int]) -> CellBatch:
        """These sentences packed; ``row`` is each cell's row in the table."""
        wanted = [self.sentences[index] for index in sentences]
        rows = np.concatenate(wanted) if wanted else np.zeros(0, dtype=np.int64)
        part = self.table.rows(rows)
        cells = len(rows)
        unknown = torch.full((cells,), -1, dtype=torch.int64)
        coordinates = part.coordinates if part.coordinates is not None else np.full((cells, 2), np.nan, dtype=np.float32)
        return CellBatch(
            crow=torch.from_numpy(part.crow),
            gene=torch.from_numpy(part.gene),
            value=torch.from_numpy(part.value),
            panels=self._panels,
            panel_index=torch.zeros(cells, dtype=torch.int64),
            cu_seqlens=torch.tensor([0, *np.cumsum([len(rows) for rows in wanted])], dtype=torch.int64),
            sentence_seed=torch.zeros(len(wanted), dtype=torch.int64),
            batch_index=unknown,
            dataset_index=unknown.clone(),
            platform_index=unknown.clone(),
            coordinates=torch.from_numpy(coordinates),
            row=torch.from_numpy(rows),
            labels=None if part.labels is None else torch.from_numpy(part.labels),
        )


def memory_store(table: CellTable, max_cells: int) -> MemoryStore:
    """The table's cells as sentences of their own batch, at most ``max_cells`` each (see `contexts`)."""
    if max_cells < 1 or table.n_cells == 0:
        return MemoryStore(table, contexts(None, table.n_cells, max_cells))
    names = None if table.batch is None else as_names(table.batch)
    codes, texts = (None, ()) if names is None else (names.codes, names.names)
    rows, edges = sentence_rows(codes, texts, table.n_cells, max_cells, seed=0)
    return MemoryStore(table, np.split(rows, edges[1:-1]))


class SentenceWeights(Config):
    """Which sentences are drawn more often than others, by a column of the manifest."""

    column: Literal["dataset", "batch"]
    """What tells sentences apart: the data set or the sample they come from."""
    values: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    """Weight of the sentences of each name; a name that is not here weighs 1, and 0 leaves its sentences out."""


class PlanConfig(Config):
    """How sentences are packed into steps."""

    seed: int = 0
    """Keys the order of sentences, the masks and every other random choice."""
    cells_per_micro_batch: int = Field(2048, ge=1)
    """Sentences are packed until a micro-batch would exceed this many cells; a longer sentence stands alone."""
    micro_batches_per_step: int = Field(2, ge=1)
    """Micro-batches of one optimizer step, dealt round robin to the workers."""
    weights: SentenceWeights | None = None
    """Draws sentences by weight, e.g. {column: dataset, values: {rare: 4}}; None: every sentence once an epoch."""


def draw_weights(config: SentenceWeights, column: NDArray[np.int64], names: Sequence[str]) -> NDArray[np.float64]:
    """Weight of every sentence, [n_sentences], from each one's position in ``names`` (-1 = none); ConfigError for an unknown name."""
    for name in config.values:
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(names[:5])}"
            raise ConfigError(f"plan.weights: no {config.column} called {name!r}; {hint}")
    by_name = np.array([*(config.values.get(name, 1.0) for name in names), 1.0])  # the last one for -1
    weights: NDArray[np.float64] = by_name[column]
    return weights


@dataclass(frozen=True)
class MicroBatch:
    """Sentences that go through the network together, each with its seed; ``key`` seeds what concerns them all."""

    sentences: tuple[int, ...]
    seeds: tuple[int, ...]
    key: int

    def read(self, store: SentenceStore) -> CellBatch:
        """The packed cells, sentence seeds set."""
        batch = store.read(self.sentences)
        batch.sentence_seed.numpy()[:] = self.seeds  # a tensor of them would cost more than all else here
        return batch


class StepPlan:
    """The micro-batches of every step: every sentence once per epoch, in an order keyed by (seed, epoch).

    With ``weights`` [n_sentences] an epoch has as many draws as there are sentences of weight above 0, and each is drawn
    its share of them: rounded up or down in one epoch, exactly in the mean; equal weights draw every sentence once. A
    pure function of (sizes, weights, config, step): it has no state but caches, so any worker can ask for any step.
    Raises DataError without sentences or with weights that draw none, ConfigError when configured weights are not given.
    """

    def __init__(self, sizes: NDArray[np.int64], config: PlanConfig, weights: NDArray[np.float64] | None = None) -> None:
        if len(sizes) == 0:
            raise DataError("there are no sentences to train on; convert some cells first")
        if weights is None and config.weights is not None:
            raise ConfigError("plan.weights needs the columns of a manifest, and this data has none; leave it out, or train from shards")
        if weights is not None and (len(weights) != len(sizes) or not (np.isfinite(weights) & (weights >= 0)).all() or not weights.any()):
            raise DataError(f"{len(sizes)} sentences need as many weights, none negative and one above 0; found {weights!r}")
        self.sizes, self.config, self.weights = sizes, config, weights
        self._first_step = [0]  # first global step of every epoch seen so far
        self._cached: tuple[int, list[list[_Drawn]]] = (-1, [])

    def epoch_of(self, step: int) -> tuple[int, int]:
        """(epoch, first step of that epoch) of a global step, both counted from 0."""
        while self._first_step[-1] <= step:
            epoch = len(self._first_step) - 1
            self._first_step.append(self._first_step[-1] + len(self._epoch(epoch)))
        epoch = bisect.bisect_right(self._first_step, step) - 1
        return epoch, self._first_step[epoch]

    def at(self, step: int) -> list[MicroBatch]:
        """The micro-batches of this global step (0, 1, ...), in order."""
        epoch, first = self.epoch_of(step)
        return [
            MicroBatch(
                sentences=tuple(sentence for sentence, _ in drawn),
                seeds=tuple(self._sentence_seed(epoch, *one) for one in drawn),
                key=keyed_seed(self.config.seed, "micro_batch", step, index),
            )
            for index, drawn in enumerate(self._epoch(epoch)[step - first])
        ]

    def _sentence_seed(self, epoch: int, sentence: int, time: int) -> int:
        again = (time,) if time else ()  # drawn again in the same epoch, it is masked differently
        return keyed_seed(self.config.seed, "sentence", epoch, sentence, *again)

    def steps_of_epoch(self, epoch: int) -> int:
        """Number of steps in this epoch."""
        return len(self._epoch(epoch))

    def _epoch(self, epoch: int) -> list[list[_Drawn]]:
        if self._cached[0] != epoch:
            self._cached = (epoch, self._pack(epoch))
        return self._cached[1]

    def _pack(self, epoch: int) -> list[list[_Drawn]]:
        packed: list[_Drawn] = []
        current: list[tuple[int, int]] = []
        cells = 0
        for sentence, time in self._order(epoch):
            size = int(self.sizes[sentence])
            if current and cells + size > self.config.cells_per_micro_batch:
                packed.append(tuple(current))
                current, cells = [], 0
            current.append((sentence, time))
            cells += size
        packed.append(tuple(current))
        width = self.config.micro_batches_per_step
        return [packed[start : start + width] for start in range(0, len(packed), width)]

    def _order(self, epoch: int) -> Iterator[tuple[int, int]]:
        """(sentence, how often it was drawn in this epoch before) of every draw."""
        rng = np.random.default_rng(keyed_seed(self.config.seed, "epoch", epoch))
        if self.weights is None:
            yield from ((sentence, 0) for sentence in rng.permutation(len(self.sizes)).tolist())
            return
        before: dict[int, int] = {}
        for sentence in rng.permutation(_draws(self.weights, rng)).tolist():
            time = before.get(sentence, 0)
            before[sentence] = time + 1
            yield sentence, time


_Drawn = tuple[tuple[int, int], ...]  # of a micro-batch: (sentence, how often it was drawn in the epoch before)


def _draws(weights: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    """The sentences of one epoch, by systematic sampling: laid end to end, each as long as its share, and cut at every whole number."""
    order = rng.permutation(np.flatnonzero(weights))
    ends = np.cumsum(weights[order] / weights.max())
    ends = np.round(ends * (len(order) / ends[-1]), 9)  # so that equal shares end at whole numbers
    offset = float(rng.integers(1 << 20)) / (1 << 20)
    return np.repeat(order, np.diff(np.floor(ends + offset).astype(np.int64), prepend=0))


def deal(micro_batches: Sequence[MicroBatch], rank: int, world_size: int) -> list[MicroBatch | None]:
    """What rank runs: micro-batches i with i mod world_size = rank; None fills up, so that every rank runs equally many."""
    rounds = -(-len(micro_batches) // world_size)
    own = [micro_batches[index] for index in range(rank, len(micro_batches), world_size)]
    return [*own, *([None] * (rounds - len(own)))]
