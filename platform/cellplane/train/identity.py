"""What a run is: the network its shards ask for, and the fingerprint of everything that changes its numbers."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from hashlib import sha256

from cellplane.config import to_plain
from cellplane.data.remote import shard_folder
from cellplane.data.shards import read_manifest
from cellplane.model.config import ModelConfig, identifying
from cellplane.train.config import PretrainConfig

SECTIONS = ("model", "masking", "plan", "optimizer")  # that change the numbers; workers, engine and keeping do not
DETERMINING = (*SECTIONS, "gene_start", "components")


def full_model_config(config: PretrainConfig) -> ModelConfig:
    """The network with the sizes that the shards determine."""
    manifest = read_manifest(shard_folder(config.shards))
    n_batches, n_datasets = len(manifest.batch_names), len(manifest.datasets)
    return replace(
        config.model,
        n_genes=manifest.n_genes,
        n_batches=n_batches if n_batches > 1 else 0,
        n_datasets=n_datasets if n_datasets > 1 else 0,
    )


def run_identity(config: PretrainConfig) -> str:
    """Fingerprint of data and of every setting that changes the numbers: a checkpoint fits when it is equal."""
    plain = to_plain(config)
    if config.plan.weights is None:
        del plain["plan"]["weights"]  # came later: a run of an earlier version keeps its identity
    parts: dict[str, object] = {name: identifying(plain[name]) for name in SECTIONS} | {
        "data": read_manifest(shard_folder(config.shards)).fingerprint
    }
    if config.validation.share > 0:  # came later too; held-out sentences are not trained on
        parts["held_out"] = {"share": config.validation.share}
    if config.gene_start == "components":
        parts["gene_start"] = {"components": config.components}
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def describe_run(config: PretrainConfig) -> dict[str, object]:
    """Parameters worth seeing beside a run: the resolved configuration and the sizes that follow from the data."""
    return {**to_plain(config), "network": asdict(full_model_config(config))}
