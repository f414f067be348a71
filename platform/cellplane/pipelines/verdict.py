"""Should I use it? The model beside the best simple method on the same hidden truth, in words and with an interval.

The units that were hidden (cells, genes) are drawn again with replacement, always the same for both methods (a paired
bootstrap), so the interval says how far the lead depends on which of them happened to be there. It does not cover what
another seed or other samples would change.
"""

# B resamplings, U distinct (truth, mine, theirs), K classes

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cellplane.errors import DataError
from cellplane.pipelines.job import MODEL_ROW
from cellplane.pipelines.significance import bootstrap_interval

RESAMPLINGS = 2000
Decision = Literal["model", "baseline", "undecided"]


@dataclass(frozen=True)
class Lead:
    """How far the model is ahead, and its 95 % interval; positive is in the model's favour."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Measure:
    """What was measured, and over which units, in words: "macro-F1", "hidden cells"."""

    name: str
    units: str
    lower_is_better: bool = False
    digits: int = 3


@dataclass(frozen=True)
class Verdict:
    """The scores of the model and of the best simple method over ``n`` hidden units, and what follows."""

    measure: Measure
    n: int
    model: float
    baseline: str
    other: float
    lead: Lead

    @property
    def decision(self) -> Decision:
        """Who is ahead beyond what the choice of units explains."""
        if self.lead.low > 0:
            return "model"
        return "baseline" if self.lead.high < 0 else "undecided"

    @property
    def winner(self) -> str:
        """Whose answer to take: the better score, decided or not; the simple method where they are equal."""
        return MODEL_ROW if self.lead.mean > 0 else self.baseline

    @property
    def text(self) -> str:
        """Two sentences: what to use, and why."""
        little = "scored better, but chance explains as much" if self.lead.mean else "is simpler"
        advice = {
            "model": f"Use {MODEL_ROW}.",
            "baseline": f"Use {self.baseline}, the simple method: it is better than {MODEL_ROW} on your data.",
            "undecided": f"Too close to tell: {self.winner} {little}.",
        }
        digits, lead = self.measure.digits, self.lead
        sense = "smaller" if self.measure.lower_is_better else "larger"
        scores = f"{MODEL_ROW} {self.model:.{digits}f}, {self.baseline} {self.other:.{digits}f}"
        mean, low, high = (f"{value:+.{digits}f}" for value in (lead.mean, lead.low, lead.high))
        interval = f"lead of {MODEL_ROW} {mean}, 95 % interval {low} to {high}"
        why = f"Over {self.n} {self.measure.units}, {self.measure.name} ({sense} is better): {scores}; {interval}."
        return f"{advice[self.decision]} {why}"


def mean_lead(leads: NDArray[Any], seed: int = 0) -> Lead:
    """The mean of one difference for each unit; those that are not finite are left out. DataError when none is left."""
    known = np.asarray(leads, dtype=np.float64)
    known = known[np.isfinite(known)]
    low, high = bootstrap_interval(known.tolist(), seed)
    return Lead(float(known.mean()), low, high)


def macro_f1_lead(truth: NDArray[Any], mine: NDArray[Any], theirs: NDArray[Any], seed: int = 0) -> Lead:
    """Lead in macro-F1 over cells; DataError for no cells. A type that a resampling misses does not count in it."""
    if not len(truth):
        raise DataError("a lead needs at least one cell")
    triples, counts = np.unique(np.stack([truth.astype(str), mine.astype(str), theirs.astype(str)]), axis=1, return_counts=True)
    weights_BU = np.random.default_rng(seed).multinomial(len(truth), counts / counts.sum(), RESAMPLINGS)
    drawn = np.concatenate([counts[None], weights_BU])
    leads = _macro_f1(drawn, triples[0], triples[1]) - _macro_f1(drawn, triples[0], triples[2])
    low, high = np.quantile(leads[1:], (0.025, 0.975))
    return Lead(float(leads[0]), float(low), float(high))


def _macro_f1(weights_BU: NDArray[Any], truth_U: NDArray[Any], answer_U: NDArray[Any]) -> NDArray[np.float64]:
    """Macro-F1 of every resampling, [B]: the mean over types that have a cell in it."""
    classes_K = np.unique(truth_U)
    true_UK, said_UK = truth_U[:, None] == classes_K, answer_U[:, None] == classes_K
    support, claimed, hits = (weights_BU @ part.astype(np.float64) for part in (true_UK, said_UK, true_UK & said_UK))
    f1 = np.where(support > 0, 2 * hits / np.maximum(support + claimed, 1), 0.0)
    scores: NDArray[np.float64] = f1.sum(1) / np.maximum((support > 0).sum(1), 1)
    return scores
