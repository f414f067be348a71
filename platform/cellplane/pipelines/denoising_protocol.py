"""The full protocol of denoising: two ways to take counts out, tuned baselines, and whether the cells were smoothed too much.

*masking* and *splitting* are those of `denoising_scores`. *splitting* also tells over-smoothing, by counts that nobody was
shown: how much the cells really differ, and which genes really vary together, is known from them without bias where counts
are Poisson. A denoiser that invents structure is worse than none (PROTOCOLS 8).
"""

# C cells, G genes, M compared genes

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from cellplane.artifact.folder import ModelFolder
from cellplane.artifact.genes import with_genes
from cellplane.config import to_plain
from cellplane.data.sentences import CellTable
from cellplane.data.sources import AnnData
from cellplane.errors import DataError
from cellplane.genes import GeneVocabulary
from cellplane.inference import Predictor, query_keys
from cellplane.pipelines.config import DenoisingConfig
from cellplane.pipelines.denoising import Cells, DenoisingPipeline, answers
from cellplane.pipelines.denoising_baselines import (
    BASELINES,
    KEPT,
    Answers,
    Ask,
    Tuned,
    cell_shares,
    gene_shares,
    matrix,
    pieces,
    split_counts,
    splitting_score,
    tuned_baselines,
)
from cellplane.pipelines.denoising_scores import FLIPPED, flip, masking_scores
from cellplane.pipelines.job import MODEL_ROW
from cellplane.pipelines.protocol import Entry, Evaluation, Found, Method, Place
from cellplane.pipelines.protocol_run import Finished, Ledgers, Opened, Say, base_notes, check_protocol, finish, open_data, out_of, quiet
from cellplane.pipelines.task_protocols import DenoisingProtocol

MASKING, SPLITTING = "masking", "splitting"
NETWORK_ROW = "cellplm without neighbours"
CONTROLS = ("nonzero_mean", "own_counts")  # what masking rewards, and what splitting punishes
COMPARED_GENES = 200  # the most counted ones, of which held-out counts say how much cells differ
NO_COVARIANCE = 1e-12  # squared, of all pairs: rounding is what is left of answers alike for all cells
PER = 1000.0  # entries: nats of single ones differ in the fourth digit
METRICS = {MASKING: "mask_pearson", SPLITTING: "nats_per_1000"}
ERRORS = ("nats_per_1000", "mask_rmse", "mask_mae")
AIMS = {"variance_ratio": 1.0, "coexpression_slope": 1.0}


def run_denoising_protocol(config: DenoisingProtocol, say: Say = quiet) -> Finished:
    """Every data set, seed, protocol and method that the ledger does not know yet, and the report of all."""
    check_protocol(config)
    ledgers = Ledgers(out_of(config, config.task))
    entries: list[Entry] = []
    notes: list[str] = []
    for name, asked in config.data.items():
        opened = open_data(name, asked, config.bases_for(name), config.tracking_uri)
        found = list(_entries(config, name, opened, (ledgers, say)))
        entries += found
        notes += [*_notes(name, found), *base_notes(name, [asked.path], opened.bases)]
    evaluation = Evaluation(config.task, METRICS[SPLITTING], tuple(entries), (), tuple(notes), ERRORS, deciding=METRICS, aims=AIMS)
    return finish(evaluation, config, "Denoising, beside tuned baselines, and whether it smooths too much")


@dataclass(frozen=True)
class Task:
    """Cells with counts taken out under one protocol, and how an answer about them is scored."""

    protocol: str
    thinned: CellTable
    score: Callable[[Answers], dict[str, float]]
    test_share: float


def tasks_of(table: CellTable, seed: int) -> Iterator[Task]:
    """Both protocols for one seed; DataError when there is nothing to hide."""
    flipped, entries = flip(table, seed)
    yield Task(MASKING, flipped, lambda found: masking_scores(found, table, entries), FLIPPED / (1 - FLIPPED))
    kept, rest = split_counts(table, seed)
    yield Task(SPLITTING, kept, lambda found: splitting_scores(found, kept, rest), (1 - KEPT) / KEPT)


def splitting_scores(found: Answers, kept: CellTable, rest: CellTable) -> dict[str, float]:
    """Nats per 1,000 held-out entries, and the two signs of over-smoothing."""
    genes = np.argsort(-gene_shares(kept), kind="stable")[: min(COMPARED_GENES, int(kept.panel.sum()))]
    seen: NDArray[np.float64] = np.zeros((kept.n_cells, len(genes)))

    def watched() -> Answers:
        for rows, shares in found:
            seen[rows] = shares[:, genes]
            yield rows, shares

    nats = splitting_score(watched(), kept, rest)
    return {"nats_per_1000": nats * PER, **smoothness(seen, kept, rest, genes)}


