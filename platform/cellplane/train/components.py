"""Gene vectors that begin at main directions of the cells trained on, so that a short run need not find them first.

A gene's vector is its loading on each direction, scaled so that strong directions do not drown weak ones; the embedder's
bias takes the mean off. Each data set is centred by itself and weighs alike: what tells studies apart is no direction.
Every rank finds the same ones, for they depend on the shards and the plan's seed alone.
"""

# C cells, G genes, V the most variable of them, K directions, D width

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import eigsh

from cellplane.cells import CellBatch
from cellplane.data.loader import ShardStore
from cellplane.errors import DataError
from cellplane.model.cellplm import CellPLM
from cellplane.seeds import keyed_seed

VARIABLE_GENES = 2000  # the usual choice of the field
CELLS_LOOKED_AT = 5000  # of each data set
FEWEST_CELLS = 3  # of whom directions can be told
START = "components"  # keys which sentences are looked at


@dataclass(frozen=True, eq=False)
class Sample:
    """Cells of one data set: log counts ``logs_CG`` as the embedder sums them, and which genes were ``measured_G``."""

    logs_CG: sparse.csr_matrix
    measured_G: NDArray[np.bool_]


def samples_of(store: ShardStore, sentences: NDArray[np.int64], total: float, seed: int) -> Iterator[Sample]:
    """Some of these sentences of every data set, chosen by the seed; counts scaled to ``total`` first unless that is 0."""
    dataset = np.array([row.dataset for row in store.manifest.sentences], dtype=np.int64)
    for number in range(store.n_datasets):
        own = np.random.default_rng(keyed_seed(seed, START, number)).permutation(sentences[dataset[sentences] == number])
        before = np.cumsum(store.sizes[own]) - store.sizes[own]
        if len(chosen := own[before < CELLS_LOOKED_AT]):
            yield _sample(store.read(chosen.tolist()), total)


def begin_at_directions(network: CellPLM, samples: Sequence[Sample], most: int, whitening: float = 0.5) -> int:
    """Sets the network's gene vectors to at most ``most`` main directions of the cells; how many there were.

    ``whitening`` 0 leaves every direction its spread, 1 makes all alike; their mean variance is 1. Genes beyond the 2,000
    most variable begin at 0. DataError for fewer than 3 cells.
    """
    cells = sum(sample.logs_CG.shape[0] for sample in samples)
    if cells < FEWEST_CELLS:
        raise DataError(f"components need {FEWEST_CELLS} cells at least, found {cells}")
    genes_V = variable_together(samples)
    covariance_VV, mean_V = _moments(samples, genes_V)
    size = int(min(most, cells - 1, len(genes_V) - 1, network.config.width))
    variance_K, axes_VK = eigsh(covariance_VV, k=size, v0=np.ones(len(genes_V)))  # a fixed beginning: the same on every rank
    kept = np.maximum(variance_K[::-1], np.finfo(np.float32).eps)
    scale_K = kept ** (-whitening / 2)
    loadings_VK = axes_VK[:, ::-1] * scale_K / np.sqrt((kept * scale_K**2).mean())
    embedder = network.embedder
    with torch.no_grad():
        embedder.genes_GD.zero_()
        embedder.genes_GD[torch.from_numpy(genes_V), :size] = torch.from_numpy(loadings_VK.copy()).float().to(embedder.genes_GD.device)
        mean_D = torch.zeros(network.config.width)
        mean_D[:size] = torch.from_numpy(mean_V @ loadings_VK).float()
        embedder.linear.bias.copy_(-embedder.linear.weight @ mean_D.to(embedder.linear.weight.device))
    return size


def variable_together(samples: Sequence[Sample]) -> NDArray[np.int64]:
    """The genes [V], ascending, whose log counts vary most, as a mean over the data sets that measured them."""
    n_genes = samples[0].logs_CG.shape[1]
    variance, times = np.zeros(n_genes), np.zeros(n_genes)
    for sample in samples:
        mean = np.asarray(sample.logs_CG.mean(axis=0)).ravel()
        variance += np.asarray(sample.logs_CG.multiply(sample.logs_CG).mean(axis=0)).ravel() - mean**2
        times += sample.measured_G
    order = np.argsort(-variance / np.maximum(times, 1), kind="stable")
    return np.sort(order[:VARIABLE_GENES])


def _sample(batch: CellBatch, total: float) -> Sample:
    shape = (batch.n_cells, batch.panels.shape[1])
    counts = sparse.csr_matrix((batch.value.double().numpy(), batch.gene.numpy().copy(), batch.crow.numpy().copy()), shape=shape)
    if total:
        found = np.asarray(counts.sum(axis=1)).ravel()
        counts = sparse.csr_matrix(sparse.diags(total / np.where(found > 0, found, 1.0)) @ counts)
    panels = batch.panels.numpy()[np.unique(batch.panel_index.numpy())]
    return Sample(counts.log1p(), panels.any(axis=0))


def _moments(samples: Sequence[Sample], genes_V: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Covariance [V, V] of cells centred in their data set, every data set weighing alike, and the mean [V] over data sets."""
    covariance, mean = np.zeros((len(genes_V), len(genes_V))), np.zeros(len(genes_V))
    for sample in samples:
        logs = sample.logs_CG[:, genes_V].toarray()
        own = logs.mean(axis=0)
        logs -= own
        covariance += logs.T @ logs / (len(logs) * len(samples))
        mean += own / len(samples)
    return covariance, mean
