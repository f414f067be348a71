"""Ray keeps the workers alive; what a run goes on from is in its own folder."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cellplane.artifact.folder import load_model
from cellplane.data.shards import read_manifest
from cellplane.errors import CheckpointError, ConfigError, IntegrityError, ServiceError, TrainingError
from cellplane.inference import Predictor
from cellplane.tracking.journal import Journal
from cellplane.train import launch
from cellplane.train.config import PretrainConfig
from cellplane.train.identity import describe_run, full_model_config, run_identity
from cellplane.train.launch import _cause, group_settings, pretrain
from cellplane.train.run_folder import RunFolder
from cellplane.train.worker import run_worker
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


def test_a_word_of_ours_tells_more_than_the_connections_it_broke():
    lost, ours = RuntimeError("Connection closed by peer"), TrainingError("the loss is not finite")
    wrapped = RuntimeError("worker group failed")
    wrapped.worker_failures = {0: lost, 1: ours}
    assert _cause(wrapped) is ours


def test_a_gpu_run_asks_ray_for_gpus_nccl_and_time_limits(run_config, cellplane_home, monkeypatch):
    """What the launcher would do on a machine with GPUs; nothing of it needs one."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    config = run_config("r", {"workers": {"count": 8, "cpus": 4, "use_gpu": True, "collective_timeout_s": 100}})
    settings = group_settings(config, RunFolder.of("r"), 8)
    assert (settings.scaling.num_workers, settings.scaling.use_gpu) == (8, True)
    assert settings.scaling.resources_per_worker == {"CPU": 4.0, "GPU": 1.0}
    assert (settings.backend.backend, settings.backend.timeout_s) == ("nccl", 180)
    assert settings.controller["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] == "100"
    assert "DS_ACCELERATOR" not in settings.run.worker_runtime_env["env_vars"]
    assert settings.run.worker_runtime_env["env_vars"]["OMP_NUM_THREADS"] == "4"


def test_a_cpu_run_asks_for_gloo_and_threads_that_sleep_while_they_wait(run_config, cellplane_home):
    settings = group_settings(run_config("r"), RunFolder.of("r"), 2)
    assert (settings.backend.backend, settings.scaling.use_gpu) == ("gloo", False)
    asked = settings.run.worker_runtime_env["env_vars"]
    expected = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    assert expected.items() <= asked.items()
    assert asked["CELLPLANE_HOME"] == str(cellplane_home)


def test_each_group_has_a_run_name_of_its_own_and_ray_restarts_nothing(run_config, cellplane_home):
    first, second = (group_settings(run_config("r"), RunFolder.of("r"), 2).run for _ in range(2))
    assert first.name != second.name
    assert (first.failure_config.max_failures, first.failure_config.controller_failure_limit) == (0, 0)


class Groups:
    """Stands for the cluster: groups that end as told, after so many steps."""

    def __init__(self, ends: list[int | Exception], kept: list[int]) -> None:
        self.ends, self.kept, self.sizes, self.again = ends, kept, [], []

    def run(self, config: PretrainConfig, folder: RunFolder, count: int, again: bool) -> int:
        self.sizes.append(count)
        self.again.append(again)
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int | Exception], list[int]], Groups]:
    def make(ends: list[int | Exception], kept: list[int]) -> Groups:
        made = Groups(ends, kept)
        monkeypatch.setattr(launch, "_run_group", made.run)
        monkeypatch.setattr(launch, "_kept", lambda config: made.kept.pop(0))
        monkeypatch.setattr(launch, "_await_room", lambda workers, patience_s: 2)
        return made

    return make


def test_losses_with_a_new_checkpoint_in_between_never_end_a_run(groups, run_config, cellplane_home):
    lost = launch._GroupLost("a worker died")
    config, folder = run_config("r", {"workers": {"max_failures": 1}}), RunFolder.of("r")
    made = groups([lost, lost, lost, lost, STEPS], [3, 4, 5, 6])
    launch._train_through(config, folder, 0)
    assert made.again == [False, True, True, True, True]  # so that the next one waits for a writer that was cut off
    assert [start.step for start in folder.starts()] == [0, 3, 4, 5, 6]


def test_losses_without_progress_end_it_with_the_reason(groups, run_config, cellplane_home):
    lost = launch._GroupLost("a worker died")
    groups([lost, lost, lost], [3, 3, 3])
    with pytest.raises(TrainingError, match=r"run r failed: a worker died; run it again to go on"):
        launch._train_through(run_config("r", {"workers": {"max_failures": 1}}), RunFolder.of("r"), 0)


def test_a_group_that_found_no_room_counts_as_no_loss(groups, run_config, cellplane_home):
    no_room = launch._GroupLost("no placement", ran=False)
    made = groups([no_room, no_room, no_room, STEPS], [0, 0, 0])
    launch._train_through(run_config("r", {"workers": {"max_failures": 0}}), RunFolder.of("r"), 0)
    assert len(made.sizes) == 4


@pytest.mark.cluster
def test_more_workers_than_the_cluster_has_are_refused_at_once(ray_cluster, run_config, cellplane_home):
    with pytest.raises(ServiceError, match=r"3 workers of 1 CPUs need 3 CPUs, the cluster has 2 CPUs.*workers.count=1"):
        pretrain(run_config("r", {"workers": {"count": 3}}))
    with pytest.raises(ServiceError, match=r"need 1 CPUs and 1 GPUs, the cluster has 2 CPUs and 0 GPUs"):
        pretrain(run_config("r", {"workers": {"count": 1, "use_gpu": True}}))
    assert not RunFolder.of("r").config.exists()


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
    hopeless = {"optimizer": {"lr": 1e30, "warmup_steps": 0}, "guard": {"max_skips": 2}, "workers": {"count": 1, "max_failures": 5}}
    config = run_config("nan", {**hopeless, **TORCH})
    with pytest.raises(TrainingError, match=r"run nan failed: .*not finite.*run it again"):
        pretrain(config)
    assert len(RunFolder.of("nan").starts()) == 1  # it would only happen again
