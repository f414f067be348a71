"""One training process of a measurement: bare steps of the network, and the same steps through engine and loop.

A bare step is the least that training can be: forward, backward and the optimizer's step on micro-batches that lie ready,
with the same network and the same cells. The loop reads, drops, masks, clips, checks, journals and keeps beside that.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from cellplane.benchmark.worker import resident_bytes, serve

NEVER = 1 << 30
READY = 4  # steps whose micro-batches lie ready for bare steps; the loop goes through the same ones again and again


class Training:
    """A network with its optimizer, shards to train on, and a loop around it."""

    def __init__(self) -> None:
        self.config: Any = None
        self.engine: Any = None
        self.objective: Any = None
        self.plan: Any = None
        self.meter: Any = None
        self.works: list[Any] = []
        self.done = 0

    def make(self, folder: str, cells: int, nonzeros: int, genes: int, sentence: int) -> None:
        """Shards of random cells under ``folder``/shards, sentences of this many."""
        from cellplane.benchmark.data_convert import make
        from cellplane.data.config import ConvertConfig, DataKeys
        from cellplane.data.convert import convert_with
        from cellplane.data.work import write_part

        source = str(Path(folder) / "cells.h5ad")
        make(source, cells, genes, nonzeros, gzip=False)
        keys = DataKeys(batch_key="batch")
        config = ConvertConfig(inputs=(source,), out=str(Path(folder) / "shards"), keys=keys, max_cells=sentence)
        convert_with(config, lambda tasks: map(write_part, tasks), lambda _: None)
        Path(source).unlink()

    def setup(self, config: Mapping[str, Any], home: str, threads: int, ranks: tuple[int, int, int] = (0, 1, 0)) -> dict[str, Any]:
        """Network, engine and loop of a pre-training configuration; ``ranks`` = (this one, how many, port)."""
        import torch

        from cellplane.data.loader import ShardStore
        from cellplane.data.sentences import StepPlan
        from cellplane.model.cellplm import new_model
        from cellplane.train.config import PretrainConfig
        from cellplane.train.engine import new_engine
        from cellplane.train.identity import full_model_config
        from cellplane.train.objective import MaskedObjective, work_of
        from cellplane.train.throughput import Throughput

        torch.set_num_threads(threads)
        os.environ["CELLPLANE_HOME"] = home
        self.config = PretrainConfig.model_validate(config)
        world_size = _join(ranks) if self.config.engine.name == "deepspeed" else 1
        store = ShardStore(Path(self.config.shards))
        self.plan = StepPlan(store.sizes, self.config.plan)
        self.objective = MaskedObjective(store, self.config.masking)
        rounds = -(-self.config.plan.micro_batches_per_step // world_size)
        model = full_model_config(self.config)
        network = new_model(model, 0)
        self.meter = Throughput.of(self.config, model, store.manifest, torch.device("cpu"), world_size)
        self.engine = new_engine(network, self.config.optimizer, self.config.engine, rounds, None)
        if world_size == 1:
            steps = (self.plan.at(step) for step in range(READY))
            self.works = [work_of(self.objective, step, step) for step in steps]
        return {
            "parameters": network.n_parameters(),
            "cells": sum(int(store.sizes[list(part.sentences)].sum()) for part in self.plan.at(0)),
        }

    def bare(self, steps: int) -> dict[str, float]:
        """`wall_s`, the median of these bare steps, and `cpu_s` of one; needs the plain engine, whose network and optimizer it uses."""
        from cellplane.model.noise import Noise

        network, optimizer = self.engine.model, self.engine.optimizer
        seconds, cpu = [], time.process_time()
        for step in range(steps):
            works, total = self.works[step % READY]
            began = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            for work in works:
                loss = network(work.batch, work.mask, Noise(work.key, step)).loss
                ((loss.total * work.weights).sum() / total).backward()
            optimizer.step()
            seconds.append(time.perf_counter() - began)
        return {"wall_s": median(seconds), "cpu_s": (time.process_time() - cpu) / steps}

    def loop(self, steps: int, every: int = 0) -> dict[str, float]:
        """The same steps in the loop, a checkpoint after each ``every`` of them (0: none).

        `wall_s`: from one step's end to the next, the median; `all_s`: from the first step's end until all is written, one
        checkpoint at the very end included.
        """
        from cellplane.train.loop import train

        cpu = time.process_time()
        ends: list[float] = []

        def ended(done: int, result: object) -> bool:  # noqa: ARG001
            ends.append(time.perf_counter())
            return False

        first, self.done = self.done, self.done + steps
        with self._checkpoints(first) as checkpoints:
            keeping = self._keeping(checkpoints, first, every)
            train(self.engine, self.objective, self.plan, range(first, self.done), keeping, ended)
        gaps = [after - before for before, after in itertools.pairwise(ends)]
        return {"wall_s": median(gaps), "all_s": time.perf_counter() - ends[0], "cpu_s": (time.process_time() - cpu) / steps}

    def _checkpoints(self, first: int) -> Any:
        from cellplane.train.checkpoint import checkpoints_of
        from cellplane.train.run_folder import RunFolder

        return checkpoints_of(RunFolder.of(f"steps-{first}").path, self.config.checkpoint)

    def _keeping(self, checkpoints: Any, first: int, every: int) -> Any:
        """As a worker has it, with a journal and a meter on rank 0."""
        from cellplane.tracking.journal import Journal
        from cellplane.train.loop import Keeping
        from cellplane.train.run_folder import RunFolder

        journal = Journal(RunFolder.of(f"steps-{first}").journal) if self.engine.rank == 0 else None
        config = self.config.checkpoint.model_copy(update={"every_steps": every or NEVER})
        return Keeping(checkpoints, config, "measured", journal, meter=self.meter)

    def memory(self) -> dict[str, float]:
        """Resident bytes now and at their peak."""
        return {"rss_bytes": resident_bytes("VmRSS"), "peak_bytes": resident_bytes("VmHWM")}


def _join(ranks: tuple[int, int, int]) -> int:
    """A process group of these ranks on this machine; the number of them."""
    import torch.distributed as dist

    rank, world_size, port = ranks
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in local.items()} | {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
    dist.init_process_group("gloo")
    return world_size


def main() -> None:
    """Serves until the input ends."""
    side = Training()
    commands = (side.make, side.setup, side.bare, side.loop, side.memory)
    serve({command.__name__: command for command in commands})


if __name__ == "__main__":
    main()
