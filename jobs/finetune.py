"""Fine-tunes an annotator, or what the first word names: `python -m jobs.finetune denoise --config denoise -o data=...`."""

from __future__ import annotations

from cellplane.cli.finetune import finetune_annotate, finetune_app
from cellplane.cli.main import run_job

if __name__ == "__main__":
    run_job(finetune_annotate, finetune_app)
