"""Trying imputation: genes that file and reference share are hidden from the file and filled in, by the model, neighbours and ridge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cellplane.data.sources import AnnData, read_h5ad
from cellplane.errors import ConfigError, DataError, VocabularyError
from cellplane.genes import MINIMUM_SHARED_GENES
from cellplane.pipelines.drawing import draw_gene_correlations, new_axes
from cellplane.pipelines.imputation import SpatialImputationPipeline
from cellplane.pipelines.imputation_baselines import BASELINES, Counts, baseline_predictions
from cellplane.pipelines.imputation_cells import dense
from cellplane.pipelines.imputation_config import ImputationConfig
from cellplane.pipelines.imputation_evaluation import shared_genes
from cellplane.pipelines.imputation_reading import NothingToImputeError, read_pair
from cellplane.pipelines.job import MODEL_ROW
from cellplane.pipelines.plots import save_axes
from cellplane.pipelines.protocol import Entry, Found, Method, Picture, Place
from cellplane.pipelines.try_config import TryImputation
from cellplane.pipelines.try_parts import Bench, Task, Tried, base_of, evaluation_of, still_to_go
from cellplane.pipelines.verdict import Measure, Verdict, mean_lead

MEASURE = Measure("mean correlation of predicted and measured expression", "hidden genes")
ROWS = {MODEL_ROW: "model", **{name: name for name in BASELINES}}  # the row's name here, and in the pipeline's scores


def measure_imputation(config: TryImputation, bench: Bench) -> Tried:
    """Hides the shared genes part by part; every part is measured once and remembered."""
    if config.hidden_genes < config.folds:
        raise ConfigError(f"hidden_genes {config.hidden_genes} are too few for {config.folds} folds: each hides one gene at least")
    query, reference, recipe, notes = _read(config)
    shared = _shared(query, reference, recipe)
    if len(shared) < (needed := fewest_shared(config.folds, config.hidden_genes)):
        raise DataError(
            f"file and reference share {len(shared)} genes, at least {needed} are needed to hide some in {config.folds} parts: "
            "check that both name genes alike (cellplane data genes), or take another reference"
        )
    hidden = np.random.default_rng(config.seed).permutation(shared)[: config.hidden_genes]
    folds = np.array_split(hidden, config.folds)
    entries: list[Entry] = []
    found: list[Entry] = []
    for number, genes in enumerate(folds, 1):
        to_go = still_to_go([entry.seconds for entry in found], len(folds))
        bench.say(f"[{number}/{len(folds)}] {len(genes)} of {len(shared)} shared genes hidden{to_go}")
        place = Place(Path(config.data).stem, "genes", number - 1, config.seed)
        part = recipe.model_copy(update={"genes": tuple(map(str, genes)), "seed": config.seed})
        work = lambda part=part: _measured(config, part, query, reference)  # noqa: E731
        entry = bench.ledger.measured(place, Method("all", "control"), work, len(genes) / len(shared))
        found.append(entry)
        entries += [_row(entry, name) for name in ROWS]
    per_gene = {name: {gene: value for entry in found for gene, value in entry.details["per_gene"][name].items()} for name in ROWS}
    verdict = _verdict(per_gene, config.seed)
    axes = draw_gene_correlations(new_axes((11, 5.5)), per_gene)
    picture = Picture("Hidden genes", save_axes(axes, bench.pictures / "genes.png"), "Each gene imputed by a fit that never saw it.")
    lost = len(hidden) - len(per_gene[MODEL_ROW])
    notes.append(f"{len(hidden)} of {len(shared)} shared genes were hidden; {lost} of them do not vary in the file and say nothing.")
    return Tried(verdict, evaluation_of("pearson", entries, "impute", notes, [picture]))


def fewest_shared(folds: int, most: int) -> int:
    """How many genes must be shared to hide two in every fold (``most`` in all) and still show what an imputation rests on."""
    needed = 2 * folds
    while needed - -(-min(needed, most) // folds) < MINIMUM_SHARED_GENES:  # the largest fold is hidden
        needed += 1
    return needed


def _shared(query: AnnData, reference: AnnData, recipe: ImputationConfig) -> list[str]:
    try:
        return shared_genes(query, reference, recipe)
    except VocabularyError as error:
        raise VocabularyError(f"file and reference share too few genes to hide some; the reference is the model here: {error}") from error


def _read(config: TryImputation) -> tuple[AnnData, AnnData, ImputationConfig, list[str]]:
    if not config.reference:
        raise ConfigError("imputing needs a reference: cellplane try impute FILE --reference ATLAS.h5ad")
    query, reference = read_h5ad(Path(config.data)), read_h5ad(Path(config.reference))
    keys, notes = config.recipe.keys, []
    if keys.spatial_key is not None and keys.spatial_key not in query.obsm:
        notes.append(f"The file has no obsm[{keys.spatial_key!r}]: cells were read without positions, in random patches.")
        keys = keys.model_copy(update={"spatial_key": None})
    return query, reference, config.recipe.model_copy(update={"keys": keys}), notes


def _measured(config: TryImputation, recipe: ImputationConfig, query: AnnData, reference: AnnData) -> Found:
    scores = SpatialImputationPipeline(base_of(config), recipe).fit(query, reference).score(query)
    settings = {name: scores[theirs]["setting"] for name, theirs in ROWS.items()}
    return Found({}, {"per_gene": {name: scores[theirs]["per_gene"] for name, theirs in ROWS.items()}, "settings": settings})


def _row(entry: Entry, name: str) -> Entry:
    pearson = float(np.mean(list(entry.details["per_gene"][name].values())))
    method = Method(name, "model" if name == MODEL_ROW else "baseline")
    return Entry(entry.place, method, {"pearson": pearson}, 0.0, entry.test_share)


def _verdict(per_gene: dict[str, dict[str, float]], seed: int) -> Verdict:
    """Against the simple method that turned out better: hindsight that favours it, not us."""
    means = {name: float(np.mean(list(values.values()))) for name, values in per_gene.items()}
    best = max(BASELINES, key=means.__getitem__)
    leads = np.array([value - per_gene[best][gene] for gene, value in per_gene[MODEL_ROW].items()])
    return Verdict(MEASURE, len(leads), means[MODEL_ROW], best, means[best], mean_lead(leads, seed))


def answer_imputation(config: TryImputation, winner: str) -> tuple[AnnData | None, str]:
    """A new AnnData of the genes that the file lacks: X the counts expected at each cell's depth, layers["log1p"]."""
    query, reference, recipe, _ = _read(config)
    recipe = recipe.model_copy(update={"seed": config.seed})
    try:
        pair = read_pair(query, reference, recipe, None)
    except NothingToImputeError:
        return None, "the file measured every gene of the reference: there is nothing to answer"
    wanted = pair.names.call(pair.problem.wanted)
    if winner == MODEL_ROW:
        found = SpatialImputationPipeline(base_of(config), recipe).fit(query, reference).predict(query)
        return found, f"{found.n_vars} genes imputed by {winner}"
    return _simple_answer(query, pair.problem, wanted, (winner, config.seed)), f"{len(wanted)} genes imputed by {winner}"


def _simple_answer(query: AnnData, problem: Any, wanted: list[str], how: tuple[str, int]) -> AnnData:
    observed, asked = np.flatnonzero(problem.observed), np.flatnonzero(problem.wanted)
    theirs = problem.cells.reference
    counts = Counts(dense(problem.cells.query, observed), dense(theirs, observed), dense(theirs, asked))
    _, logs = baseline_predictions(counts, how[1])[how[0]]
    expected = np.expm1(np.maximum(logs, 0)) / problem.total * counts.query.sum(1)[:, None]
    var = pd.DataFrame(index=pd.Index(wanted))
    layers = {"log1p": np.log1p(expected).astype(np.float32)}
    return AnnData(X=expected.astype(np.float32), obs=query.obs.copy(), var=var, layers=layers, obsm=dict(query.obsm.copy()))


IMPUTE = Task(TryImputation, measure_imputation, answer_imputation)
