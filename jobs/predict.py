"""Annotates h5ad files, or what the first word names: `python -m jobs.predict embed FILE.h5ad --model ... --out ...`."""

from __future__ import annotations

from cellplane.cli.main import run_job
from cellplane.cli.predict import predict_annotate, predict_app

if __name__ == "__main__":
    run_job(predict_annotate, predict_app)
