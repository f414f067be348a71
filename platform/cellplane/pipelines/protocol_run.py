"""What the full protocols share: reading data sets and bases, ledgers by what decides the scores, and the report at the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellplane import __version__
from cellplane.artifact.folder import ModelFolder, load_model
from cellplane.config import fingerprint, home, to_plain
from cellplane.data.files import file_sha256
from cellplane.data.inputs import SOURCE_DIGITS, source_sha256
from cellplane.data.sources import AnnData, column, read_h5ad
from cellplane.errors import ConfigError, DataError
from cellplane.pipelines.evaluation_report import Report, log_evaluation, write_report
from cellplane.pipelines.protocol import Evaluation, Ledger
from cellplane.pipelines.protocol_config import EvaluatedData, Protocol
from cellplane.pipelines.task_pictures import with_pictures
from cellplane.tracking.registry import resolve_model
from cellplane.tracking.runs import resolve_uri

Say = Callable[[str], None]  # a line for whoever waits
ENTRIES = "entries.jsonl"


@dataclass(frozen=True)
class Finished:
    """A written evaluation; ``run_id`` is None when no tracker answered."""

    evaluation: Evaluation
    report: Report
    run_id: str | None


@dataclass(frozen=True)
class Opened:
    """A data set of a protocol as it was found: cells, bases by name, and a checksum of all that decides scores on it."""

    cells: AnnData
    bases: Mapping[str, ModelFolder]
    identity: str


class Ledgers:
    """One file of entries; each question has a ledger of what was measured under exactly its settings."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ENTRIES
        self._known: dict[str, Ledger] = {}

    def of(self, *decisive: Any) -> Ledger:
        """The ledger for these JSON-ready settings."""
        identity = hashlib.sha256(json.dumps([__version__, *decisive], sort_keys=True).encode()).hexdigest()
        if identity not in self._known:
            self._known[identity] = Ledger(self.path, identity)
        return self._known[identity]


def quiet(line: str) -> None:
    """The Say that tells nobody."""


def out_of(config: Protocol, task: str) -> Path:
    """The folder of an evaluation."""
    return Path(config.out) if config.out else home() / "evaluations" / task


def check_protocol(config: Protocol) -> None:
    """ConfigError for no data set, a file or a model that is not there, or a tracker that is none; before any work begins."""
    resolve_uri(config.tracking_uri)
    if not config.data:
        raise ConfigError("no data set is named: give one with -o data.NAME.path=FILE.h5ad, or list them in the file")
    for name, asked in config.data.items():
        if not Path(asked.path).is_file():
            raise ConfigError(f"data.{name}.path: no file {asked.path!r}; name it with -o data.{name}.path=FILE.h5ad")
        reference = getattr(asked, "reference", None)
        if reference is not None and not Path(reference).is_file():
            raise ConfigError(f"data.{name}.reference: no file {reference!r}; name it with -o data.{name}.reference=FILE.h5ad")
        for source in config.bases_for(name).values():
            resolve_model(source, config.tracking_uri, home() / "cache")


def open_bases(config: Protocol, name: str) -> dict[str, ModelFolder]:
    """The base models of a data set by name; raises what loading raises."""
    return loaded(config.bases_for(name), config.tracking_uri)


def loaded(bases: Mapping[str, str], uri: str | None) -> dict[str, ModelFolder]:
    """Base models by name."""
    return {label: load_model(resolve_model(source, uri, home() / "cache").path) for label, source in bases.items()}


def open_data(name: str, asked: EvaluatedData, bases: Mapping[str, str], uri: str | None) -> Opened:
    """A data set with its base models. Raises DataError for a missing batch column or coordinates, and what loading raises."""
    path = Path(asked.path)
    cells = read_h5ad(path)
    key = asked.keys.spatial_key
    if key is not None and key not in cells.obsm:
        raise DataError(f"{name}: there is no obsm[{key!r}]; name the entry of the coordinates with -o data.{name}.keys.spatial_key=...")
    if asked.keys.batch_key is not None:
        column(cells, asked.keys.batch_key)
    plain = {key: value for key, value in to_plain(asked).items() if key not in ("path", "bases", "most_splits")}
    if plain.get("optimizer") is None:
        plain.pop("optimizer", None)  # came later: what was measured without stays known
    identity = hashlib.sha256(json.dumps([plain, file_sha256(path)], sort_keys=True).encode()).hexdigest()
    return Opened(cells, loaded(bases, uri), identity)


def seen(base: ModelFolder, path: Path) -> bool | None:
    """Whether the base was pre-trained on this file, by its checksum; None when the model does not say what it saw."""
    known = base.lineage.get("sources")
    return None if known is None else source_sha256(path, False)[:SOURCE_DIGITS] in known.split()


def base_notes(name: str, files: Sequence[str], bases: Mapping[str, ModelFolder]) -> list[str]:
    """One line for each base: whether it had seen cells of these files; such a row is no zero-shot row."""
    words = {
        True: "SEEN IN PRE-TRAINING: self-supervised on the same cells, not zero-shot",
        False: "not among the files it was pre-trained on",
        None: "the model does not say which files it was pre-trained on",
    }
    lines = []
    for label, base in bases.items():
        found = {seen(base, Path(file)) for file in files}
        worst = next(answer for answer in (True, None, False) if answer in found)
        lines.append(f"{name}, base {label} ({base.model_sha256[:12]}): {words[worst]}")
    return lines


def finish(evaluation: Evaluation, config: Protocol, title: str) -> Finished:
    """Draws what the task's entries allow beside the pictures that are there, writes the report and tells the tracker."""
    out = out_of(config, evaluation.task)
    evaluation = with_pictures(evaluation, out / "pictures")
    report = write_report(evaluation, out, title)
    return Finished(evaluation, report, log_evaluation(evaluation, out, fingerprint(config), to_plain(config), config.tracking_uri))
