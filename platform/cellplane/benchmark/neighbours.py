"""Does a pre-trained model learn what neighbours do? Simulated tissue, where the answer is known.

Senders switch on a receptor programme around them. Three small models are pre-trained on the same cells: with their
neighbours, each cell alone, and with the coordinates of each field of view shuffled. In fields they never saw, half of
the cells hide the whole programme. Does the predicted rate follow what the neighbours did (correlation of logarithms,
within a type and field)? And which share is saved of the nats between the cells alone and the truth (1 = as good as
knowing all rates)?
"""

# C cells, G genes

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cellplane.benchmark.report import Figure, at_least, at_most
from cellplane.cells import CellBatch
from cellplane.config import load_config
from cellplane.data.config import SimulateConfig
from cellplane.data.sentences import CellTable, MemoryStore, StepPlan
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData
from cellplane.model.cellplm import CellPLM, new_model
from cellplane.model.masking import Mask, mask_of
from cellplane.pipelines.pretraining import network_means
from cellplane.seeds import keyed_seed
from cellplane.train.baselines import Predict, hidden_nb
from cellplane.train.config import PretrainConfig
from cellplane.train.engine import TorchEngine
from cellplane.train.loop import train
from cellplane.train.objective import MaskedObjective
from cellplane.train.validation import evaluating, held_out, training_weights

log = logging.getLogger(__name__)

ALONE, WITH, SHUFFLED = "alone", "with neighbours", "shuffled"
LEAST_WITH, MOST_WITHOUT = 0.5, 0.15  # correlations that count as recovered, and as lost


@dataclass(frozen=True)
class Answer:
    """How far a model's predictions follow the truth, its nats for the hidden programme, and those of the true rates."""

    correlation: float
    nats: float
    nats_of_truth: float

    def share(self, alone: Answer) -> float:
        """How much of the way from the cells alone to the truth is gone."""
        return (alone.nats - self.nats) / (alone.nats - self.nats_of_truth)


@dataclass(frozen=True)
class NeighboursBenchmark:
    """What to train on: cells of the tissue, and how often, each time another tissue and another network."""

    cells: int | None = None
    rounds: int = 3
    threads: int = 1
    steps: int | None = None

    def run(self) -> Iterator[Figure]:
        """Every figure of every tissue, then the gates on their worst."""
        torch.set_num_threads(self.threads)
        found: dict[str, list[Figure]] = {}
        for seed in range(self.rounds):
            tissue = Tissue(self.simulation(seed), self.recipe(seed))
            answers = {company: tissue.answer(company) for company in (ALONE, WITH, SHUFFLED)}
            for company, answer in answers.items():
                share = Figure(f"seed {seed}, {company}: share of the nats", answer.share(answers[ALONE]), "")
                for figure in (Figure(f"seed {seed}, {company}: correlation", answer.correlation, ""), share):
                    yield figure
                    found.setdefault(figure.name.partition(", ")[2], []).append(figure)
        yield from _gates({name: [float(figure.value or 0.0) for figure in figures] for name, figures in found.items()})

    def simulation(self, seed: int) -> SimulateConfig:
        """configs/simulate/tissue.yaml with this seed."""
        shipped = load_config(SimulateConfig, "tissue", "simulate", [f"seed={seed}"])
        return shipped if self.cells is None else shipped.model_copy(update={"n_cells": self.cells})

    def recipe(self, seed: int) -> PretrainConfig:
        """configs/pretrain/tissue.yaml with this seed."""
        overrides = [f"plan.seed={seed}", *([] if self.steps is None else [f"optimizer.steps={self.steps}"])]
        return load_config(PretrainConfig, "tissue", "pretrain", overrides)


def _gates(found: dict[str, list[float]]) -> Iterator[Figure]:
    """The response is recovered in every tissue with neighbours, lost in every one without, and knowing it saves nats."""
    followed, saved, chance = found[f"{WITH}: correlation"], found[f"{WITH}: share of the nats"], found[f"{SHUFFLED}: share of the nats"]
    yield at_least(f"{WITH}: correlation, worst", min(followed), LEAST_WITH, "").because(_spread(followed))
    for name in (f"{ALONE}: correlation", f"{SHUFFLED}: correlation"):
        yield at_most(f"{name}, worst", max(found[name]), MOST_WITHOUT, "").because(_spread(found[name]))
    more = [with_them - without for with_them, without in zip(saved, chance, strict=True)]
    yield at_least(f"{WITH}: share of the nats beyond {SHUFFLED}, worst", min(more), 0.0, "").because(_spread(more))
    for name, shares in ((WITH, saved), (SHUFFLED, chance)):
        yield Figure(f"{name}: share of the nats, mean", float(np.mean(shares)), "", note=_spread(shares))


def _spread(values: list[float]) -> str:
    return f"mean {np.mean(values):.3f}, sd {np.std(values):.3f}, {len(values)} tissues"


