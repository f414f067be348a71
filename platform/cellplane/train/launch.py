"""Masked pre-training on a cluster: groups of workers, one after another, until the last step is done.

Ray Train starts each group; every worker runs the one loop (worker.py), and our own checkpoints hold the state. What
happens when a group is lost is decided here and not by Ray: errors that would come back end the run at once, a lost
process or node is replaced by a new group, as large as the cluster allows, that picks the newest valid checkpoint. Each
group uses a fresh Ray run name, so nothing stale of Ray's own can stand in the way.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from cellplane.artifact.folder import ModelFolder, save_model
from cellplane.config import home, to_plain
from cellplane.data.inputs import SOURCE_DIGITS
from cellplane.data.loader import ShardStore
from cellplane.data.remote import fetch_shards, is_url, shard_folder
from cellplane.errors import CellplaneError, CheckpointError, ServiceError, TrainingError
from cellplane.train.checkpoint import TrainingState, checkpoints_of
from cellplane.train.checks import origin_of
from cellplane.train.config import PretrainConfig, WorkersConfig
from cellplane.train.elastic import Nodes, has_room, resources_of
from cellplane.train.gauges import GAUGES, Set, exported
from cellplane.train.identity import DETERMINING as DETERMINING
from cellplane.train.identity import describe_run as describe_run
from cellplane.train.identity import full_model_config as full_model_config
from cellplane.train.identity import run_identity as run_identity
from cellplane.train.run_folder import RunFolder as RunFolder
from cellplane.train.watchdog import collective_limit_s, ended_after_s, found_stacks
from cellplane.train.worker import WRITER_WAIT_S
from cellplane.train.worker import run_worker as run_worker

log = logging.getLogger(__name__)

SETTLING_S = 10.0  # a job that has just ended gives its CPUs back a little later
SUBMITTED = "submitted"  # why a run's first group begins
REJOIN_S = 600.0  # a node that was lost may come back
# Threads that wait must sleep: spinning ones make everything that shares their cores slow (STACK.md 9)
QUIET_THREADS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


@dataclass(frozen=True)
class PretrainOutcome:
    """A finished run: its model folder, steps done in all and in this call, and how long this call took."""

    model: Path
    steps: int
    steps_now: int
    seconds: float


class _GroupLost(Exception):
    """A group of workers ended for a reason that may pass; ``ran`` is False when it never began."""

    def __init__(self, reason: str, ran: bool = True) -> None:
        super().__init__(reason, ran)
        self.reason, self.ran = reason, ran


def pretrain(config: PretrainConfig) -> PretrainOutcome:
    """Trains to the configured number of steps, going on from what the run folder holds, and writes the model folder.

    Needs an initialised Ray. Raises TrainingError when the run fails for good, CheckpointError when its checkpoints do
    not fit, DataError when the shards are damaged, StorageError when their URL cannot be read.
    """
    shards = fetch_shards(config.shards)
    if not is_url(config.shards):
        config = config.model_copy(update={"shards": str(shards.absolute())})  # workers have working folders of their own
    began = time.monotonic()
    folder = RunFolder.of(config.run)
    found = newest_state(config)
    done = 0 if found is None else found.step
    if done < config.optimizer.steps:
        if not ray.is_initialized():
            raise ServiceError("training needs Ray: start a local cluster with `cellplane up`, or set RAY_ADDRESS")
        check_room(config.workers)
        folder.remember(config, origin_of(config))
        _train_through(config, folder, done)
    state = newest_state(config)
    if state is None or state.step != config.optimizer.steps:
        raise TrainingError(f"the run ended without a checkpoint of step {config.optimizer.steps} in {folder.checkpoints}")
    save_model(_model_folder(config, state), folder.model)
    return PretrainOutcome(folder.model, state.step, state.step - done, time.monotonic() - began)


def ray_job_id() -> str:
    """Ray's name for this job; `none` without a cluster."""
    return str(ray.get_runtime_context().get_job_id()) if ray.is_initialized() else "none"


def newest_state(config: PretrainConfig) -> TrainingState | None:
    """The newest valid state of the run, None before its first checkpoint; CheckpointError names the settings that differ."""
    folder = RunFolder.of(config.run)
    try:
        return checkpoints_of(folder.path, config.checkpoint).newest_valid(run_identity(config))
    except CheckpointError as error:
        if differing := folder.differences(config, DETERMINING):
            raise CheckpointError(f"{error}; {'; '.join(differing[:3])}") from error
        raise


