"""A linear probe sees what the frozen encoder says, learns only on top of it, and answers as the whole network does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cellplane.artifact.folder import ModelFolder
from cellplane.data.sentences import MicroBatch
from cellplane.data.sources import AnnData
from cellplane.errors import ConfigError
from cellplane.model.cellplm import new_model
from cellplane.pipelines import probe as module
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.probe import Probe, ProbeObjective, encoded, shifted, stacked, without_counts
from tests.tiny import ANNOTATOR
from tests.train.fit import labelled

CPU = torch.device("cpu")
PROBE = {"transfer": {"learn": "head"}, "optimizer": {"steps": 40, "lr": 1e-2}, "max_cells": 100}


def test_the_probe_answers_as_the_whole_network():
    network, store = new_model(ANNOTATOR, 0), labelled(40, seed=0)
    probe = Probe(network, encoded(network, store, CPU))
    batch = store.read([0, 2])
    whole, bare = network(batch), probe(without_counts(store).read([0, 2]))
    torch.testing.assert_close(bare.logits, whole.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(bare.loss.total, whole.loss.total, rtol=0, atol=1e-6)


def test_features_of_two_stores_lie_one_after_the_other():
    network, stores = new_model(ANNOTATOR, 0), (labelled(20, seed=0), labelled(30, seed=1))
    probe = Probe(network, stacked(network, stores, CPU))
    batch = stores[1].read([1])
    torch.testing.assert_close(probe(shifted(batch, 20)).logits, network(batch).logits, rtol=0, atol=1e-6)


def test_only_the_projection_and_the_head_are_parameters():
    network = new_model(ANNOTATOR, 0)
    probe = Probe(network, torch.zeros(1, ANNOTATOR.width))
    assert {name.split(".")[0] for name in probe.state_dict()} == {"latent", "head"}


def test_without_counts_everything_else_stays():
    store = labelled(20, seed=0)
    bare = without_counts(store).read([1, 0])
    full = store.read([1, 0])
    assert bare.gene.numel() == 0
    assert torch.equal(bare.labels, full.labels)
    assert torch.equal(bare.row, full.row)
    objective = ProbeObjective(without_counts(store))
    np.testing.assert_array_equal(objective.weights(), store.sizes)
    batch, mask = objective.prepare(MicroBatch((0,), (7,), 3))
    assert (batch.n_cells, mask) == (10, None)


def test_the_encoder_is_asked_once_for_every_cell(base_model: ModelFolder, training: AnnData, monkeypatch):
    asked: list[int] = []
    original = module.encoded
    monkeypatch.setattr(
        module, "encoded", lambda network, store, device: asked.append(store.table.n_cells) or original(network, store, device)
    )
    pipeline = CellTypeAnnotationPipeline(base_model, config=PROBE).fit(training)
    assert len(asked) == 2
    assert sum(asked) == training.n_obs
    assert len(pipeline.history_) == 40


def test_a_probe_learns_and_leaves_the_base_model_alone(base_model: ModelFolder, training: AnnData, query: AnnData):
    pipeline = CellTypeAnnotationPipeline(base_model, config={**PROBE, "optimizer": {"steps": 150, "lr": 2e-2}}).fit(training)
    weights = pipeline.folder_.weights
    kept = [name for name in base_model.weights if name.startswith(("embedder.", "encoder."))]
    assert all(torch.equal(weights[name], base_model.weights[name]) for name in kept)
    assert pipeline.score(query)["macro_f1"] > 0.6  # of a network that was never trained; chance is 0.25


def test_a_probe_needs_a_base_model_and_the_latent_space_is_new(base_model: ModelFolder, training: AnnData):
    with pytest.raises(ConfigError, match=r"transfer\.learn: head keeps what a base model knows"):
        CellTypeAnnotationPipeline(config=PROBE).fit(training)
    with pytest.raises(ConfigError, match="the latent is new in this task"):
        CellTypeAnnotationPipeline(base_model, config={"transfer": {"frozen": ["latent"]}}).fit(training)
