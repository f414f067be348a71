"""Spatial imputation: genes that a spatial assay did not measure, from a matching single-cell reference.

    pipeline = SpatialImputationPipeline().fit(query, reference)
    imputed = pipeline.predict(query)        # AnnData: cells x genes the query lacks

Cells of both enter one context, each with its platform's token; what is asked for is never visible, in either, in training
or later. Everything is chosen on observed genes hidden in turn, which also say which genes not to trust (PROTOCOLS 6).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from cellplane.artifact.folder import ModelFolder, pack_tensors
from cellplane.config import fingerprint
from cellplane.data.sources import AnnData, cell_table
from cellplane.errors import DataError
from cellplane.inference import flag_column, query_keys, record
from cellplane.pipelines.base import Estimator, base_name, check_transfer
from cellplane.pipelines.imputation_answer import KNOWN as KNOWN
from cellplane.pipelines.imputation_answer import REFERENCE_CELLS, Fitted, imputed, imputed_rates
from cellplane.pipelines.imputation_answer import fitted_from as fitted_from
from cellplane.pipelines.imputation_baselines import Counts, baseline_predictions
from cellplane.pipelines.imputation_cells import dense, limited, scaled_log
from cellplane.pipelines.imputation_config import ImputationConfig
from cellplane.pipelines.imputation_fit import Learned, Problem, learn
from cellplane.pipelines.imputation_reading import Pair, read_pair, read_query, shown_total
from cellplane.pipelines.metrics import correlations, rank_correlations
from cellplane.train.finetune import Course, Progress
from cellplane.train.loop import Keeping

log = logging.getLogger(__name__)

COLUMNS = ("crow", "gene", "value")


class SpatialImputationPipeline(Estimator):
    """fit / predict / score / suggest_panel / save / load on AnnData.

    ``model`` is a base model's folder or registry URI (None: from scratch). A fitted pipeline keeps `kept_reference` cells
    of the reference, counts and all: they are the context of every prediction, and are saved with the model.
    """

    task: ClassVar[str] = "impute"
    recipe: ClassVar[type[Any]] = ImputationConfig

    def fit(
        self,
        data: AnnData,
        reference: AnnData | None = None,
        config: ImputationConfig | Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        keeping: Keeping | None = None,
    ) -> SpatialImputationPipeline:
        """Learns to fill in, for the spatial cells of ``data``, genes that only ``reference`` measured; neither is changed.

        Counts that ``data`` may hold of genes to impute are dropped on reading. ``progress`` and ``keeping`` go along with
        the last fit, after those that hide observed genes. Raises DataError for a missing reference, fewer than 10 shared
        genes or nothing to impute, ColumnError for missing coordinates.
        """
        if reference is None:
            raise DataError("an imputation learns from a single-cell reference: fit(data, reference)")
        told: ImputationConfig = self.configured(config)
        check_transfer(told.transfer, self.base)
        pair = read_pair(data, reference, told, self.base)
        pair = replace(pair, problem=_with_kept_reference(pair.problem, told))
        learned = learn(pair.problem, told, Course(progress, keeping))
        self.history_ = learned.history
        self.adopt(self._folder(pair, learned, told))
        return self

    def adopt(self, folder: ModelFolder) -> None:
        """Answers with this model from now on, as it was told when it was fitted."""
        known = fitted_from(folder)
        self._answer_with(folder, known.config)
        self._known = known

    @property
    def genes_(self) -> tuple[str, ...]:
        """The genes that are imputed, in the order of the answer, as the reference calls them."""
        return tuple(self._state().names.call(self._state().wanted))

    @property
    def observed_genes_(self) -> tuple[str, ...]:
        """The genes that the query shows."""
        return tuple(self._state().names.call(self._state().observed))

    @property
    def expected_correlation_(self) -> NDArray[np.float64]:
        """The correlation over cells to expect of every imputed gene, [n genes], judged by observed genes that were hidden."""
        state = self._state()
        return state.expected[state.wanted]

    def predict(self, data: AnnData, config: Mapping[str, Any] | None = None, reference: AnnData | None = None) -> AnnData:
        """The imputed genes of every cell, as a new AnnData: obs and obsm of ``data``, one column a gene.

        X are the counts expected at each cell's observed depth, layers["log1p"] their log1p, layers["sd"] the standard
        deviation of such a count (negative binomial). var["expected_correlation"] says how far a gene can be trusted; those
        below `min_correlation` are refused: NaN in X and the layers, True in var["refused"], listed in uns["cellplm"]["refused"].
        A gene of unknown expectation (NaN) counts as the poorest: -1 alone lets it pass. Nothing is shared with ``data``.
        obs["cellplm_flag"] names cells without counts in the genes that the model was fitted with: their X is 0.
        The cells are read beside the kept reference, or beside ``reference``; then only genes that it measured are imputed.
        """
        state, asked = self._state(), self.settings(config)
        problem, report = self._problem(data, asked, reference)
        found = imputed(self._fitted().model, state, problem)
        expected = state.expected[found.genes]
        refused = ~state.trusted(asked.min_correlation)[found.genes]
        tables = [np.where(refused, np.nan, table).astype(np.float32) for table in (found.counts, np.log1p(found.counts), found.sd)]
        genes = state.names.call(problem.wanted)
        ids = [self._fitted().vocabulary.gene_ids[gene] for gene in found.genes]
        var = pd.DataFrame({"gene_id": ids, "expected_correlation": expected, "refused": refused}, index=pd.Index(genes))
        obs = data.obs.copy()
        obs.index = obs.index.astype(str)
        if (flags := flag_column(problem.cells.query)) is not None:
            obs["cellplm_flag"] = flags
        out = AnnData(X=tables[0], obs=obs, var=var, layers={"log1p": tables[1], "sd": tables[2]}, obsm=dict(data.obsm.copy()))
        listed = [gene for gene, no in zip(genes, refused, strict=True) if no]
        out.uns["cellplm"] = self._record(report, listed, problem.cells.reference.n_cells if reference is not None else None)
        return out

    def score(self, data: AnnData) -> dict[str, Any]:
        """How well genes whose truth ``data`` holds were imputed, beside the baselines; nothing of that truth enters the model.

        Per gene and as means over genes that vary: Pearson and Spearman over cells of log1p of scaled counts (truth scaled
        by the total of all genes that data and model share), for the model, `knn` and `ridge`, whose setting is chosen by
        hiding observed genes. Keys: model, knn, ridge (each pearson, spearman, per_gene), genes, constant_genes.
        """
        state = self._state()
        problem, _ = self._problem(data, self.settings())
        truth, scored = self._truth(data)
        columns = np.searchsorted(np.flatnonzero(state.wanted), scored)
        counts = _baseline_counts(problem, scored)
        rates, _ = imputed_rates(self._fitted().model, state, problem)
        answers: dict[str, tuple[float | None, NDArray[np.float64]]] = {"model": (None, np.log1p(rates[:, columns] * state.total))}
        answers |= baseline_predictions(counts, state.config.seed)
        ids = [state.names.labels[gene] for gene in scored]
        found: dict[str, Any] = {name: {"setting": setting, **_scores(truth, log, ids)} for name, (setting, log) in answers.items()}
        return {**found, "genes": len(ids), "constant_genes": int((truth.std(0) == 0).sum())}

    def suggest_panel(self, n: int) -> list[str]:
        """The ``n`` imputed genes to measure next: each leaves, in the reference, the least variance of the others unexplained.

        Greedy, given the genes observed already; best first. DataError when there are fewer, and where they do not vary over the
        kept reference: a single cell, or cells that are all alike.
        """
        state = self._state()
        wanted = np.flatnonzero(state.wanted)
        if not 1 <= n <= len(wanted):
            raise DataError(f"a panel of {n} genes was asked for, there are {len(wanted)} imputed ones to choose from")
        order = np.concatenate([np.flatnonzero(state.observed), wanted])
        logs = scaled_log(dense(state.reference, order), limited(state.reference, state.observed).totals(), state.total)
        chosen = greedy_panel(logs, int(state.observed.sum()), n)
        return [state.names.labels[order[gene]] for gene in chosen]

    def _state(self) -> Fitted:
        self._fitted()
        return self._known

    def _problem(self, data: AnnData, asked: ImputationConfig, reference: AnnData | None = None) -> tuple[Problem, Mapping[str, Any]]:
        """Cells to impute beside the kept reference, or another."""
        state = self._state()
        keys = query_keys(data, asked.keys)
        if asked.keys.spatial_key is not None and keys.spatial_key is None:
            log.warning("the cells have no obsm[%r]: they are imputed without positions, in random patches", asked.keys.spatial_key)
        query, report = read_query(data, self._fitted().vocabulary, keys, state.observed)
        if reference is None:
            return state.problem(query), report
        others, _ = cell_table(reference, self._fitted().vocabulary, query_keys(reference, asked.reference_keys))
        return state.problem(query, others), report

    def _truth(self, data: AnnData) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """log1p of scaled counts of the wanted genes that ``data`` measured [n, k], and which these are."""
        state = self._state()
        everything = state.observed | state.wanted
        table, _ = read_query(data, self._fitted().vocabulary, query_keys(data, self.settings().keys), everything)
        scored = np.flatnonzero(state.wanted & table.panel)
        if len(scored) == 0:
            raise DataError("the data measured none of the imputed genes: there is no truth to score against")
        truth = scaled_log(dense(table, scored), table.totals(), shown_total(table, "query"))
        if not (truth.std(0) > 0).any():
            raise DataError(f"none of the {len(scored)} genes varies over the {len(truth)} cells; score on cells that differ")
        return truth, scored

    def _record(self, report: Mapping[str, Any], refused: list[str], given: int | None) -> dict[str, Any]:
        state = self._state()
        beside = f"{state.config.reference_cells} kept reference cells" if given is None else f"{given} given reference cells"
        context = f"own + reference: patches of at most {state.config.query_cells} cells, {beside}"
        mixed_in = {"partner": f"ridge {state.config.ridge:g}" if state.config.ridge else "neighbours", "partner_share": state.share}
        extra = {"context": context, "refused": refused, **mixed_in, "observed_genes": int(state.observed.sum())}
        return record(self._fitted().folder, {**report, **extra})

    def _folder(self, pair: Pair, learned: Learned, told: ImputationConfig) -> ModelFolder:
        problem = pair.problem
        return ModelFolder(
            config=learned.network.config,
            weights=learned.network.cpu().state_dict(),
            vocabulary=pair.names.vocabulary,
            task="impute",
            max_cells=told.query_cells + told.reference_cells,
            lineage={
                "base_model": base_name(self.base),
                "training_cells": f"{problem.cells.query.n_cells} query, {problem.cells.reference.n_cells} reference",
                "counts": str(pair.report.get("count_source", "")),
                "config_sha256": fingerprint(told),
                "best_step": str(learned.step),
                "keys": told.keys.model_dump_json(),
            },
            attachments=_attachments(pair, learned, told),
        )


def _with_kept_reference(problem: Problem, config: ImputationConfig) -> Problem:
    """The problem with as many reference cells as are kept, so that training and prediction see the same ones."""
    rows = problem.cells.drawn(config.kept_reference, config.seed)
    return replace(problem, cells=replace(problem.cells, reference=problem.cells.reference.rows(rows)))


def _attachments(pair: Pair, learned: Learned, config: ImputationConfig) -> dict[str, bytes]:
    problem = pair.problem
    known = {
        "names": list(pair.names.labels),
        "observed": np.flatnonzero(problem.observed).tolist(),
        "wanted": np.flatnonzero(problem.wanted).tolist(),
        "expected": _numbers(learned.expected[problem.wanted]),
        "hidden_correlation": _numbers(learned.hidden_correlation[problem.observed]),
        "total": problem.total,
        "share": learned.share,
        "slope": learned.scaling.slope.tolist(),
        "shift": learned.scaling.shift.tolist(),
        "config": config.model_copy(update={"ridge": learned.ridge}).model_dump(mode="json"),
    }
    reference = {name: torch.from_numpy(np.ascontiguousarray(getattr(problem.cells.reference, name))) for name in COLUMNS}
    return {KNOWN: json.dumps(known).encode(), REFERENCE_CELLS: pack_tensors(reference)}


def _numbers(values: NDArray[np.float64]) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _baseline_counts(problem: Problem, hidden: NDArray[np.int64]) -> Counts:
    observed = np.flatnonzero(problem.observed)
    query, reference = problem.cells.query, problem.cells.reference
    return Counts(dense(query, observed), dense(reference, observed), dense(reference, hidden))


def _scores(truth: NDArray[np.float64], log: NDArray[np.float64], genes: list[str]) -> dict[str, Any]:
    pearson, spearman = correlations(truth, log), rank_correlations(truth, log)
    varies = np.isfinite(pearson)
    if not varies.any():
        raise DataError(f"none of the {len(genes)} genes varies over the cells; score on cells that differ")
    per_gene = {gene: float(value) for gene, value, known in zip(genes, pearson, varies, strict=True) if known}
    return {"pearson": float(np.nanmean(pearson)), "spearman": float(np.nanmean(spearman[varies])), "per_gene": per_gene}


def greedy_panel(logs: NDArray[np.float64], known: int, n: int) -> list[int]:
    """``n`` columns of ``logs`` [cells, genes] behind the first ``known``, each explaining most of what is left of the later ones.

    The residual covariance given the columns so far is updated one column at a time (a pivoted Cholesky factorisation by
    explained variance instead of own variance). DataError where nothing varies, so that no covariance says which speaks for which.
    """
    if not (np.ptp(logs[:, known:], axis=0) > 0).any():
        raise DataError(f"no gene varies over the kept reference ({len(logs)} cells), so none tells of another; fit with more of its cells")
    covariance = np.cov(logs, rowvar=False)
    noise = 1e-3 * float(np.trace(covariance)) / len(covariance)  # counts are noisy: no column explains another exactly
    for column in range(known):
        covariance = _given(covariance, column, noise)
    chosen: list[int] = []
    for _ in range(n):
        later = covariance[known:, known:]
        gain = (later**2).sum(0) / (np.diag(later) + noise)
        gain[[column - known for column in chosen]] = -np.inf
        chosen.append(known + int(np.argmax(gain)))
        covariance = _given(covariance, chosen[-1], noise)
    return chosen


def _given(covariance: NDArray[np.float64], column: int, noise: float) -> NDArray[np.float64]:
    part = covariance[:, column]
    left: NDArray[np.float64] = covariance - np.outer(part, part) / (part[column] + noise)
    return left
