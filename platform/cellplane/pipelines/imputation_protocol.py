"""The full protocol of imputation: shared genes are hidden in folds, imputed, and compared with what they really were.

Beside the correlation with the truth stands whether the model knows what it does not know: whether the counts fall into its
predictive intervals, and whether the correlation that it expects of a gene is the one that it achieves (PROTOCOLS 6).
"""

# n cells, H hidden genes

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import nbinom
from sklearn.linear_model import Ridge
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from cellplane.artifact.folder import ModelFolder
from cellplane.config import to_plain
from cellplane.data.files import file_sha256
from cellplane.data.sources import AnnData, cell_table, find_counts, read_h5ad
from cellplane.errors import DataError
from cellplane.genes import GeneVocabulary
from cellplane.pipelines.gene_names import GeneNames
from cellplane.pipelines.imputation import SpatialImputationPipeline
from cellplane.pipelines.imputation_baselines import ALPHAS
from cellplane.pipelines.imputation_cells import dense, scaled_log
from cellplane.pipelines.imputation_config import ImputationConfig
from cellplane.pipelines.imputation_evaluation import shared_genes
from cellplane.pipelines.job import MODEL_ROW
from cellplane.pipelines.metrics import correlations, rank_correlations
from cellplane.pipelines.protocol import Entry, Evaluation, Found, Ledger, Method, Place
from cellplane.pipelines.protocol_run import Finished, Ledgers, Say, base_notes, check_protocol, finish, open_bases, out_of, quiet
from cellplane.pipelines.task_pictures import COVERED, COVERED_GENES, LEVELS, MAPS, ends_and_middle, short
from cellplane.pipelines.task_protocols import ImputationProtocol, ImputedData
from cellplane.seeds import keyed_seed

PROTOCOL, LEVEL = "genes hidden in folds", 0.9
WITHIN, CEILING = "ridge trained within the query", "split-half ceiling"
ROWS = {"model": Method(MODEL_ROW, "model"), "knn": Method("knn", "baseline"), "ridge": Method("ridge", "baseline")}
MAPPED_CELLS = 2000  # of the tissue, in a picture
CELL_FOLDS = 5  # of the query, for the regression within it
AIMS = {"coverage_90": LEVEL, "expected_minus_achieved": 0.0}

Table = NDArray[np.float64]


def run_imputation_protocol(config: ImputationProtocol, say: Say = quiet) -> Finished:
    """Every data set, seed, fold and method that the ledger does not know yet, and the report of all.

    Raises ConfigError for files that are not there, DataError for fewer shared genes than the folds need.
    """
    check_protocol(config)
    ledgers = Ledgers(out_of(config, config.task))
    entries: list[Entry] = []
    notes: list[str] = []
    for name, asked in config.data.items():
        bases = open_bases(config, name)
        found = list(_entries(config, name, bases, (ledgers, say)))
        entries += found
        notes += [*_notes(name, found), *base_notes(name, [asked.path, *([asked.reference] if asked.reference else [])], bases)]
    evaluation = Evaluation(config.task, "pearson", tuple(entries), (), tuple(notes), ("expected_error",), aims=AIMS)
    return finish(evaluation, config, "Imputation of hidden genes, beside tuned baselines, and whether the model knows its errors")


def opened(asked: ImputedData) -> tuple[AnnData, AnnData]:
    """Query and reference: two files, or the right and the left half of one tissue without the strip between them."""
    query = read_h5ad(Path(asked.path))
    if asked.reference is not None:
        return query, read_h5ad(Path(asked.reference))
    key = asked.keys.spatial_key
    if key is None or key not in query.obsm:
        raise DataError(f"halves of a tissue need coordinates: obsm[{key!r}] is not there; set keys.spatial_key, or name a reference")
    x = np.asarray(query.obsm[key], dtype=np.float64)[:, 0]
    middle = float(np.nanmedian(x))
    right, left = x > middle + asked.strip_um / 2, x < middle - asked.strip_um / 2
    if not right.any() or not left.any():
        raise DataError(f"a strip of {asked.strip_um:g} leaves no cell on one side; is it in units of the coordinates?")
    return query[right].copy(), query[left].copy()


