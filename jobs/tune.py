"""Searches for a better recipe: `python -m jobs.tune --config configs/tune/annotate.yaml -o fixed.data=...`."""

from __future__ import annotations

from cellplane.cli.main import run_job
from cellplane.cli.tune import tune_annotate

if __name__ == "__main__":
    run_job(tune_annotate)
