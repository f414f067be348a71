"""A perturbation screen in memory: groups of comparable cells, what was done to each, and the pairs a network learns from.

A group is one batch x cell type. Perturbed cells are only ever compared with controls of their own group: a group without
controls teaches nothing, and a screen in which batch and perturbation coincide is refused.
"""

# n cells, C cells of a batch, G genes, S sentences, K pairs

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from cellplane.artifact.folder import ModelFolder
from cellplane.cells import CellBatch
from cellplane.data.sentences import CellTable, MemoryStore, MicroBatch
from cellplane.data.sources import AnnData, cell_table, column
from cellplane.errors import DataError
from cellplane.genes import GeneVocabulary
from cellplane.model.perturbation import KINDS, SIGNS, PairedBatch
from cellplane.pipelines.base import starting_model
from cellplane.pipelines.gene_names import GeneNames
from cellplane.pipelines.imputation_cells import Rows, dense, renumbered, scaled_log
from cellplane.pipelines.perturbation_config import TARGETS, Kind, PerturbationConfig
from cellplane.seeds import keyed_seed

log = logging.getLogger(__name__)

Names = NDArray[np.object_]
Table = NDArray[np.float64]
Key = tuple[tuple[int, ...], int]
T = TypeVar("T")


@dataclass(frozen=True)
class Perturbation:
    """One perturbation: its ``genes`` as ascending positions (from G on: free stimuli) and its kind's number."""

    name: str
    genes: tuple[int, ...]
    kind: int

    @property
    def key(self) -> Key:
        """What it means, whatever it is called: A+B is B+A."""
        return self.genes, self.kind

    def columns(self, cells: int) -> dict[str, torch.Tensor]:
        """What a CellBatch of so many cells says of it."""
        room = [*self.genes, *[-1] * (TARGETS - len(self.genes))]
        signs = [SIGNS[self.kind] if gene >= 0 else 0.0 for gene in room]
        kinds = [self.kind if gene >= 0 else -1 for gene in room]
        return {
            "perturbation": torch.tensor(room, dtype=torch.int64).expand(cells, TARGETS),
            "perturbation_sign": torch.tensor(signs).expand(cells, TARGETS),
            "perturbation_kind": torch.tensor(kinds, dtype=torch.int64).expand(cells, TARGETS),
        }


def understood(name: str, config: PerturbationConfig, names: GeneNames, stimuli: Sequence[str]) -> Perturbation | None:
    """What a name means: the genes of a combination, or of `targets`; a stimulus among ``stimuli`` has a free place. None: unknown.

    The order of a combination's parts says nothing, here and in what the configuration says of names.
    """
    kind = KINDS.index(kind_of(name, config))
    place = said_of(name, {stimulus: at for at, stimulus in enumerate(stimuli)}, config)
    if place is not None:
        return Perturbation(name, (len(names.labels) + place,), kind)
    places = sorted(int(at) for at in names.find(said_of(name, config.targets, config) or _parts(name, config)))
    if not places or places[0] < 0:
        return None
    if len(places) > TARGETS:
        raise DataError(f"{name} perturbs {len(places)} genes; combinations of at most {TARGETS} are understood")
    return Perturbation(name, tuple(places), kind)


def kind_of(name: str, config: PerturbationConfig) -> Kind:
    """The kind of a perturbation: what `kinds` says of its name, else `kind`."""
    return said_of(name, config.kinds, config) or config.kind


def said_of(name: str, said: Mapping[str, T], config: PerturbationConfig) -> T | None:
    """What is said of a name, or of one with the same parts in another order; None: nothing."""
    if name in said or config.separator not in name:
        return said.get(name)
    parts = sorted(_parts(name, config))
    return next((value for other, value in said.items() if sorted(_parts(other, config)) == parts), None)


def _parts(name: str, config: PerturbationConfig) -> tuple[str, ...]:
    return tuple(part.strip() for part in name.split(config.separator) if part.strip() not in ("", config.control))


