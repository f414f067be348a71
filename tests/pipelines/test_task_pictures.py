"""Reports get their pictures from entries alone: those of earlier versions give fewer, and none is cut off or without words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cellplane.pipelines.protocol import Entry, Evaluation, Method, Picture, Place
from cellplane.pipelines.task_pictures import CHANGES, COVERED, COVERED_GENES, LEVELS, MAPS, by_gene, ends_and_middle, short, with_pictures
from tests.pipelines.test_plots import assert_picture

GENES = [f"GENE{gene}" for gene in range(30)]
KINDS = {"cellplm": "model", "knn": "baseline", "ridge": "baseline", "mean_of_others": "baseline", "own_counts": "control"}


def entry(place: tuple[str, int], name: str, metrics: dict[str, float], details: dict[str, Any] | None = None, split: int = 0) -> Entry:
    method = Method(name, KINDS.get(name, "ceiling"))  # type: ignore[arg-type]
    return Entry(Place("cells", place[0], split, place[1]), method, metrics, details=details or {})


def imputed(old: bool = False, split: int = 0) -> list[Entry]:
    """One fold of two seeds; ``old``: without what came later."""
    rng = np.random.default_rng(split)
    found = []
    for seed in (0, 1):
        rows = {name: dict(zip(GENES[split::2], rng.uniform(0, 0.8, 15).tolist(), strict=True)) for name in ("cellplm", "knn", "ridge")}
        for name, per_gene in rows.items():
            told: dict[str, Any] = {"per_gene": per_gene, "setting": None}
            if name == "cellplm" and not old:
                told |= {"expected": dict.fromkeys(per_gene, 0.4), COVERED: list(LEVELS), COVERED_GENES: dict.fromkeys(per_gene, 0.9)}
            if name == "cellplm" and not old and seed == 0:
                values = {gene: {"truth": [0.0, 1.0, 2.0], "predicted": [0.5, 1.0, 1.5]} for gene in ends_and_middle(per_gene)}
                told[MAPS] = {"places": [[0, 0], [10, 0], [0, 30]], "genes": values}
            found.append(entry(("folds", seed), name, {"pearson": float(np.mean(list(per_gene.values())))}, told, split))
    return found


def perturbed(old: bool = False, perturbations: int = 5) -> list[Entry]:
    rng = np.random.default_rng(1)
    names = [f"GENE{number}+A" for number in range(perturbations)]
    found = []
    for seed in (0, 1):
        for row in ("cellplm", "mean_of_others"):
            scores = dict(zip(names, rng.uniform(-0.3, 0.9, perturbations).tolist(), strict=True))
            told: dict[str, Any] = {"by_perturbation": scores, "interval": [0, 1], "unreliable": {}}
            if row == "cellplm" and not old and seed == 0:
                change = {"truth": rng.normal(size=30).tolist(), "predicted": rng.normal(size=30).tolist(), "de": list(range(20))}
                told[CHANGES] = {"genes": GENES, "of": {one: {**change, "targets": [3], "pearson": scores[one]} for one in names[:3]}}
            found.append(entry(("left out", seed), row, {"pearson": 0.5}, told))
        found.append(entry(("left out", seed), "split-half ceiling", {"pearson": 0.9}, {"reliability": dict.fromkeys(names, 0.6)}))
    return found


def denoised() -> list[Entry]:
    scores = {"cellplm": (44.2, 0.6, 1.1), "knn": (53.0, 0.5, 1.3), "own_counts": (82.0, 9.0, 0.3), "ridge": (60.0, 0.0, float("nan"))}
    found = [entry(("masking", seed), name, {"mask_pearson": 1 / nats}) for name, (nats, *_) in scores.items() for seed in (0, 1)]
    for name, (nats, ratio, slope) in scores.items():
        metrics = {"nats_per_1000": nats, "variance_ratio": ratio, "coexpression_slope": slope}
        found += [entry(("splitting", seed), name, {key: value + seed / 100 for key, value in metrics.items()}) for seed in (0, 1)]
    return found


def drawn(task: str, entries: list[Entry], folder: Path) -> dict[str, Picture]:
    deciding = {"masking": "mask_pearson", "splitting": "nats_per_1000"}
    evaluation = Evaluation(task, "pearson", tuple(entries), lower_is_better=("nats_per_1000",), deciding=deciding)
    return {picture.title.split(": ")[1]: picture for picture in with_pictures(evaluation, folder).pictures}


def test_denoising_shows_scores_of_both_protocols_and_smoothing_once(tmp_path):
    found = drawn("denoise", denoised(), tmp_path)
    assert list(found) == ["mask_pearson by method", "nats_per_1000 by method", "smoothed too much?"]
    assert found["nats_per_1000 by method"].alt.startswith("Means of nats_per_1000, best first: cellplm 44.2")
    assert "lower is better" in found["nats_per_1000 by method"].caption
    assert found["smoothed too much?"].caption.endswith("alike for all cells: ridge.")


def test_imputation_shows_genes_calibration_intervals_and_tissue(tmp_path):
    found = drawn("impute", [*imputed(), *imputed(split=1)], tmp_path)
    assert next(iter(found)) == "Pearson of every hidden gene"
    assert [title.split(" against ")[0] for title in list(found)[1:]] == [
        "ours",
        "expected and achieved correlation",
        "what intervals hold",
        "hidden genes in the tissue",
    ]
    assert "90.0 %" in found["what intervals hold"].alt
    assert found["hidden genes in the tissue"].alt.count("Pearson") == 3


def test_the_best_and_the_worst_gene_of_all_folds_are_shown(tmp_path):
    folds = [*imputed(), *imputed(split=1)]
    scores = {gene: r for one in folds if MAPS in one.details for gene, r in one.details["per_gene"].items()}
    words = {
        name: word
        for word, name in zip(("best", "worst"), (max(scores, key=scores.__getitem__), min(scores, key=scores.__getitem__)), strict=True)
    }
    alt = drawn("impute", folds, tmp_path)["hidden genes in the tissue"].alt
    for gene, word in words.items():
        assert f"{word} gene {gene}, Pearson {scores[gene]:.2f}" in alt


def test_perturbation_shows_bars_and_some_changes(tmp_path):
    found = drawn("perturb", perturbed(), tmp_path)
    assert list(found) == ["Pearson by perturbation", "changes of some perturbations"]
    assert [part.split(":")[0] for part in found["changes of some perturbations"].alt.split("; ")] == ["best", "median", "worst"]


def test_hundreds_of_perturbations_are_cut_to_the_best_and_the_worst(tmp_path):
    found = drawn("perturb", perturbed(old=True, perturbations=200), tmp_path)
    assert "of 200 the 30 best and the 30 worst" in found["Pearson by perturbation"].caption


@pytest.mark.parametrize(
    ("task", "entries", "left"),
    [
        ("impute", imputed(old=True), ["Pearson of every hidden gene", "ours"]),
        ("perturb", perturbed(old=True), ["Pearson by perturbation"]),
        ("impute", [entry(("folds", 0), "cellplm", {"pearson": 0.3})], []),
        ("denoise", [entry(("masking", 0), "cellplm", {"mask_pearson": float("nan")})], []),
        ("perturb", [entry(("left out", 0), "cellplm", {"pearson": 0.3})], []),
    ],
)
def test_entries_of_earlier_versions_give_the_pictures_that_they_can(task, entries, left, tmp_path):
    assert [title.split(" against ")[0] for title in drawn(task, entries, tmp_path)] == left


@pytest.mark.parametrize(("task", "entries"), [("denoise", denoised()), ("impute", imputed()), ("perturb", perturbed())])
def test_every_picture_is_whole_and_has_one_sentence_and_a_description(task, entries, tmp_path):
    for picture in drawn(task, entries, tmp_path).values():
        assert_picture(picture.path)
        assert picture.caption.endswith(".")
        assert picture.caption.rstrip(".").count(". ") == 0
        assert picture.alt
        assert " " not in picture.path.name


def test_pictures_of_other_tasks_stay_as_they_are(tmp_path):
    evaluation = Evaluation("annotate", "macro_f1", (), (Picture("Dot", tmp_path / "dot.png"),))
    assert with_pictures(evaluation, tmp_path) is evaluation


def test_the_middle_is_named_only_where_there_is_one():
    assert ends_and_middle({"a": 0.1, "b": 0.9, "c": 0.5}) == {"b": "best", "c": "median", "a": "worst"}
    assert ends_and_middle({"a": 0.1, "b": 0.9}) == {"b": "best", "a": "worst"}
    assert ends_and_middle({"a": 0.1}) == {"a": "only one"}
    assert ends_and_middle({}) == {}


def test_a_gene_is_averaged_over_the_seeds_that_know_it():
    entries = [entry(("folds", seed), "knn", {}, {"per_gene": {"A": value, "B": float("nan")}}) for seed, value in ((0, 0.2), (1, 0.4))]
    assert by_gene(entries, "per_gene") == {"A": pytest.approx(0.3)}


def test_what_is_kept_for_a_picture_is_short():
    assert short([[123.456, 0.000123456]], 3) == [[123.0, 0.000123]]
