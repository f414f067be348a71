"""Workers as forks of one process that has imported everything: a group starts in a second instead of ten."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from cellplane.train.config import PretrainConfig

PRELOADED = ["torch", "deepspeed", "cellplane.train.worker", "tests.chaos.forks"]
WAIT_S = 180


def run_forked(config: PretrainConfig, home: Path, world_size: int, environment: Mapping[str, str] | None = None) -> list[int]:
    """Runs the workers of a configuration under a home; their exit codes, one for each rank, -9 for a killed one."""
    context = multiprocessing.get_context("forkserver")
    os.environ["DS_ACCELERATOR"] = "cpu"
    context.set_forkserver_preload(PRELOADED)
    home.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(world_size)}
    shared |= {"CELLPLANE_HOME": str(home), "FAULT_AT": "", "FAULT_SIGNAL": "SIGKILL", **(environment or {})}
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
    workers = [context.Process(target=_rank, args=(config.model_dump_json(), one, str(home))) for one in ranks]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join(WAIT_S)
        return [worker.exitcode if worker.exitcode is not None else 1000 for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _rank(config: str, environment: dict[str, str], home: str) -> None:
    os.environ.update(environment)
    log = os.open(Path(home) / f"rank-{environment['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import traceback
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from cellplane.train.worker import run_worker

    code = 1
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        run_worker(PretrainConfig.model_validate_json(config), dist.get_world_size(), dist.get_rank(), lambda metrics: None)
        dist.destroy_process_group()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # DeepSpeed's exit handlers take seconds
