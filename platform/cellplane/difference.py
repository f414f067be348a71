"""What differs between two answers about the same cells: labels that changed, confidence, embeddings, rates by gene.

Made for the day the champion changes: the same cells answered by both versions, side by side. Files are h5ad or Parquet as
`cellplane predict` writes them; cells are matched by name, genes and perturbations too.
"""

# n cells (or perturbations) both files have, G genes both have

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellplane.data.answer_tables import is_table, read_answers
from cellplane.data.sources import AnnData, read_h5ad
from cellplane.errors import DataError

SHIFT = 0.1  # of a confidence that a person would notice
PLACES = ("cellplm_denoised", "log1p", "delta")  # layers that hold rates: denoised, imputed, perturbed
LISTED = 20  # changes and genes that are told
ROWWISE = ("labels", "confidence", "embedding", "rates")


@dataclass(frozen=True)
class Result:
    """One file of answers: rows by ``names``, and of what it holds the labels, their confidence, the embedding, rates by gene."""

    names: pd.Index
    labels: NDArray[np.object_] | None
    confidence: NDArray[np.float64] | None
    embedding: NDArray[np.float32] | None
    rates: NDArray[np.float32] | None
    genes: pd.Index
    model: str

    @classmethod
    def read(cls, path: Path) -> Result:
        """The answers of a file; DataError when it holds none."""
        data = read_answers(path) if is_table(path) else read_h5ad(path)
        result = cls(
            names=pd.Index(data.obs_names.astype(str)),
            labels=_column(data, "cellplm_cell_type", str, object),
            confidence=_column(data, "cellplm_confidence", float, np.float64),
            embedding=None if "X_cellplm" not in data.obsm else np.asarray(data.obsm["X_cellplm"], dtype=np.float32),
            rates=next((np.asarray(data.layers[name], dtype=np.float32) for name in PLACES if name in data.layers), None),
            genes=pd.Index(data.var_names.astype(str)),
            model=str(data.uns.get("cellplm", {}).get("model_sha256", ""))[:12],
        )
        if result.labels is None and result.embedding is None and result.rates is None:
            raise DataError(f"{path} holds no answers of a model: cellplane predict writes them")
        return result

    def take(self, rows: NDArray[np.int64]) -> Result:
        """Some of the rows, in this order."""
        taken: dict[str, Any] = {name: None if (part := getattr(self, name)) is None else part[rows] for name in ROWWISE}
        return replace(self, names=self.names[rows], **taken)


def _column(data: AnnData, name: str, kind: type, dtype: Any) -> NDArray[Any] | None:
    return np.array([kind(value) for value in data.obs[name]], dtype=dtype) if name in data.obs else None


def difference(first: Path, second: Path) -> dict[str, Any]:
    """What changed from the first file to the second, JSON-ready; only what both hold. DataError when they share nothing."""
    before, after = Result.read(first), Result.read(second)
    told: dict[str, Any] = {"models": [before.model, after.model]}
    before, after, told["cells"] = _matched(before, after)
    if before.labels is not None and after.labels is not None:
        told["labels"] = _labels(before.labels, after.labels)
    if before.confidence is not None and after.confidence is not None:
        told["confidence"] = _confidence(before.confidence, after.confidence)
    if before.embedding is not None and after.embedding is not None:
        told["embedding"] = _embedding(before.embedding, after.embedding)
    if before.rates is not None and after.rates is not None:
        told["rates"] = _rates(before, after)
    if not told.keys() & {"labels", "confidence", "embedding", "rates"}:
        raise DataError("the two files hold answers to different tasks: compare two of the same")
    return told


def _matched(before: Result, after: Result) -> tuple[Result, Result, dict[str, int]]:
    """The cells that both have, in the order of the first: by name, or by place where names repeat."""
    if not before.names.is_unique or not after.names.is_unique:
        if len(before.names) != len(after.names) or (before.names != after.names).any():
            raise DataError("cell names repeat and the files differ in them, so no cell can be found in the other file")
        return before, after, {"both": len(before.names), "only_first": 0, "only_second": 0}
    place = after.names.get_indexer(before.names)
    rows = np.flatnonzero(place >= 0)
    if len(rows) == 0:
        raise DataError("the two files have no cell in common: compare answers about the same cells")
    counts = {"both": len(rows), "only_first": len(before.names) - len(rows), "only_second": len(after.names) - len(rows)}
    return before.take(rows), after.take(place[rows].astype(np.int64)), counts


def _labels(before: NDArray[np.object_], after: NDArray[np.object_]) -> dict[str, Any]:
    changed = before != after
    moves = Counter(zip(before[changed].tolist(), after[changed].tolist(), strict=True))
    listed = sorted(((count, source, target) for (source, target), count in moves.items()), key=lambda row: (-row[0], *row[1:]))
    crosstab = [{"from": source, "to": target, "cells": count} for count, source, target in listed]
    return {"changed": int(changed.sum()), "share": float(changed.mean()), "changes": crosstab}


