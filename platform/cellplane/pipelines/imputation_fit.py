"""Learning an imputation: one network that saw the reference's hidden genes as targets, and how far it can be trusted.

The query's truth about the wanted genes does not exist, so everything is chosen on observed genes that are hidden in turn,
fold by fold: the number of steps, the partner and its share, and which correlation to expect of a gene.
"""

# C cells, G genes

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from cellplane.artifact.folder import ModelFolder
from cellplane.data.sentences import PlanConfig, StepPlan
from cellplane.errors import DataError
from cellplane.inference import build_network, decoded
from cellplane.model.cellplm import CellPLM, new_model
from cellplane.pipelines.imputation_cells import (
    REFERENCE,
    ImputationObjective,
    MixedCells,
    Rows,
    dense,
    limited,
    patches,
    scaled_log,
    shown,
)
from cellplane.pipelines.imputation_config import ImputationConfig
from cellplane.pipelines.imputation_partner import best_partner, partner_rates, partners_of
from cellplane.pipelines.masks import Masks, imputation_masks
from cellplane.pipelines.metrics import correlations
from cellplane.seeds import keyed_seed
from cellplane.train.config import FitConfig
from cellplane.train.finetune import Best, Course, Look, finetune

log = logging.getLogger(__name__)

Flags = NDArray[np.bool_]
Table = NDArray[np.float64]
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the partner in the answer, tried on hidden observed genes
LOOKED_CELLS = 2048  # query cells that a look predicts; always the same ones


@dataclass(frozen=True)
class Problem:
    """Cells, which genes [G] the query shows (``observed``) and which are asked for (``wanted``), and where to start from.

    ``total`` is what every cell's shown counts are scaled to, before they are read and where logs are compared.
    """

    cells: MixedCells
    observed: Flags
    wanted: Flags
    total: float
    start: ModelFolder | None = None

    def hiding(self, genes: Rows) -> Problem:
        """The same with these observed genes taken from the query and asked for as well."""
        hidden = np.zeros_like(self.observed)
        hidden[genes] = True
        observed = self.observed & ~hidden
        cells = replace(self.cells, query=limited(self.cells.query, observed))
        return replace(self, cells=cells, observed=observed, wanted=self.wanted | hidden)

    def partner(self, genes: Rows, config: ImputationConfig) -> Table:
        """What the config's partner expects of some genes, [n, len(genes)]; see `partner_rates`."""
        return partner_rates(self.cells, self.observed, self.total, genes, config)

    def masks(self, recipe: str) -> Masks:
        """See `imputation_masks`."""
        return imputation_masks(self.observed, self.wanted, recipe)


@dataclass(frozen=True)
class Learned:
    """What a fit found: the network after ``step`` steps, its partner with ``share`` and ``scaling``, and per gene [G] what to expect.

    ``ridge`` is the penalty of the regression that is the partner, 0 where the neighbours' average is.

    ``expected`` is the correlation over cells to expect of a prediction (NaN where nothing is known); ``hidden_correlation``
    that of every observed gene when it was hidden.
    """

    network: CellPLM
    step: int
    ridge: float
    share: float
    scaling: Scaling
    expected: Table
    hidden_correlation: Table
    history: list[dict[str, float]]


def learn(problem: Problem, config: ImputationConfig, course: Course) -> Learned:
    """Hides the observed genes fold by fold, then fits once more with all of them for as many steps as was best.

    ``course`` goes along with the last fit alone: after a kill the folds, which depend on the seed alone, are done again.
    """
    rng = np.random.default_rng(keyed_seed(config.seed, "folds"))
    observed = np.flatnonzero(problem.observed)
    folds = [Fold.of(problem, np.sort(genes), config) for genes in np.array_split(rng.permutation(observed), config.folds)]
    if not any((fold.truth.std(0) > 0).any() for fold in folds):
        raise DataError(
            f"no observed gene varies over the {problem.cells.query.n_cells} cells of the query, so none can show how well it is "
            "foretold when it is hidden; fit on cells that differ"
        )
    step = best_step([fold.curve for fold in folds])
    ridge, share = best_partner(scores_of(folds)) if partners_of(config) else (0.0, 0.0)
    correlation, expected = np.full(len(problem.observed), np.nan), np.full(len(problem.observed), np.nan)
    for fold in folds:
        correlation[fold.genes] = fold.correlation(ridge, share)
    asked = np.flatnonzero(problem.wanted)
    expected[asked] = expected_correlations(problem, folds, correlation)
    told = f"ridge {ridge:g}" if ridge else "neighbours"
    log.info("hidden observed genes: best after %d steps, share of %s %.2f, correlation %.3f", step, told, share, np.nanmean(correlation))
    network = new_network(problem, config)
    best = fit(network, problem, config, Until(step, config, course), course)
    network.load_state_dict(best.weights)
    chosen = config.model_copy(update={"ridge": ridge})
    alone = Scaling(np.ones(len(asked)), np.zeros(len(asked)))
    scaling = Scaling.between(*logs_of(network, problem, chosen)) if share else alone
    return Learned(network, step, ridge, share, scaling, expected, correlation, best.history)


