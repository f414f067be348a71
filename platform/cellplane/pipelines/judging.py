"""What a finished annotator learns about its own answers from cells that did not train it, and what a caller may ask of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cellplane.artifact.folder import ModelFolder
from cellplane.artifact.judgement import UNKNOWN, Judgement, Tree
from cellplane.data.company import SharedStore
from cellplane.data.sentences import MemoryStore
from cellplane.errors import ConfigError, DataError
from cellplane.inference import Predictor
from cellplane.pipelines.base import as_config
from cellplane.pipelines.calibration import fit_temperature
from cellplane.pipelines.config import AnnotationConfig, HierarchyConfig, UnknownConfig
from cellplane.pipelines.hierarchy import Parents, label_tree, read_parents
from cellplane.pipelines.linear_member import fit_linear
from cellplane.pipelines.unknown import Seen, fit_rule, fit_space, places_in, reference_of
from cellplane.train.finetune import device_named

log = logging.getLogger(__name__)


def check_judging(config: AnnotationConfig, classes: Sequence[str]) -> None:
    """Before any work begins: ConfigError for a tree of labels that cannot be used, DataError for a type that strangers are called by.

    Without `unknown.reject` such a type is learned, with a warning: cells without known counts are called so as well.
    """
    tree_of(config, classes)
    if UNKNOWN not in classes:
        return
    told = f"obs[{config.keys.labels_key!r}] has a cell type {UNKNOWN!r}, which is what cells are called that get no answer"
    if config.unknown.reject:
        raise DataError(f"{told}: with unknown.reject nobody could tell the two; rename the type, or leave its cells without a label")
    log.warning("%s: rename it, or leave its cells without a label", told)


def tree_of(config: AnnotationConfig, classes: Sequence[str]) -> Tree:
    """The configuration's tree above these classes; ConfigError as of `label_tree`, and for two trees at once."""
    parents: Parents = config.hierarchy.parents
    if config.hierarchy_file is not None:
        if parents:
            raise ConfigError("hierarchy.parents and hierarchy_file are both given; keep one")
        parents = read_parents(Path(config.hierarchy_file), classes)
    return label_tree(parents, classes, config.hierarchy.threshold)


def judged(folder: ModelFolder, stores: tuple[MemoryStore, MemoryStore | SharedStore], config: AnnotationConfig) -> ModelFolder:
    """The model with the judgement of its answers: reference cells from the training ``stores[0]``, all else from ``stores[1]``.

    What answers is judged: all members that the folder holds, none of which may have learned from ``stores[1]``.
    """
    predictor = Predictor(folder, str(device_named(config.device)))
    votes = config.method == "neighbours"
    space = fit_space(stores[0].table, config.seed) if config.unknown.space == "expression" else None
    held_out = _seen(predictor, stores[1])
    training = _seen(predictor, stores[0]) if votes or space is None else _unasked(stores[0], len(folder.classes))
    voters = None
    if votes:
        voters = reference_of(training, config.voting.neighbours, config.voting.cells_per_class, config.seed)
        held_out = replace(held_out, logits=voters.votes(held_out.z))
    linear = None
    if config.linear:
        linear, both = fit_linear(stores, held_out.logits, config.seed, calibrated=config.calibrate)
        held_out = replace(held_out, logits=both)
    if space is not None:
        training, held_out = (replace(cells, z=places_in(space, store)) for cells, store in zip((training, held_out), stores, strict=True))
    reference = reference_of(training, config.unknown.neighbours, config.unknown.cells_per_class, config.seed)
    temperature = fit_temperature(held_out.logits, held_out.label) if config.calibrate else 1.0
    judgement = Judgement(
        temperature=temperature,
        reference=reference,
        rule=fit_rule(held_out, reference, temperature, config.unknown),
        tree=tree_of(config, folder.classes),
        reject=config.unknown.reject,
        refusal_rate=config.unknown.refusal_rate,
        space=space,
        voters=voters,
        linear=linear,
    )
    return replace(folder, attachments={**folder.attachments, **judgement.attachments()})


def _seen(predictor: Predictor, store: MemoryStore | SharedStore) -> Seen:
    """What the network says of a store's cells, in the order of its table."""
    assert store.table.labels is not None
    logits, z = predictor.logits(store)
    return Seen(logits, z, np.asarray(store.table.labels))


def _unasked(store: MemoryStore, classes: int) -> Seen:
    """Labelled cells of which the network need say nothing."""
    assert store.table.labels is not None
    cells = store.table.n_cells
    nothing = np.broadcast_to(np.float32(0), (cells, classes))
    return Seen(nothing, np.zeros((cells, 0), dtype=np.float32), np.asarray(store.table.labels))


def asked_judgement(own: Judgement, config: AnnotationConfig | Mapping[str, Any] | None, classes: Sequence[str]) -> Judgement:
    """The model's judgement with what one call asks otherwise: the keys unknown, hierarchy and hierarchy_file that it names."""
    if config is None:
        return own
    named = set(config) if isinstance(config, Mapping) else config.model_fields_set
    unknown, tree = UnknownConfig(reject=own.reject, refusal_rate=own.refusal_rate), own.tree
    if "unknown" in named:
        given = config["unknown"] if isinstance(config, Mapping) else config.unknown
        unknown = as_config(UnknownConfig, given, unknown)
        if unknown.reject and UNKNOWN in classes:
            raise ConfigError(f"the model learned a cell type {UNKNOWN!r}: refused cells could not be told from it; ask without reject")
    if {"hierarchy", "hierarchy_file"} & named:
        default = AnnotationConfig(hierarchy=HierarchyConfig(parents=dict(tree.parents), threshold=tree.threshold))
        tree = tree_of(_only_tree(config, default), classes)
    return replace(own, reject=unknown.reject, refusal_rate=unknown.refusal_rate, tree=tree)


def _only_tree(config: AnnotationConfig | Mapping[str, Any], default: AnnotationConfig) -> AnnotationConfig:
    """The tree that is asked for: another one replaces the model's own, a threshold alone is applied to it."""
    if isinstance(config, AnnotationConfig):
        return config
    section = config.get("hierarchy", {})
    base = default.model_dump()
    if "parents" in section or config.get("hierarchy_file") is not None:
        base["hierarchy"]["parents"] = {}
    changes = {name: config[name] for name in ("hierarchy", "hierarchy_file") if name in config}
    asked: AnnotationConfig = as_config(AnnotationConfig, changes, AnnotationConfig(hierarchy=HierarchyConfig(**base["hierarchy"])))
    return asked
