"""Scores a model beside its baselines: `python -m jobs.evaluate --config configs/evaluate/annotate.yaml -o model=...`."""

from __future__ import annotations

from cellplane.cli.main import run_job
from cellplane.cli.train import evaluate_annotate

if __name__ == "__main__":
    run_job(evaluate_annotate)
