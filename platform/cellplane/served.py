"""Answers of an endpoint as what the offline pipelines give: the same keys of an AnnData, the same new tables."""

# n cells, P perturbations (and groups), G genes

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellplane.data.config import DataKeys
from cellplane.data.sentences import CellTable
from cellplane.data.sources import AnnData, gene_columns
from cellplane.results import Annotation, Denoised, write_annotation, write_denoised, write_flags
from cellplane.wire import N_ROWS, WireCells

Columns = Mapping[str, NDArray[Any]]
About = Mapping[str, Any]
TABLES = {"mean_log": "X", "log_fold_change": "delta", "rate_perturbed": "rates"}  # of a perturbation's answer, and where they go
EVERYBODY = "all"


@dataclass(frozen=True)
class ServedAnnotation:
    """Cell types of n cells: ``labels`` [n] str, ``confidence`` [n], ``proba`` [n, K] over ``classes``; ``about`` names who answered."""

    labels: NDArray[np.object_]
    confidence: NDArray[np.float32]
    proba: NDArray[np.float32]
    classes: tuple[str, ...]
    about: dict[str, Any]


def write_served_annotation(adata: AnnData, columns: Columns, about: dict[str, Any], table: CellTable) -> ServedAnnotation:
    """Writes obs cellplm_cell_type, cellplm_confidence, cellplm_flag, where learned cellplm_unknown_score, obsm, and uns."""
    classes = tuple(str(name) for name in about["classes"])
    strange = columns.get("unknown_score") if about.get("unknown_rule") else None
    found = Annotation(columns["cell_type"], columns["confidence"], columns["proba"], classes, strange)
    write_flags(adata, table)
    write_annotation(adata, found)
    adata.uns["cellplm"] = storable(about)
    return ServedAnnotation(found.labels, found.confidence, found.proba, classes, about)


def write_served_rates(adata: AnnData, columns: Columns, about: About, cells: WireCells, keys: DataKeys) -> NDArray[np.float32]:
    """Writes layers cellplm_denoised, obs cellplm_size_factor and uns; the rates per 10,000, NaN for genes the model does not know."""
    places = gene_columns(adata, keys, cells.vocabulary)
    local = np.full(len(cells.vocabulary), -1, dtype=np.int64)
    local[cells.measured] = np.arange(len(cells.measured))
    known = np.flatnonzero(places >= 0)
    rates = np.full((adata.n_obs, len(places)), np.nan, dtype=np.float32)
    rates[:, known] = columns["rate"][:, local[places[known]]]
    write_flags(adata, cells.table)
    write_denoised(adata, Denoised(rates, cells.table, cells.report))
    adata.uns["cellplm"] = storable(about)
    return rates


def served_imputation(adata: AnnData, columns: Columns, about: About, order: Sequence[str]) -> AnnData:
    """The imputed genes as a new AnnData, as the pipeline's predict; ``order`` lists all genes of the model."""
    answered, refused = {gene: at for at, gene in enumerate(about["genes"])}, about["refused"]
    expected = {**dict(zip(about["genes"], about["expected_r"], strict=True)), **refused}
    genes = [gene for gene in order if gene in expected]
    counts, sd = (np.full((adata.n_obs, len(genes)), np.nan, dtype=np.float32) for _ in range(2))
    for at, gene in enumerate(genes):
        if gene in answered:
            counts[:, at], sd[:, at] = columns["rate"][:, answered[gene]], columns["sd"][:, answered[gene]]
    var = pd.DataFrame(
        {
            "gene_id": [about["vocabulary_ids"][gene] for gene in genes],
            "expected_correlation": np.array([expected[gene] for gene in genes], dtype=np.float64),
            "refused": [gene in refused for gene in genes],
        },
        index=pd.Index(genes),
    )
    out = AnnData(X=counts, obs=adata.obs.copy(), var=var, layers={"log1p": np.log1p(counts), "sd": sd}, obsm=dict(adata.obsm.copy()))
    out.uns["cellplm"] = storable({**about, "refused": [gene for gene in genes if gene in refused]})
    return out


def served_perturbation(parts: Sequence[tuple[Columns, About]], cells: WireCells, by_group: bool) -> AnnData:
    """Predicted populations as a new AnnData, as the pipeline's predict; ``parts`` are answers by group, in any order."""
    about = parts[0][1]
    rows = [pd.DataFrame({name: values for name, values in columns.items() if values.ndim == 1}) for columns, _ in parts]
    obs = pd.concat(rows, ignore_index=True)
    tables = {name: np.concatenate([columns[name] for columns, _ in parts]) for name in TABLES}
    place = {name: at for at, name in enumerate(dict.fromkeys(obs["perturbation"]))}
    order = np.array(sorted(range(len(obs)), key=lambda row: (place[obs["perturbation"][row]], obs["group"][row])), dtype=np.int64)
    obs, tables = obs.iloc[order].reset_index(drop=True), {name: table[order] for name, table in tables.items()}
    if not by_group:
        obs, tables = _averaged(obs, tables)
    names = [f"{name} | {group}" if by_group else name for name, group in zip(obs["perturbation"], obs["group"], strict=True)]
    obs = obs.loc[:, ["perturbation", "group", "kind", "seen", "fallback", "control_cells"]].set_axis(pd.Index(names), axis=0)
    var = pd.DataFrame({"gene_id": list(cells.vocabulary.gene_ids), "measured": cells.table.panel}, index=pd.Index(about["genes"]))
    layers = {place: tables[name].astype(np.float32) for name, place in TABLES.items() if place != "X"}
    out = AnnData(X=tables["mean_log"].astype(np.float32), obs=obs, var=var, layers=layers)
    out.uns["cellplm"] = storable({key: value for key, value in about.items() if key != "genes"})
    return out


def _averaged(obs: pd.DataFrame, tables: Mapping[str, NDArray[Any]]) -> tuple[pd.DataFrame, dict[str, NDArray[Any]]]:
    """One row a perturbation, its groups weighted by their control cells."""
    found = {name: list[NDArray[Any]]() for name in tables}
    rows = []
    for _, own in obs.groupby("perturbation", sort=False):
        weights = own["control_cells"].to_numpy(dtype=np.float64)
        for name, table in tables.items():
            found[name].append(np.average(table[own.index].astype(np.float64), axis=0, weights=weights))
        rows.append({**own.iloc[0].to_dict(), "group": EVERYBODY, "control_cells": int(weights.sum())})
    return pd.DataFrame(rows), {name: np.stack(parts) for name, parts in found.items()}


def storable(about: About) -> dict[str, Any]:
    """The metadata an h5ad file can hold: without None, and without what differs from call to call."""
    kept = {key: storable(value) if isinstance(value, Mapping) else value for key, value in about.items()}
    return {key: value for key, value in kept.items() if value is not None and key not in (N_ROWS, "request_id", "vocabulary_ids")}
