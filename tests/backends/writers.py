"""One of many processes that write to a tracker at once: `python writers.py URI NUMBER STEPS MODEL_FOLDER`; prints its version."""

from __future__ import annotations

import sys
from pathlib import Path

from cellplane.tracking.journal import Journal
from cellplane.tracking.registry import register
from cellplane.tracking.runs import RunSpec, TrackedRun

if __name__ == "__main__":
    uri, number, steps, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    journal = Journal(folder.parent / f"journal-{number}.jsonl")
    for step in range(1, steps + 1):
        journal.append(step, {"train/loss": number + 1 / step}, time_ms=1_700_000_000_000 + step)
    run = TrackedRun.open(RunSpec(run_key=f"writer-{number}", experiment="cellplane/many", name=f"writer-{number}"), uri)
    run.replay(journal)
    run.log_artifacts(folder, "model")
    run.finish()
    print(run.run_id, register(folder, run.run_id, "many", uri))
