"""The end of a pre-training run in a few lines, the same on the terminal and in the run's artifacts (report.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def summary_of(report: Mapping[str, Any], checkpoints: Sequence[Path], model: Path) -> dict[str, str]:
    """What a person wants to know at the end; ``report`` is that of `record.report_of`, keys are in reading order."""
    starts = report["starts"]
    again = [f"{start['workers']} workers from step {start['step']} ({start['because']})" for start in starts[1:]]
    lines = {
        "steps": str(report["steps"]),
        "loss": _ends(report.get("train_loss"), "first", "last"),
        "validation_loss": _ends(report.get("val_loss"), "lowest", "last"),
        "cells_per_s": _figure(report.get("cells_per_s_median"), "median"),
        "restarts": "; ".join([str(len(again)), *again]),
        "skipped_steps": str(report["skipped_steps"]),
        "checkpoints": ", ".join(path.name for path in checkpoints) or "none here",
        "model": str(model),
    }
    return {key: line for key, line in lines.items() if line}


def as_markdown(run: str, summary: Mapping[str, str]) -> str:
    """The summary as a small table under a heading."""
    rows = [f"| {key.replace('_', ' ')} | {value.replace('|', '/')} |" for key, value in summary.items()]
    return "\n".join([f"# Run {run}", "", "| what | |", "|---|---|", *rows, ""])


def _ends(values: Mapping[str, float] | None, before: str, after: str) -> str:
    return "" if values is None else f"{before} {values[before]:.4g}, {after} {values[after]:.4g}"


def _figure(value: float | None, kind: str) -> str:
    return "" if value is None else f"{value:.4g} ({kind})"
