"""The pictures in the reports of denoising, imputation and perturbation, drawn from entries alone.

An evaluation that goes on finds its entries in the ledger and fits nothing again, so whatever is drawn stands in their details:
under ``COVERED``, ``COVERED_GENES``, ``MAPS`` and ``CHANGES``. Entries of earlier versions lack some; then those pictures are missing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cellplane.pipelines import plots
from cellplane.pipelines.drawing import axes_in_a_row, axes_in_rows, draw_beside_truth, draw_change, draw_gene_correlations, new_axes, safe
from cellplane.pipelines.job import MODEL_ROW
from cellplane.pipelines.protocol import Entry, Evaluation, Picture
from cellplane.pipelines.score_drawing import (
    draw_by_name,
    draw_gene_shares,
    draw_levels,
    draw_pairs,
    draw_scores,
    draw_smoothness,
    finite,
    lines_size,
)

COVERED, COVERED_GENES = "covered", "covered_genes"  # shares of counts inside intervals of `LEVELS`; and of each gene's, inside 90 %
LEVELS = tuple(round(0.05 * step, 2) for step in range(1, 20))
MAPS = "maps"  # {"places": [[x, y]], "genes": {gene: {"truth": [..], "predicted": [..]}}}
CHANGES = "changes"  # {"genes": [..], "of": {perturbation: {"truth", "predicted", "de", "targets", "pearson"}}}
MOST_BARS = 60  # perturbations in one picture

Drawn = Iterator[Picture]


def with_pictures(evaluation: Evaluation, folder: Path) -> Evaluation:
    """The evaluation with every picture of its task that its entries allow, as PNG files in ``folder``, behind those it has."""
    draw = PICTURES.get(evaluation.task)
    return evaluation if draw is None else replace(evaluation, pictures=(*evaluation.pictures, *draw(evaluation, folder)))


def denoising_pictures(evaluation: Evaluation, folder: Path) -> Drawn:
    """Scores of every method for each table, and over-smoothing where it was measured."""
    for dataset, protocol in evaluation.tables():
        yield from _scores(evaluation, (dataset, protocol), folder)
        yield from _smoothness(evaluation, (dataset, protocol), folder)


def imputation_pictures(evaluation: Evaluation, folder: Path) -> Drawn:
    """Correlations by gene, what the model knows of its errors, and some hidden genes in the tissue."""
    for dataset, protocol in evaluation.tables():
        table = _table(evaluation, dataset, protocol)
        ours = [entry for entry in table if entry.method.name == MODEL_ROW]
        achieved = by_gene(ours, "per_gene")
        if not achieved:
            continue
        yield from _correlations(table, achieved, (dataset, folder))
        yield from _expected(ours, achieved, (dataset, folder))
        yield from _covered(ours, (dataset, folder))
        yield from _maps(ours, (dataset, folder))


def perturbation_pictures(evaluation: Evaluation, folder: Path) -> Drawn:
    """Scores by perturbation beside baselines and ceiling, and the changes of some perturbations."""
    for dataset, protocol in evaluation.tables():
        table, where = _table(evaluation, dataset, protocol), (f"{dataset}, {protocol}", folder)
        yield from _by_perturbation(table, where)
        yield from _changes([entry for entry in table if entry.method.name == MODEL_ROW], where)


def by_gene(entries: Sequence[Entry], key: str) -> dict[str, float]:
    """Mean over seeds of what the entries' details hold of every gene under ``key``; unknown numbers are left out."""
    values: dict[str, list[float]] = defaultdict(list)
    for entry in entries:
        for gene, value in entry.details.get(key, {}).items():
            values[gene] += finite([value])
    return {gene: float(np.mean(known)) for gene, known in values.items() if known}


