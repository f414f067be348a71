"""Sentences that training never sees, and how well the network recovers what is hidden in them.

Which sentences are held out is a function of (sentences, seed) alone, and what is hidden in them of the sentence alone,
so every look of every run with the same masking asks for the same values. A look is shared out over the workers like a
training step; it draws from no generator that training uses and leaves the network as it found it.
"""

# S sentences

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from cellplane.cells import CellBatch
from cellplane.data.loader import ShardStore
from cellplane.data.sentences import MicroBatch, SentenceStore, StepPlan, deal
from cellplane.errors import ConfigError, DataError, TrainingError
from cellplane.model.config import MaskingConfig
from cellplane.model.masking import Mask, mask_genes
from cellplane.seeds import keyed_seed
from cellplane.train.baselines import DISPERSION_CELLS, RATE_CELLS, GeneMeans, Sample, hidden_nb
from cellplane.train.config import PretrainConfig, ValidationConfig

MASKS = "validation"  # keys what is hidden: the same for every seed, run and look


def held_out(groups: NDArray[np.int64], share: float, seed: int) -> NDArray[np.bool_]:
    """Which sentences training never sees, [n_sentences]: about ``share`` of them, from every data set where that can be.

    ``groups`` [n_sentences] is each one's data set. Each keeps a sentence to train on; one at least is held out. Raises
    DataError when there are not two sentences to share out.
    """
    held = np.zeros(len(groups), dtype=np.bool_)
    if share <= 0:
        return held
    if len(groups) < 2:
        raise DataError(
            f"{len(groups)} sentences cannot be shared out between training and validation; convert with a smaller max_cells, "
            "which makes more of them, or set validation.share=0"
        )
    rng = np.random.default_rng(keyed_seed(seed, "held out"))
    names, sizes = np.unique(groups, return_counts=True)
    wanted = min(max(1, round(share * len(groups))), len(groups) - 1)
    for name, count in zip(names, _dealt(sizes, wanted, rng), strict=True):
        held[rng.permutation(np.flatnonzero(groups == name))[:count]] = True
    return held


