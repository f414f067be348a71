"""Masked pre-training on a cluster: Ray Train starts the workers, each runs the one loop, our checkpoints hold the state.

Ray keeps the processes alive and restarts them after a failure. What a restart continues from is ours alone: every
start of the loop picks the newest valid checkpoint of the run folder. Each submission uses a fresh Ray run name, so
nothing stale of Ray's own can stand in the way.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import ray
import torch

from cellplane.artifact.folder import ModelFolder, save_model
from cellplane.config import home, to_plain
from cellplane.data.loader import ShardStore
from cellplane.data.sentences import StepPlan
from cellplane.data.shards import read_manifest
from cellplane.errors import ConfigError, DataError, ServiceError, TrainingError
from cellplane.model.cellplm import new_model
from cellplane.model.config import ModelConfig, identifying
from cellplane.tracking.journal import Journal
from cellplane.train.checkpoint import Checkpoints
from cellplane.train.config import PretrainConfig
from cellplane.train.engine import new_engine
from cellplane.train.loop import Keeping, train
from cellplane.train.objective import MaskedObjective

log = logging.getLogger(__name__)

SETTLING_S = 10.0  # a job that has just ended gives its CPUs back a little later
DETERMINING = ("model", "masking", "plan", "optimizer")  # sections that change the numbers; workers, engine and keeping do not


@dataclass(frozen=True)
class RunFolder:
    """Where everything of a run lies: checkpoints, journal, artifacts, the finished model."""

    path: Path

    @classmethod
    def of(cls, run: str) -> RunFolder:
        """The folder of a run name, under $CELLPLANE_HOME/runs; ConfigError for a name that is not a plain file name."""
        if not run or Path(run).name != run or run.startswith("."):
            raise ConfigError(f"run {run!r} cannot be a folder's name: use letters, digits, '-', '_' and '.'")
        return cls(home() / "runs" / run)

    @property
    def checkpoints(self) -> Path:
        """Checkpoint folders."""
        return self.path / "checkpoints"

    @property
    def journal(self) -> Path:
        """Metrics of every step, JSON lines."""
        return self.path / "journal.jsonl"

    @property
    def model(self) -> Path:
        """The finished model folder."""
        return self.path / "model"

    @property
    def artifacts(self) -> Path:
        """Files for the tracker: configuration, plots."""
        return self.path / "artifacts"


@dataclass(frozen=True)
class PretrainOutcome:
    """A finished run: its model folder, steps done in all and in this call, and how long this call took."""

    model: Path
    steps: int
    steps_now: int
    seconds: float


def full_model_config(config: PretrainConfig) -> ModelConfig:
    """The network with the sizes that the shards determine."""
    manifest = read_manifest(Path(config.shards))
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
    parts = {name: identifying(plain[name]) for name in DETERMINING} | {"data": read_manifest(Path(config.shards)).fingerprint}
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def pretrain(config: PretrainConfig) -> PretrainOutcome:
    """Trains to the configured number of steps, going on from what the run folder holds, and writes the model folder.

    Needs an initialised Ray. Raises TrainingError when the run fails for good, CheckpointError when its checkpoints do
    not fit, DataError when the shards are damaged.
    """
    config = config.model_copy(update={"shards": str(Path(config.shards).absolute())})  # workers have working folders of their own
    began = time.monotonic()
    folder = RunFolder.of(config.run)
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep)
    identity = run_identity(config)
    found = checkpoints.newest_valid(identity)
    done = 0 if found is None else found.step
    if done < config.optimizer.steps:
        if not ray.is_initialized():
            raise ServiceError("training needs Ray: start a local cluster with `cellplane up`, or set RAY_ADDRESS")
        _check_room(config)
        _fit(config, folder)
    state = checkpoints.newest_valid(identity)
    if state is None or state.step != config.optimizer.steps:
        raise TrainingError(f"the run ended without a checkpoint of step {config.optimizer.steps} in {folder.checkpoints}")
    store = ShardStore(Path(config.shards))
    model = ModelFolder(
        config=full_model_config(config),
        weights=state.weights,
        vocabulary=store.vocabulary,
        task="pretrain",
        max_cells=store.manifest.max_cells,
        lineage={
            "data_fingerprint": store.manifest.fingerprint,
            "training_cells": str(store.manifest.cells),
            "run": config.run,
            "run_identity": identity,
            "steps": str(state.step),
        },
    )
    save_model(model, folder.model)
    return PretrainOutcome(folder.model, state.step, state.step - done, time.monotonic() - began)


def _check_room(config: PretrainConfig) -> None:
    """A cluster too small for the workers is an error, a busy one worth a word: Ray itself waits without an end."""
    wanted = config.workers.count * config.workers.cpus
    existing = ray.cluster_resources().get("CPU", 0.0)
    if existing < wanted:
        raise ServiceError(
            f"{config.workers.count} workers of {config.workers.cpus} CPUs need {wanted} CPUs, the cluster has {existing:g}; "
            "start fewer (-o workers.count=1), the losses stay the same"
        )
    deadline = time.monotonic() + SETTLING_S
    while ray.available_resources().get("CPU", 0.0) < wanted:
        if time.monotonic() > deadline:
            log.warning("waiting for CPUs: the run needs %d of %g, another job or an endpoint holds too many", wanted, existing)
            return
        time.sleep(0.2)


def _fit(config: PretrainConfig, folder: RunFolder) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    workers = config.workers
    resources = {"CPU": workers.cpus, **({"GPU": 1} if workers.use_gpu else {})}
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": to_plain(config), "home": str(home()), "fault": os.environ.get("FAULT_AT", "")},
        scaling_config=ScalingConfig(num_workers=workers.count, use_gpu=workers.use_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name=f"{config.run}-{uuid.uuid4().hex[:8]}",
            storage_path=str(folder.path / "ray"),
            failure_config=FailureConfig(max_failures=workers.max_failures),
        ),
        torch_config=TorchConfig(backend="nccl" if workers.use_gpu else "gloo", timeout_s=workers.collective_timeout_s),
    )
    try:
        with _interruptible():
            trainer.fit()
    except Exception as error:
        if isinstance(cause := _cause(error), DataError | ConfigError):
            raise cause from error  # it would fail again: no word about running it again
        raise TrainingError(f"run {config.run} failed: {_last_line(cause)}; run it again to go on from the last checkpoint") from error


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
    """What really went wrong: Ray wraps a worker's error in several others."""
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", None) or {}
    cause: BaseException = next(iter(failures.values()), error)
    while (inner := getattr(cause, "cause", None) or cause.__cause__) is not None and inner is not cause:
        cause = inner
    return cause


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _worker(settings: dict[str, Any]) -> None:
    """One worker's run, from the newest valid checkpoint to the last step."""
    from ray import train as ray_train

    os.environ.update(CELLPLANE_HOME=settings["home"], FAULT_AT=settings["fault"])
    config = PretrainConfig.model_validate(settings["config"])
    torch.set_num_threads(config.workers.cpus)
    context = ray_train.get_context()
    run_worker(config, context.get_world_size(), context.get_world_rank(), lambda metrics: ray_train.report(dict(metrics)))