def ends_and_middle(scores: Mapping[str, float]) -> dict[str, str]:
    """The names with the highest, the median and the lowest score, each with what it is; fewer where there are fewer."""
    ranked = sorted(scores, key=lambda name: (-scores[name], name))
    if len(ranked) < 2:
        return dict.fromkeys(ranked, "only one")
    words = {ranked[len(ranked) // 2]: "median", ranked[-1]: "worst", ranked[0]: "best"}
    return {name: words[name] for name in ranked if name in words}


def _scores(evaluation: Evaluation, table: tuple[str, str], folder: Path) -> Drawn:
    metric, title = evaluation.decides(table[1]), ", ".join(table)
    rows = {row.method.name: row for row in evaluation.rows(*table)}
    found = {name: finite(row.values[metric]) for name, row in rows.items() if finite(row.values[metric])}
    if not found:
        return
    down = metric in evaluation.lower_is_better
    order = sorted(found, key=lambda name: float(np.mean(found[name])) * (1 if down else -1))
    axes = draw_scores(
        new_axes(lines_size(len(order))),
        {name: found[name] for name in order},
        {name: row.method.kind for name, row in rows.items()},
        metric,
    )
    best = ", ".join(f"{name} {np.mean(found[name]):.4g}" for name in order)
    yield Picture(
        f"{title}: {metric} by method",
        plots.save_axes(axes, folder / f"{_file(title)}-scores.png", title),
        f"Best on top ({'lower' if down else 'higher'} is better); small dots are seeds, bars their standard deviation.",
        f"Means of {metric}, best first: {best}.",
    )


def _smoothness(evaluation: Evaluation, table: tuple[str, str], folder: Path) -> Drawn:
    title = ", ".join(table)
    found, kinds, without = {}, {}, []
    for row in evaluation.rows(*table):
        ratio, slope = (finite(row.values.get(name, ())) for name in ("variance_ratio", "coexpression_slope"))
        kinds[row.method.name] = row.method.kind
        if ratio and slope:
            found[row.method.name] = ratio, slope
        elif ratio:
            without.append(row.method.name)
    if not found:
        return
    axes = draw_smoothness(new_axes((9.5, 6.5)), found, kinds)
    told = ", ".join(f"{name} {np.mean(ratio):.2f} and {np.mean(slope):.2f}" for name, (ratio, slope) in found.items())
    left_out = f"; no slope, for their answers are alike for all cells: {', '.join(without)}" if without else ""
    yield Picture(
        f"{title}: smoothed too much?",
        plots.save_axes(axes, folder / f"{_file(title)}-smoothness.png", title),
        f"Where the dashed lines cross, answers vary as much as the cells do and their co-expression is real{left_out}.",
        f"Variance ratio and co-expression slope: {told}.",
    )


def _correlations(table: Sequence[Entry], achieved: Mapping[str, float], to: tuple[str, Path]) -> Drawn:
    """Sorted beside the baselines, and gene by gene against the best of them."""
    (dataset, folder), names = to, dict.fromkeys(entry.method.name for entry in table if entry.method.kind == "baseline")
    rows = {name: by_gene([entry for entry in table if entry.method.name == name], "per_gene") for name in names}
    rows = {name: row for name, row in rows.items() if row}
    if not rows:
        return
    best = max(rows, key=lambda name: float(np.mean(list(rows[name].values()))))
    axes = draw_gene_correlations(new_axes((11, 5)), {MODEL_ROW: achieved, **rows})
    yield Picture(
        f"{dataset}: Pearson of every hidden gene",
        plots.save_axes(axes, folder / f"{_file(dataset)}-genes.png", dataset),
        "Genes in the order of ours, mean over seeds; dashed lines are the means over genes.",
        f"Pearson of {len(achieved)} genes from {max(achieved.values()):.2f} down to {min(achieved.values()):.2f} for ours.",
    )
    pairs = {gene: (rows[best][gene], value) for gene, value in achieved.items() if gene in rows[best]}
    above = sum(y > x for x, y in pairs.values())
    axes = draw_pairs(new_axes((7, 7)), pairs, (f"Pearson of {best}", "Pearson of ours"))
    yield Picture(
        f"{dataset}: ours against {best}, the best baseline",
        plots.save_axes(axes, folder / f"{_file(dataset)}-against.png"),
        "Each point is a gene, mean over seeds; above the line ours is nearer the truth, and the genes furthest from it are named.",
        f"Ours is above {best} for {above} of {len(pairs)} genes.",
    )


def _expected(ours: Sequence[Entry], achieved: Mapping[str, float], to: tuple[str, Path]) -> Drawn:
    dataset, folder = to
    pairs = {gene: (value, achieved[gene]) for gene, value in by_gene(ours, "expected").items() if gene in achieved}
    if not pairs:
        return
    axes = draw_pairs(new_axes((7, 7)), pairs, ("expected correlation", "achieved correlation (Pearson)"))
    gap = float(np.mean([x - y for x, y in pairs.values()]))
    yield Picture(
        f"{dataset}: expected and achieved correlation",
        plots.save_axes(axes, folder / f"{_file(dataset)}-expected.png"),
        "Each point is a hidden gene, mean over seeds; on the line the model knew how well it would impute it, above it was too modest.",
        f"Expected correlations of {len(pairs)} genes are {abs(gap):.3f} too {'high' if gap > 0 else 'low'} in the mean.",
    )


def _covered(ours: Sequence[Entry], to: tuple[str, Path]) -> Drawn:
    dataset, folder = to
    told = [entry for entry in ours if COVERED in entry.details]
    if not told:
        return
    seeds = {f"seed {entry.place.seed}": [one.details[COVERED] for one in told if one.place.seed == entry.place.seed] for entry in told}
    left, right = axes_in_a_row(2)
    draw_levels(left, LEVELS, {name: np.mean(shares, axis=0).tolist() for name, shares in seeds.items()})
    draw_gene_shares(right, by_gene(told, COVERED_GENES), 0.9)
    at_90 = float(np.mean([entry.details[COVERED][LEVELS.index(0.9)] for entry in told]))
    yield Picture(
        f"{dataset}: what intervals hold",
        plots.save_axes(left, folder / f"{_file(dataset)}-intervals.png"),
        "Left, all hidden counts: below the dashed line intervals are too narrow, above too wide; right, the same for every gene at 90 %.",
        f"90 % intervals hold {100 * at_90:.1f} % of the true counts.",
    )


def _maps(ours: Sequence[Entry], to: tuple[str, Path]) -> Drawn:
    """The best, the median and the worst gene of the first seed that has maps."""
    dataset, folder = to
    mapped = [entry for entry in ours if entry.details.get(MAPS)]
    mapped = [entry for entry in mapped if entry.place.seed == mapped[0].place.seed]
    kept = {gene: (entry.details["per_gene"][gene], entry) for entry in mapped for gene in entry.details[MAPS]["genes"]}
    if not kept:
        return
    middle = float(np.median([value for entry in mapped for value in entry.details["per_gene"].values()]))
    order = sorted(kept, key=lambda gene: -kept[gene][0])
    median = min(order, key=lambda gene: abs(kept[gene][0] - middle))
    shown = {order[-1]: "worst", median: "median", order[0]: "best"}  # where they are one, the best names it
    genes = [gene for gene in order if gene in shown]
    grid = axes_in_rows(len(genes), 3)
    for panels, gene in zip(grid, genes, strict=True):
        r, entry = kept[gene]
        table = entry.details[MAPS]["genes"][gene]
        places, truth, predicted = (np.array(one) for one in (entry.details[MAPS]["places"], table["truth"], table["predicted"]))
        draw_beside_truth(panels, places, truth, predicted, gene)
        panels[0].set_title(f"{shown[gene]} gene, r {r:.2f}\n{panels[0].get_title()}")
    yield Picture(
        f"{dataset}: hidden genes in the tissue",
        plots.save_axes(grid[0][0], folder / f"{_file(dataset)}-tissue.png"),
        "The best, the median and the worst imputed gene of one seed, at most 2,000 cells: truth, prediction, and what was told too much "
        "(purple) or too little (orange).",
        "; ".join(f"{shown[gene]} gene {gene}, Pearson {kept[gene][0]:.2f}" for gene in genes) + ".",
    )


def _by_perturbation(table: Sequence[Entry], to: tuple[str, Path]) -> Drawn:
    """Ours, the baselines and the ceiling of each perturbation, in the order of ours."""
    title, folder = to
    ours = _scores_of(table, MODEL_ROW)
    names = sorted(ours, key=lambda name: -float(np.mean(ours[name])))
    if not names:
        return
    half = MOST_BARS // 2
    shown = names if len(names) <= MOST_BARS else [*names[:half], *names[-half:]]
    methods = dict.fromkeys(entry.method.name for entry in table if entry.method.kind == "baseline")
    means = {method: {name: float(np.mean(values)) for name, values in _scores_of(table, method).items()} for method in methods}
    halves = by_gene([entry for entry in table if entry.method.kind == "ceiling"], "reliability")
    ceiling = {name: float(np.sqrt(2 * r / (1 + r))) for name, r in halves.items() if r > 0}
    axes = draw_by_name(new_axes(lines_size(len(shown))), {name: ours[name] for name in shown}, means, ceiling, "Pearson over all genes")
    some = "" if len(shown) == len(names) else f" (of {len(names)} the {half} best and the {half} worst)"
    yield Picture(
        f"{title}: Pearson by perturbation",
        plots.save_axes(axes, folder / f"{_file(title)}-perturbations.png", title),
        f"Ours as bars, best on top{some}, baselines as markers; the black line is what a perfect prediction of such noisy changes would "
        "score.",
        "Ours: " + ", ".join(f"{name} {np.mean(ours[name]):.2f}" for name in shown) + ".",
    )


def _scores_of(table: Sequence[Entry], method: str) -> dict[str, list[float]]:
    """Pearson of every perturbation by seed."""
    found: dict[str, list[float]] = defaultdict(list)
    for entry in table:
        if entry.method.name == method:
            for name, value in entry.details.get("by_perturbation", {}).items():
                found[name] += finite([value])
    return {name: values for name, values in found.items() if values}


def _changes(ours: Sequence[Entry], to: tuple[str, Path]) -> Drawn:
    """The change of some perturbations, gene by gene, of the first seed that has them."""
    title, folder = to
    known = next((entry.details[CHANGES] for entry in ours if entry.details.get(CHANGES)), None)
    if known is None:
        return
    words = ends_and_middle({name: change["pearson"] for name, change in known["of"].items()})
    panels = axes_in_a_row(len(words))
    for axes, (name, word) in zip(panels, words.items(), strict=True):
        change = known["of"][name]
        truth, predicted = np.array(change["truth"]), np.array(change["predicted"])
        draw_change(axes, truth, predicted, known["genes"], change["de"], change["targets"])
        axes.set_title(f"{word}: {safe(name)}, r {change['pearson']:.2f}", fontsize=11)
    yield Picture(
        f"{title}: changes of some perturbations",
        plots.save_axes(panels[0], folder / f"{_file(title)}-changes.png"),
        "Each point is a gene, the 20 most differential ones are named and the perturbed gene has a square; on the dashed line the "
        "prediction is the measured change.",
        "; ".join(f"{word}: {name}, Pearson {known['of'][name]['pearson']:.2f}" for name, word in words.items()) + ".",
    )


def _table(evaluation: Evaluation, dataset: str, protocol: str) -> list[Entry]:
    return [entry for entry in evaluation.entries if (entry.place.dataset, entry.place.protocol) == (dataset, protocol)]


def _file(title: str) -> str:
    """The title as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", title).strip("-")


def short(values: Any, digits: int = 4) -> list[Any]:
    """Numbers, or rows of them, with so many significant digits: what is drawn needs no more, and the ledger stays small."""
    plain = np.asarray(values, dtype=np.float64)
    if plain.ndim > 1:
        return [short(row, digits) for row in plain]
    return [float(f"{value:.{digits}g}") for value in plain.tolist()]


PICTURES = {"denoise": denoising_pictures, "impute": imputation_pictures, "perturb": perturbation_pictures}
