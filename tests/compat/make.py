"""Writes the folders that test_formats.py reads; run once for each format version, never again for an old one.

python -m tests.compat.make tests/compat/v1
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from cellplane.artifact.folder import ModelFolder, save_model
from cellplane.genes import GeneVocabulary
from cellplane.model.cellplm import new_model
from cellplane.model.config import ModelConfig
from cellplane.train.checkpoint import Checkpoints, TrainingState

CONFIG = ModelConfig(
    n_genes=12,
    width=8,
    n_blocks=1,
    n_heads=2,
    latent="ae",
    latent_width=4,
    decoder="none",
    n_classes=2,
    positions="continuous",
    gene_init_sd=0.5,
)


def main(folder: Path) -> None:
    weights = new_model(CONFIG, seed=0).state_dict()
    model = ModelFolder(
        config=CONFIG,
        weights=weights,
        vocabulary=GeneVocabulary.from_ids(f"GENE{gene:02d}" for gene in range(12)),
        task="annotate",
        max_cells=16,
        classes=("B cell", "T cell"),
        lineage={"run_id": "0123456789abcdef"},
        card="# A tiny model of format 1\n",
    )
    save_model(model, folder / "model")
    small = replace(CONFIG, n_genes=3, positions="none")
    weights = new_model(small, seed=0).state_dict()
    moments = {f"{kind}:{name}": torch.full_like(tensor, 0.5) for kind in ("exp_avg", "exp_avg_sq") for name, tensor in weights.items()}
    Checkpoints(folder / "checkpoint").save(TrainingState(7, weights, moments, identity="f" * 64))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
