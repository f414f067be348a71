"""Classical annotators tuned as a careful colleague would: every family over its settings, by inner cross-validation.

Logistic regression over strengths x scalings x genes (all or variable ones, or 60 principal components), a random forest, and
15 neighbours among 50 components. "The baseline" is the family with the best inner score: the test cells choose nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from cellplane.errors import ConfigError
from cellplane.pipelines.baselines import PANEL_GENES, SCALINGS, STRENGTHS
from cellplane.pipelines.metrics import annotation_scores
from cellplane.pipelines.splits import random_splits

VARIABLE_GENES = 2000
LOGISTIC_COMPONENTS, KNN_COMPONENTS, NEIGHBOURS = 60, 50, 15
SPACES = {"genes": 0, f"pca{LOGISTIC_COMPONENTS}": LOGISTIC_COMPONENTS, f"pca{KNN_COMPONENTS}": KNN_COMPONENTS}  # and components of each
TREES, SMALLEST_LEAF = 300, 2
ITERATIONS = 300  # warm starts from the next stronger penalty settle sooner than a cold start

Labels = NDArray[Any]
View = Callable[[Any], Any]  # counts -> features
Answers = dict[tuple[str, str], Labels]  # (family, setting) -> labels of the asked cells


@dataclass(frozen=True)
class Tuned:
    """What each family answers for the asked cells, the setting it chose, its inner macro-F1; ``best`` is the best family."""

    answers: dict[str, Labels]
    settings: dict[str, str]
    inner: dict[str, float]
    best: str


def tuned_baselines(train: tuple[Any, Labels], asked: Any, seed: int, folds: int = 3) -> Tuned:
    """Families tuned on the training (counts, labels), answering for the counts of the asked cells. One thread."""
    counts, labels = train
    with threadpool_limits(limits=1):
        inner = inner_scores(counts, labels, seed, folds)
        chosen = {family: max((key for key in inner if key[0] == family), key=inner.__getitem__) for family, _ in inner}
        answers = dict(_answers((counts, labels), asked, seed, set(chosen.values())))
    scores = {family: inner[key] for family, key in chosen.items()}
    settings = {family: key[1] for family, key in chosen.items()}
    return Tuned({family: answers[key] for family, key in chosen.items()}, settings, scores, max(scores, key=scores.__getitem__))


def answers_by(choice: tuple[str, str], train: tuple[Any, Labels], asked: Any, seed: int) -> Labels:
    """What one (family, setting) of `inner_scores`, fitted on the training (counts, labels), answers for the counts of the asked cells.

    ConfigError for a setting that is not tried here.
    """
    with threadpool_limits(limits=1):
        for key, answer in _answers(train, asked, seed, {choice}):
            if key == choice:
                return answer
    raise ConfigError(f"no simple method {' '.join(choice)!r} is known: it was chosen by another version; begin in an empty folder")


def inner_scores(counts: Any, labels: Labels, seed: int, folds: int) -> dict[tuple[str, str], float]:
    """Mean macro-F1 over inner folds of every (family, setting)."""
    found: dict[tuple[str, str], list[float]] = {}
    for split in random_splits(labels, seed, folds):
        train = counts[split.train], labels[split.train]
        for key, answer in _answers(train, counts[split.test], seed, None):
            found.setdefault(key, []).append(annotation_scores(labels[split.test], answer)["macro_f1"])
    return {key: float(np.mean(scores)) for key, scores in found.items()}


def _answers(
    train: tuple[Any, Labels], asked: Any, seed: int, wanted: set[tuple[str, str]] | None
) -> Iterator[tuple[tuple[str, str], Labels]]:
    """(family, setting) and its answers, for the wanted ones; views of the data are made once for all that share them."""
    counts, labels = train
    for scaling in SCALINGS:
        if not _any_of(wanted, f"{scaling} "):
            continue
        scaled, theirs = SCALINGS[scaling](counts), SCALINGS[scaling](asked)
        genes = variable_genes(scaled)
        for space, size in SPACES.items():
            learners = _learners(space, scaling, counts.shape[1])
            if not learners or not _any_of(wanted, f"{scaling} {space}"):
                continue
            view = _components(scaled[:, genes], genes, size, seed) if size else _only(genes)
            mine, its = view(scaled), view(theirs)
            for family, learn in learners.items():
                for setting, answer in learn((mine, labels), its, seed, _settings(wanted, family, f"{scaling} {space}")):
                    yield (family, f"{scaling} {space}{setting}"), answer


def _any_of(wanted: set[tuple[str, str]] | None, view: str) -> bool:
    return wanted is None or any(name.startswith(view) for _, name in wanted)


def variable_genes(scaled: Any) -> NDArray[np.int64]:
    """All genes of a panel, else the 2,000 whose scaled values vary most for their mean (dispersion), in their order."""
    mean = np.asarray(scaled.mean(axis=0)).ravel()
    if len(mean) <= VARIABLE_GENES:
        return np.arange(len(mean))
    variance = np.asarray(scaled.multiply(scaled).mean(axis=0)).ravel() - mean**2
    dispersion = np.where(mean > 0.0125, variance / np.maximum(mean, 1e-12), 0)  # scanpy's floor of the mean
    return np.sort(np.argsort(-dispersion, kind="stable")[:VARIABLE_GENES])


def _only(genes: NDArray[np.int64]) -> View:
    return lambda matrix: matrix[:, genes]


def _components(scaled: Any, genes: NDArray[np.int64], wanted: int, seed: int) -> View:
    size = min(wanted, min(scaled.shape) - 1)
    if size < 1:  # a single cell or gene has no directions
        return lambda matrix: matrix[:, genes].toarray()
    fitted = PCA(size, svd_solver="arpack", random_state=seed).fit(scaled)
    return lambda matrix: fitted.transform(matrix[:, genes])


Learner = Callable[[tuple[Any, Labels], Any, int, "set[str] | None"], Iterator[tuple[str, Labels]]]


def _learners(space: str, scaling: str, n_genes: int) -> dict[str, Learner]:
    """What is fitted in a view: regression on genes and 60 components, trees on genes, neighbours among 50 components."""
    if space == f"pca{KNN_COMPONENTS}":
        usual = scaling == "cp10k" or n_genes < PANEL_GENES  # raw counts of a transcriptome measure depth
        return {"pca50 + knn15": _neighbours} if usual else {}
    return {"logistic regression": _regressions} | ({"random forest": _forest} if space == "genes" else {})


def _settings(wanted: set[tuple[str, str]] | None, family: str, view: str) -> set[str] | None:
    return None if wanted is None else {name.removeprefix(view) for its, name in wanted if its == family and name.startswith(view)}


def _regressions(train: tuple[Any, Labels], asked: Any, seed: int, wanted: set[str] | None) -> Iterator[tuple[str, Labels]]:
    """All strengths, each begun where the stronger penalty ended."""
    several = len(set(train[1])) > 1  # else there is nothing to tell apart
    model = LogisticRegression(max_iter=ITERATIONS, warm_start=True, random_state=seed) if several else DummyClassifier().fit(*train)
    for strength in STRENGTHS if wanted is None or wanted else ():
        with warnings.catch_warnings():  # a setting that has not settled is judged by its score like any other
            warnings.simplefilter("ignore", ConvergenceWarning)
            if several:
                model.set_params(C=strength).fit(*train)
        if wanted is None or f" C={strength:g}" in wanted:
            yield f" C={strength:g}", model.predict(asked)


def _forest(train: tuple[Any, Labels], asked: Any, seed: int, wanted: set[str] | None) -> Iterator[tuple[str, Labels]]:
    if wanted is None or "" in wanted:
        trees = RandomForestClassifier(TREES, min_samples_leaf=SMALLEST_LEAF, class_weight="balanced", random_state=seed)
        yield "", trees.fit(*train).predict(asked)


def _neighbours(train: tuple[Any, Labels], asked: Any, seed: int, wanted: set[str] | None) -> Iterator[tuple[str, Labels]]:  # noqa: ARG001
    if wanted is None or "" in wanted:
        yield "", KNeighborsClassifier(min(NEIGHBOURS, len(train[1]))).fit(*train).predict(asked)


def position_answers(places: Sequence[NDArray[np.float64]], labels: Labels) -> Labels:
    """The vote of the 15 training cells nearest in the tissue: (training, asked) places [n, 2]."""
    train, asked = places
    found: Labels = KNeighborsClassifier(min(NEIGHBOURS, len(labels))).fit(train, labels).predict(asked)
    return found