def run_worker(config: PretrainConfig, world_size: int, rank: int, report: Callable[[Mapping[str, float]], None]) -> None:
    """The body of a worker, also callable inside any process group: builds store, network and engine, runs the loop."""
    folder, identity = RunFolder.of(config.run), run_identity(config)
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep)
    state = checkpoints.newest_valid(identity)
    store = ShardStore(Path(config.shards))
    network = new_model(full_model_config(config), config.plan.seed)
    if config.workers.use_gpu:
        network = network.to("cuda")
    rounds = -(-config.plan.micro_batches_per_step // world_size)
    engine = new_engine(network, config.optimizer, config.engine, rounds, state)
    done = 0 if state is None else state.step
    journal = Journal(folder.journal) if rank == 0 else None
    if journal is not None:
        folder.path.mkdir(parents=True, exist_ok=True)
        journal.cut(done)
    keeping = Keeping(checkpoints, config.checkpoint, identity, journal)
    plan = StepPlan(store.sizes, config.plan, store.draw_weights(config.plan.weights))
    last = train(engine, MaskedObjective(store, config.masking), plan, range(done, config.optimizer.steps), keeping)
    report({"step": float(last)})


def describe_run(config: PretrainConfig) -> dict[str, object]:
    """Parameters worth seeing beside a run: the resolved configuration and the sizes that follow from the data."""
    return {**to_plain(config), "network": asdict(full_model_config(config))}
