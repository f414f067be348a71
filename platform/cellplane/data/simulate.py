"""Synthetic cells whose truth is known: negative binomial counts with types, batches, depths and dropout.

Counts are gamma-Poisson draws, the usual model of UMI data. They are drawn in blocks of cells, so that a hundred
thousand cells need no dense matrix. Real data differs: use this to test software, never to compare methods.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from cellplane.data.config import SimulateConfig
from cellplane.data.sources import AnnData

MEAN_COUNTS_PER_GENE = 1.5  # a mid-depth panel: about half the entries are zero after dropout
MARKER_FOLD = 8.0
MARKER_SHARE = 0.1  # of the genes, for each type, as long as genes last
DISPERSION = 2.0  # theta of the negative binomial: variance = mean + mean^2 / theta
DROPOUT_RATE = 0.1
BATCH_EFFECT_SIGMA = 0.15  # of the log fold change of a gene in a batch
DEPTH_SIGMA = 0.3  # of the log library size
SLIDE_UM = 1000.0
BLOCK_CELLS = 1024


def simulate(config: SimulateConfig) -> AnnData:
    """Seeded cells: X integer CSR float32, obs cell_type and batch, obsm spatial (micrometres) when asked for."""
    rng = np.random.default_rng(config.seed)
    types = rng.permutation(np.arange(config.n_cells) % config.n_types)
    batches = rng.permutation(np.arange(config.n_cells) % config.n_batches)
    profiles = _profiles(config, rng)
    depths = rng.lognormal(0.0, DEPTH_SIGMA, config.n_cells)
    parts = [slice(start, start + BLOCK_CELLS) for start in range(0, config.n_cells, BLOCK_CELLS)]
    blocks = [_counts(profiles[batches[part], types[part]], depths[part], rng) for part in parts]
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical([f"type_{t}" for t in types]), "batch": pd.Categorical([f"batch_{b}" for b in batches])},
        index=pd.Index([f"cell_{cell:06d}" for cell in range(config.n_cells)]),
    )
    var = pd.DataFrame(index=pd.Index([f"GENE{gene:04d}" for gene in range(1, config.n_genes + 1)]))
    adata = AnnData(X=sp.vstack(blocks, format="csr"), obs=obs, var=var)
    if config.spatial:
        adata.obsm["spatial"] = _positions(types, config.n_types, rng)
    return adata


def _profiles(config: SimulateConfig, rng: np.random.Generator) -> NDArray[np.float64]:
    """Expected counts of each gene in each batch and type, [batches, types, genes]."""
    base = rng.gamma(1.0, MEAN_COUNTS_PER_GENE, config.n_genes)
    fold = np.ones((config.n_types, config.n_genes))
    per_type = max(1, min(int(MARKER_SHARE * config.n_genes), config.n_genes // config.n_types))
    order = rng.permutation(config.n_genes)
    for cell_type in range(config.n_types):
        fold[cell_type, order[cell_type * per_type : (cell_type + 1) * per_type]] = MARKER_FOLD
    effect = rng.lognormal(0.0, BATCH_EFFECT_SIGMA, (config.n_batches, 1, config.n_genes))
    profiles: NDArray[np.float64] = (base + 0.05) * fold * effect
    return profiles


def _counts(means: NDArray[np.float64], depths: NDArray[np.float64], rng: np.random.Generator) -> sp.csr_matrix:
    rates = rng.gamma(DISPERSION, means * depths[:, None] / DISPERSION)
    counts = rng.poisson(rates) * (rng.random(means.shape) >= DROPOUT_RATE)
    return sp.csr_matrix(counts.astype(np.float32))


def _positions(types: NDArray[np.int64], n_types: int, rng: np.random.Generator) -> NDArray[np.float32]:
    centres = rng.uniform(0.0, SLIDE_UM, (n_types, 2))
    scattered = centres[types] + rng.normal(0.0, SLIDE_UM / 8, (len(types), 2))
    return np.clip(scattered, 0.0, SLIDE_UM).astype(np.float32)
