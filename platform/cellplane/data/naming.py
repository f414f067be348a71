"""Under which names a data set offers its genes, and which of them a vocabulary knows best.

Files carry Ensembl ids beside symbols, or only one of them. Taking the wrong one is silent nonsense, so the naming is
chosen by what matches, and repeated genes are refused.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellplane.errors import DataError, VocabularyError
from cellplane.genes import ENSEMBL_PATTERN, GeneAlignment, GeneVocabulary, without_version

GENE_COLUMNS = ("ensembl_id", "feature_id", "gene_ids")  # as scanpy, CELLxGENE and 10x call them


def gene_namings(var: pd.DataFrame) -> dict[str, list[str]]:
    """Every naming of the genes: known id columns first, then var_names. A missing id falls back to the var_name."""
    names = [str(name) for name in var.index]
    if not names:
        raise DataError("the data has no genes at all")
    found = {}
    for key in GENE_COLUMNS:
        if key in var:
            present = var[key].notna().to_numpy() & (var[key].astype(str).to_numpy() != "")
            found[key] = [str(value) if ok else name for value, ok, name in zip(var[key], present, names, strict=True)]
    return {**found, "var_names": names}


def default_naming(namings: dict[str, list[str]]) -> list[str]:
    """The first naming that is mostly Ensembl ids, else var_names; repeated genes are refused."""
    chosen = next((key for key, ids in namings.items() if 2 * sum(map(_is_ensembl, ids)) > len(ids)), "var_names")
    return unique_genes(namings[chosen], chosen)


def _is_ensembl(gene: str) -> bool:
    return ENSEMBL_PATTERN.match(gene) is not None


def unique_genes(ids: list[str], naming: str) -> list[str]:
    """The same ids, without Ensembl versions; DataError lists the first five that stand there twice."""
    plain = [without_version(gene) for gene in ids]
    repeated = pd.Index(plain)[pd.Index(plain).duplicated()].unique()
    if len(repeated):
        found = f"{len(repeated)} genes stand in {naming} more than once, e.g. {list(repeated[:5])}"
        raise DataError(f"{found}; sum or drop the repeated columns first")
    return plain


def best_naming(namings: dict[str, list[str]], vocabulary: GeneVocabulary) -> tuple[str, GeneAlignment]:
    """The naming most of whose genes the vocabulary knows, and how it aligns; VocabularyError names what was tried."""
    shared = {key: int((vocabulary.index(ids) >= 0).sum()) for key, ids in namings.items()}
    best = max(shared, key=lambda key: shared[key])
    known = vocabulary.index(namings[best]) >= 0
    unique_genes([gene for gene, ok in zip(namings[best], known, strict=True) if ok], best)
    try:
        return best, vocabulary.align(namings[best])
    except VocabularyError as error:
        raise VocabularyError(f"{error} (tried {', '.join(namings)})") from None


def to_vocabulary(matrix: sp.csr_matrix, alignment: GeneAlignment) -> sp.csr_matrix:
    """The same rows with columns at their vocabulary positions, in their own order; unknown genes are left out."""
    shape = (matrix.shape[0], alignment.n_vocabulary)
    if np.array_equal(alignment.positions, np.arange(matrix.shape[1])):
        return sp.csr_matrix((matrix.data, matrix.indices, matrix.indptr), shape=shape, copy=False)
    target = alignment.positions.astype(np.int32)[matrix.indices]
    if (alignment.positions >= 0).all():
        return sp.csr_matrix((matrix.data, target, matrix.indptr), shape=shape, copy=False)
    keep = target >= 0
    before = np.concatenate([[0], np.cumsum(keep)])
    return sp.csr_matrix((matrix.data[keep], target[keep], before[matrix.indptr]), shape=shape)
