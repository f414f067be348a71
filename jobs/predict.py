"""Annotates h5ad files (`-o task=embed` embeds them): `python -m jobs.predict FILE.h5ad --model ... --out ...`."""

from __future__ import annotations

from cellplane.cli.main import run_job
from cellplane.cli.predict import predict_annotate

if __name__ == "__main__":
    run_job(predict_annotate)