def logs_of(network: CellPLM, problem: Problem, config: ImputationConfig) -> tuple[Table, Table]:
    """The partner's and the network's log1p of scaled rates of the wanted genes, [n, H] each."""
    asked = np.flatnonzero(problem.wanted)
    near, rates = problem.partner(asked, config), impute(network, problem, config).query[:, asked]
    return np.log1p(near * problem.total), np.log1p(rates * problem.total)


@dataclass(frozen=True)
class Fold:
    """One part of the observed genes, hidden from the query throughout: what model and partners say of them, and the truth.

    All are log1p of scaled rates [C, n]; ``partners`` by the ridge's penalty (0: neighbours), ``curve`` the correlation by
    step; ``in_reference`` [G] how well each hidden gene was predicted in the reference.
    """

    genes: Rows
    curve: dict[int, float]
    truth: Table
    model: Table
    partners: Mapping[float, Table]
    in_reference: Table

    @classmethod
    def of(cls, problem: Problem, genes: Rows, config: ImputationConfig) -> Fold:
        """Fits with these genes hidden."""
        inner = problem.hiding(genes)
        network = new_network(inner, config)
        watch = HiddenGenes(network, problem, inner, genes, config)
        best = fit(network, inner, config, watch)
        network.load_state_dict(best.weights)
        curve = {int(row["step"]): row["val/pearson"] for row in best.history if "val/pearson" in row}
        rates = impute(network, inner, config)
        told = {ridge: config.model_copy(update={"ridge": ridge}) for ridge in partners_of(config)}
        near = {ridge: np.log1p(inner.partner(genes, one) * problem.total) for ridge, one in told.items()}
        model = np.log1p(rates.query[:, genes] * problem.total)
        return cls(genes, curve, watch.truth, model, near, reference_fit(inner, rates))

    def correlation(self, ridge: float, share: float) -> Table:
        """Of every gene [n], with this share of a partner."""
        if not share:
            return correlations(self.truth, self.model)
        near = self.partners[ridge]
        return correlations(self.truth, mixed(self.model, Scaling.between(near, self.model)(near), share))


@dataclass(frozen=True)
class Scaling:
    """Brings one table's columns to the mean and spread of another's: the neighbours' average keeps its pattern, not its level."""

    slope: Table
    shift: Table

    @classmethod
    def between(cls, table: Table, like: Table) -> Scaling:
        """Of logs [n, H] to logs [n, H]; a column that does not vary becomes the other's mean."""
        spread = table.std(0)
        slope = np.where(spread > 0, like.std(0) / np.where(spread > 0, spread, 1), 0)
        return cls(slope, like.mean(0) - slope * table.mean(0))

    def only(self, columns: Rows) -> Scaling:
        """That of some of the columns."""
        return Scaling(self.slope[columns], self.shift[columns])

    def __call__(self, table: Table) -> Table:
        """The table [n, H] in the other's units."""
        return table * self.slope + self.shift


def mixed(model: Table, partner: Table, share: float) -> Table:
    """The weighted mean of both in log units; not below 0."""
    found: Table = np.maximum((1 - share) * model + share * partner, 0)
    return found


def best_step(curves: Sequence[dict[int, float]]) -> int:
    """The step with the highest mean over the folds; a fold that ended earlier counts with its last value."""
    steps = sorted(set().union(*curves))
    means = [np.mean([curve[max(at for at in curve if at <= step)] for curve in curves]) for step in steps]
    return steps[int(np.argmax(means))]


