"""Reading a query and its reference for an imputation: which genes both know, which are asked for, and what is wrong with them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellplane.artifact.folder import ModelFolder
from cellplane.data.config import DataKeys
from cellplane.data.quality import tell_scale
from cellplane.data.sentences import CellTable
from cellplane.data.sources import AnnData, cell_table
from cellplane.errors import DataError, VocabularyError
from cellplane.genes import MINIMUM_SHARED_GENES, GeneVocabulary
from cellplane.pipelines.base import starting_model
from cellplane.pipelines.gene_names import GeneNames
from cellplane.pipelines.imputation_cells import MixedCells, dense, limited, renumbered, scaled_log
from cellplane.pipelines.imputation_config import ImputationConfig
from cellplane.pipelines.imputation_fit import Problem

log = logging.getLogger(__name__)

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Pair:
    """A query and its reference over one vocabulary, and what to report about reading them."""

    problem: Problem
    names: GeneNames
    report: Mapping[str, Any]


class NothingToImputeError(DataError):
    """The query has all genes of the reference."""


def read_pair(data: AnnData, reference: AnnData, config: ImputationConfig, base: ModelFolder | None) -> Pair:
    """Both data sets, the query limited to what it may show.

    From scratch the vocabulary is what is observed and wanted; a base model brings its own. Raises DataError for too few
    shared genes, nothing to impute, or cells that show nothing.
    """
    start, vocabulary = starting_model(base, reference, config.reference_keys, config.new_genes)
    theirs, _ = cell_table(reference, vocabulary, config.reference_keys)
    query, report = cell_table(data, vocabulary, config.keys)
    tell_scale(query)
    wanted = _wanted(query, theirs, GeneNames.of(reference, vocabulary, config.reference_keys), config)
    observed = query.panel & theirs.panel & ~wanted
    check_shared(observed)
    query, theirs = limited(query, observed), limited(theirs, observed | wanted)
    if start is None:
        kept = np.flatnonzero(observed | wanted)
        query, theirs, observed, wanted = renumbered(query, kept), renumbered(theirs, kept), observed[kept], wanted[kept]
        vocabulary = GeneVocabulary(tuple(vocabulary.gene_ids[gene] for gene in kept), vocabulary.namespace)
    total = shown_total(query, "query")
    shown_total(limited(theirs, observed), "reference")
    names = GeneNames.of(reference, vocabulary, config.reference_keys)
    return Pair(Problem(MixedCells(query, theirs), observed, wanted, total, start), names, report)


def check_shared(observed: Flags) -> None:
    """VocabularyError for fewer shared genes than an answer can rest on."""
    if (shared := int(observed.sum())) < MINIMUM_SHARED_GENES:
        raise VocabularyError(
            f"query and reference share {shared} observed genes, at least {MINIMUM_SHARED_GENES} are needed to find one in the other; "
            "check that both name genes alike (cellplane data genes), or take another reference"
        )


def shown_total(table: CellTable, which: str) -> float:
    """Median total of the cells that show any counts; DataError when none does."""
    totals = table.totals()
    if not (totals > 0).any():
        raise DataError(f"no cell of the {which} has counts in the genes that both share")
    if empty := int((totals == 0).sum()):
        log.warning("%d of %d cells of the %s show no counts in the shared genes", empty, table.n_cells, which)
    return float(np.median(totals[totals > 0]))


def _wanted(query: CellTable, reference: CellTable, names: GeneNames, config: ImputationConfig) -> Flags:
    """The genes to impute, [G]: those named, or the most variable of the reference that the query lacks."""
    wanted = np.zeros(len(names.vocabulary), dtype=bool)
    if config.genes is not None:
        places = names.find(config.genes)
        if unknown := [gene for gene, at in zip(config.genes, places, strict=True) if at < 0 or not reference.panel[at]]:
            raise DataError(f"{len(unknown)} of {len(places)} genes to impute were not measured in the reference, e.g. {unknown[:5]}")
        wanted[places] = True
        return wanted
    missing = np.flatnonzero(reference.panel & ~query.panel)
    if len(missing) == 0:
        raise NothingToImputeError("the query measured every gene of the reference: nothing to impute; name genes to impute them anyway")
    if len(missing) > config.max_genes:
        logs = scaled_log(dense(reference, missing), reference.totals(), shown_total(reference, "reference"))
        missing = missing[np.argsort(-logs.var(0), kind="stable")[: config.max_genes]]
        log.info("the %d most variable of the reference's genes that the query lacks are imputed", config.max_genes)
    wanted[missing] = True
    return wanted


def read_query(data: AnnData, vocabulary: GeneVocabulary, keys: DataKeys, observed: Flags) -> tuple[CellTable, Mapping[str, Any]]:
    """Other query cells, limited to the genes that were observed in fitting; warns when some of these are missing.

    Raises VocabularyError when too few are left, DataError when there are cells and none shows counts.
    """
    table, report = cell_table(data, vocabulary, keys)
    tell_scale(table)
    part = limited(table, observed)
    check_shared(part.panel)
    if missing := int(observed.sum() - part.panel.sum()):
        log.warning("%d of the %d genes that the model was fitted with are missing here", missing, observed.sum())
    if table.n_cells:
        shown_total(part, "query")
    return replace(part, labels=None), report
