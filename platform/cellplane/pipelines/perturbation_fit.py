"""Learning what perturbations change, and predicting populations: control cells in, mean profile out.

How long to train is chosen by hiding perturbations in turn: with few of them, whatever the network adds to "only the target
changes" may be noise, and then the best number of steps is none at all. A perturbation that was measured in other cell types
also has a mean change there: what share of it enters the answer is chosen by hiding cell types.
"""

# C cells, G genes, S sentences

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from cellplane.artifact.folder import ModelFolder
from cellplane.artifact.genes import with_only
from cellplane.data.sentences import PlanConfig, StepPlan
from cellplane.inference import decoded
from cellplane.model.cellplm import CellPLM, new_model
from cellplane.model.perturbation import KINDS, change_of, population_rates
from cellplane.pipelines.base import take_over
from cellplane.pipelines.imputation_cells import Rows
from cellplane.pipelines.imputation_fit import SHARES, Until
from cellplane.pipelines.metrics import correlations
from cellplane.pipelines.perturbation_cells import Key, Pair, PairObjective, Perturbation, Screen, asked, pairs_of
from cellplane.pipelines.perturbation_config import PerturbationConfig
from cellplane.seeds import keyed_seed
from cellplane.train.finetune import Best, Course, Look, finetune

log = logging.getLogger(__name__)

Table = NDArray[np.float64]
TRANSFERRED = ("embedder.genes_GD", "embedder.linear", "embedder.norm", "embedder.positions", "embedder.hidden_D", "encoder.")
SENTENCE_CELLS = 256  # control cells that attend to one another when a population is predicted
CERTAIN = 2.0  # standard errors that a gain on hidden perturbations must exceed
EFFICIENCY = {"knockout": -2.3, "crispri": -1.6, "crispra": 1.4, "stimulation": 0.0}  # log rates: -90 %, -80 %, times four, none
USUAL = tuple(EFFICIENCY[kind] for kind in KINDS)


@dataclass(frozen=True)
class Learned:
    """The network after ``step`` steps, what the training pairs themselves tell, and the steps' metrics."""

    network: CellPLM
    step: int
    measured: Measured
    history: list[dict[str, float]]


@dataclass(frozen=True)
class Measured:
    """What training pairs tell without a network: every perturbation's mean change [G] over its groups, by its key.

    ``share`` is that change's part in an answer about the perturbation; ``log_efficiency`` of each kind is what the targets'
    own log rates changed by.
    """

    changes: Mapping[Key, Table]
    share: float
    log_efficiency: Sequence[float]

    @classmethod
    def of(cls, screen: Screen, pairs: Sequence[Pair], share: float = 0.0) -> Measured:
        """What these pairs tell."""
        found: dict[Key, list[Table]] = {}
        for pair in pairs:
            found.setdefault(pair.perturbation.key, []).append(screen.mean(pair.perturbed) - screen.mean(pair.control))
        changes = {key: np.asarray(np.mean(mine, axis=0)) for key, mine in found.items()}
        return cls(changes, share, efficiencies(screen, pairs))

    def blended(self, change: Table, one: Perturbation) -> Table:
        """A predicted change [G] with that share of what was measured elsewhere; as it is where nothing was."""
        if not self.share or one.key not in self.changes:
            return change
        return (1 - self.share) * change + self.share * self.changes[one.key]

    @property
    def mean(self) -> Table:
        """Over all training perturbations, [G]."""
        return np.asarray(np.mean(list(self.changes.values()), axis=0))


def learn(screen: Screen, config: PerturbationConfig, start: ModelFolder | None, course: Course) -> Learned:
    """Hides perturbations fold by fold, then fits with all of them for as many steps as was best; none at all where that was best.

    ``course`` goes along with the last fit alone.
    """
    pairs = pairs_of(screen, config.min_cells)
    folds = [Fold.of(screen, pairs, hidden, config, start) for hidden in hidden_pairs(pairs, config)] if config.folds else []
    step = surest_step(folds) if folds else config.optimizer.steps
    measured = Measured.of(screen, pairs, best_share(folds))
    network = new_network(screen, pairs, config, start)
    log.info("%d pairs of group and perturbation; on hidden ones %d steps, share %.2f were best", len(pairs), step, measured.share)
    history: list[dict[str, float]] = []
    if step:
        best = _fit(network, screen, pairs, config.model_copy(update={"patience": 1}), Until(step, config, course), course)
        network.load_state_dict(best.weights)
        history = best.history
    return Learned(network, step, measured, history)


