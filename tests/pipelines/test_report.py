"""The last words of a run say what happened to it, and nothing that did not."""

from __future__ import annotations

from pathlib import Path

from cellplane.pipelines.report import as_markdown, summary_of

STARTS = [
    {"time_ms": 1, "workers": 2, "step": 0, "because": "submitted"},
    {"time_ms": 2, "workers": 1, "step": 50, "because": "a node | was lost"},
]
REPORT = {
    "steps": 100,
    "train_loss": {"first": 2.5, "last": 0.75, "lowest": 0.7},
    "cells_per_s_median": 1234.5,
    "skipped_steps": 3,
    "starts": STARTS,
}


def test_the_summary_names_losses_speed_restarts_and_places():
    found = summary_of(REPORT, [Path("a/step-00000050"), Path("a/step-00000100")], Path("runs/r/model"))
    assert found["loss"] == "first 2.5, last 0.75"
    assert found["cells_per_s"] == "1234 (median)"
    assert found["restarts"] == "1; 1 workers from step 50 (a node | was lost)"
    assert found["skipped_steps"] == "3"
    assert found["checkpoints"] == "step-00000050, step-00000100"
    assert found["model"] == "runs/r/model"
    assert "validation_loss" not in found


def test_the_best_validation_is_told_where_there_was_one():
    report = {**REPORT, "val_loss": {"first": 3.0, "last": 2.0, "lowest": 1.5}}
    assert summary_of(report, [], Path("m"))["validation_loss"] == "lowest 1.5, last 2"


def test_the_same_lines_make_a_table_that_nothing_in_them_breaks():
    text = as_markdown("r", summary_of(REPORT, [], Path("m")))
    assert text.startswith("# Run r\n")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(row.count("|") == 3 for row in rows)
    assert "| restarts | 1; 1 workers from step 50 (a node / was lost) |" in rows
