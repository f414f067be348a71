"""Gene vectors that begin at the principal components of the training cells, so that a few hundred cells need not find them first.

A gene's vector is its loading on each component, scaled so that every component varies alike over the cells; the embedder's
bias takes the mean off. What enters the first layer is then what PCA and a linear classifier start from, and everything
goes on learning. Only training cells are looked at, and only where there is no base model.
"""

# C cells, G genes, K components, D width

from __future__ import annotations

import numpy as np
import torch
from sklearn.decomposition import PCA

from cellplane.data.sentences import CellTable
from cellplane.errors import DataError
from cellplane.model.cellplm import CellPLM
from cellplane.pipelines.annotation_baselines import variable_genes
from cellplane.pipelines.baselines import table_logs

FEWEST_CELLS = 3  # of whom components can be told


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
