"""Annotating every h5ad of a folder from one labelled atlas: annotated copies and one report, never a changed input.

The annotator is a fine-tuning job like any other (checkpoints, journal, tracker); each file is finished by itself and kept, so
whatever was killed goes on behind the last one. A file that cannot be read is reported and skipped.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field

from cellplane import __version__
from cellplane.config import Config, fingerprint, home
from cellplane.data.config import UNLABELLED, DataKeys
from cellplane.data.files import atomic_file, gone_if_empty
from cellplane.data.inputs import check_answers, find_inputs, source_sha256
from cellplane.data.sources import AnnData, cell_table, check_h5ad, column, read_h5ad, write_h5ad
from cellplane.errors import ConfigError, DataError, about
from cellplane.inference import UNKNOWN, query_keys
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.baselines import log_cp10k
from cellplane.pipelines.config import AnnotationConfig, FinetuneConfig, UnknownConfig
from cellplane.pipelines.finetuning import identity_of, run_finetune
from cellplane.pipelines.gene_names import GeneNames
from cellplane.pipelines.job import JobReport, Progress, quiet
from cellplane.pipelines.protocol import Found, Ledger, Method, Place
from cellplane.pipelines.second_opinion import Atlas, Choice, counts_of

log = logging.getLogger(__name__)

OPINION = "baseline_cell_type"  # obs column of the second opinion
Say = Callable[[str], None]


class AnnotateConfig(Config):
    """Annotating a folder of h5ad files from a labelled reference."""

    kind: Literal["annotate"] = "annotate"
    """What this file configures."""
    folder: str = ""
    """Folder whose h5ad files are annotated; they are never changed."""
    reference: str = ""
    """h5ad of labelled cells to learn from."""
    out: str | None = None
    """Folder of the annotated copies and the report; None: $CELLPLANE_HOME/annotated/<name of the folder>."""
    keys: DataKeys = DataKeys()
    """Where counts lie in the files; batch_key names their samples in the report, and cells of two never share a sentence."""
    base_model: str | None = None
    """Model folder or models:/NAME@ALIAS to fine-tune; None trains from scratch."""
    recipe: AnnotationConfig = AnnotationConfig(unknown=UnknownConfig(reject=True))
    """How the annotator learns from the reference; recipe.keys says where counts and labels lie there."""
    opinion_cells: int = Field(10_000, ge=100)
    """The second opinion is tuned and fitted on at most so many cells of the reference."""
    markers: int = Field(3, ge=1)
    """Genes of every type in the dot plot."""
    tracking_uri: str | None = None
    """MLflow server or database; None: $MLFLOW_TRACKING_URI, else a database under $CELLPLANE_HOME."""


@dataclass(frozen=True)
class Summary:
    """What the report tells of a file, JSON-ready.

    ``samples``: {name: cells, unknown, flagged, agree (cells), confidence (quartiles)}. ``pairs``: [[model's label, second
    opinion, cells]]. ``dots``: {type: cells, and for each marker the cells that show it and the sum of its log levels}.
    """

    source: str
    bytes: int
    samples: Mapping[str, Mapping[str, Any]]
    pairs: list[tuple[str, str, int]]
    dots: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class FolderReport:
    """Files annotated now and before, what failed: {file: reason}; the annotator, its second opinion, and the summaries by file."""

    out: Path
    model: JobReport
    opinion: tuple[Choice, float]
    written: tuple[Path, ...]
    reused: tuple[Path, ...]
    failed: Mapping[str, str]
    summaries: Mapping[str, Summary] = field(default_factory=dict)
    genes: tuple[str, ...] = ()  # the markers of the dots


@dataclass(frozen=True)
class Annotator:
    """All that answers: the model, the atlas for the second opinion, the choice of it, the markers; ``identity`` of all that."""

    pipeline: CellTypeAnnotationPipeline
    atlas: Atlas
    choice: Choice
    markers: list[int]
    keys: DataKeys
    seed: int
    identity: str


def learn_reference(config: AnnotateConfig, progress: Progress = quiet) -> JobReport:
    """The annotator of a reference, by a job that goes on where it was killed and is reused when it finished."""
    return run_finetune(job_of(config), progress)


def annotate_folder(config: AnnotateConfig, learned: JobReport | None = None, say: Say | None = None) -> FolderReport:
    """Annotates every file into `config.out` with what `learn_reference` made; ``say`` hears of every file.

    Raises ConfigError and DataError before any work for what is missing; a file that cannot be used is in the report.
    """
    tell = say or log.info
    inputs, out = check_folder(config)
    report = learned or learn_reference(config)
    with gone_if_empty(out), about(config.reference):
        annotator, opinion = _annotator(config, report, out)
    written: list[Path] = []
    reused: list[Path] = []
    failed: dict[str, str] = {}
    summaries: dict[str, Summary] = {}
    for number, path in enumerate(inputs, 1):
        answer = out / path.name
        try:
            known = _finished(path, answer, annotator.identity)
            summaries[path.name] = known or annotate_file(annotator, path, answer)
            (reused if known else written).append(answer)
            tell(f"[{number}/{len(inputs)}] {path.name}: {_told(summaries[path.name])}{', done before' if known else ''}")
        except DataError as error:
            failed[path.name] = str(error)
            tell(f"[{number}/{len(inputs)}] {path.name}: skipped, {error}")
    genes = tuple(annotator.atlas.genes[gene] for gene in annotator.markers)
    return FolderReport(out, report, opinion, tuple(written), tuple(reused), failed, summaries, genes)


def check_folder(config: AnnotateConfig) -> tuple[list[Path], Path]:
    """The h5ad files to annotate, without the reference should it lie among them, and the folder of the answers."""
    for name in ("folder", "reference"):
        if not getattr(config, name):
            raise ConfigError(f"{name} is empty: cellplane annotate FOLDER --reference ATLAS.h5ad")
    folder, reference = Path(config.folder), Path(config.reference)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; name the folder of the h5ad files")
    inputs = [path for path in find_inputs([str(folder)]) if path.suffix == ".h5ad" and path.resolve() != reference.resolve()]
    if not inputs:
        raise DataError(f"{folder} holds no .h5ad file to annotate (the reference itself does not count)")
    out = Path(config.out) if config.out else home() / "annotated" / folder.resolve().name
    check_answers(inputs, out)
    return inputs, out


def job_of(config: AnnotateConfig) -> FinetuneConfig:
    """The fine-tuning job that makes the annotator; the same settings and data give the same run name."""
    plain = {name: getattr(config.recipe, name) for name in AnnotationConfig.model_fields}
    where = {"data": config.reference, "base_model": config.base_model, "tracking_uri": config.tracking_uri}
    job = FinetuneConfig.model_validate({**plain, **where, "run": "annotate-folder"})
    if not Path(config.reference).is_file():
        raise DataError(f"{config.reference}: no such file; name an h5ad of labelled cells as the reference")
    return job.model_copy(update={"run": f"annotate-{identity_of(job)[:12]}"})


def _annotator(config: AnnotateConfig, report: JobReport, out: Path) -> tuple[Annotator, tuple[Choice, float]]:
    """The model, and the second opinion, chosen once and remembered in ``out``."""
    pipeline = CellTypeAnnotationPipeline.load(report.model)
    pipeline.set_params(config={"keys": config.keys})  # of the files, which need not lie as the reference does
    assert pipeline.folder_ is not None
    atlas = read_atlas(read_h5ad(Path(config.reference)), pipeline, config.recipe.keys).thinned(config.opinion_cells, config.recipe.seed)
    settings = fingerprint(config.model_copy(update={"folder": "", "reference": "", "out": None, "tracking_uri": None}))
    known = (pipeline.folder_.model_sha256, settings, source_sha256(Path(config.reference), False), __version__)
    identity = hashlib.sha256(" ".join(known).encode()).hexdigest()
    ledger = Ledger(out / "opinion.jsonl", identity)
    entry = ledger.measured(
        Place("reference", "inner", 0, config.recipe.seed), Method("opinion", "baseline"), lambda: _opinion(atlas, config)
    )
    choice = (str(entry.details["family"]), str(entry.details["setting"]))
    markers = atlas.markers(config.markers)
    annotator = Annotator(pipeline, atlas, choice, markers, config.keys, config.recipe.seed, identity)
    return annotator, (choice, entry.metrics["macro_f1"])


def _opinion(atlas: Atlas, config: AnnotateConfig) -> Found:
    (family, setting), score = atlas.choose(config.recipe.seed)
    return Found({"macro_f1": score}, {"family": family, "setting": setting})


def read_atlas(reference: AnnData, pipeline: CellTypeAnnotationPipeline, keys: DataKeys) -> Atlas:
    """The labelled cells of a reference over the vocabulary of the annotator that learned them."""
    assert pipeline.folder_ is not None
    vocabulary = pipeline.folder_.vocabulary
    labels = column(reference, str(keys.labels_key))
    known = np.array([label is not None and label not in UNLABELLED for label in labels])
    table, _ = cell_table(reference, vocabulary, query_keys(reference, keys))
    return Atlas(
        table.rows(np.flatnonzero(known)), labels[known].astype(str).astype(object), GeneNames.of(reference, vocabulary, keys).labels
    )


def annotate_file(annotator: Annotator, path: Path, answer: Path) -> Summary:
    """Reads a file, writes the annotated copy, then what the report tells of it: a file without its summary is done again."""
    source = source_sha256(path, False)
    data = read_h5ad(path)
    if data.n_obs == 0:
        raise DataError(f"{path} holds no cells")
    table = annotator.pipeline.annotate(data)
    opinion = annotator.atlas.answers(annotator.choice, table, annotator.seed)
    labels = data.obs["cellplm_cell_type"].astype(str).to_numpy()
    data.obs[OPINION] = pd.Categorical(opinion, categories=list(annotator.atlas.types))
    data.obs["cellplm_agrees"] = labels == opinion
    data.uns["cellplm"] |= {"second_opinion": " ".join(annotator.choice), "annotate_identity": annotator.identity}
    write_h5ad(data, answer)
    dots = _dots(log_cp10k(counts_of(table))[:, annotator.markers].toarray(), labels)
    summary = Summary(source, answer.stat().st_size, _samples(data, annotator.keys), _pairs(labels, opinion), dots)
    _write(_beside(answer), {"identity": annotator.identity, **asdict(summary)})
    return summary


def _samples(data: AnnData, keys: DataKeys) -> dict[str, dict[str, Any]]:
    """Numbers of every sample; all cells are one where no column tells samples apart."""
    known = keys.batch_key is not None and keys.batch_key in data.obs
    names = column(data, str(keys.batch_key)).astype(str) if known else np.full(data.n_obs, "all cells", dtype=object)
    flagged = data.obs["cellplm_flag"].notna().to_numpy() if "cellplm_flag" in data.obs else np.zeros(data.n_obs, dtype=bool)
    unknown = (data.obs["cellplm_cell_type"].astype(str) == UNKNOWN).to_numpy()
    confidence, agrees = data.obs["cellplm_confidence"].to_numpy(), data.obs["cellplm_agrees"].to_numpy()
    found = {}
    for name in sorted(set(names)):
        own = names == name
        numbers = {"cells": own.sum(), "unknown": (own & unknown).sum(), "flagged": (own & flagged).sum(), "agree": (own & agrees).sum()}
        quartiles = np.quantile(confidence[own], (0.25, 0.5, 0.75))
        found[str(name)] = {**{key: int(value) for key, value in numbers.items()}, "confidence": [float(value) for value in quartiles]}
    return found


def _pairs(labels: NDArray[Any], opinion: NDArray[Any]) -> list[tuple[str, str, int]]:
    counted = Counter(zip(labels.tolist(), opinion.tolist(), strict=True))
    return [(mine, theirs, cells) for (mine, theirs), cells in sorted(counted.items())]


def _dots(logs: NDArray[Any], labels: NDArray[Any]) -> dict[str, dict[str, Any]]:
    found = {}
    for name in sorted(set(labels)):
        own = logs[labels == name]
        found[str(name)] = {"cells": len(own), "shown": (own > 0).sum(0).tolist(), "level": own.sum(0).astype(float).tolist()}
    return found


def _beside(answer: Path) -> Path:
    return answer.parent / "summaries" / f"{answer.name}.json"


def _write(path: Path, plain: Mapping[str, Any]) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(plain), encoding="utf-8")


def _finished(path: Path, answer: Path, identity: str) -> Summary | None:
    """The summary of an annotated copy of this very file by this very annotator; None when there is none."""
    try:
        plain = json.loads(_beside(answer).read_text(encoding="utf-8"))
        if plain.pop("identity") != identity or plain["bytes"] != answer.stat().st_size or plain["source"] != source_sha256(path, False):
            return None
        check_h5ad(answer)
        return Summary(**{**plain, "pairs": [tuple(pair) for pair in plain["pairs"]]})
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not whole: it is made again
        return None


def _told(summary: Summary) -> str:
    cells, unknown, agree = (sum(sample[name] for sample in summary.samples.values()) for name in ("cells", "unknown", "agree"))
    return f"{cells} cells, {unknown / cells:.1%} unknown, second opinion agrees on {agree / cells:.1%}"