@dataclass(frozen=True)
class Tissue:
    """One simulated tissue and the recipe of the models that are trained on it."""

    simulation: SimulateConfig
    recipe: PretrainConfig

    @cached_property
    def cells(self) -> AnnData:
        """The cells with their truth."""
        return simulate(self.simulation)

    @cached_property
    def fields(self) -> NDArray[np.int64]:
        """Field of view of every cell, [C]."""
        return np.asarray(self.cells.obs["field_of_view"], dtype=np.int64)

    @cached_property
    def unseen(self) -> NDArray[np.int64]:
        """The fields that training never sees."""
        names = np.unique(self.fields)
        unseen: NDArray[np.int64] = names[
            held_out(np.zeros(len(names), dtype=np.int64), self.recipe.validation.share, self.recipe.plan.seed)
        ]
        return unseen

    def store(self, company: str) -> MemoryStore:
        """The cells as sentences: fields of view, single cells, or fields whose cells have changed places."""
        table, rows = _table(self.cells), np.arange(len(self.fields))
        if company == "alone":
            return MemoryStore(table, [rows[row : row + 1] for row in rows])
        sentences = [rows[self.fields == name] for name in np.unique(self.fields)]
        if company == "shuffled":
            rng, places = np.random.default_rng(keyed_seed(self.recipe.plan.seed, "places")), rows.copy()
            for members in sentences:
                places[members] = rng.permutation(members)
            assert table.coordinates is not None
            table = replace(table, coordinates=table.coordinates[places])
        return MemoryStore(table, sentences)

    def trained(self, store: MemoryStore) -> CellPLM:
        """A network pre-trained on all sentences but those of unseen fields."""
        recipe = self.recipe
        held = np.array([self.fields[rows[0]] in self.unseen for rows in store.sentences])
        network = new_model(replace(recipe.model, n_genes=self.cells.n_vars), recipe.plan.seed)
        plan = StepPlan(store.sizes, recipe.plan, training_weights(held, None))
        train(TorchEngine(network, recipe.optimizer), MaskedObjective(store, recipe.masking), plan, range(recipe.optimizer.steps))
        return network

    def answer(self, company: str) -> Answer:
        """What a model that was trained in this company makes of the hidden programme."""
        store = self.store(company)
        network = self.trained(store)
        log.info("trained %s, seed %d", company, self.recipe.plan.seed)
        batch, mask, scored = self.question(store)
        with evaluating(network):
            predict = network_means(network, batch, mask)
            rates = predict(torch.arange(batch.n_cells))[0].double().numpy()
        row, asked = batch.row.numpy(), (scored.hidden_C > 0).numpy()
        predicted = np.log(rates[:, self.programme].sum(1) / rates[:, ~self.programme].sum(1))
        correlation = _within(predicted[asked], np.log(self.response()[row][asked]), self.groups()[row][asked])
        nats, nats_of_truth = (float(hidden_nb(batch, scored, one).visible_total.sum()) for one in (predict, self.truth(batch)))
        return Answer(correlation, nats, nats_of_truth)

    @cached_property
    def programme(self) -> NDArray[np.bool_]:
        """The genes that answer the ligand, [G]."""
        return np.asarray(self.cells.var["is_programme"], dtype=np.bool_)

    def question(self, store: MemoryStore) -> tuple[CellBatch, Mask, Mask]:
        """The cells of unseen fields, what half of them hide, and the programme alone, which is scored: alike in any company.

        A cell that is asked hides all of its programme, and of the other genes as many as in training: a network that is
        asked with far fewer genes hidden than it was trained with finds the response, but too small a one.
        """
        batch = store.read([index for index, rows in enumerate(store.sentences) if self.fields[rows[0]] in self.unseen])
        rng = np.random.default_rng(keyed_seed(self.recipe.plan.seed, "asked"))
        asked = (rng.random(len(self.fields)) < 0.5)[batch.row.numpy(), None]
        others = (rng.random((len(self.fields), self.cells.n_vars)) < self.recipe.masking.gene_mask_rate)[batch.row.numpy()]
        hidden, scored = (torch.from_numpy(asked & genes) for genes in (others | self.programme, self.programme))
        return batch, mask_of(batch, hidden), mask_of(batch, scored)

    def response(self) -> NDArray[np.float64]:
        """What the neighbours multiply each cell's programme by, [C]."""
        return 1.0 + self.simulation.niche.strength * np.asarray(self.cells.obs["signal"], dtype=np.float64)

    def groups(self) -> NDArray[np.int64]:
        """Type and field of every cell as one number, [C]."""
        types: NDArray[np.int64] = self.cells.obs["cell_type"].cat.codes.to_numpy().astype(np.int64)
        return types * int(self.fields.max() + 1) + self.fields

    def truth(self, batch: CellBatch) -> Predict:
        """The rates that the counts were drawn from."""
        means = torch.from_numpy(np.asarray(self.cells.layers["true_rate"])[batch.row.numpy()])
        theta = torch.full((self.cells.n_vars,), self.simulation.dispersion)
        return lambda cells: (means[cells], theta)


def _table(cells: AnnData) -> CellTable:
    counts: Any = cells.X.tocsr()
    return CellTable(
        counts.indptr.astype(np.int64),
        counts.indices.astype(np.int64),
        counts.data.astype(np.float32),
        np.ones(cells.n_vars, dtype=np.bool_),
        coordinates=np.asarray(cells.obsm["spatial"], dtype=np.float32),
    )


def _group_means(values: NDArray[np.float64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """The mean of each one's group, [n]."""
    number = np.bincount(groups)
    means: NDArray[np.float64] = (np.bincount(groups, values) / np.maximum(number, 1))[groups]
    return means


def _within(x: NDArray[np.float64], y: NDArray[np.float64], groups: NDArray[np.int64]) -> float:
    """Pearson correlation of what remains when each group's mean is taken off."""
    x, y = x - _group_means(x, groups), y - _group_means(y, groups)
    return float((x * y).sum() / max(np.sqrt((x * x).sum() * (y * y).sum()), 1e-12))
