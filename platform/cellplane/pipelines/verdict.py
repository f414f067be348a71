"""Should I use it? The model beside the best simple method on the same hidden truth, in words and with an interval.

The units that were hidden (cells, genes) are drawn again with replacement, always the same for both methods (a paired
bootstrap), so the interval says how far the lead depends on which of them happened to be there. Clusters have no units that
could be drawn twice: there the cells are halved again and again. Neither covers what another seed or other samples would change.
"""

# B resamplings, U distinct (truth, mine, theirs), K classes

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cellplane.errors import DataError
from cellplane.pipelines.job import MODEL_ROW
from cellplane.pipelines.significance import bootstrap_interval, paired_difference

RESAMPLINGS = 2000
Decision = Literal["model", "baseline", "undecided", "too few"]


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
    """The scores of the model and of the best simple method over ``n`` hidden units, and what follows.

    Below ``least`` units nothing follows. ``ours`` is the model's row where it has several; ``remark`` ends the text.
    """

    measure: Measure
    n: int
    model: float
    baseline: str
    other: float
    lead: Lead
    least: int = 1
    ours: str = MODEL_ROW
    remark: str = ""

    @property
    def decision(self) -> Decision:
        """Who is ahead beyond what the choice of units explains."""
        if self.n < self.least:
            return "too few"
        if self.lead.low > 0:
            return "model"
        return "baseline" if self.lead.high < 0 else "undecided"

    @property
    def winner(self) -> str:
        """Whose answer to take: the better score, decided or not; the simple method where they are equal, or nothing is known."""
        return self.ours if self.lead.mean > 0 and self.n >= self.least else self.baseline

    @property
    def text(self) -> str:
        """What to use, and why, in two sentences, and the remark."""
        little = "scored better, but chance explains as much" if self.lead.mean else "is simpler"
        advice = {
            "model": f"Use {self.ours}.",
            "baseline": f"Use {self.baseline}, the simple method: it is better than {self.ours} on your data.",
            "undecided": f"Too close to tell: {self.winner} {little}.",
            "too few": f"Too few to tell: {self.n} {self.measure.units}, at least {self.least} are needed.",
        }
        return " ".join(filter(None, (advice[self.decision], self._why if self.n else "", self.remark)))

    @property
    def _why(self) -> str:
        digits, lead = self.measure.digits, self.lead
        sense = "smaller" if self.measure.lower_is_better else "larger"
        scores = f"{self.ours} {self.model:.{digits}f}, {self.baseline} {self.other:.{digits}f}"
        mean, low, high = (f"{value:+.{digits}f}" for value in (lead.mean, lead.low, lead.high))
        interval = f"lead of {self.ours} {mean}, 95 % interval {low} to {high}"
        return f"Over {self.n} {self.measure.units}, {self.measure.name} ({sense} is better): {scores}; {interval}."


def mean_lead(leads: NDArray[Any], seed: int = 0) -> Lead:
    """The mean of one difference for each unit; those that are not finite are left out. DataError when none is left."""
    known = np.asarray(leads, dtype=np.float64)
    known = known[np.isfinite(known)]
    low, high = bootstrap_interval(known.tolist(), seed)
    return Lead(float(known.mean()), low, high)


def few_lead(leads: Sequence[float], seed: int = 0) -> Lead:
    """`mean_lead` of a few units, with an interval no narrower than Student's t gives.

    Drawing three leads of one sign again never gives the other sign, though a coin does so once in four times.
    """
    drawn, student = mean_lead(np.asarray(leads), seed), paired_difference(leads)
    if len(leads) < 2:
        return drawn
    return Lead(drawn.mean, min(drawn.low, student.low), max(drawn.high, student.high))


def halves_lead(leads: Sequence[float]) -> Lead:
    """The mean of one difference for each half of the cells, with the interval that all cells together deserve.

    The variance over random halves is that of the same number told from all cells (the delete-d jackknife of Shao and Wu, Annals
    of Statistics 17, 1989, with d = n / 2), so more halves do not make the interval narrower. DataError for no or unknown numbers.
    """
    found = paired_difference(leads, test_share=1.0)
    return Lead(found.mean, found.low, found.high)


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
