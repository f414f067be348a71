"""How well a pre-trained model recovers hidden counts of sentences it never saw, in which company, and beside what.

Every method and every context is asked for the same values: those that the released masking hides, keyed by the
sentence alone. Two figures each, in nats per hidden value: `nb` tells every method the hidden counts' total, as the
training loss does; `nb_visible` tells it the visible counts only, as in use.
"""

# C cells

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from cellplane.artifact.folder import ModelFolder, load_model
from cellplane.cells import CellBatch
from cellplane.config import Config, home, to_plain
from cellplane.data.loader import ShardStore
from cellplane.data.remote import fetch_shards
from cellplane.errors import ConfigError, DataError, VocabularyError
from cellplane.inference import build_network
from cellplane.model.cellplm import CellPLM
from cellplane.model.config import MaskingConfig
from cellplane.model.masking import Mask
from cellplane.tracking.registry import resolve_model
from cellplane.train.baselines import DISPERSION_CELLS, RATE_CELLS, Column, GeneMeans, HiddenNB, Predict, Sample, hidden_nb
from cellplane.train.contexts import CONTEXTS, Gain, paired_gain
from cellplane.train.validation import Split, looked_at, micro_batches, prepare, split_of

GENE_MEANS: dict[str, Column] = {"gene_mean": "dataset_index", "gene_mean_by_sample": "batch_index"}  # two baselines
SHARE = 0.1  # held out of shards that the model was not trained on: the gene means are fitted to the rest
CELLS_TOGETHER = 4096  # the cells among which neighbours are shuffled


class PretrainingEvaluation(Config):
    """What to ask a pre-trained model."""

    model: str
    """Model folder, or models:/NAME@ALIAS."""
    shards: str
    """Folder or URL written by `cellplane data convert`, with the model's vocabulary."""
    contexts: tuple[str, ...] = tuple(CONTEXTS)
    """own, self, shuffled_coordinates, shuffled_neighbours; the first one is compared with everything else."""
    max_cells: int = Field(20_000, ge=1)
    """At most about so many held-out cells are looked at."""
    share: float = Field(SHARE, gt=0, lt=1)
    """Share of the sentences held out of shards that the model was not trained on; else the run's own share counts."""
    seed: int = 0
    """Chooses those sentences; else the run's own seed counts."""
    masking: MaskingConfig = MaskingConfig()
    """What is hidden; the released setting, whatever the model was trained with."""
    out: str | None = None
    """Folder of scores.json; None: $CELLPLANE_HOME/evaluations/, by model."""
    tracking_uri: str | None = None
    """MLflow server or database of the registry."""


def run_evaluate_pretraining(config: PretrainingEvaluation) -> dict[str, Any]:
    """Scores of the model by context and of the gene means, gains with confidence intervals, also by data set; writes scores.json.

    Raises ConfigError for an unknown context, VocabularyError for shards of other genes, DataError for a model that
    decodes no counts, or that was trained on every sentence of these shards.
    """
    if unknown := [name for name in config.contexts if name not in CONTEXTS]:
        raise ConfigError(f"no context {unknown[0]!r}; there are {', '.join(CONTEXTS)}")
    folder = load_model(resolve_model(config.model, config.tracking_uri, home() / "cache").path)
    store = ShardStore(fetch_shards(config.shards))
    found = evaluate_pretraining(folder, store, config)
    result = {
        "scores": found.scores(),
        "gains": {name: asdict(gain) for name, gain in found.gains().items()},
        "datasets": found.by_dataset(store),
        **found.size(),
    }
    out = Path(config.out) if config.out else home() / "evaluations" / f"{folder.model_sha256[:16]}-pretraining"
    out.mkdir(parents=True, exist_ok=True)
    (out / "scores.json").write_text(json.dumps({"config": to_plain(config), **result}, indent=1), encoding="utf-8")
    return {**result, "out": str(out)}


@dataclass(frozen=True)
class Recovered:
    """Nats of each cell's hidden counts by method, [n] each: ``nb`` and ``nb_visible``; ``values`` [n] hidden, ``dataset`` [n].

    Cells that hide nothing are left out. ``first`` is the context that the others, and the gene means, are compared with.
    """

    first: str
    nb: Mapping[str, NDArray[np.float64]]
    nb_visible: Mapping[str, NDArray[np.float64]]
    values: NDArray[np.float64]
    dataset: NDArray[np.int64]
    sentences: int

    def scores(self) -> dict[str, dict[str, float]]:
        """Nats per hidden value of every method; smaller is better."""
        figures = {"nb": self.nb, "nb_visible": self.nb_visible}
        return {name: {figure: self._mean(nats[name]) for figure, nats in figures.items()} for name in self.nb}

    def gains(self) -> dict[str, Gain]:
        """What the first context saves over every other method, in nats per hidden value, paired by cell."""
        best = self.nb[self.first]
        return {f"{self.first} over {name}": paired_gain(nats, best, self.values) for name, nats in self.nb.items() if name != self.first}

    def by_dataset(self, store: ShardStore) -> dict[str, dict[str, float]]:
        """``nb`` of every method in each data set that was looked at."""
        names = [entry.name for entry in store.manifest.datasets]
        groups = {names[index]: self.dataset == index for index in np.unique(self.dataset)}
        return {name: {method: self._mean(nats, where) for method, nats in self.nb.items()} for name, where in groups.items()}

    def size(self) -> dict[str, int]:
        """What the figures are of."""
        return {"sentences": self.sentences, "cells": len(self.values), "hidden_values": int(self.values.sum())}

    def _mean(self, nats: NDArray[np.float64], where: NDArray[np.bool_] | slice = slice(None)) -> float:
        return float(nats[where].sum() / self.values[where].sum())


