"""Label transfer without training: the nearest training cells in a base model's embedding vote for a cell's type.

What to try first on a small reference, and what a fine-tuned network has to beat. The vote itself is judged like a
network's logits (see `artifact.judgement`): calibrated, with strangers told and broader names given.
"""

from __future__ import annotations

from dataclasses import replace

from cellplane.artifact.folder import ModelFolder
from cellplane.errors import ConfigError, DataError
from cellplane.inference import build_network
from cellplane.model.cellplm import CellPLM, new_model


def voting_network(start: ModelFolder | None) -> CellPLM:
    """The base model up to its embedding, without decoder and head.

    ConfigError without a base model: an untrained embedding would vote by chance. DataError when weights are missing.
    """
    if start is None:
        raise ConfigError("method neighbours compares cells in a base model's embedding, but there is no base model; name one")
    network = new_model(replace(start.config, decoder="none", n_classes=0, n_batches=0, n_datasets=0, n_platforms=0), 0)
    weights, wanted = build_network(start).state_dict(), network.state_dict()
    if lacking := sorted(name for name in wanted if name not in weights):
        raise DataError(f"the base model does not fit: missing {lacking[:5]}")
    network.load_state_dict({name: weights[name] for name in wanted})
    return network