def _model_folder(config: PretrainConfig, state: TrainingState) -> ModelFolder:
    store = ShardStore(shard_folder(config.shards))
    return ModelFolder(
        config=full_model_config(config),
        weights=state.weights,
        vocabulary=store.vocabulary,
        task="pretrain",
        max_cells=store.manifest.max_cells,
        lineage={
            **({} if config.purpose is None else {"purpose": config.purpose}),
            "data_fingerprint": store.manifest.fingerprint,
            "sources": " ".join(entry.sha256[:SOURCE_DIGITS] for entry in store.manifest.datasets),  # whether a file was seen
            "training_cells": str(store.manifest.cells),
            "decoder_batches": json.dumps(store.manifest.batch_names),  # whose names its decoder knows
            "run": config.run,
            "run_identity": run_identity(config),
            "steps": str(state.step),
            "plan_seed": str(config.plan.seed),
            "validation_share": str(config.validation.share),  # with the seed it tells what the model never saw
        },
    )


def _train_through(config: PretrainConfig, folder: RunFolder, done: int) -> None:
    """Groups of workers until the last step; TrainingError when too many in a row were lost without a new checkpoint."""
    failures, because, patience_s = 0, SUBMITTED, 0.0
    while done < config.optimizer.steps:
        count = _await_room(config.workers, patience_s)
        folder.started(count, done, because)
        try:
            done, because = _run_group(config, folder, count, again=because != SUBMITTED), "there is room for more workers"
        except _GroupLost as loss:
            reached = _kept(config)
            failures = failures + loss.ran if reached == done else int(loss.ran)
            if failures > config.workers.max_failures:
                raise TrainingError(f"run {config.run} failed: {loss.reason}; run it again to go on from the last checkpoint") from loss
            log.warning("workers of run %s were lost (%s); going on from step %d", config.run, loss.reason, reached)
            done, because = reached, loss.reason
        patience_s = REJOIN_S


def _kept(config: PretrainConfig) -> int:
    state = newest_state(config)
    return 0 if state is None else state.step


def check_room(workers: WorkersConfig) -> None:
    """ServiceError when the cluster as it is cannot hold even the least number of workers."""
    each, nodes = resources_of(workers), _nodes()
    if nodes.holds(each) >= workers.least:
        return
    asked = " and ".join(f"{workers.least * amount:g} {name}s" for name, amount in each.items())
    there = " and ".join(f"{sum(node.get(name, 0.0) for node in nodes.totals):g} {name}s" for name in each)
    raise ServiceError(
        f"{workers.least} workers of {workers.cpus} CPUs need {asked}, the cluster has {there}; "
        "start fewer (-o workers.count=1), the losses stay the same"
    )


def _nodes() -> Nodes:
    return Nodes(tuple(node["Resources"] for node in ray.nodes() if node["Alive"]), ray.available_resources())


def _await_room(workers: WorkersConfig, patience_s: float) -> int:
    """Workers the next group gets; waits for busy CPUs, and for ``patience_s`` also for a lost node (then ServiceError)."""
    each, began, told = resources_of(workers), time.monotonic(), False
    while True:
        nodes = _nodes()
        wanted, now = min(nodes.holds(each), workers.most), min(nodes.holds_now(each), workers.most)
        waited = time.monotonic() - began
        if now >= workers.least and (now >= wanted or waited > SETTLING_S):
            return now
        if wanted < workers.least and waited > patience_s:
            check_room(workers)
        if waited > SETTLING_S and not told:
            log.warning(
                "waiting: the run needs %d x %s, free are %s; a node is lost, or another job holds too much",
                workers.least,
                each,
                nodes.free,
            )
            told = True
        time.sleep(0.2)


@dataclass(frozen=True)
class GroupSettings:
    """What Ray Train is told about one group of workers; ``controller`` are variables of the process that starts them."""

    scaling: Any
    run: Any
    backend: Any
    controller: Mapping[str, str]


