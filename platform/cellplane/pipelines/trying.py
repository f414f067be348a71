"""Should I use it on my data? Hide a part of it, let the model and tuned simple methods answer, say who was better.

What was measured is kept line by line, so a trial that was killed goes on; the answer of the winner is written whole or not
at all. The user's file is never changed.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cellplane import __version__
from cellplane.artifact.folder import ModelFolder, save_model, verify_model
from cellplane.config import fingerprint, home
from cellplane.data.files import atomic_file, leaves_nothing
from cellplane.data.inputs import source_sha256
from cellplane.data.sources import read_h5ad, write_h5ad
from cellplane.errors import DataError, about
from cellplane.pipelines.evaluation_report import LEGEND, as_markdown, sections
from cellplane.pipelines.pages import paragraph, write_page
from cellplane.pipelines.protocol import Ledger
from cellplane.pipelines.try_annotation import ANNOTATE
from cellplane.pipelines.try_config import TryConfig
from cellplane.pipelines.try_denoising import DENOISE
from cellplane.pipelines.try_embedding import EMBED
from cellplane.pipelines.try_imputation import IMPUTE
from cellplane.pipelines.try_parts import Bench, Say, Task, Tried
from cellplane.pipelines.try_perturbation import PERTURB
from cellplane.pipelines.verdict import Verdict
from cellplane.tracking.registry import resolve_model

log = logging.getLogger(__name__)

TASKS: Mapping[str, Task] = {"annotate": ANNOTATE, "embed": EMBED, "impute": IMPUTE, "denoise": DENOISE, "perturb": PERTURB}


@dataclass(frozen=True)
class TryReport:
    """The verdict, the page about it, and with --auto the file or model folder of the answer (None: there is none) and what it holds."""

    verdict: Verdict
    page: Path
    answer: Path | None = None
    told: str = ""


def run_try(config: TryConfig, say: Say | None = None) -> TryReport:
    """Tries a task on the user's file; ``say`` hears what goes on. Raises ConfigError and DataError before any fit."""
    tell = say or log.info
    config.check()
    task = TASKS[str(getattr(config, "task", ""))]
    identity = _identity(config)
    ledger = Ledger(config.folder / "measured.jsonl", identity)
    bench = Bench(ledger, tell, config.folder / "pictures")
    names = " or ".join(filter(None, (config.data, config.reference)))
    with leaves_nothing(config.folder, lambda: bool(ledger.entries())), about(names):
        tried = task.measure(config, bench)
    page = write_try_page(config, tried)
    if not config.auto:
        return TryReport(tried.verdict, page)
    answer, told = _answer(config, task, tried.verdict.winner, identity)
    return TryReport(tried.verdict, page, answer, told)


def write_try_page(config: TryConfig, tried: Tried) -> Path:
    """report.html: the verdict on top, what it rests on below; the same as report.md beside it."""
    title = f"Try {tried.evaluation.task}: {Path(config.data).name}"
    told = as_markdown(tried.evaluation, title, config.folder).split("\n\n", 1)  # heading | the rest
    body = [paragraph(tried.verdict.text, "verdict"), paragraph(tried.how), paragraph(LEGEND), *sections(tried.evaluation)]
    page = write_page(config.folder / "report.html", title, body)
    with atomic_file(config.folder / "report.md") as temporary:
        temporary.write_text("\n\n".join([told[0], f"**{tried.verdict.text}**", tried.how, *told[1:]]), encoding="utf-8")
    return page


def _answer(config: TryConfig, task: Task, winner: str, identity: str) -> tuple[Path | None, str]:
    """The winner's answer, written now or by an earlier run of the same trial."""
    auto = {"identity": identity, "winner": winner}
    for path in (config.answer, config.learned):
        if (told := _answered(path, auto)) is not None:
            return path, f"{told} (written before)"
    found, told = task.answer(config, winner)
    if found is None:
        return None, told
    if isinstance(found, ModelFolder):
        return save_model(replace(found, lineage={**found.lineage, **auto, "told": told}), config.learned), told
    found.uns["auto"] = {**auto, "told": told}
    write_h5ad(found, config.answer)
    return config.answer, told


def _answered(path: Path, auto: Mapping[str, str]) -> str | None:
    """What the answer of this very trial says of itself; None when there is none."""
    try:
        known = verify_model(path)["lineage"] if path.is_dir() else _auto_of(path) if path.is_file() else {}
    except DataError:
        return None
    return str(known["told"]) if all(known.get(key) == value for key, value in auto.items()) else None


def _auto_of(path: Path) -> Mapping[str, Any]:
    known = read_h5ad(path, backed=True)
    try:
        return dict(known.uns.get("auto", {}))
    finally:
        known.file.close()


def _identity(config: TryConfig) -> str:
    """All that decides the scores: the settings and the bytes of the files."""
    settings = fingerprint(config.model_copy(update={"data": "", "reference": None, "out": None, "auto": False, "tracking_uri": None}))
    base = "none" if config.base_model is None else resolve_model(config.base_model, config.tracking_uri, home() / "cache").path
    bytes_of_base = base if isinstance(base, str) else verify_model(base)["model_sha256"]
    tree = getattr(getattr(config, "recipe", None), "hierarchy_file", None)
    files = [source_sha256(existing(path), False) for path in (config.data, config.reference, tree) if path]
    return hashlib.sha256(" ".join([settings, __version__, bytes_of_base, *files]).encode()).hexdigest()


def existing(path: str) -> Path:
    """The path; DataError when there is no file."""
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file")
    return Path(path)