def smoothness(shares_CM: NDArray[np.float64], kept: CellTable, rest: CellTable, genes: NDArray[np.int64]) -> dict[str, float]:
    """``variance_ratio``: variance between cells of the answers over the true one, mean-scaled genes summed; below 1 = too smooth.

    ``coexpression_slope``: of the held-out covariances of pairs of genes on those of the answers; below 1: co-expression was
    invented, above 1: it was smoothed away. Held-out counts have no noise in common with an answer, and no two genes' have
    with one another; a gene's own Poisson noise is its mean, and is taken off.
    """
    exposure = kept.totals() * (1 - KEPT) / KEPT
    live = exposure > 0
    mean = gene_shares(kept)[genes]
    counts = matrix(rest)[:, genes].toarray()[live]
    true = counts / exposure[live, None] / mean
    noise = (counts / exposure[live, None] ** 2).mean(0) / mean**2
    told = np.cov(shares_CM[live] / mean, rowvar=False)
    held = np.cov(true, rowvar=False)
    real = float((np.diag(held) - noise).sum())
    pairs = ~np.eye(len(genes), dtype=bool)
    size = float((told[pairs] ** 2).sum())
    return {
        "variance_ratio": float(np.trace(told)) / real if real > 0 else float("nan"),
        "coexpression_slope": float((told[pairs] * held[pairs]).sum()) / size if size > NO_COVARIANCE else float("nan"),
    }


def own_counts(table: CellTable) -> Answers:
    """A cell's own counts as they are: nothing is denoised."""
    shares = cell_shares(table)
    for rows in pieces(table.n_cells):
        yield rows, shares[rows].toarray()


@dataclass(frozen=True)
class Fit:
    """A recipe fitted to thinned cells, when it is first asked."""

    cells: Cells
    recipe: DenoisingConfig

    @cached_property
    def folder(self) -> ModelFolder:
        """The fitted model."""
        found = DenoisingPipeline(config=self.recipe).fit_cells(self.cells).folder_
        assert found is not None
        return found

    def whole(self) -> tuple[Answers, dict[str, Any]]:
        """The model's answers, and what it chose."""
        told = {name: self.folder.lineage[name] for name in ("best_step", "smoothing") if name in self.folder.lineage}
        return answers(Predictor(self.folder), self.cells.table), told

    def network(self) -> tuple[Answers, dict[str, Any]]:
        """Those of its network alone."""
        return answers(Predictor(replace(self.folder, attachments={})), self.cells.table), {}


Work = Callable[[], tuple[Answers, dict[str, Any]]]


@dataclass(frozen=True)
class Arm:
    """How cells are denoised by a network, from scratch or from a base of other genes: ``places`` [G] of our genes in its own."""

    label: str
    recipe: DenoisingConfig
    cells: Cells
    places: NDArray[np.int64]
    settings: tuple[Any, ...]

    @classmethod
    def from_scratch(cls, recipe: DenoisingConfig, cells: Cells) -> Arm:
        """A network of these cells' genes."""
        return cls("", recipe, cells, np.arange(len(cells.vocabulary)), (to_plain(recipe),))

    @classmethod
    def from_base(cls, base: tuple[str, ModelFolder], recipe: DenoisingConfig, data: AnnData, genes: GeneVocabulary) -> Arm:
        """``data`` read with a named base; DataError when that does not know all ``genes`` and may add none."""
        label, folder = base
        new = [gene for gene, place in zip(genes.gene_ids, folder.vocabulary.index(genes.gene_ids), strict=True) if place < 0]
        grown = with_genes(folder, new) if recipe.new_genes == "add" else folder  # also those named otherwise
        own = Cells.of(data, grown, recipe)
        places = own.vocabulary.index(genes.gene_ids)
        if (unknown := int((places < 0).sum())) > 0:
            raise DataError(f"base {label} does not know {unknown} of {len(genes)} genes, and all are scored; set finetune.new_genes=add")
        return cls(label, recipe, own, places, (to_plain(recipe), folder.model_sha256))

    def methods(self, thinned: CellTable, seed: int) -> dict[Method, Work]:
        """What it says of thinned cells: with their neighbours, and the network alone."""
        own = replace(self.cells, table=renumbered(thinned, self.places, len(self.cells.vocabulary)))
        fit = Fit(own, self.recipe.model_copy(update={"seed": self.recipe.seed + seed}))
        since = f" from {self.label}" if self.label else ""
        rows = {Method(MODEL_ROW + since, "model"): fit.whole, Method(NETWORK_ROW + since, "control"): fit.network}
        return {row: partial(self._asked, work) for row, work in rows.items()}

    def _asked(self, work: Work) -> tuple[Answers, dict[str, Any]]:
        found, told = work()
        return ((rows, shares[:, self.places]) for rows, shares in found), told