@dataclass(frozen=True)
class Screen:
    """Cells with their ``group`` and perturbation ``name`` [n] ('' = control), and what the names mean.

    ``total`` is the median total of some controls, which counts are scaled to, NaN before `told_by`; ``stimuli`` are those
    without a gene; ``cell_type`` of every group, the group itself where none is known.
    """

    table: CellTable
    genes: GeneNames
    group: Names
    name: Names
    meaning: Mapping[str, Perturbation]
    total: float
    cell_type: Mapping[str, str]
    stimuli: tuple[str, ...] = ()

    def rows(self, group: str, name: str = "") -> Rows:
        """Cells of a group with this perturbation; controls without a name."""
        return np.flatnonzero((self.group == group) & (self.name == name))

    @cached_property
    def logs(self) -> Table:
        """log1p of scaled counts of every cell [n, G]."""
        return scaled_log(dense(self.table, np.arange(len(self.table.panel))), self.table.totals(), self.total)

    def mean(self, rows: Rows) -> Table:
        """Mean log profile of some cells, [G]."""
        profile: Table = self.logs[rows].mean(0)
        return profile

    def profile(self, rows: Rows) -> Table:
        """Share of each gene in the counts of some cells [G]; half a count is added to every measured gene, so that none is 0."""
        part = self.table.rows(rows)
        counts = np.bincount(part.gene, weights=part.value, minlength=len(part.panel)) + 0.5 * self.table.panel
        return np.asarray(counts / counts.sum())

    def only(self, kept: NDArray[np.bool_]) -> Screen:
        """Some of the cells, in their order; names mean the same."""
        rows = np.flatnonzero(kept)
        return replace(self, table=self.table.rows(rows), group=self.group[rows], name=self.name[rows])

    def told_by(self, learning: NDArray[np.bool_], max_genes: int | None = None) -> Screen:
        """All cells, over genes and in a scale that the cells flagged in ``learning`` [n] tell, and no others.

        ``max_genes`` are the targets and the measured genes that vary most over these cells (None: all genes, measured or
        not); the scale is the median total of the controls among them, over the genes that stay.
        """
        screen = self
        if max_genes is not None and min(max_genes, int(self.table.panel.sum())) < len(self.genes.labels):
            targets = {gene for one in self.meaning.values() for gene in one.genes if gene < len(self.genes.labels)}
            screen = self._over(_most_variable(self.table.rows(np.flatnonzero(learning)), sorted(targets), max_genes))
        return replace(screen, total=float(np.median(screen.table.totals()[learning & (self.name == "")])))

    def _over(self, kept: Rows) -> Screen:
        """The same cells over some of the genes, given as ascending positions; targets must be among them."""
        vocabulary, labels = self.genes.vocabulary, self.genes.labels
        chosen = GeneVocabulary(tuple(vocabulary.gene_ids[gene] for gene in kept), vocabulary.namespace)
        place = {int(gene): at for at, gene in enumerate(kept)} | {len(labels) + at: len(kept) + at for at in range(len(self.stimuli))}
        return replace(
            self,
            table=renumbered(self.table, kept),
            genes=GeneNames(chosen, tuple(labels[gene] for gene in kept)),
            meaning={name: replace(one, genes=tuple(place[gene] for gene in one.genes)) for name, one in self.meaning.items()},
        )


@dataclass(frozen=True)
class Pair:
    """A group's controls and its cells with one perturbation."""

    group: str
    cell_type: str
    perturbation: Perturbation
    control: Rows
    perturbed: Rows


def pairs_of(screen: Screen, min_cells: int) -> list[Pair]:
    """Every (group, perturbation) with enough cells on both sides, in order of names."""
    found = []
    for group in sorted(set(screen.group)):
        control = screen.rows(group)
        for name in sorted(set(screen.name[screen.group == group]) - {""}):
            perturbed = screen.rows(group, name)
            if len(control) >= min_cells and len(perturbed) >= min_cells:
                found.append(Pair(group, screen.cell_type[group], screen.meaning[name], control, perturbed))
    return found


Read = tuple[Screen, ModelFolder | None, dict[str, object]]


def read_screen(data: AnnData, config: PerturbationConfig, base: ModelFolder | None) -> Read:
    """The cells of a screen, the base model with the data's genes, and what to report; cells that teach nothing are left out.

    At most `max_genes` are read; all cells tell which, and all controls the scale. Raises what `read_cells` raises, and
    DataError without a control that shows counts, or where no group has both controls and perturbed cells.
    """
    cells, start, report = read_cells(data, config, base)
    screen = cells.only(with_counts(cells))
    check_groups(screen.group, screen.name, config)
    return screen.told_by(np.ones(screen.table.n_cells, dtype=bool), config.max_genes), start, report


