"""Under which names a data set offers its genes, and counts over a vocabulary's columns.

Files carry Ensembl ids beside symbols, or only one of them. Taking the wrong one is silent nonsense, so the naming is
chosen by what matches, and genes that stand there twice are refused unless a person says what to do with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellplane.data.gene_mapping import GENE_COLUMNS as GENE_COLUMNS
from cellplane.data.gene_mapping import GeneRules, Repeated, align_namings, genes_without_place, repeated_names
from cellplane.data.gene_mapping import gene_namings as gene_namings
from cellplane.data.gene_tables import installed_tables
from cellplane.genes import ENSEMBL_PATTERN, GeneAlignment, GeneVocabulary, without_version


def default_naming(namings: Mapping[str, Sequence[str]], repeated: Repeated = "error") -> list[str]:
    """The first naming that is mostly Ensembl ids, else var_names (else a column, where they are mere numbers).

    Versions are stripped, so two columns may have one name: they are to be added up. DataError for a name that stands
    there twice as it is, unless ``repeated`` allows it.
    """
    chosen = next((key for key, ids in namings.items() if 2 * sum(map(_is_ensembl, ids)) > len(ids)), "var_names")
    if chosen == "var_names" and all(name.isdigit() for name in namings[chosen]):
        chosen = next(iter(namings))
    names = pd.Index(namings[chosen])
    if repeated == "error" and (again := names.duplicated()).any():
        raise repeated_names(list(names[again]), chosen)
    return [without_version(gene) for gene in namings[chosen]]


def _is_ensembl(gene: str) -> bool:
    return ENSEMBL_PATTERN.match(gene) is not None


def best_naming(
    namings: Mapping[str, Sequence[str]], vocabulary: GeneVocabulary, rules: GeneRules | None = None
) -> tuple[str, GeneAlignment]:
    """`gene_mapping.align_namings` with the id tables installed on this machine, if any."""
    return align_namings(namings, vocabulary, installed_tables(), rules)


def lacking_genes(gene_ids: Sequence[str], known: Sequence[str]) -> list[str]:
    """What a further data set adds to a vocabulary of the ``known`` genes: those it lacks, named as it names its own.

    Without an installed id table names are compared as they stand, and all are returned.
    """
    tables = installed_tables()
    if not known or not tables:
        return list(gene_ids)
    return genes_without_place(gene_ids, GeneVocabulary.from_ids(known), tables)


def merged_columns(matrix: sp.csr_matrix, gene_ids: Sequence[str]) -> tuple[sp.csr_matrix, list[str]]:
    """The counts [n, distinct genes] with the columns of one gene added up, and the genes in order of appearance."""
    distinct = GeneVocabulary(tuple(dict.fromkeys(gene_ids)), "")
    if len(distinct) == len(gene_ids):
        return matrix, list(gene_ids)
    return to_vocabulary(matrix, GeneAlignment(distinct.index(gene_ids), len(distinct), "")), list(distinct.gene_ids)


def to_vocabulary(matrix: sp.csr_matrix, alignment: GeneAlignment) -> sp.csr_matrix:
    """The same rows with columns at their vocabulary positions, in their own order; unknown genes are left out.

    Columns of one position are added up, wide enough for any sum; their rows come back sorted.
    """
    shape = (matrix.shape[0], alignment.n_vocabulary)
    if np.array_equal(alignment.positions, np.arange(matrix.shape[1])):
        return sp.csr_matrix((matrix.data, matrix.indices, matrix.indptr), shape=shape, copy=False)
    target = alignment.positions.astype(np.int32)[matrix.indices]
    if (alignment.positions >= 0).all():
        placed = sp.csr_matrix((matrix.data, target, matrix.indptr), shape=shape, copy=False)
    else:
        keep = target >= 0
        before = np.concatenate([[0], np.cumsum(keep)])
        placed = sp.csr_matrix((matrix.data[keep], target[keep], before[matrix.indptr]), shape=shape)
    return _summed(placed) if alignment.n_summed else placed


def _summed(matrix: Any) -> sp.csr_matrix:
    wide = matrix.data.astype({"u": np.uint64, "i": np.int64, "b": np.int64}.get(matrix.dtype.kind, matrix.dtype))
    summed = sp.csr_matrix((wide, matrix.indices, matrix.indptr), shape=matrix.shape, copy=True)
    summed.sum_duplicates()
    return summed