@dataclass(frozen=True)
class Round:
    """One fold's hidden genes; everything is fitted when the first of its rows is asked for."""

    query: AnnData
    reference: AnnData
    recipe: ImputationConfig
    base: ModelFolder | None = None
    mapped: bool = False
    """Whether ours keeps some genes in the tissue, for a picture."""

    @cached_property
    def pipeline(self) -> SpatialImputationPipeline:
        """Ours, fitted without the hidden genes of the query."""
        return SpatialImputationPipeline(self.base, self.recipe).fit(self.query, self.reference)

    @cached_property
    def scores(self) -> Mapping[str, Any]:
        """The pipeline's own rows."""
        return self.pipeline.score(self.query)

    def row(self, name: str) -> Found:
        """Correlations of one row; ours with what it knew of its errors."""
        row = self.scores[name]
        found = {"pearson": float(row["pearson"]), "spearman": float(row["spearman"])}
        told = {"per_gene": row["per_gene"], "setting": row["setting"]}
        if name != "model":
            return Found(found, told)
        expected = dict(zip(self.pipeline.genes_, self.pipeline.expected_correlation_.tolist(), strict=True))
        pairs = np.array([(expected[gene], value) for gene, value in row["per_gene"].items()])
        answer = self.pipeline.predict(self.query, {"min_correlation": -1.0})
        found |= {
            "coverage_90": coverage(answer, self.truth, self.recipe.seed),
            "expected_minus_achieved": float((pairs[:, 0] - pairs[:, 1]).mean()),
            "expected_error": float(np.abs(pairs[:, 0] - pairs[:, 1]).mean()),
            "expected_correlates": float(np.corrcoef(pairs.T)[0, 1]) if len(pairs) > 2 else float("nan"),
        }
        told |= {"expected": expected, **covered(answer, self.truth, self.recipe.seed)}
        return Found(found, {**told, MAPS: self.maps(answer, row["per_gene"])} if self.mapped else told)

    def maps(self, answer: AnnData, scores: Mapping[str, float]) -> dict[str, Any]:
        """Truth and prediction of the best, the median and the worst gene at places of at most 2,000 cells; {} without coordinates."""
        key = self.recipe.keys.spatial_key
        if key is None or key not in self.query.obsm:
            return {}
        places = np.asarray(self.query.obsm[key], dtype=np.float64)
        rows = np.sort(np.random.default_rng(keyed_seed(self.recipe.seed, "mapped")).permutation(len(places))[:MAPPED_CELLS])
        shown, hidden = self.counts
        totals = shown.sum(1)
        genes = {}
        for gene in ends_and_middle(scores):
            truth = _scaled(self.truth[gene][:, None], totals + hidden.sum(1))[rows, 0]
            predicted = _scaled(np.asarray(answer[:, [gene]].X), totals)[rows, 0]
            genes[gene] = {"truth": short(truth), "predicted": short(predicted)}
        return {"places": short(places[rows], 5), "genes": genes}

    def within(self) -> Found:
        """What a regression learns from other cells of the query itself, where the hidden genes are shown: an upper reference."""
        shown, hidden = self.counts
        x, y = _scaled(shown, shown.sum(1)), _scaled(hidden, shown.sum(1) + hidden.sum(1))
        fold = np.random.default_rng(keyed_seed(self.recipe.seed, "within")).permutation(np.arange(len(x)) % CELL_FOLDS)
        best, tables = -np.inf, np.zeros_like(y)
        with threadpool_limits(limits=1):
            for alpha in ALPHAS:
                told = np.zeros_like(y)
                for number in range(CELL_FOLDS):
                    told[fold == number] = Ridge(alpha=alpha).fit(x[fold != number], y[fold != number]).predict(x[fold == number])
                if (score := float(np.nanmean(correlations(y, told)))) > best:
                    best, tables = score, told
        return Found({"pearson": best, "spearman": float(np.nanmean(rank_correlations(y, tables)))})

    def ceiling(self) -> Found:
        """The correlation that the true rates would have with such noisy counts, told by their halves."""
        shown, hidden = self.counts
        rng = np.random.default_rng(keyed_seed(self.recipe.seed, "halves"))
        one = rng.binomial(np.rint(hidden).astype(np.int64), 0.5)
        totals = (shown.sum(1) + hidden.sum(1)) / 2
        r = np.clip(correlations(_scaled(one, totals), _scaled(hidden - one, totals)), 0, 1)
        return Found({"pearson": float(np.nanmean(np.sqrt(2 * r / (1 + r))))})

    @cached_property
    def truth(self) -> dict[str, Table]:
        """The query's counts [n] of every gene that it shares with the reference, by the reference's name of it."""
        vocabulary = GeneVocabulary.from_ids(dict.fromkeys(find_counts(self.reference, self.recipe.reference_keys).gene_ids))
        table, _ = cell_table(self.query, vocabulary, self.recipe.keys)
        measured = np.flatnonzero(table.panel)
        names = GeneNames.of(self.reference, vocabulary, self.recipe.reference_keys).call(table.panel)
        return dict(zip(names, dense(table, measured).T, strict=True))

    @property
    def counts(self) -> tuple[Table, Table]:
        """The query's counts of genes that are shown [n, O], and of those that are hidden [n, H]."""
        hidden = set(self.recipe.genes or ())
        sides = [[column for gene, column in self.truth.items() if (gene in hidden) == side] for side in (False, True)]
        return np.stack(sides[0], axis=1), np.stack(sides[1], axis=1)


def coverage(found: AnnData, truth: Mapping[str, Table], seed: int) -> float:
    """Share of the true counts inside the central 90 % of what was predicted for them; .9 is honest, less is overconfident.

    A count's place in its negative binomial is drawn evenly between the probabilities of less and of no more, so that
    discrete counts of a calibrated model are covered exactly.
    """
    _, place = drawn_places(found, truth, seed)
    return float(((place > (1 - LEVEL) / 2) & (place < (1 + LEVEL) / 2)).mean())