def read_cells(data: AnnData, config: PerturbationConfig, base: ModelFolder | None) -> Read:
    """As `read_screen`, with cells that have no counts, over all genes, and in no scale yet: `Screen.told_by` gives one.

    Raises ColumnError for a missing column, DataError without controls, or with unknown perturbations (unless left out).
    """
    start, vocabulary = starting_model(base, data, config.keys, config.new_genes)
    table, report = cell_table(data, vocabulary, config.keys)
    names = named(data, config)
    genes = GeneNames.of(data, vocabulary, config.keys)
    meaning, stimuli = _meanings(names, config, genes)
    group, cell_type = groups(data, config)
    screen = Screen(table, genes, group, names, meaning, np.nan, cell_type, stimuli)
    return screen.only(np.array([name == "" or name in meaning for name in names])), start, report


def with_counts(screen: Screen) -> NDArray[np.bool_]:
    """Which cells [n] show counts at all, the others being told; DataError where no control does."""
    counted = screen.table.totals() > 0
    if not (counted & (screen.name == "")).any():
        raise DataError("no control cell has counts in genes the model knows: a screen is read from its controls")
    if empty := int((~counted).sum()):
        log.warning("%d of %d cells have no counts in genes the model knows and are left out", empty, screen.table.n_cells)
    return counted


def named(data: AnnData, config: PerturbationConfig) -> Names:
    """Every cell's perturbation [n]: '' for a control, None for a cell that is to be left out. DataError without controls."""
    names = column(data, config.perturbation_key)
    if config.control not in names:
        seen = ", ".join([*sorted({str(name) for name in names})[:5], "..."] if len(names) else ["nothing: there are no cells"])
        raise DataError(
            f"no cell of obs[{config.perturbation_key!r}] is {config.control!r} (it says {seen}): predictions start from control "
            "cells; set control to what yours are called"
        )
    left_out = {None, *config.ignore}
    out: Names = np.empty(len(names), dtype=object)
    out[:] = ["" if name == config.control else None if name in left_out else name for name in names]
    return out


def groups(data: AnnData, config: PerturbationConfig) -> tuple[Names, dict[str, str]]:
    """Batch x cell type of every cell, [n] text, and the cell type of each group; one group where neither is named."""
    used = [key for key in (config.keys.batch_key, config.keys.labels_key) if key is not None]
    columns = [column(data, key) for key in used]
    out: Names = np.empty(data.n_obs, dtype=object)
    out[:] = [" | ".join(str(part[row]) for part in columns) or "all" for row in range(data.n_obs)]
    return out, dict(zip(out, out if config.keys.labels_key is None else columns[-1], strict=True))


def _meanings(names: Names, config: PerturbationConfig, genes: GeneNames) -> tuple[dict[str, Perturbation], tuple[str, ...]]:
    """What each name means, and the stimuli that need a free place; unknown ones are refused or left out."""
    found: dict[str, Perturbation] = {}
    unknown, stimuli = [], []
    for name in sorted({name for name in names if name}):
        meaning = understood(name, config, genes, ())
        if meaning is not None:
            found[name] = meaning
        elif config.kinds.get(name, config.kind) == "stimulation":
            stimuli.append(name)
        else:
            unknown.append(name)
    for name in stimuli:
        log.warning("%s is no gene the model knows: it is learned by itself, and says nothing about other stimuli", name)
        found[name] = Perturbation(name, (len(genes.labels) + stimuli.index(name),), KINDS.index("stimulation"))
    if unknown and config.unknown == "error":
        raise DataError(
            f"{len(unknown)} perturbations are no genes the model knows, e.g. {unknown[:5]}: name their genes in targets, leave their "
            "cells out with ignore, or set unknown to leave_out"
        )
    if unknown:
        log.warning("cells of %d perturbations that are no known genes are left out: %s", len(unknown), ", ".join(unknown[:5]))
    return found, tuple(stimuli)


