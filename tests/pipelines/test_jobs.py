"""Whole jobs leave a model folder, a run with everything in it, and a version; a second time they reuse what is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cellplane.artifact.folder import load_model
from cellplane.data.config import ConvertConfig
from cellplane.data.convert import convert_with, write_part
from cellplane.errors import ConfigError, ServiceError, TrainingError
from cellplane.pipelines.jobs import run_pretrain
from cellplane.tracking.runs import connect, local_uri
from cellplane.train.config import PretrainConfig
from cellplane.train.launch import run_worker
from tests.pipelines.conftest import Place


@pytest.fixture
def shards(alone: Place) -> Path:
    """The training cells as shards."""
    config = ConvertConfig(inputs=(str(alone.train),), out=str(alone.home / "shards"), max_cells=40)
    convert_with(config, lambda tasks: map(write_part, tasks), lambda _: None)
    return alone.home / "shards"


Pretrain = Callable[..., PretrainConfig]


@pytest.fixture
def pretrain_config(alone: Place, shards: Path, empty_tracker: bytes) -> Pretrain:
    (alone.home / "mlflow.db").write_bytes(empty_tracker)
    tracker = local_uri(alone.home)
    model = {"width": 16, "n_blocks": 1, "n_heads": 2, "latent_width": 8, "n_clusters": 3, "cluster_width": 8, "decoder_width": 16}

    def make(**changes: Any) -> PretrainConfig:
        plain = {"shards": str(shards), "run": "base", "model": model, "optimizer": {"steps": 4}, "engine": {"name": "torch"}}
        return PretrainConfig.model_validate({**plain, "tracking_uri": tracker, **changes})

    return make


def test_pre_training_leaves_a_model_with_a_card_and_a_run(alone, pretrain_config):
    """The workers ran before, in this process; the job finds their checkpoint, keeps the model and tells the tracker."""
    config = pretrain_config(register_as="cellplm-tiny")
    run_worker(config, 1, 0, lambda metrics: None)
    report = run_pretrain(config)
    assert (report.reused, report.steps, report.version) == (True, 4, 1)
    model = load_model(report.model)
    assert (model.task, model.max_cells, model.lineage["steps"]) == ("pretrain", 40, "4")
    assert "a pre-trained cell language model" in model.card
    run = connect(local_uri(alone.home)).get_run(report.run_id)
    assert run.info.status == "FINISHED"
    assert {"train/loss", "train/nb", "train/kl", "train/cells_per_s"} <= run.data.metrics.keys()
    assert run.data.params["network.n_genes"] == "150"
    assert run.data.tags["cellplane.cells"] == "200"
    assert run_pretrain(config).version == 1


def test_pre_training_without_ray_says_how_to_start_it(pretrain_config, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(ServiceError, match="cellplane up"):
        run_pretrain(pretrain_config())


def test_pre_training_refuses_a_run_of_another_seed(pretrain_config, monkeypatch):
    run_worker(pretrain_config(), 1, 0, lambda metrics: None)
    with pytest.raises(TrainingError, match="another configuration"):
        run_pretrain(pretrain_config(plan={"seed": 1}))


def test_shards_must_be_named(alone):
    with pytest.raises(ConfigError, match="shards is empty"):
        run_pretrain(PretrainConfig())