def covered(found: AnnData, truth: Mapping[str, Table], seed: int) -> dict[str, Any]:
    """Share of the true counts inside the central intervals of every level, and of each gene's inside its 90 %; JSON-ready."""
    genes, place = drawn_places(found, truth, seed)
    width = np.abs(2 * place - 1)
    inside = short((width < LEVEL).mean(0))
    return {COVERED: short([float((width < level).mean()) for level in LEVELS]), COVERED_GENES: dict(zip(genes, inside, strict=True))}


def drawn_places(found: AnnData, truth: Mapping[str, Table], seed: int) -> tuple[list[str], Table]:
    """The imputed genes with a truth, and each true count's place [n, H] in its negative binomial: even in [0, 1] if that is honest."""
    genes = [gene for gene in map(str, found.var_names) if gene in truth]
    mean = np.maximum(np.asarray(found[:, genes].X, dtype=np.float64), 1e-9)
    variance = np.asarray(found[:, genes].layers["sd"], dtype=np.float64) ** 2
    true = np.rint(np.stack([truth[gene] for gene in genes], axis=1))
    size = mean**2 / np.maximum(variance - mean, 1e-9 * mean)
    share = size / (size + mean)
    below, upto = nbinom.cdf(true - 1, size, share), nbinom.cdf(true, size, share)
    return genes, below + np.random.default_rng(keyed_seed(seed, "coverage")).random(true.shape) * (upto - below)


def _scaled(counts: NDArray[Any], totals: Table) -> Table:
    """log1p of counts scaled to the median total."""
    return scaled_log(np.asarray(counts, dtype=np.float64), totals, float(np.median(totals[totals > 0])))


def _entries(config: ImputationProtocol, name: str, bases: Mapping[str, ModelFolder], to: tuple[Ledgers, Say]) -> Iterator[Entry]:
    ledgers, say = to
    asked = config.data[name]
    query, reference = opened(asked)
    keys = {"keys": asked.keys, "reference_keys": asked.reference_keys}
    recipe = config.recipe.model_copy(update=keys)
    begun = (config.finetune or config.recipe).model_copy(update=keys)
    shared = shared_genes(query, reference, recipe)
    if len(shared) < 2 * config.gene_folds:
        raise DataError(f"{name}: query and reference share {len(shared)} genes, too few to hide them in {config.gene_folds} folds")
    files = [file_sha256(Path(path)) for path in (asked.path, asked.reference) if path is not None]
    places = [asked.strip_um, config.gene_folds]
    ledger = ledgers.of("impute", to_plain(recipe), files, places)
    others = {label: ledgers.of("impute", to_plain(begun), files, places, base.model_sha256) for label, base in bases.items()}
    for seed in config.seeds:
        for fold, hidden in enumerate(np.array_split(np.random.default_rng(seed).permutation(shared), config.gene_folds)):
            told = {"genes": tuple(map(str, hidden)), "seed": recipe.seed + seed}
            one = Round(query, reference, recipe.model_copy(update=told), mapped=seed == config.seeds[0])
            methods: dict[Method, tuple[Ledger, Callable[[], Found]]] = {row: (ledger, partial(one.row, key)) for key, row in ROWS.items()}
            for label, base in bases.items():
                other = Round(query, reference, begun.model_copy(update=told), base)
                methods[Method(f"{MODEL_ROW} from {label}", "model")] = others[label], partial(other.row, "model")
            methods |= {Method(WITHIN, "ceiling"): (ledger, one.within), Method(CEILING, "ceiling"): (ledger, one.ceiling)}
            place = Place(name, PROTOCOL, fold, seed)
            for row, (own, work) in methods.items():
                known = own.find(place, row.name) is not None
                entry = own.measured(place, row, work, 1 / (config.gene_folds - 1))
                if not known:
                    say(f"{name} fold {fold} seed {seed}: {row.name}  pearson {entry.metrics['pearson']:.3f}  {entry.seconds:.0f} s")
                yield entry


def _notes(name: str, found: Sequence[Entry]) -> list[str]:
    """What was chosen on observed genes, and how the folds of a seed come together."""
    lines = []
    for row in ROWS.values():
        by_seed: dict[int, list[float]] = {}
        for entry in found:
            if entry.method == row:
                by_seed.setdefault(entry.place.seed, []).extend(entry.details["per_gene"].values())
        means = [float(np.mean(values)) for values in by_seed.values()]
        spread = float(np.std(means, ddof=1)) if len(means) > 1 else 0.0
        lines.append(f"{name}, {row.name}: mean over all genes {np.mean(means):.4f}, spread over {len(means)} seeds {spread:.4f}")
    settings = {row: sorted({entry.details["setting"] for entry in found if entry.method.name == row}) for row in ("knn", "ridge")}
    lines.append(f"{name}: chosen by hiding observed genes: {settings['knn']} neighbours, alpha {settings['ridge']}")
    return lines