def hidden_pairs(pairs: Sequence[Pair], config: PerturbationConfig) -> list[list[int]]:
    """Which pairs each fold hides: those of some perturbations; of some cell types (else groups) where there are fewer than three.

    No folds where nothing would be left to learn.
    """
    names, types = sorted({pair.perturbation.name for pair in pairs}), {pair.cell_type for pair in pairs}
    keys = [pair.perturbation.name if len(names) >= 3 else pair.cell_type if len(types) >= 2 else pair.group for pair in pairs]
    units = np.random.default_rng(keyed_seed(config.seed, "folds")).permutation(sorted(set(keys)))
    if len(units) < 2:
        log.warning(
            "one perturbation in one group: nothing can be hidden to choose the number of steps; all %d are taken", config.optimizer.steps
        )
        return []
    parts = np.array_split(units, min(config.folds, len(units)))
    return [[index for index, key in enumerate(keys) if key in set(part)] for part in parts]


@dataclass(frozen=True)
class Fold:
    """Some hidden pairs: their correlations by number of steps (from 0 on), and true, predicted and elsewhere measured changes [n, G].

    ``names`` are those of the pairs' perturbations. The last three are of pairs whose perturbation was trained on in other
    groups; there may be none.
    """

    names: list[str]
    curve: dict[int, Table]
    truth: Table
    network: Table
    measured: Table

    @classmethod
    def of(
        cls, screen: Screen, pairs: Sequence[Pair], hidden: Sequence[int], config: PerturbationConfig, start: ModelFolder | None
    ) -> Fold:
        """Fits without these pairs; combinations with a hidden gene are not trained on either.

        Nor are the controls that tell the hidden pairs' truth: their noise is part of every change that is measured from them,
        and would be foretold by whoever had learned it.
        """
        by_name = len({pair.perturbation.name for pair in pairs}) >= 3
        genes = {gene for index in hidden for gene in pairs[index].perturbation.genes} if by_name else set()
        kept = [pair for index, pair in enumerate(pairs) if index not in hidden and not genes & set(pair.perturbation.genes)]
        asked_groups = {pairs[index].group for index in hidden}
        kept = [replace(pair, control=halved(pair.control, config.seed)[0]) if pair.group in asked_groups else pair for pair in kept]
        nothing = np.zeros((0, len(screen.genes.labels)))
        names = [pairs[index].perturbation.name for index in hidden]
        if not kept:
            return cls(names, {0: np.zeros(len(names))}, nothing, nothing, nothing)
        network = new_network(screen, kept, config, start)
        look = HiddenPairs(network, screen, [pairs[index] for index in hidden], config)
        look()  # before any step
        best = _fit(network, screen, kept, config, look, Course())
        looked_at = [0, *(int(row["step"]) for row in best.history if "val/pearson" in row)]
        curve = dict(zip(looked_at, look.seen, strict=True))
        network.load_state_dict(best.weights)
        changes = Measured.of(screen, kept).changes
        known = [at for at, pair in enumerate(look.pairs) if pair.perturbation.key in changes]
        measured = [changes[look.pairs[at].perturbation.key] for at in known]
        return cls(names, curve, look.truth[known], look.changes()[known], np.stack(measured) if measured else nothing)


def surest_step(folds: Sequence[Fold]) -> int:
    """The number of steps with the highest mean over hidden perturbations, if that is no accident; else 0: only targets change.

    No accident: the gain over 0 steps is more than twice its standard error over perturbations (over pairs, where there is
    but one). A fold that ended earlier counts with its last look.
    """
    names = np.array([name for fold in folds for name in fold.names])
    units = names if len(set(names)) >= 3 else np.arange(len(names)).astype(str)
    steps = sorted(set().union(*(fold.curve for fold in folds)))
    scores = np.stack([np.concatenate([_at(fold.curve, step) for fold in folds]) for step in steps])
    gains = np.stack([(scores - scores[0])[:, units == unit].mean(1) for unit in sorted(set(units))])  # units x steps
    best = int(np.argmax(gains.mean(0)))
    error = gains[:, best].std(ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else np.inf
    return steps[best] if gains[:, best].mean() > CERTAIN * error else 0


def _at(curve: Mapping[int, Table], step: int) -> Table:
    return curve[max(at for at in curve if at <= step)]


def best_share(folds: Sequence[Fold]) -> float:
    """The share of the measured change with the highest mean correlation over hidden pairs; 0 where none was measured elsewhere."""
    if not sum(len(fold.truth) for fold in folds):
        return 0.0
    truth, network, measured = (np.concatenate([getattr(fold, name) for fold in folds]).T for name in ("truth", "network", "measured"))
    return max(SHARES, key=lambda share: float(np.nanmean(correlations(truth, (1 - share) * network + share * measured))))


class HiddenPairs:
    """Looks at pairs that are not trained on: half of each group's controls goes in, the change is told from the other half."""

    def __init__(self, network: CellPLM, screen: Screen, pairs: Sequence[Pair], config: PerturbationConfig) -> None:
        self.network, self.screen, self.pairs = network, screen, pairs
        self.halves = [halved(pair.control, config.seed) for pair in pairs]
        self.seen: list[Table] = []  # correlations of every pair [n], look by look
        self.truth = np.stack([screen.mean(pair.perturbed) - screen.mean(half[1]) for pair, half in zip(pairs, self.halves, strict=True)])

    def changes(self) -> Table:
        """Predicted for every pair, [n, G]."""
        asked_for = zip(self.pairs, self.halves, strict=True)
        return np.stack([predicted(self.network, self.screen, half[0], pair.perturbation).change for pair, half in asked_for])

    def __call__(self) -> Look:
        """Mean over pairs of the correlation over genes, and the squared error."""
        found = self.changes()
        error = float(((found - self.truth) ** 2).mean())
        self.seen.append(np.nan_to_num(correlations(self.truth.T, found.T)))
        score = float(self.seen[-1].mean())
        return Look({"val/pearson": score, "val/mse": error}, (round(score, 4), -error))


def halved(rows: Rows, seed: int) -> tuple[Rows, Rows]:
    """Two disjoint halves, by the seed."""
    order = np.random.default_rng(keyed_seed(seed, "halves")).permutation(rows)
    return np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])


