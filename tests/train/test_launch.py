"""Ray keeps the workers alive; what a run goes on from is in its own folder."""

from __future__ import annotations

import pytest

from cellplane.artifact.folder import load_model
from cellplane.data.shards import read_manifest
from cellplane.errors import CheckpointError, ConfigError, IntegrityError, ServiceError, TrainingError
from cellplane.inference import Predictor
from cellplane.tracking.journal import Journal
from cellplane.train.launch import RunFolder, _cause, describe_run, full_model_config, pretrain, run_identity, run_worker
from tests.train.conftest import STEPS

TORCH = {"engine": {"name": "torch"}}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", ".hidden", "/tmp"])
def test_a_run_name_cannot_lead_out_of_the_home(name):
    with pytest.raises(ConfigError, match="cannot be a folder's name"):
        RunFolder.of(name)


def test_the_identity_covers_what_changes_the_numbers_and_nothing_else(run_config):
    identity = run_identity(run_config("a"))
    kept = {"checkpoint": {"every_steps": 1}, "register_as": "x"}
    for indifferent in (TORCH, {"workers": {"count": 7}}, kept, {"engine": {"zero_stage": 3}}):
        assert run_identity(run_config("b", indifferent)) == identity
    for changed in ({"plan": {"seed": 1}}, {"optimizer": {"lr": 1.0}}, {"masking": {"cell_mask_rate": 0.5}}, {"model": {"dropout": 0.0}}):
        assert run_identity(run_config("a", changed)) != identity


def test_the_network_gets_its_sizes_from_the_shards(run_config, shards):
    model = full_model_config(run_config("a"))
    assert (model.n_genes, model.n_batches, model.n_datasets) == (24, 2, 0)
    assert describe_run(run_config("a"))["network"]["n_genes"] == read_manifest(shards).n_genes


def test_without_ray_the_error_says_how_to_start_it(run_config, cellplane_home, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(ServiceError, match="cellplane up"):
        pretrain(run_config("a"))


def test_a_finished_run_needs_no_ray_and_no_training(run_config, cellplane_home, monkeypatch):
    config = run_config("a", TORCH)
    run_worker(config, 1, 0, lambda metrics: None)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    outcome = pretrain(config)
    assert (outcome.steps, outcome.steps_now) == (STEPS, 0)
    folder = load_model(outcome.model)
    assert folder.lineage["run_identity"] == run_identity(config)
    assert folder.task == "pretrain"
    assert Predictor.load(outcome.model).max_cells == 12


def test_a_run_folder_of_other_data_or_settings_is_refused(run_config, cellplane_home):
    run_worker(run_config("a", TORCH), 1, 0, lambda metrics: None)
    with pytest.raises(CheckpointError, match="another configuration or other data"):
        pretrain(run_config("a", {**TORCH, "plan": {"seed": 1}}))


@pytest.mark.cluster
def test_shards_are_found_by_a_path_relative_to_where_the_person_is(ray_cluster, run_config, shards, cellplane_home, monkeypatch):
    """Workers have working folders of their own."""
    monkeypatch.chdir(shards.parent)
    config = run_config("relative", {**TORCH, "shards": shards.name, "workers": {"count": 1}})
    assert pretrain(config).steps == STEPS


def test_an_error_in_the_data_is_not_dressed_up_as_a_failed_run():
    damaged = IntegrityError("shard a.arrow is damaged")
    wrapped = TrainingError("worker group failed")
    wrapped.worker_failures = {0: damaged}
    assert _cause(wrapped) is damaged
    outer = RuntimeError("outer")
    outer.__cause__ = damaged
    assert _cause(outer) is damaged


@pytest.mark.cluster
def test_a_killed_worker_is_started_again_and_the_run_ends_as_if_nothing_happened(
    ray_cluster, run_config, run_workers, cellplane_home, tmp_path_factory, monkeypatch, losses
):
    """Ray Train, DeepSpeed ZeRO 2, two workers; rank 1 dies once after step 5, before step 6 is kept."""
    config = run_config("r", {"workers": {"count": 2, "max_failures": 1, "collective_timeout_s": 30}})
    flag = cellplane_home / "killed"
    monkeypatch.setenv("FAULT_AT", f"step_rank1:4:{flag}")
    outcome = pretrain(config)
    assert flag.exists()
    assert (outcome.steps, outcome.steps_now) == (STEPS, STEPS)
    undisturbed = tmp_path_factory.mktemp("undisturbed")
    assert run_workers(config, undisturbed, 2) == [0, 0]
    assert losses(cellplane_home, "r") == losses(undisturbed, "r")
    again = pretrain(config)
    assert again.steps_now == 0
    assert len(Journal(RunFolder.of("r").journal).rows()) == STEPS


@pytest.mark.cluster
def test_a_run_that_cannot_work_fails_with_the_reason_and_the_way_on(ray_cluster, run_config, cellplane_home):
    config = run_config("nan", {"optimizer": {"lr": 1e30, "warmup_steps": 0}, "workers": {"count": 1, "max_failures": 0}, **TORCH})
    with pytest.raises(TrainingError, match=r"run nan failed: .*not finite.*run it again"):
        pretrain(config)