def _confidence(before: NDArray[np.float64], after: NDArray[np.float64]) -> dict[str, float]:
    shift = after - before
    low, middle, high = np.quantile(shift, (0.05, 0.5, 0.95)).tolist()
    means = {"mean_first": float(before.mean()), "mean_second": float(after.mean()), "mean_shift": float(shift.mean())}
    return {**means, "shift_05": low, "shift_50": middle, "shift_95": high, "noticeable": int((np.abs(shift) > SHIFT).sum())}


def _embedding(before: NDArray[np.float32], after: NDArray[np.float32]) -> dict[str, Any]:
    if before.shape[1] != after.shape[1]:
        return {"comparable": False, "widths": [before.shape[1], after.shape[1]]}
    norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    cosine = np.where(norms > 0, (before * after).sum(1) / np.maximum(norms, 1e-12), 1.0)
    low, middle = np.quantile(cosine, (0.05, 0.5)).tolist()
    return {"comparable": True, "cosine_min": float(cosine.min()), "cosine_05": low, "cosine_50": middle}


def _rates(before: Result, after: Result) -> dict[str, Any]:
    """Per gene over the cells both have, genes that differ most first; genes refused by one (NaN) are counted."""
    assert before.rates is not None
    assert after.rates is not None
    genes = before.genes.intersection(after.genes, sort=False)
    if not before.genes.is_unique or not after.genes.is_unique or len(genes) == 0:
        raise DataError("the files' genes have nothing in common, or repeat: compare answers over the same genes")
    first, second = (part.rates[:, part.genes.get_indexer(genes)] for part in (before, after))  # type: ignore[index]  # both are there
    known = np.flatnonzero(np.isfinite(first).all(0) & np.isfinite(second).all(0))
    wide: tuple[NDArray[np.float64], NDArray[np.float64]] = first[:, known].astype(np.float64), second[:, known].astype(np.float64)
    gap = wide[1] - wide[0]
    table = pd.DataFrame(
        {
            "mean_first": wide[0].mean(0),
            "mean_second": wide[1].mean(0),
            "mean_difference": gap.mean(0),
            "rms_difference": np.sqrt((gap**2).mean(0)),
            "correlation": _correlations(*wide),
        },
        index=genes[known],
    )
    worst = table.sort_values("rms_difference", ascending=False, kind="stable").head(LISTED)
    rows = [{"gene": gene, **{key: _number(value) for key, value in row.items()}} for gene, row in worst.iterrows()]
    told = {"genes": len(known), "unknown_in_one": len(genes) - len(known), "only_first": len(before.genes) - len(genes)}
    told |= {"only_second": len(after.genes) - len(genes)}
    spread = {"rms_difference": _number(np.sqrt((gap**2).mean())), "median_correlation": _number(table["correlation"].median())}
    return {**told, **spread, "most_changed": rows}


def _correlations(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over rows, of every column; NaN for one that does not vary."""
    centred = first - first.mean(0), second - second.mean(0)
    scale = np.sqrt((centred[0] ** 2).sum(0) * (centred[1] ** 2).sum(0))
    found: NDArray[np.float64] = np.where(scale > 0, (centred[0] * centred[1]).sum(0) / np.where(scale > 0, scale, 1), np.nan)
    return found


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def sections(told: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The same as tables for a person: title, header, rows."""
    out = [("cells", ["in both", "only in the first", "only in the second"], [[str(value) for value in told["cells"].values()]])]
    if labels := told.get("labels"):
        rows = [[row["from"], row["to"], str(row["cells"])] for row in labels["changes"][:LISTED]]
        out.append((f"labels: {labels['changed']} changed ({labels['share']:.2%})", ["from", "to", "cells"], rows))
    if confidence := told.get("confidence"):
        row = [f"{confidence[name]:.4f}" for name in ("mean_first", "mean_second", "mean_shift", "shift_05", "shift_50", "shift_95")]
        header = ["mean of the first", "of the second", "mean shift", "5 %", "50 %", "95 %", f"cells beyond {SHIFT:g}"]
        out.append(("confidence", header, [[*row, str(confidence["noticeable"])]]))
    if embedding := told.get("embedding"):
        if embedding["comparable"]:
            rows = [[f"{embedding[name]:.4f}" for name in ("cosine_min", "cosine_05", "cosine_50")]]
            out.append(("embedding, cosine of each cell with itself", ["least", "5 %", "median"], rows))
        else:
            out.append(("embedding: of other widths", ["first", "second"], [[str(width) for width in embedding["widths"]]]))
    if rates := told.get("rates"):
        keys = ("mean_first", "mean_second", "rms_difference", "correlation")
        rows = [[row["gene"], *("-" if row[key] is None else f"{row[key]:.4g}" for key in keys)] for row in rates["most_changed"]]
        header = ["gene", "mean of the first", "of the second", "rms difference", "correlation"]
        out.append((f"rates of {rates['genes']} genes, most changed first", header, rows))
    return out
