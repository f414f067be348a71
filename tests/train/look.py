"""One worker's look at held-out sentences: `RANK=0 WORLD_SIZE=2 ... python look.py CONFIG.json`; rank 0 prints what it saw as JSON."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from cellplane.data.loader import ShardStore
from cellplane.model.cellplm import new_model
from cellplane.train.config import PretrainConfig
from cellplane.train.identity import full_model_config
from cellplane.train.validation import new_validation

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    config = PretrainConfig.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    network = new_model(full_model_config(config), config.plan.seed)
    look = new_validation(config, ShardStore(Path(config.shards)), network, (dist.get_rank(), dist.get_world_size()))
    assert look is not None
    seen = look(1)
    if dist.get_rank() == 0:
        print(json.dumps(dict(seen)), flush=True)
    dist.destroy_process_group()
    os._exit(0)