def evaluate_pretraining(folder: ModelFolder, store: ShardStore, config: PretrainingEvaluation) -> Recovered:
    """The hidden counts of held-out sentences under the gene means and under the model in every context."""
    _check(folder, store)
    split = held_out_split(folder, store, config)
    network, means = build_network(folder).eval(), {name: _gene_means(store, split, column) for name, column in GENE_MEANS.items()}
    chosen = looked_at(store, split.held_out, config.max_cells)
    columns: dict[str, list[Tensor]] = defaultdict(list)
    for part in micro_batches(store, chosen, CELLS_TOGETHER):
        batch, mask = prepare(store, part, config.masking)
        for name, column in _columns(network, means, (batch, mask), config.contexts):
            columns[name].append(column[mask.hidden_C > 0])
    found = {name: torch.cat(parts).numpy() for name, parts in columns.items()}
    methods = (*GENE_MEANS, *config.contexts)
    nb, nb_visible = ({name: found[f"{figure}:{name}"] for name in methods} for figure in ("nb", "nb_visible"))
    return Recovered(config.contexts[0], nb, nb_visible, found["values"].astype(np.float64), found["dataset"], len(chosen))


def _check(folder: ModelFolder, store: ShardStore) -> None:
    if folder.vocabulary.fingerprint != store.vocabulary.fingerprint:
        raise VocabularyError(
            f"the model knows {len(folder.vocabulary)} genes, the shards have {len(store.vocabulary)} others or in another order; "
            "convert the cells with its vocabulary: cellplane data convert --vocabulary MODEL"
        )
    if folder.config.decoder != "negative_binomial":
        raise DataError(f"the model's decoder is {folder.config.decoder}, and only negative_binomial gives counts a likelihood")


def held_out_split(folder: ModelFolder, store: ShardStore, config: PretrainingEvaluation) -> Split:
    """What to look at: of the shards a model was trained on what its run held out, of others a share that the seed chooses.

    Raises DataError when the model was trained on every sentence of these shards.
    """
    if folder.lineage.get("data_fingerprint") != store.manifest.fingerprint:
        return split_of(store, config.share, config.seed)
    share = float(folder.lineage.get("validation_share", 0))
    if share <= 0:
        raise DataError(
            "the model was trained on every sentence of these shards, so its figures would be of what it has seen; "
            "pre-train with -o validation.share=0.1, or give shards of other cells"
        )
    return split_of(store, share, int(folder.lineage["plan_seed"]))


def _gene_means(store: ShardStore, split: Split, column: Column) -> GeneMeans:
    def sample(cells: int) -> Sample:
        parts = micro_batches(store, looked_at(store, split.training, cells), CELLS_TOGETHER)
        return lambda: (part.read(store) for part in parts)

    groups = {"dataset_index": store.n_datasets, "batch_index": store.n_batches}[column]
    return GeneMeans.fit(sample(RATE_CELLS), sample(DISPERSION_CELLS), (groups, len(store.vocabulary)), column)


def _columns(
    network: CellPLM, means: Mapping[str, GeneMeans], work: tuple[CellBatch, Mask], contexts: tuple[str, ...]
) -> Iterator[tuple[str, Tensor]]:
    """Named columns [C] in the order of the batch, whatever order a context puts the cells in."""
    batch, mask = work
    yield "values", mask.hidden_C
    yield "dataset", batch.dataset_index
    for name, baseline in means.items():
        yield from _figures(name, hidden_nb(batch, mask, baseline.predict(batch)))
    back = batch.row.argsort().argsort()
    for name in contexts:
        placed = CONTEXTS[name](batch, mask, 0)
        found = hidden_nb(*placed, network_means(network, *placed))
        order = placed[0].row.argsort()[back]  # where each cell of the batch lies now
        yield from _figures(name, HiddenNB(found.own_total[order], found.visible_total[order]))


def _figures(name: str, found: HiddenNB) -> Iterator[tuple[str, Tensor]]:
    yield f"nb:{name}", found.own_total
    yield f"nb_visible:{name}", found.visible_total


def network_means(network: CellPLM, batch: CellBatch, mask: Mask) -> Predict:
    """What the network, in evaluation, expects in these cells, decoded some at a time."""
    with torch.no_grad():
        z_CZ = network(batch, mask).latent
    decoder = network.decoder
    assert decoder is not None

    def predict(cells: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            mean, theta = decoder(z_CZ[cells], batch.take(cells), None)
        return mean, theta

    return predict