def renumbered(table: CellTable, places: NDArray[np.int64], genes: int) -> CellTable:
    """The same cells over a vocabulary of ``genes`` in which our genes have these places [G]."""
    counts = csr_matrix((table.value.copy(), places[table.gene], table.crow), shape=(table.n_cells, genes))
    counts.sort_indices()
    panel = np.zeros(genes, dtype=bool)
    panel[places] = table.panel
    return replace(table, crow=counts.indptr.astype(np.int64), gene=counts.indices.astype(np.int64), value=counts.data, panel=panel)


def plain_methods(table: CellTable, seed: int) -> dict[Method, Work]:
    """What answers about the thinned cells without a network: tuned baselines, controls."""
    methods: dict[Method, Work] = {}
    for name, tuned in tuned_baselines(seed).items():
        methods[Method(name, "baseline")] = partial(_tuned, tuned, table)
    plain: dict[str, Ask] = {**BASELINES, "own_counts": own_counts}
    for name, ask in plain.items():
        methods[Method(name, "control" if name in CONTROLS else "baseline")] = partial(_plain, ask, table)
    return methods


def _tuned(method: Tuned, table: CellTable) -> tuple[Answers, dict[str, Any]]:
    found = method(table)
    return found, {"chosen": str(method.chosen), "tried": method.tried}


def _plain(method: Ask, table: CellTable) -> tuple[Answers, dict[str, Any]]:
    return method(table), {}


def _entries(config: DenoisingProtocol, name: str, opened: Opened, to: tuple[Ledgers, Say]) -> Iterator[Entry]:
    ledgers, say = to
    keys = {"keys": query_keys(opened.cells, config.data[name].keys)}
    recipe, begun = (one.model_copy(update=keys) for one in (config.recipe, config.finetune or config.recipe))
    whole = Cells.of(opened.cells, None, recipe)
    begun_arms = (Arm.from_base(base, begun, opened.cells, whole.vocabulary) for base in opened.bases.items())
    arms = [Arm.from_scratch(recipe, whole), *begun_arms]
    for seed in config.seeds:
        for task in tasks_of(whole.table, seed):
            place = Place(name, task.protocol, 0, seed)
            methods = {method: (arm.settings, work) for arm in arms for method, work in arm.methods(task.thinned, seed).items()}
            methods |= {method: (({},), work) for method, work in plain_methods(task.thinned, seed).items()}
            for method, (settings, work) in methods.items():
                ledger = ledgers.of("denoise", opened.identity, *settings)
                known = ledger.find(place, method.name) is not None
                entry = ledger.measured(place, method, partial(_found, task, work), task.test_share)
                if not known:
                    say(_line(entry))
                yield entry


def _found(task: Task, work: Work) -> Found:
    found, told = work()
    return Found(task.score(found), told)


def _line(entry: Entry) -> str:
    scores = "  ".join(f"{name} {value:.4f}" for name, value in entry.metrics.items())
    place = entry.place
    return f"{place.dataset} {place.protocol} seed {place.seed}: {entry.method.name}  {scores}  {entry.seconds:.0f} s"


def _notes(name: str, found: Sequence[Entry]) -> list[str]:
    """What was chosen on held-out counts of the thinned cells, and how long a fit took."""
    lines = []
    for row in ("diffusion", "low_rank", MODEL_ROW):
        mine = [entry for entry in found if entry.method.name == row]
        chosen = sorted({str(entry.details.get("chosen", entry.details.get("smoothing", "none"))) for entry in mine})
        lines.append(f"{name}, {row}: chosen on counts held out of the thinned cells: {'; '.join(chosen)}")
    if seconds := [entry.seconds for entry in found if entry.method.name == MODEL_ROW]:
        lines.append(f"{name}: a fit with its answers took {np.mean(seconds):.0f} s (at most {max(seconds):.0f})")
    return lines
