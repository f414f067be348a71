"""Scores an annotator beside its baselines, or what the first word names: `python -m jobs.evaluate impute --protocol cpu_impute`."""

from __future__ import annotations

from cellplane.cli.main import run_job
from cellplane.cli.train import evaluate_annotate, evaluate_app

if __name__ == "__main__":
    run_job(evaluate_annotate, evaluate_app)
