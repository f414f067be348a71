"""Whether one method is better than another on the same splits, or only luckier.

Scores of two methods on one split share its difficulty, so their difference is what is tested. Splits of one data set share
training cells: their scores are not independent, and a plain t test finds differences that are not there. Nadeau and Bengio
("Inference for the generalization error", Machine Learning 52, 2003) widen its variance by test cells / training cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from cellplane.errors import DataError

DECIDED = 0.05  # the customary error rate; nothing below it is called a difference here either
BOOTSTRAPS = 10_000


@dataclass(frozen=True)
class Difference:
    """Mean lead over ``pairs`` splits, its 95 % interval, and p values of two paired tests; NaN where they cannot be made.

    ``p_value`` is the corrected resampled t test's, ``p_wilcoxon`` that of the signed rank test (which calls splits independent).
    """

    mean: float
    low: float
    high: float
    p_value: float
    p_wilcoxon: float
    pairs: int

    @property
    def verdict(self) -> str:
        """better, worse, or undecided: a difference inside the spread is no difference."""
        if not self.p_value < DECIDED:  # NaN is undecided
            return "undecided"
        return "better" if self.mean > 0 else "worse"

    def text(self) -> str:
        """`+0.012 [-0.003, 0.027] p .11`."""
        if np.isnan(self.p_value):
            return f"{self.mean:+.3f}"
        return f"{self.mean:+.3f} [{self.low:.3f}, {self.high:.3f}] p {self.p_value:.2g}"


def paired_difference(leads: Sequence[float], test_share: float = 0.0) -> Difference:
    """The corrected resampled t test on differences, one for each split and seed; ``test_share`` = test / training cells.

    With ``test_share`` 0 it is the plain paired t test, for splits that share nothing. DataError for no or unknown numbers.
    """
    values = np.asarray(leads, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise DataError(f"a paired test needs finite differences, one for each split; found {values.tolist()[:5]}")
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return Difference(mean, np.nan, np.nan, np.nan, np.nan, n)
    error = float(np.sqrt((1 / n + test_share) * values.var(ddof=1)))
    if error == 0:
        certain = 1.0 if mean == 0 else 0.0
        return Difference(mean, mean, mean, certain, _signed_rank(values), n)
    reach = float(stats.t.ppf(0.975, n - 1)) * error
    p_value = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    return Difference(mean, mean - reach, mean + reach, p_value, _signed_rank(values), n)


def _signed_rank(values: NDArray[np.float64]) -> float:
    """Wilcoxon's signed rank test, exact for few pairs without ties; 1 when all are 0."""
    if not values.any():
        return 1.0
    ties = len(set(abs(values))) < len(values) or not values.all()
    return float(stats.wilcoxon(values, method="asymptotic" if ties else "auto").pvalue)


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of a mean over independent units (genes, perturbations, cells), by resampling them 10,000 times."""
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    if not known.size:
        raise DataError("an interval needs at least one finite number, found none")
    rng = np.random.default_rng(seed)
    means = [known[rng.integers(0, len(known), len(known))].mean() for _ in range(BOOTSTRAPS)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
