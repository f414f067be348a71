"""What a pre-training run tells about itself: the tags of its origin, its pictures, and a report of how it went."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from statistics import median
from typing import Any

from cellplane.config import fingerprint
from cellplane.data.shards import Manifest
from cellplane.model.config import ModelConfig
from cellplane.pipelines import plots
from cellplane.tracking.journal import Journal, JournalRow
from cellplane.tracking.runs import RunSpec, code_tags
from cellplane.train.config import PretrainConfig
from cellplane.train.identity import describe_run, run_identity
from cellplane.train.run_folder import RunFolder
from cellplane.train.throughput import count_parameters

LOSSES = ("train/loss", "val/loss")


def pretraining_spec(config: PretrainConfig, manifest: Manifest, name: str, ray_job: str = "none") -> RunSpec:
    """The run in the tracker: found again by its key whatever restarts; its tags say what it was made from."""
    return RunSpec(
        run_key=f"pretrain:{config.run}:{run_identity(config)[:16]}",
        experiment="cellplane/pretrain",
        name=name,
        params=describe_run(config),
        tags={
            **code_tags(),
            "config_sha256": fingerprint(config),
            "data_fingerprint": manifest.fingerprint,
            "cells": manifest.cells,
            "vocabulary_fingerprint": manifest.vocabulary_fingerprint,
            "base_model": "none",
            "ray_job_id": ray_job,
            "world_size": config.workers.count,
        },
    )


def draw_pretraining(journal: Journal, folder: Path, run: str) -> list[Path]:
    """loss.png, course.png (speed, learning rate, gradients), and validation.png where there was one."""
    rows: list[dict[str, Any]] = [{"step": row.step, "metrics": dict(row.metrics)} for row in journal.rows()]
    drawn = [plots.loss_plot(rows, folder / "loss.png", f"Pre-training loss, {run}")]
    drawn.append(plots.course_plot(rows, folder / "course.png", f"Course of the run, {run}"))
    if any("val/loss" in row["metrics"] for row in rows):
        drawn.append(plots.validation_plot(rows, folder / "validation.png", f"Held-out cells, {run}"))
    return drawn


def report_of(folder: RunFolder, model: ModelConfig) -> dict[str, Any]:
    """How a finished run went, JSON-ready: steps, losses, speed, what was skipped, how often and with how many it began."""
    rows, starts = Journal(folder.journal).rows(), folder.starts()
    return {
        "parameters": sum(count_parameters(model).values()),
        "steps": max((row.step for row in rows), default=0),
        **{key.replace("/", "_"): ends for key in LOSSES if (ends := _ends(rows, key))},
        "cells_per_s_median": _median(rows, "train/cells_per_s"),
        "mfu_median": _median(rows, "train/mfu"),
        "rss_peak_bytes": _largest(rows, "system/rss_peak_bytes"),
        "gpu_peak_bytes": _largest(rows, "system/gpu_peak_bytes"),
        "skipped_steps": int(_largest(rows, "train/nan_skips") or 0),
        "seconds": (rows[-1].time_ms - rows[0].time_ms) / 1000 if rows else 0.0,
        "starts": [{"time_ms": start.time_ms, "workers": start.workers, "step": start.step, "because": start.because} for start in starts],
    }


def report_line(report: Mapping[str, Any]) -> str:
    """The report as one line for a person who waits."""
    loss, speed = report.get("train_loss", {}), report["cells_per_s_median"]
    parts = [
        f"{report['parameters']:,} parameters, {report['steps']} steps, loss {loss.get('first', nan):.4g} -> {loss.get('last', nan):.4g}"
    ]
    parts += [] if speed is None else [f"{speed:.4g} cells/s"]
    parts += [f"{report['skipped_steps']} steps skipped"] if report["skipped_steps"] else []
    parts += [f"{len(report['starts']) - 1} restarts"] if len(report["starts"]) > 1 else []
    return ", ".join(parts)


def held_out_scores(journal: Journal) -> dict[str, dict[str, float]] | None:
    """The last look at held-out cells, for the model card; None when nothing was held out."""
    looks = [row.metrics for row in journal.rows() if "val/loss" in row.metrics]
    if not looks:
        return None
    return {"cellplm": {key.removeprefix("val/"): value for key, value in looks[-1].items() if key.startswith("val/")}}


def write_report(report: Mapping[str, Any], artifacts: Path) -> Path:
    """report.json among the artifacts of a run."""
    path = artifacts / "report.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return path


def closing_tags(report: Mapping[str, Any]) -> dict[str, object]:
    """Tags that only the end knows: the last number of workers, all of them in order, and how often the run began again."""
    sizes = [start["workers"] for start in report["starts"]]
    if not sizes:
        return {}
    return {"world_size": sizes[-1], "world_sizes": " ".join(map(str, sizes)), "restarts": len(sizes) - 1}


def _values(rows: Sequence[JournalRow], key: str) -> list[float]:
    return [row.metrics[key] for row in rows if key in row.metrics and math.isfinite(row.metrics[key])]


def _ends(rows: Sequence[JournalRow], key: str) -> dict[str, float]:
    """The first, the last and the lowest value; nothing when there is none."""
    values = _values(rows, key)
    return {"first": values[0], "last": values[-1], "lowest": min(values)} if values else {}


def _median(rows: Sequence[JournalRow], key: str) -> float | None:
    values = _values(rows, key)
    return median(values) if values else None


def _largest(rows: Sequence[JournalRow], key: str) -> float | None:
    return max(_values(rows, key), default=None)
