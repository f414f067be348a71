"""Fine-tunes an annotator: `python -m jobs.finetune --config configs/finetune/annotate.yaml -o data=...`."""

from __future__ import annotations

from cellplane.cli.finetune import finetune_annotate
from cellplane.cli.main import run_job

if __name__ == "__main__":
    run_job(finetune_annotate)