def _fit(
    network: CellPLM, screen: Screen, pairs: Sequence[Pair], config: PerturbationConfig, look: HiddenPairs | Until, course: Course
) -> Best:
    objective = PairObjective(screen, pairs, config)
    cells = config.pairs_per_step * config.control_cells
    plan = StepPlan(objective.sizes, PlanConfig(seed=config.seed, cells_per_micro_batch=cells, micro_batches_per_step=1))
    return finetune(network, objective, plan, config, look, course)


def new_network(screen: Screen, pairs: Sequence[Pair], config: PerturbationConfig, start: ModelFolder | None) -> CellPLM:
    """The network before training: it says that nothing changes but the targets, by what the training pairs lost of theirs."""
    if start is not None:
        start = with_only(start, screen.genes.vocabulary)
    model = replace(
        config.model if start is None else start.config,
        n_genes=len(screen.genes.labels),
        latent="ae",
        decoder="residual",
        input_total=screen.total,
        n_stimuli=len(screen.stimuli),
        change_weight=config.change_weight,
        n_classes=0,
        n_batches=0,
        n_datasets=0,
        platform_tokens=0,
    )
    network = new_model(model, config.seed)
    if start is not None:
        take_over(network, start, TRANSFERRED)
    state = network.state_dict()
    state["decoder.log_efficiency"].copy_(torch.tensor(efficiencies(screen, pairs), dtype=torch.float32))
    return network


def efficiencies(screen: Screen, pairs: Sequence[Pair]) -> list[float]:
    """Mean log change of the target's own share, by kind, over measured targets of the pairs; a usual value for kinds without any."""
    found: dict[int, list[float]] = {}
    for pair in pairs:
        before, after = screen.profile(pair.control), screen.profile(pair.perturbed)
        for gene in pair.perturbation.genes:
            if gene < len(screen.table.panel) and screen.table.panel[gene]:
                found.setdefault(pair.perturbation.kind, []).append(float(np.log(after[gene] / before[gene])))
    return [float(np.mean(found[kind])) if kind in found else USUAL[kind] for kind in range(len(KINDS))]


@dataclass(frozen=True)
class Population:
    """A predicted population [G]: the ``change`` of the mean log profile, and the ``rates``, which sum to 1."""

    change: Table
    rates: Table


def predicted(network: CellPLM, screen: Screen, control: Rows, perturbation: Perturbation) -> Population:
    """What becomes of these control cells: the perturbation is added to each, its shift decoded, the rates averaged.

    The cells are dealt evenly to sentences of at most SENTENCE_CELLS, in their order.
    """
    parts = np.array_split(control, -(-len(control) // SENTENCE_CELLS))
    device = next(network.parameters()).device
    profile_G = torch.from_numpy(screen.profile(control)).float().to(device)
    batch = asked(screen.table, parts, [perturbation] * len(parts)).to(device)
    shift_CG, theta_G = decoded(network, batch)
    rates_SG = population_rates(batch, profile_G.expand(len(parts), -1), shift_CG)
    weight_S = batch.cu_seqlens.diff().float() / len(control)
    rates_G = (rates_SG * weight_S[:, None]).sum(0)
    change_G = change_of(rates_G[None], profile_G[None], theta_G, screen.total)[0]
    return Population(change_G.double().cpu().numpy(), rates_G.double().cpu().numpy())