def scores_of(folds: Sequence[Fold]) -> dict[tuple[float, float], float]:
    """Mean correlation over all hidden observed genes of every (ridge, share)."""
    pairs = [(ridge, share) for ridge in folds[0].partners for share in SHARES]
    return {pair: float(np.nanmean(np.concatenate([fold.correlation(*pair) for fold in folds]))) for pair in pairs}


def expected_correlations(problem: Problem, folds: Sequence[Fold], correlation: Table) -> Table:
    """What to expect of each wanted gene: a line through the hidden observed genes, by how well each is predicted in the reference.

    Shrunk to the mean by one pseudo gene; NaN when fewer than three observed genes vary.
    """
    feature = np.full(len(correlation), np.nan)
    for fold in folds:
        feature[fold.genes] = fold.in_reference[fold.genes]
    known = np.flatnonzero(np.isfinite(correlation) & np.isfinite(feature))
    asked = np.flatnonzero(problem.wanted)
    if len(known) < 3:
        return np.full(len(asked), np.nan)
    centre = feature[known].mean(), correlation[known].mean()
    across = feature[known] - centre[0]
    slope = float(across @ (correlation[known] - centre[1]) / (across @ across + across.var() + 1e-12))
    by_fold = np.stack([fold.in_reference[asked] for fold in folds])
    there = np.isfinite(by_fold)
    found = np.where(there, by_fold, 0).sum(0) / np.maximum(there.sum(0), 1)  # a gene that never varied there is worth 0
    expected: Table = np.clip(centre[1] + slope * (found - centre[0]), -1, 1)
    return expected


class HiddenGenes:
    """Looks how well hidden observed genes are predicted in the query; the score is their mean correlation."""

    def __init__(self, network: CellPLM, problem: Problem, inner: Problem, genes: Rows, config: ImputationConfig) -> None:
        self.network, self.inner, self.genes, self.config = network, inner, genes, config
        self.total = problem.total
        totals = problem.cells.query.totals()
        self.truth = scaled_log(dense(problem.cells.query, genes), totals, self.total)
        self.some = looked(problem, config)

    def __call__(self) -> Look:
        """Pearson over cells, mean over genes."""
        rates = impute(self.network, self.inner, self.config, self.some).query
        rows = np.concatenate(self.some)
        found = correlations(self.truth[rows], np.log1p(rates[rows][:, self.genes] * self.total))
        score = float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")
        return Look({"val/pearson": score}, (score,))


class Until:
    """A look that asks for the weights after ``step`` steps, whatever they are worth; also where a fit goes on after a kill."""

    def __init__(self, step: int, config: FitConfig, course: Course) -> None:
        self.step, self.every, self.last = step, config.validate_every, config.optimizer.steps
        keeping = course.keeping
        begun = None if keeping is None else keeping.checkpoints.newest_valid(keeping.identity)
        self.looks = 0 if begun is None else begun.step // self.every

    def __call__(self) -> Look:
        """Best at the wanted step."""
        self.looks += 1
        return Look({}, (-abs(min(self.looks * self.every, self.last) - self.step),))


def looked(problem: Problem, config: ImputationConfig) -> list[Rows]:
    """Patches of at most about LOOKED_CELLS query cells, spread over all."""
    every = patches(problem.cells.query, config.query_cells)
    step = max(1, round(problem.cells.query.n_cells / LOOKED_CELLS))
    return every[::step]


def fit(network: CellPLM, problem: Problem, config: ImputationConfig, look: HiddenGenes | Until, course: Course | None = None) -> Best:
    """Trains the network on patches of the query beside draws of the reference."""
    objective = ImputationObjective(problem.cells, patches(problem.cells.query, config.query_cells), problem.masks(config.recipe), config)
    cells = config.query_cells + config.reference_cells
    plan = StepPlan(objective.sizes, PlanConfig(seed=config.seed, cells_per_micro_batch=cells, micro_batches_per_step=1))
    recipe = config if not isinstance(look, Until) else config.model_copy(update={"patience": 1})
    return finetune(network, objective, plan, recipe, look, course)


