"""The body of one worker: from the newest valid checkpoint to the last step, inside whatever process group there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from cellplane.data.loader import ShardStore
from cellplane.data.remote import shards_here
from cellplane.errors import CheckpointError
from cellplane.model.cellplm import CellPLM, new_model
from cellplane.processes import locked
from cellplane.tracking.journal import Journal
from cellplane.train.checkpoint import TrainingState, checkpoints_of
from cellplane.train.components import begin_at_directions, samples_of
from cellplane.train.config import PretrainConfig
from cellplane.train.elastic import Room, agreed
from cellplane.train.engine import new_engine
from cellplane.train.identity import full_model_config, run_identity
from cellplane.train.loop import AfterStep, Keeping, Looking, train
from cellplane.train.run_folder import RunFolder
from cellplane.train.staging import objective_for
from cellplane.train.step import Engine, StepResult
from cellplane.train.throughput import Throughput
from cellplane.train.validation import Validation, new_validation, split_of, training_plan
from cellplane.train.watchdog import Peer, Watchdog, collective_limit_s

WRITER_WAIT_S = 60.0  # a worker whose driver was killed lives on for some seconds

ValueT = TypeVar("ValueT")
Report = Callable[[Mapping[str, float]], None]


def run_worker(
    config: PretrainConfig, world_size: int, rank: int, report: Report, room: Room | None = None, writer_wait_s: float = WRITER_WAIT_S
) -> None:
    """Runs one rank: builds store, network and engine, then the loop; ``report`` hears how many steps are done.

    ``room`` (rank 0 of an elastic run) says whether a larger group would fit; then the group ends at a checkpoint.
    ``writer_wait_s`` is how long the writer of an earlier group may need to end; no collective waits that long for rank 0.
    Raises CheckpointError when the ranks do not see the same run folder, ServiceError when another process trains this
    run, and what `train` raises.
    """
    folder = RunFolder.of(config.run)
    with _alone(folder, writer_wait_s, rank), _watched(folder, config, world_size, rank) as watchdog:
        report({"step": float(_train(config, world_size, rank, watchdog, room))})


@contextmanager
def _alone(folder: RunFolder, wait_s: float, rank: int) -> Iterator[None]:
    """Only one process writes a run, however often it was submitted; the other ranks wait meanwhile."""
    with locked(folder.lock, wait_s) if rank == 0 else nullcontext():
        yield


@contextmanager
def _watched(folder: RunFolder, config: PretrainConfig, world_size: int, rank: int) -> Iterator[Watchdog]:
    peers = gathered(Peer.here(rank), world_size)  # nobody reads the folder before rank 0 alone may write it
    with Watchdog(folder.stacks, rank, peers, config.workers.collective_timeout_s).watching() as watchdog:
        yield watchdog


def _train(config: PretrainConfig, world_size: int, rank: int, watchdog: Watchdog, room: Room | None) -> int:
    shards = shards_here(config.shards)  # before anything is read from them
    folder, identity = RunFolder.of(config.run), run_identity(config)
    with checkpoints_of(folder.path, config.checkpoint) as checkpoints:  # left when the last one is on the disk
        state = _same_everywhere(checkpoints.newest_valid(identity), world_size)
        done = 0 if state is None else state.step
        store, where = ShardStore(shards), device_of(config)
        network = _begun(config, store, done).to(where)
        engine = _engine(config, network, world_size, state)
        keeping = Keeping(
            checkpoints,
            config.checkpoint,
            identity,
            journal=_journal(folder, done) if rank == 0 else None,
            looking=_looking(config, new_validation(config, store, network, (rank, world_size)), watchdog),
            meter=Throughput.of(config, full_model_config(config), store.manifest, where, world_size) if rank == 0 else None,
        )
        steps, after = range(done, config.optimizer.steps), _after_step(config, world_size, watchdog, room)
        return train(engine, objective_for(store, config.masking, where), training_plan(config, store), steps, keeping, after)


def _begun(config: PretrainConfig, store: ShardStore, done: int) -> CellPLM:
    """The network as its first step finds it; what a checkpoint holds comes later."""
    network = new_model(full_model_config(config), config.plan.seed)
    if config.gene_start == "components" and not done:
        sentences = split_of(store, config.validation.share, config.plan.seed).training
        samples = list(samples_of(store, sentences, network.config.input_total, config.plan.seed))
        begin_at_directions(network, samples, config.components)
    return network


def _engine(config: PretrainConfig, network: nn.Module, world_size: int, state: TrainingState | None) -> Engine:
    rounds = -(-config.plan.micro_batches_per_step // world_size)
    engine = new_engine(network, config.optimizer, config.engine, rounds, state, config.guard)
    limit_collectives(collective_limit_s(config.workers.collective_timeout_s))
    return engine


def _looking(config: PretrainConfig, validation: Validation | None, watchdog: Watchdog) -> Looking | None:
    if validation is None:
        return None

    def look(done: int) -> Mapping[str, float]:
        watchdog.beat(done)
        found = validation(done)
        watchdog.beat(done)
        return found

    return Looking(config.validation.every_steps, look)


def _after_step(config: PretrainConfig, world_size: int, watchdog: Watchdog, room: Room | None) -> AfterStep:
    """Tells the watchdog, and at a checkpoint of an elastic run whether to end the group so that a larger one begins."""
    workers = config.workers

    def after_step(done: int, _: StepResult) -> bool:
        watchdog.beat(done)
        due = workers.elastic and world_size < workers.most and done % config.checkpoint.every_steps == 0
        return due and agreed(room is not None and room(), device_of(config))

    return after_step


def device_of(config: PretrainConfig) -> torch.device:
    """Where the network lives; with a GPU the one that the launcher chose for this worker."""
    return torch.device("cuda", torch.cuda.current_device()) if config.workers.use_gpu else torch.device("cpu")


def limit_collectives(timeout_s: float) -> None:
    """Gives every process group our time limit: those that DeepSpeed makes would wait for 30 minutes."""
    from torch.distributed import distributed_c10d as c10d

    if dist.is_available() and dist.is_initialized():
        for group in list(c10d._world.pg_map):
            c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def gathered(value: ValueT, world_size: int) -> list[ValueT]:
    """The value of every rank."""
    if world_size == 1:
        return [value]
    values: list[ValueT | None] = [None] * world_size
    dist.all_gather_object(values, value)
    return [found for found in values if found is not None]


def _same_everywhere(state: TrainingState | None, world_size: int) -> TrainingState | None:
    steps = gathered(0 if state is None else state.step, world_size)
    if len(set(steps)) > 1:
        raise CheckpointError(
            f"the workers would go on from different steps, by rank: {', '.join(map(str, steps))}; "
            "CELLPLANE_HOME must be one folder that every node sees"
        )
    return state


def _journal(folder: RunFolder, done: int) -> Journal:
    journal = Journal(folder.journal)
    journal.cut(done)
    return journal
