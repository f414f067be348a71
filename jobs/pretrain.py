"""Pre-trains by masking: `python -m jobs.pretrain --config configs/pretrain/demo.yaml -o shards=...`."""

from __future__ import annotations

from cellplane.cli.main import run_job
from cellplane.cli.train import pretrain

if __name__ == "__main__":
    run_job(pretrain)
