"""Converts AnnData (h5ad, zarr) to shards: `python -m jobs.convert --config configs/data/default.yaml -o out=...`."""

from __future__ import annotations

from cellplane.cli.data import convert
from cellplane.cli.main import run_job

if __name__ == "__main__":
    run_job(convert)
