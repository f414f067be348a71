"""Networks that begin at the principal components of the training cells, so that a few hundred cells need not find them first.

A gene's vector is its loading on each component, scaled so that every component varies alike over the cells; the embedder's
bias takes the mean off. What enters the first layer is then what PCA and a linear classifier start from, and everything
goes on learning. A decoder's last layer may begin at the same: each column of its weights is one direction in which the
cells differ. Only training cells are looked at, and only where there is no base model.
"""

# C cells, G genes, K components, D width

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from cellplane.data.sentences import CellTable
from cellplane.errors import DataError
from cellplane.model.cellplm import CellPLM
from cellplane.pipelines.annotation_baselines import variable_genes
from cellplane.pipelines.baselines import table_logs
from cellplane.seeds import keyed_seed

FEWEST_CELLS = 3  # of whom components can be told
LEAST_VARIANCE = 1e-9  # of a gene's log counts; less is rounding
MOST_CELLS = 20_000  # that directions are told from


def begin_at_components(network: CellPLM, table: CellTable, components: int, seed: int = 0) -> int:
    """Sets the network's gene vectors to at most ``components`` whitened components of the cells; how many there were.

    Genes beyond the 2,000 most variable begin at 0. DataError for fewer than 3 cells.
    """
    if table.n_cells < FEWEST_CELLS:
        raise DataError(f"components need {FEWEST_CELLS} training cells at least, found {table.n_cells}")
    embedder = network.embedder
    logs_CG = table_logs(table, network.config.input_total, np.float64)  # what the embedder sums over
    genes = variable_genes(logs_CG)
    values = logs_CG[:, genes].toarray()
    size = int(min(components, *(side - 1 for side in values.shape), network.config.width))
    fitted = PCA(size, svd_solver="arpack", random_state=seed).fit(values)
    spread_K = np.sqrt(np.maximum(fitted.explained_variance_, np.finfo(np.float32).eps))
    loadings_GK = fitted.components_.T / spread_K
    with torch.no_grad():
        embedder.genes_GD.zero_()
        embedder.genes_GD[torch.from_numpy(genes), :size] = torch.from_numpy(loadings_GK).float()
        mean_D = torch.zeros(network.config.width)
        mean_D[:size] = torch.from_numpy(fitted.mean_ @ loadings_GK).float()
        embedder.linear.bias.copy_(-embedder.linear.weight @ mean_D)
    return size


def main_directions(table: CellTable, most: int, seed: int = 0) -> NDArray[np.float64]:
    """At most ``most`` principal components of log counts, each as long as the cells' spread along it, [G, K].

    Counts are scaled to the median total first; of more than 20,000 cells so many are drawn by the seed. K is 0 where cells or
    genes are too few, or the cells do not differ.
    """
    rows = np.sort(np.random.default_rng(keyed_seed(seed, "directions")).permutation(table.n_cells)[:MOST_CELLS])
    part = table.rows(rows)
    totals = part.totals()
    size = min(most, part.n_cells - 1, int(part.panel.sum()) - 1)
    if size < 1 or not (totals > 0).any():
        return np.zeros((len(part.panel), 0))
    logs_CG = table_logs(part, float(np.median(totals[totals > 0])))
    mean, of_squares = (np.asarray(logs_CG.power(power).mean(axis=0)) for power in (1, 2))
    if (of_squares - mean**2).max() < LEAST_VARIANCE:
        return np.zeros((len(part.panel), 0))
    with threadpool_limits(limits=1):
        fitted = PCA(size, svd_solver="arpack", random_state=seed).fit(logs_CG)
    directions_GK: NDArray[np.float64] = fitted.components_.T * np.sqrt(np.maximum(fitted.explained_variance_, 0))
    return directions_GK
