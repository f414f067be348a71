"""Tiny cells, networks and model folders for tests: everything random is keyed by a seed, everything takes milliseconds."""

# C cells, G genes

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cellplane.artifact.folder import ModelFolder
from cellplane.cells import CellBatch, single_panel_batch
from cellplane.genes import GeneVocabulary
from cellplane.model.cellplm import new_model
from cellplane.model.config import ModelConfig

N_GENES = 24
GENES = tuple(f"GENE{gene:04d}" for gene in range(1, N_GENES + 1))

TINY = ModelConfig(
    n_genes=N_GENES,
    width=16,
    n_blocks=2,
    n_heads=2,
    latent_width=6,
    n_clusters=3,
    cluster_width=8,
    decoder_width=8,
    decoder_bottleneck=5,
    gene_init_sd=0.5,
)
ANNOTATOR = replace(TINY, latent="ae", decoder="none", n_classes=3)
CLASSES = ("B", "NK", "T")


def random_counts(n_cells: int, n_genes: int = N_GENES, seed: int = 0) -> Tensor:
    """[C, G] float32 whole numbers, about half of them zero."""
    generator = torch.Generator().manual_seed(seed)
    rates = torch.empty(n_cells, n_genes).exponential_(generator=generator) * 2
    return torch.poisson(rates, generator=generator)


def dense_batch(counts_CG: Tensor, sizes: Sequence[int] | None = None, panel_G: Tensor | None = None) -> CellBatch:
    """The non-zero counts as a CellBatch; one sentence unless sizes are given; all genes measured unless a panel is."""
    cell, gene = counts_CG.nonzero(as_tuple=True)
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), (counts_CG != 0).sum(1).cumsum(0)])
    panel = torch.ones(counts_CG.shape[1], dtype=torch.bool) if panel_G is None else panel_G
    return single_panel_batch(crow, gene, counts_CG[cell, gene], panel, sizes)


def random_batch(sizes: Sequence[int], seed: int = 0) -> CellBatch:
    """Sentences of these sizes, with batches, coordinates (the third cell's missing) and a seed of their own each."""
    n_cells = sum(sizes)
    batch = dense_batch(random_counts(n_cells, seed=seed), sizes)
    coordinates = torch.rand(n_cells, 2, generator=torch.Generator().manual_seed(seed)) * 500
    coordinates[2:3] = torch.nan
    return replace(
        batch,
        batch_index=torch.arange(n_cells) % 3 - 1,
        coordinates=coordinates,
        sentence_seed=torch.arange(len(sizes)) + 100 * (seed + 1),
    )


def dense(batch: CellBatch) -> Tensor:
    """The counts of a batch, [C, G]."""
    counts = torch.zeros(batch.n_cells, batch.n_genes)
    return counts.index_put_((batch.cell_of_entry(), batch.gene), batch.value, accumulate=True)


def tiny_folder(config: ModelConfig = ANNOTATOR, seed: int = 0, max_cells: int = 8) -> ModelFolder:
    """An untrained model in memory: what it says is noise, but always the same noise."""
    return ModelFolder(
        config=config,
        weights=new_model(config, seed).state_dict(),
        vocabulary=GeneVocabulary.from_ids(GENES),
        task="annotate" if config.n_classes else "pretrain",
        max_cells=max_cells,
        classes=CLASSES[: config.n_classes],
        lineage={"run_id": "abc"},
        card="# A tiny model\n",
    )
