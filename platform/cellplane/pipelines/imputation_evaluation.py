"""Imputation on data whose truth is known: shared genes are hidden from the query in folds, imputed, and compared.

The hidden genes leave the query before anything is computed from it; their truth is only looked at to score
(EVALUATION.md: 5 folds of the shared genes, mean over genes of Pearson on log1p-normalised counts).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from cellplane.config import Config
from cellplane.data.sources import AnnData, cell_table, find_counts
from cellplane.errors import DataError
from cellplane.genes import GeneVocabulary
from cellplane.pipelines.base import as_config
from cellplane.pipelines.gene_names import GeneNames
from cellplane.pipelines.imputation import SpatialImputationPipeline
from cellplane.pipelines.imputation_config import ImputationConfig

log = logging.getLogger(__name__)

ROWS = ("model", "knn", "ridge")


def evaluate_imputation(
    query: AnnData, reference: AnnData, config: Config | Mapping[str, Any] | None = None, gene_folds: int = 5, seed: int = 0
) -> dict[str, Any]:
    """Pearson and Spearman, means over all shared genes, each imputed in the fold that hides it; JSON-ready.

    Keys: model, knn, ridge (each pearson, spearman, by_fold and per_gene), trust (correlation over genes of expected and true
    Pearson; Pearson of the genes that are not refused, and how many are). DataError for fewer shared genes than folds need.
    """
    given: ImputationConfig = as_config(ImputationConfig, config, ImputationConfig())
    shared = shared_genes(query, reference, given)
    if len(shared) < 2 * gene_folds:
        raise DataError(f"query and reference share {len(shared)} genes, too few to hide them in {gene_folds} folds")
    found: list[dict[str, Any]] = []
    expected: dict[str, float] = {}
    for fold, hidden in enumerate(np.array_split(np.random.default_rng(seed).permutation(shared), gene_folds)):
        recipe = given.model_copy(update={"genes": tuple(map(str, hidden)), "seed": given.seed + seed})
        pipeline = SpatialImputationPipeline(config=recipe).fit(query, reference)
        found.append(pipeline.score(query))
        expected |= dict(zip(pipeline.genes_, pipeline.expected_correlation_.tolist(), strict=True))
        log.info("fold %d of %d: %s", fold + 1, gene_folds, {name: round(found[-1][name]["pearson"], 4) for name in ROWS})
    return {**{name: _joined(found, name) for name in ROWS}, "trust": _trust(found, expected, given.min_correlation)}


def shared_genes(query: AnnData, reference: AnnData, config: ImputationConfig) -> list[str]:
    """Genes of the reference that the query has too, in its order, as it calls them."""
    vocabulary = GeneVocabulary.from_ids(dict.fromkeys(find_counts(reference, config.reference_keys).gene_ids))
    theirs, _ = cell_table(query, vocabulary, config.keys)
    return GeneNames.of(reference, vocabulary, config.reference_keys).call(theirs.panel)


def _joined(found: list[dict[str, Any]], name: str) -> dict[str, Any]:
    per_gene = {gene: value for scores in found for gene, value in scores[name]["per_gene"].items()}
    by_fold = [scores[name]["pearson"] for scores in found]
    weights = [len(scores[name]["per_gene"]) for scores in found]
    spearman = float(np.average([scores[name]["spearman"] for scores in found], weights=weights))
    settings = [scores[name]["setting"] for scores in found]
    return {
        "pearson": float(np.mean(list(per_gene.values()))),
        "spearman": spearman,
        "by_fold": by_fold,
        "settings": settings,
        "per_gene": per_gene,
    }


def _trust(found: list[dict[str, Any]], expected: Mapping[str, float], threshold: float) -> dict[str, float]:
    """How well the expected correlation tells good genes from bad ones."""
    true = {gene: value for scores in found for gene, value in scores["model"]["per_gene"].items()}
    pairs = np.array([(expected[gene], value) for gene, value in true.items()])
    kept = pairs[:, 0] >= threshold
    return {
        "correlation": float(np.corrcoef(pairs.T)[0, 1]),
        "mean_error": float((pairs[:, 0] - pairs[:, 1]).mean()),
        "refused": int((~kept).sum()),
        "pearson_of_accepted": float(pairs[kept, 1].mean()) if kept.any() else float("nan"),
    }
