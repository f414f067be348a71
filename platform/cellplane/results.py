"""Answers, and where they stand in an AnnData: the keys that notebooks, batch jobs and the client all write."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellplane.artifact.folder import ModelFolder
from cellplane.data.company import Context
from cellplane.data.sentences import CellTable
from cellplane.data.sources import AnnData, read_h5ad
from cellplane.errors import DataError

log = logging.getLogger(__name__)

LABELS_DERIVED = ("unknown_score", "agrees")  # columns that are worth nothing once a cell has another label
WARNINGS = "warnings"  # key of a record: sentences that whoever reads the answer should know; it is not there without any
NO_COUNTS, NO_KNOWN_COUNTS = "no counts", "no counts in genes the model knows"


@dataclass(frozen=True)
class Annotation:
    """Cell types in the caller's order: ``labels`` [n] str, ``confidence`` [n] in [0, 1], ``proba`` [n, n_classes].

    A cell without counts in genes the model knows is UNKNOWN, with confidence 0; its probabilities say what the model
    thinks of the context alone. ``unknown_score`` [n]: how strange a cell is, see `artifact.judgement`; None from models
    that did not learn it.
    """

    labels: NDArray[np.object_]
    confidence: NDArray[np.float32]
    proba: NDArray[np.float32]
    classes: tuple[str, ...]
    unknown_score: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Denoised:
    """``rates`` per 10,000, [n, n_vars] float32: NaN for genes without a place in the vocabulary; and the cells they are of."""

    rates: NDArray[np.float32]
    table: CellTable
    report: Mapping[str, Any]


def write_annotation(data: AnnData, annotation: Annotation, key_added: str = "cellplm") -> None:
    """Writes labels (categorical), confidence, probabilities and, where known, the unknown score under our usual keys."""
    others = sorted({str(label) for label in annotation.labels} - {*annotation.classes})  # unknown, and broader names
    data.obs[f"{key_added}_cell_type"] = pd.Categorical(annotation.labels, categories=[*annotation.classes, *others])
    data.obs[f"{key_added}_confidence"] = annotation.confidence
    for name in LABELS_DERIVED:  # an earlier model's
        if f"{key_added}_{name}" in data.obs:
            del data.obs[f"{key_added}_{name}"]
    if annotation.unknown_score is not None:
        data.obs[f"{key_added}_unknown_score"] = annotation.unknown_score
    data.obsm[f"{key_added}_cell_type_proba"] = annotation.proba


def write_denoised(data: AnnData, found: Denoised, key_added: str = "cellplm") -> None:
    """Writes layers[key_denoised], rates per 10,000, and obs[key_size_factor], each cell's counts in genes the model knows."""
    data.layers[f"{key_added}_denoised"] = found.rates
    data.obs[f"{key_added}_size_factor"] = found.table.totals().astype(np.float32)


def write_embedding(data: AnnData, latent: NDArray[np.float32], table: CellTable, key_added: str = "cellplm") -> None:
    """Writes obsm[X_key], and in obs[key_flag] which cells have the embedding of their context alone."""
    write_flags(data, table, key_added)
    data.obsm[f"X_{key_added}"] = latent


def write_flags(data: AnnData, table: CellTable, key_added: str = "cellplm") -> None:
    """Says in obs[key_flag] which cells show the model nothing, and why; without such cells there is no such column."""
    key, flags = f"{key_added}_flag", flag_column(table)
    if key in data.obs:
        del data.obs[key]
    if flags is not None:
        data.obs[key] = flags
        log.warning("%d of %d cells have no counts in genes the model knows; see obs[%r]", (flags.codes >= 0).sum(), table.n_cells, key)


def flag_column(table: CellTable) -> Any:
    """Why cells show the model nothing, a pandas Categorical [n]; None when all show something."""
    uncounted = table.totals() == 0
    if not uncounted.any():
        return None
    empty = uncounted if table.empty is None else table.empty
    return pd.Categorical.from_codes(np.select([empty, uncounted], [0, 1], -1), categories=pd.Index([NO_COUNTS, NO_KNOWN_COUNTS]))


def record(folder: ModelFolder, report: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into `uns["cellplm"]`: model, context policy, where counts and genes came from, and warnings, where there are any."""
    return {
        "model_sha256": folder.model_sha256,
        "lineage": dict(folder.lineage),
        "context": f"own: sentences of at most {folder.max_cells} cells of one batch, dealt by seed 0",
        "dtype": "float32",
        **{key: value for key, value in report.items() if value is not None},
    }


def with_warnings(report: Mapping[str, Any], said: Sequence[str]) -> dict[str, Any]:
    """The report with sentences that `record` puts into `uns["cellplm"]["warnings"]`; each is told in the log too."""
    for sentence in said:
        log.warning("%s", sentence)
    return {**report, WARNINGS: [*report.get(WARNINGS, ()), *said]} if said else dict(report)


ONLY_SOME = "only_some"  # key of a record whose caller named what to answer, so that it stands for no other call


def same_call(said: Mapping[str, Any], sha256: str, context: Context) -> bool:
    """Whether a record is of this model, asked about everything, in this company; what a record does not say is as usual."""
    told = said.get("context", "own")
    told = str(told.get("choice", "own") if isinstance(told, Mapping) else told)
    named = next((name for name in get_args(Context) if told.startswith(name)), "own")
    return bool(said.get("model_sha256") == sha256) and named == context and not said.get(ONLY_SOME)


def answered(source: Path, answer: Path, sha256: str, holds: tuple[str, str] = ("uns", "cellplm"), context: Context = "own") -> bool:
    """Whether ``answer`` is what the model of this checksum wrote about ``source`` as it is now, with ``holds`` (place, key) in it.

    An answer in another company, or about some perturbations alone, is another one.
    """
    if not answer.is_file() or answer.stat().st_mtime_ns < source.stat().st_mtime_ns:
        return False
    try:
        adata = read_h5ad(answer, backed=True)
    except DataError:
        return False
    try:
        place, key = holds
        return key in getattr(adata, place) and same_call(adata.uns.get("cellplm", {}), sha256, context)
    finally:
        adata.file.close()