def group_settings(config: PretrainConfig, folder: RunFolder, count: int) -> GroupSettings:
    """The group of ``count`` workers as Ray Train wants it; asks no cluster, so that the GPU path can be looked at anywhere."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from cellplane.train.network import AddressedTorchConfig

    workers = config.workers
    timeout_s = workers.collective_timeout_s
    environment = {**QUIET_THREADS, "OMP_NUM_THREADS": str(workers.cpus), "CELLPLANE_HOME": str(home())}
    environment |= {} if workers.use_gpu else {"DS_ACCELERATOR": "cpu"}
    environment |= {name: os.environ[name] for name in ("FAULT_AT", "FAULT_SIGNAL") if name in os.environ}
    return GroupSettings(
        scaling=ScalingConfig(num_workers=count, use_gpu=workers.use_gpu, resources_per_worker=resources_of(workers)),
        run=RunConfig(
            name=f"{config.run}-{uuid.uuid4().hex[:8]}",
            storage_path=str(folder.path / "ray"),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # this module decides
            worker_runtime_env={"env_vars": environment},
        ),
        backend=AddressedTorchConfig(backend="nccl" if workers.use_gpu else "gloo", timeout_s=int(collective_limit_s(timeout_s))),
        controller={"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(timeout_s), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1"},
    )


def _run_group(config: PretrainConfig, folder: RunFolder, count: int, again: bool = False) -> int:
    """Steps done when a group of ``count`` workers has ended by itself; _GroupLost, or the error that would come back.

    ``again``: there was a group before. Its writer may live on a host that was cut off, and end only when its step is overdue.
    """
    from ray.train.torch import TorchTrainer

    settings, began = group_settings(config, folder, count), time.time()
    timeout_s = config.workers.collective_timeout_s
    wait_s = ended_after_s(timeout_s) if again else min(WRITER_WAIT_S, timeout_s / 2)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": to_plain(config), "writer_wait_s": wait_s},
        scaling_config=settings.scaling,
        run_config=settings.run,
        torch_config=settings.backend,
    )
    try:
        with _interruptible(), _environment(settings.controller):
            return int(trainer.fit().return_value)
    except Exception as error:
        cause = _cause(error)
        if type(cause) is TrainingError:
            raise TrainingError(f"run {config.run} failed: {cause}; run it again to go on from the last checkpoint") from error
        if isinstance(cause, CellplaneError):
            raise cause from error  # it would fail again: no word about running it again
        stalled = ", ".join(path.name for path in found_stacks(folder.stacks, began))
        reason = f"a step did not end within {config.workers.collective_timeout_s} s, see {folder.stacks}: {stalled}" if stalled else ""
        raise _GroupLost(reason or _last_line(cause), ran="WorkerGroupStartupTimeout" not in f"{type(cause)}{error}") from error


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Settings that Ray Train reads from this process; what the person set stays."""
    ours = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C stays Ctrl-C: Ray Train takes over SIGINT, keeps it, and ends the process with code 0 and no word."""
    here = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stopped:
        raise KeyboardInterrupt from stopped
    finally:
        if here:
            signal.signal(signal.SIGINT, before)


def _cause(error: BaseException) -> BaseException:
    """What really went wrong: Ray wraps a worker's error in several others; one of ours tells more than a lost connection."""
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", None) or {0: error}
    causes = [_innermost(failure) for failure in failures.values()]
    return next((cause for cause in causes if isinstance(cause, CellplaneError)), causes[0])


def _innermost(error: BaseException) -> BaseException:
    cause = error
    while (
        (inner := getattr(cause, "cause", None) or cause.__cause__) is not None
        and inner is not cause
        and not isinstance(cause, CellplaneError)
    ):
        cause = inner
    return cause


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _worker(settings: dict[str, Any]) -> int:
    """One worker of a group: how many steps are done when it ends by itself."""
    from ray import train as ray_train

    config = PretrainConfig.model_validate(settings["config"])
    torch.set_num_threads(config.workers.cpus)
    context, last = ray_train.get_context(), 0

    def report(metrics: Mapping[str, float]) -> None:
        nonlocal last
        last = int(metrics["step"])
        ray_train.report(dict(metrics))

    size, rank = context.get_world_size(), context.get_world_rank()
    with exported(RunFolder.of(config.run).journal, _gauges(config.run)) if rank == 0 else nullcontext():
        run_worker(config, size, rank, report, lambda: has_room(config.workers, _nodes(), size), settings["writer_wait_s"])
    return last


def _gauges(run: str) -> Set:
    """Sets a gauge of this run; Ray hands it to Prometheus."""
    from ray.util.metrics import Gauge

    gauges = {name: Gauge(name, description=told, tag_keys=("run",)) for name, told in GAUGES.items()}
    return lambda name, value: gauges[name].set(value, {"run": run})