def new_network(problem: Problem, config: ImputationConfig) -> CellPLM:
    """The network before training: the base model's weights wherever they fit, platform tokens that say nothing yet."""
    base = config.model if problem.start is None else problem.start.config
    joint = config.recipe == "joint"
    model = replace(
        base if base.decoder == "negative_binomial" else replace(base, latent=config.model.latent, decoder="negative_binomial"),
        n_genes=len(problem.observed),
        n_classes=0,
        platform_tokens=2 if joint else 0,
        query_weight=config.query_weight if joint else 1.0,
        input_total=problem.total if joint else 0.0,
    )
    network = new_model(model, config.seed)
    if problem.start is not None:
        _take_what_fits(network, problem.start)
    return network


def _take_what_fits(network: CellPLM, start: ModelFolder) -> None:
    """Copies weights of the same name and shape; a last layer without platforms goes beside the new columns."""
    known = build_network(start).state_dict()
    state = network.state_dict()
    for name, tensor in state.items():
        old = known.get(name)
        if old is None:
            continue
        if old.shape == tensor.shape:
            tensor.copy_(old)
        elif name == "decoder.mean.weight" and len(old) == len(tensor) and old.shape[1] < tensor.shape[1]:
            tensor[:, : old.shape[1]] = old
    network.load_state_dict(state)


@dataclass(frozen=True)
class Rates:
    """Expected share of each gene in what a cell shows: observed genes sum to 1; [n, G] of query and context reference cells.

    ``dispersion`` [G] of the counts; ``context`` the reference rows that were in the sentences.
    """

    query: Table
    reference: Table
    dispersion: Table
    context: Rows


def impute(network: CellPLM, problem: Problem, config: ImputationConfig, some: Sequence[Rows] | None = None) -> Rates:
    """Rates of all genes from observed ones alone, decoded as the reference's platform; the same context for every patch."""
    parts = patches(problem.cells.query, config.query_cells) if some is None else some
    context = context_of(problem, config)
    query = np.zeros((problem.cells.query.n_cells, len(problem.observed)))
    reference = np.zeros((len(context), len(problem.observed)))
    dispersion = np.zeros(len(problem.observed))
    for rows, rates, theta in patch_rates(network, problem, config, parts):
        query[rows], dispersion = rates[: len(rows)], theta
        reference += rates[len(rows) :] / len(parts)
    return Rates(query, reference, dispersion, context)


def context_of(problem: Problem, config: ImputationConfig) -> Rows:
    """The reference rows that stand beside every patch when a model answers."""
    return problem.cells.drawn(config.reference_cells, keyed_seed(config.seed, "context"))


def patch_rates(network: CellPLM, problem: Problem, config: ImputationConfig, parts: Sequence[Rows]) -> Iterator[tuple[Rows, Table, Table]]:
    """Patch by patch: its rows [c], the rates of its cells and then of the context's [c + context, G], the dispersion [G].

    rate_g = exp(logit_g) / sum over observed genes of exp(logit): what a cell that shows n counts is expected to show of g is
    n times that. Hidden counts of query and reference are not in the batch at all.
    """
    masks, context = problem.masks("joint"), context_of(problem, config)
    for rows in parts:
        batch = shown(problem.cells.batch([(rows, context)]), masks).to(next(network.parameters()).device)
        told = replace(batch, platform_index=torch.full_like(batch.platform_index, REFERENCE))
        mean_CG, theta_G = decoded(network, batch, told)
        mean_CG = mean_CG.double().cpu()
        rates = (mean_CG / mean_CG[:, torch.from_numpy(problem.observed)].sum(1, keepdim=True)).numpy()
        yield rows, rates, theta_G.double().cpu().numpy()


def reference_fit(problem: Problem, rates: Rates) -> Table:
    """Correlation of each hidden gene's rates with its counts over the context cells of the reference, [G]; NaN elsewhere."""
    part = problem.cells.reference.rows(rates.context)
    total, hidden = problem.total, np.flatnonzero(problem.wanted)
    truth = scaled_log(dense(part, hidden), limited(part, problem.observed).totals(), total)
    found = np.full(len(problem.observed), np.nan)
    found[hidden] = correlations(truth, np.log1p(rates.reference[:, hidden] * total))
    return found