def _most_variable(table: CellTable, targets: Sequence[int], wanted: int) -> Rows:
    """The targets and the most variable other measured genes, as ascending positions; more than ``wanted`` where targets are more."""
    cell = np.repeat(np.arange(table.n_cells), np.diff(table.crow))
    totals, genes = table.totals(), len(table.panel)
    logs = np.log1p(table.value * (np.median(totals) / np.maximum(totals, 1))[cell])
    sums, squares = (np.bincount(table.gene, weights=logs**power, minlength=genes) for power in (1, 2))
    variance = squares / table.n_cells - (sums / table.n_cells) ** 2
    variance[~table.panel] = -np.inf
    variance[list(targets)] = np.inf
    possible = int((variance > -np.inf).sum())
    kept: Rows = np.sort(np.argsort(-variance, kind="stable")[: min(max(wanted, len(targets)), possible)])
    log.info("%d of %d genes are read and predicted: targets, and the most variable of those measured", len(kept), genes)
    return kept


def check_groups(group: Names, names: Names, config: PerturbationConfig) -> None:
    """DataError where no group has enough cells of both sides, with the table of what there is."""
    controls, perturbed = Counter(group[names == ""]), Counter(group[names != ""])
    if any(controls[one] >= config.min_cells and perturbed[one] >= config.min_cells for one in controls):
        return
    lines = [f"{one}: {controls[one]} control, {perturbed[one]} perturbed" for one in sorted(set(group))[:8]]
    confounded = all(not (controls[one] and perturbed[one]) for one in set(group))
    why = "batch and perturbation coincide, so neither can be told from the other" if confounded else "the groups are too small"
    raise DataError(
        f"no group has {config.min_cells} control and {config.min_cells} perturbed cells: {why}. By group (batch_key, labels_key): "
        + "; ".join(lines)
    )


@dataclass(frozen=True)
class PairObjective:
    """Draws control cells of a pair's group and cells that were perturbed; every perturbation weighs the same."""

    screen: Screen
    pairs: Sequence[Pair]
    config: PerturbationConfig

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Control cells of every sentence."""
        return np.array([min(len(pair.control), self.config.control_cells) for pair in self.pairs], dtype=np.int64)

    def weights(self) -> NDArray[np.float64]:
        """1 / number of groups of the pair's perturbation."""
        times = Counter(pair.perturbation.name for pair in self.pairs)
        return np.array([1 / times[pair.perturbation.name] for pair in self.pairs])

    @cached_property
    def _known(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Control profile and true change of every pair, [K, G] each."""
        control = np.stack([self.screen.profile(pair.control) for pair in self.pairs])
        change = np.stack([self.screen.mean(pair.perturbed) - self.screen.mean(pair.control) for pair in self.pairs])
        return torch.from_numpy(control).float(), torch.from_numpy(change).float()

    def prepare(self, micro_batch: MicroBatch) -> tuple[PairedBatch, None]:
        """Determined by the sentences' seeds alone."""
        chosen = [self.pairs[index] for index in micro_batch.sentences]
        sizes = self.config.control_cells, self.config.perturbed_cells
        drawn = [
            (some(pair.control, sizes[0], seed, "control"), some(pair.perturbed, sizes[1], seed, "perturbed"))
            for pair, seed in zip(chosen, micro_batch.seeds, strict=True)
        ]
        batch = asked(self.screen.table, [rows for rows, _ in drawn], [pair.perturbation for pair in chosen])
        batch = replace(batch, sentence_seed=torch.tensor(micro_batch.seeds, dtype=torch.int64))
        answers = MemoryStore(self.screen.table, [rows for _, rows in drawn]).read(range(len(drawn)))
        control_KG, change_KG = self._known
        at = list(micro_batch.sentences)
        given = {field.name: getattr(batch, field.name) for field in fields(CellBatch)}
        return PairedBatch(**given, answers=answers, control_SG=control_KG[at], change_SG=change_KG[at]), None


def some(rows: Rows, wanted: int, seed: int, what: str) -> Rows:
    """At most ``wanted`` of the rows, ascending, by the seed."""
    return np.sort(np.random.default_rng(keyed_seed(seed, what)).permutation(rows)[:wanted])


def asked(table: CellTable, sentences: Sequence[Rows], perturbations: Sequence[Perturbation]) -> CellBatch:
    """Sentences of these cells, each with one perturbation; cells without coordinates or labels."""
    plain = replace(table, coordinates=None, labels=None)
    batch = MemoryStore(plain, sentences).read(range(len(sentences)))
    columns = [one.columns(len(rows)) for one, rows in zip(perturbations, sentences, strict=True)]
    return replace(batch, **{name: torch.cat([part[name] for part in columns]) for name in columns[0]})
