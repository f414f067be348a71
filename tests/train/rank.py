"""One worker of a pre-training run in a process group of its own, without Ray: `RANK=0 WORLD_SIZE=2 ... python rank.py CONFIG.json`."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from cellplane.train.config import PretrainConfig
from cellplane.train.worker import run_worker

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    config = PretrainConfig.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    run_worker(config, dist.get_world_size(), dist.get_rank(), lambda metrics: None)
    dist.destroy_process_group()
    os._exit(0)  # DeepSpeed's exit handlers take seconds