def _dealt(sizes: NDArray[np.int64], wanted: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """How many of each group are taken, ``wanted`` in all where groups may keep one: by size, those that would get none first."""
    room = sizes - 1 if sizes.max() > 1 else sizes  # where every group has one sentence, some groups are taken whole
    exact = wanted * sizes / sizes.sum()
    taken: NDArray[np.int64] = np.minimum(np.floor(exact).astype(np.int64), room)
    while taken.sum() < min(wanted, room.sum()):
        order = np.lexsort((rng.permutation(len(sizes)), taken - exact, taken > 0))
        taken[next(group for group in order if taken[group] < room[group])] += 1
    return taken


def training_weights(held: NDArray[np.bool_], weights: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
    """Weights for a StepPlan that never draws what is held out; ``weights`` [n_sentences] are those of `plan.weights`.

    Raises DataError when what remains has no weight.
    """
    if not held.any():
        return weights
    remaining = np.where(held, 0.0, 1.0 if weights is None else weights)
    if not remaining.any():
        raise DataError("every sentence with a weight above 0 is held out; lower validation.share, or give more data sets a weight")
    return remaining


@dataclass(frozen=True)
class Split:
    """The sentences of a store by what they are for; both ascending."""

    training: NDArray[np.int64]
    held_out: NDArray[np.int64]


def split_of(store: ShardStore, share: float, seed: int) -> Split:
    """What a run with this ``share`` and plan seed trained on and held out of these shards; see `held_out`."""
    datasets = np.array([row.dataset for row in store.manifest.sentences], dtype=np.int64)
    held = held_out(datasets, share, seed)
    return Split(np.flatnonzero(~held), np.flatnonzero(held))


def training_plan(config: PretrainConfig, store: ShardStore) -> StepPlan:
    """The plan of a run's steps: without what is held out, and as it always was where nothing is."""
    weights = store.draw_weights(config.plan.weights)
    if config.validation.share > 0:
        held = np.isin(np.arange(len(store.sizes)), split_of(store, config.validation.share, config.plan.seed).held_out)
        weights = training_weights(held, weights)
    return StepPlan(store.sizes, config.plan, weights)


def looked_at(store: SentenceStore, sentences: NDArray[np.int64], max_cells: int) -> NDArray[np.int64]:
    """Some of the ``sentences``, ascending: in an order of their own until ``max_cells`` are reached, one at least."""
    order = np.random.default_rng(keyed_seed(MASKS, "order", len(store.sizes))).permutation(np.sort(sentences))
    before = np.cumsum(store.sizes[order]) - store.sizes[order]
    chosen: NDArray[np.int64] = np.sort(order[(before == 0) | (before + store.sizes[order] <= max_cells)])
    return chosen


def micro_batches(store: SentenceStore, sentences: NDArray[np.int64], budget: int) -> list[MicroBatch]:
    """These sentences packed up to ``budget`` cells, keyed by nothing but themselves."""
    packed: list[list[int]] = []
    cells = budget + 1
    for sentence in sentences.tolist():
        size = int(store.sizes[sentence])
        if cells + size > budget:
            packed.append([])
            cells = 0
        packed[-1].append(sentence)
        cells += size
    return [MicroBatch(tuple(part), tuple(keyed_seed(MASKS, sentence) for sentence in part), 0) for part in packed]


def prepare(store: SentenceStore, micro_batch: MicroBatch, masking: MaskingConfig) -> tuple[CellBatch, Mask]:
    """Every cell of the sentences, none dropped and no panel narrowed, and what is hidden in them."""
    everything = replace(masking, drop_cell_rate=0.0, panel_rate=0.0)
    batch = micro_batch.read(store)
    return batch, mask_genes(batch, store.sizes[list(micro_batch.sentences)], everything)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """The network in evaluation and without gradients; afterwards every part of it is in the mode it was in."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass(frozen=True)
class Group:
    """The workers that look together; alone by default."""

    rank: int = 0
    world_size: int = 1

    def sum(self, values: Tensor) -> Tensor:
        """The values of all workers added up, on each of them; every worker must call it."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values


@dataclass(frozen=True)
class Validation:
    """Looks at the held-out sentences; the loop calls it on every worker, in the same order.

    ``network`` is the plain module, also inside DeepSpeed; ``budget`` the cells that go through it together.
    """

    network: nn.Module
    store: ShardStore
    split: Split
    masking: MaskingConfig
    config: ValidationConfig
    budget: int
    group: Group = field(default_factory=Group)

    def __post_init__(self) -> None:
        if self.masking.cell_mask_rate == 0:
            raise ConfigError("masking.cell_mask_rate is 0: nothing would be hidden, so there is nothing to validate")
        if len(self.split.held_out) == 0:
            raise DataError("no sentence is held out, so there is nothing to validate on; set validation.share above 0")

    @cached_property
    def batches(self) -> list[MicroBatch]:
        """What every look goes through."""
        return micro_batches(self.store, looked_at(self.store, self.split.held_out, self.config.max_cells), self.budget)

    def __call__(self, done: int) -> Mapping[str, float]:
        """val/loss, and val/nb: nats per hidden value (val/gaussian for that decoder), equal on every worker.

        val/loss is the training loss of a network that answers, so without latent terms. The first look of a run, and no
        other, adds val/nb_gene_mean: what each gene's mean rate in the training sentences reaches on the same values.
        Raises TrainingError when the loss is not finite.
        """
        with evaluating(self.network):
            loss, hidden, name, cells, values = self._sums()
        if not np.isfinite(loss):
            raise TrainingError(
                f"the validation loss is not finite after {done} steps; lower the learning rate. Older checkpoints are intact"
            )
        metrics = {"val/loss": loss / max(cells, 1.0), f"val/{name}": hidden / max(values, 1.0)}
        if name == "nb" and done <= self.config.every_steps:
            metrics["val/nb_gene_mean"] = self.gene_mean()
        return metrics

    def _sums(self) -> tuple[float, float, str, float, float]:
        """Loss and hidden likelihood over all workers, what the likelihood is called, and how many cells and values they are of."""
        sums, name = torch.zeros(4, dtype=torch.float64), ""
        device = next(self.network.parameters()).device
        for micro_batch, counted in self._own():
            batch, mask = prepare(self.store, micro_batch, self.masking)
            loss = self.network(batch.to(device), mask.to(device)).loss
            if loss is None:
                raise TrainingError("the network has no decoder, so nothing hidden can be recovered; pre-train one that has")
            scored = _scored(batch, mask)
            name = loss.names[1].removesuffix("_hidden")
            found = torch.stack([loss.total, loss.parts[1]]).double().cpu() @ scored
            sums += counted * torch.stack([*found, scored.sum(), mask.hidden_C.sum().double()])
        total, hidden, cells, values = self.group.sum(sums.to(device)).tolist()
        return total, hidden, name, cells, values

    def _own(self) -> Iterator[tuple[MicroBatch, bool]]:
        """This worker's micro-batches and whether they count: as many for each, since ZeRO 3 gathers weights together."""
        for micro_batch in deal(self.batches, self.group.rank, self.group.world_size):
            yield (self.batches[0], False) if micro_batch is None else (micro_batch, True)

    def gene_mean(self) -> float:
        """What each gene's mean rate, with its own dispersion, reaches: nats per hidden value, equal on every worker."""
        means = self._gene_means()
        sums = torch.zeros(2, dtype=torch.float64)
        for micro_batch, counted in self._own():
            if counted:
                batch, mask = prepare(self.store, micro_batch, self.masking)
                sums += torch.stack([hidden_nb(batch, mask, means.predict(batch)).own_total.sum(), mask.hidden_C.sum().double()])
        hidden, values = self.group.sum(sums.to(next(self.network.parameters()).device)).tolist()
        return float(hidden / max(values, 1.0))

    def _gene_means(self) -> GeneMeans:
        """Fitted to training sentences, the passes over them shared out over the workers."""
        device = next(self.network.parameters()).device
        many, few = (self._sample(cells) for cells in (RATE_CELLS, DISPERSION_CELLS))
        shape = self.store.n_datasets, len(self.store.vocabulary)
        return GeneMeans.fit(many, few, shape, reduce=lambda sums: self.group.sum(sums.to(device)).cpu())

    def _sample(self, cells: int) -> Sample:
        """This worker's part of some training sentences."""
        parts = micro_batches(self.store, looked_at(self.store, self.split.training, cells), self.budget)
        own = parts[self.group.rank :: self.group.world_size]
        return lambda: (part.read(self.store) for part in own)


def _scored(batch: CellBatch, mask: Mask) -> Tensor:
    """Cells of every sentence that hide something, [S] float64: what a mean over them weighs."""
    return torch.bincount(batch.sentence_of_cell()[mask.hidden_C > 0], minlength=batch.n_sentences).double()


def new_validation(config: PretrainConfig, store: ShardStore, network: nn.Module, group: Sequence[int] = (0, 1)) -> Validation | None:
    """The look of a run, or None where `validation.share` is 0; ``group`` is (rank, world size).

    Build it after the engine, from the engine's own module, and train with `training_plan`. Raises DataError when the
    shards have too few sentences to hold one out.
    """
    if config.validation.share <= 0:
        return None
    split = split_of(store, config.validation.share, config.plan.seed)
    budget = config.plan.cells_per_micro_batch
    return Validation(network, store, split, config.masking, config.validation, budget, Group(*group))
