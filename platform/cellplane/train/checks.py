"""What can be known to go wrong before any cluster is asked: each its own error, within seconds."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from cellplane.config import load_config, read_yaml
from cellplane.data.remote import fetch_shards, shard_folder
from cellplane.data.shards import Manifest, read_manifest
from cellplane.errors import CheckpointError, ConfigError, DataError, VocabularyError
from cellplane.train.checkpoint import checkpoints_of
from cellplane.train.config import PretrainConfig
from cellplane.train.identity import DETERMINING, run_identity
from cellplane.train.run_folder import RunFolder

log = logging.getLogger(__name__)

USUAL_CELLS = 2048  # no sentence of an unchanged conversion is longer; a step of one takes 2 GiB even at 85M


def check_run(config: PretrainConfig) -> Manifest:
    """The manifest of the shards to train on.

    Raises ConfigError for settings that contradict one another, DataError for shards that cannot be trained on,
    VocabularyError and CheckpointError when the run of this name was begun with other genes, data or settings.
    """
    if not config.shards:
        raise ConfigError("shards is empty: name the folder that `cellplane data convert` wrote, e.g. -o shards=.cellplane/shards")
    manifest = read_manifest(fetch_shards(config.shards))
    if not manifest.sentences:
        raise DataError(f"{config.shards} holds no sentences, so there is nothing to train on; convert some cells first")
    _check_workers(config)
    _check_same(config, manifest)
    return manifest


def warn_about(config: PretrainConfig, manifest: Manifest) -> None:
    """Says what a person may regret of a run that `check_run` lets pass: for whoever starts it, once."""
    longest, budget = max(sentence.cells for sentence in manifest.sentences), config.plan.cells_per_micro_batch
    if longest > max(budget, USUAL_CELLS):
        log.warning(
            "sentences of up to %d cells exceed plan.cells_per_micro_batch = %d: each of those stands alone and takes its own memory; "
            "convert with a smaller max_cells to bound it",
            longest,
            budget,
        )
    filled = -(-manifest.cells // budget)
    if filled < config.workers.most:
        log.warning(
            "%d cells fill about %d micro-batches an epoch: most of the %d workers will do nothing",
            manifest.cells,
            filled,
            config.workers.most,
        )


def _check_workers(config: PretrainConfig) -> None:
    most, width = config.workers.most, config.plan.micro_batches_per_step
    if most > width:
        raise ConfigError(
            f"{most} workers, but a step has {width} micro-batches, which are never shared: the others would do nothing; "
            f"start {width} (-o workers.count={width}), or raise plan.micro_batches_per_step, which makes it another run"
        )


def _check_same(config: PretrainConfig, manifest: Manifest) -> None:
    """Nothing that is kept may be continued with something else; a run that kept nothing may change its mind."""
    folder = RunFolder.of(config.run)
    origin = folder.origin()
    if not origin or origin["identity"] == run_identity(config) or not checkpoints_of(folder.path, config.checkpoint).steps():
        return
    way_out = f"use another run name (-o run=...), or remove {folder.path} to start anew"
    if origin["vocabulary_fingerprint"] != manifest.vocabulary_fingerprint:
        raise VocabularyError(
            f"run {config.run} was begun with a vocabulary of {origin['n_genes']} genes ({origin['vocabulary_fingerprint'][:12]}), "
            f"{config.shards} has {manifest.n_genes} ({manifest.vocabulary_fingerprint[:12]}); {way_out}"
        )
    differing = folder.differences(config, DETERMINING) or ["its data were others"]
    raise CheckpointError(f"run {config.run} was begun with another configuration or other data: {'; '.join(differing[:3])}; {way_out}")


def origin_of(config: PretrainConfig) -> str:
    """What is remembered of a run beside its configuration, as JSON: see `RunFolder.origin`."""
    manifest = read_manifest(shard_folder(config.shards))
    remembered = {"identity": run_identity(config), "vocabulary_fingerprint": manifest.vocabulary_fingerprint, "n_genes": manifest.n_genes}
    return json.dumps(remembered)


def resumed_config(run: str, config: str | None, overrides: list[str]) -> PretrainConfig:
    """The configuration to go on with: the given one, else the one that was stored when the run started.

    Raises CheckpointError when there is nothing to go on from.
    """
    folder = RunFolder.of(run)
    if config is None and not folder.config.is_file():
        known = sorted(path.name for path in folder.path.parent.glob("*") if _kind(path / "config.yaml") == "pretrain")
        there = f"there are {', '.join(known[:5])}" if known else f"{folder.path.parent} holds none"
        raise CheckpointError(
            f"there is nothing to resume: no run {run!r} with a stored configuration; {there}, or name its file with --config"
        )
    if config is None and (kind := _kind(folder.config)) != "pretrain":
        again = f"run `cellplane {kind}` with its --resume" if kind == "finetune" else "run the command that began it"
        raise CheckpointError(f"run {run!r} is no pre-training ({kind}); {again}")
    loaded = load_config(PretrainConfig, config or folder.config, "pretrain", overrides)
    if not checkpoints_of(folder.path, loaded.checkpoint).steps():
        raise CheckpointError(f"there is nothing to resume: run {run!r} has no checkpoint yet; start it without --resume")
    return loaded


def _kind(config: Path) -> str:
    """What a stored configuration configures; empty when there is none."""
    try:
        return str(read_yaml(config).get("kind", ""))
    except ConfigError:
        return ""
