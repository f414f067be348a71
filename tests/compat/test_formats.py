"""Folders written by earlier versions stay readable, with the same answers; v1 was written by tests/compat/make.py at 0.1.0."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cellplane.artifact.folder import load_model, save_model
from cellplane.data.loader import ShardStore
from cellplane.data.manifest import verify_shards
from cellplane.errors import DataError
from cellplane.inference import Predictor
from cellplane.train.checkpoint import Checkpoints, read_checkpoint
from tests.tiny import dense_batch

V1 = Path(__file__).with_name("v1")
MODEL_SHA256 = "76c4ca2f55312e72f1a17d5f93c91b99c5cf83b4ed2ea554dd20187e55481fb4"
LOGITS = [[0.0186770, 0.9770321], [0.2175316, 1.4483100], [0.0923252, 1.2461973]]  # by 0.1.0 on a CPU, float32


def test_a_model_folder_of_format_1_is_read():
    model = load_model(V1 / "model")
    assert model.model_sha256 == MODEL_SHA256
    assert (model.task, model.classes, model.max_cells) == ("annotate", ("B cell", "T cell"), 16)
    assert model.vocabulary.gene_ids == tuple(f"GENE{gene:02d}" for gene in range(12))
    assert model.lineage == {"run_id": "0123456789abcdef"}
    assert model.card == "# A tiny model of format 1\n"


def test_a_model_folder_of_format_1_answers_as_it_did():
    batch = dense_batch((torch.arange(36).reshape(3, 12) % 5).float())
    batch = replace(batch, coordinates=torch.tensor([[0.0, 0.0], [50.0, 20.0], [torch.nan, torch.nan]]))
    with torch.no_grad():
        output = Predictor.load(V1 / "model").model(batch)
    torch.testing.assert_close(output.logits, torch.tensor(LOGITS), rtol=1e-5, atol=1e-5)


def test_a_model_of_format_1_keeps_its_identity_when_it_is_saved_again(tmp_path):
    assert load_model(save_model(load_model(V1 / "model"), tmp_path / "again")).model_sha256 == MODEL_SHA256


def test_a_checkpoint_of_format_1_is_read():
    state = Checkpoints(V1 / "checkpoint").newest_valid("f" * 64)
    assert state is not None
    assert state.step == 7
    assert len(state.optimizer) == 2 * len(state.weights) == 54
    np.testing.assert_allclose(float(sum(tensor.double().sum() for tensor in state.weights.values())), 31.8080463, atol=1e-5)
    assert all(bool((tensor == 0.5).all()) for tensor in state.optimizer.values())


@pytest.mark.parametrize("name", ["model", "checkpoint/step-00000007"])
def test_a_folder_of_format_1_is_still_verified(tmp_path, name):
    copy = Path(shutil.copytree(V1 / name, tmp_path / "copy"))
    whole = bytearray((copy / "weights.safetensors").read_bytes())
    whole[-1] ^= 1
    (copy / "weights.safetensors").write_bytes(whole)
    with pytest.raises(DataError, match="weights"):
        (load_model if name == "model" else read_checkpoint)(copy)


SHARDS_FINGERPRINT = "ee7e6c9623941b7c3605ba18fe388afdc51fa9ba91eb99b21d46248edf6f4d87"


def test_shards_of_format_1_are_read_and_keep_their_identity():
    """Two data sets of 40 and 30 cells with positions and two large counts, written before tables stood beside shards."""
    store = ShardStore(V1 / "shards")
    batch = store.read(range(len(store.sizes)))
    assert verify_shards(V1 / "shards").fingerprint == store.manifest.fingerprint == SHARDS_FINGERPRINT
    sums = (batch.n_cells, float(batch.value.sum()), int(batch.gene.sum()), float(batch.value.max()))
    assert sums == (70, 103_221, 8219, 100_000)
    np.testing.assert_allclose(float(batch.coordinates.double().sum()), 42_866.9727, rtol=1e-6)
    assert store.class_names == ("type_0", "type_1", "type_2", "type_3")
    assert [entry.obs_file for entry in store.manifest.datasets] == [None, None]
