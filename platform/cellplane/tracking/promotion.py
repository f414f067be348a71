"""Who becomes champion, and who said so: a gate on held-out scores, a history that MLflow does not keep, and the way back.

    promote   gate -> aliases move -> history entry (who, when, from, to, gate values)
    rollback  champion and previous change places -> history entry

The router follows the aliases; nothing here touches an endpoint.
"""

from __future__ import annotations

import getpass
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from cellplane.errors import ConfigError
from cellplane.tracking import registry
from cellplane.tracking.registry import CHAMPION, PREVIOUS

log = logging.getLogger(__name__)

OURS = "cellplm"  # the row of the model itself among its held-out scores
METRICS = ("macro_f1", "pearson", "accuracy")  # the first that a run has decides
MAJORITY = "majority"  # the row of the baseline that looks at no cell
NEAR = 0.2  # above the majority's macro-F1: guessing at random reaches .17 above it (two or three types of one size), and some luck
TOLERANCE = 0.01  # a point of macro-F1: what another seed changes
MANUAL_EDITS = f"set the alias {CHAMPION!r} with `cellplane models promote NAME VERSION`"


@dataclass(frozen=True)
class Verdict:
    """What the gate found: the metric that decided, its value, the champion's, the best baseline's; None where there is none.

    ``warning`` is for whoever promotes: the gate compares, and where every method fails it lets the best failure pass.
    """

    metric: str | None
    value: float | None
    champion: float | None
    baseline: float | None
    tolerance: float
    warning: str | None = None

    @property
    def refusal(self) -> str | None:
        """Why this version should not be promoted; None when it may."""
        if self.value is None:
            return None
        found = f"{self.metric} {self.value:.4f} on the held-out cells"
        if self.champion is not None and self.value < self.champion - self.tolerance:
            return f"{found}, the champion has {self.champion:.4f} ({self.tolerance:g} less is allowed)"
        if self.baseline is not None and self.value < self.baseline:
            advice = "more steps, a base model or `cellplane tune` may help, and `cellplane try` tells how sure a difference is"
            return f"{found}, a plain baseline has {self.baseline:.4f}; {advice}"
        return None


def chance_warning(metric: str, values: Mapping[str, float]) -> str | None:
    """What to think of held-out scores by method when all lie near "majority", which always says the commonest; else None."""
    majority, others = values.get(MAJORITY), {name: value for name, value in values.items() if name != MAJORITY}
    if majority is None or not others or max(others.values()) > majority + NEAR:
        return None
    best = max(others, key=others.__getitem__)
    return (
        f"no method does much better on the held-out cells than always saying the commonest type: {metric} {others[best]:.3f} of {best}, "
        f"the best, against {majority:.3f}. A model is of no use there, whichever ranks first: have both files the same types and names?"
    )


def judge(name: str, version: int, uri: str | None = None, tolerance: float = TOLERANCE) -> Verdict:
    """The gate's view of a version: at least the champion's score less ``tolerance``, and no worse than the best baseline.

    A version whose run has no held-out scores has no metric, and passes: that is said in the history.
    """
    scores = registry.scores_of(name, version, uri)
    metric = next((known for known in METRICS if f"{OURS}/{known}" in scores), None)
    if metric is None:
        return Verdict(None, None, None, None, tolerance)
    champion = registry.aliases_of(name, uri).get(CHAMPION)
    other = None if champion in (None, version) else registry.scores_of(name, champion, uri).get(f"{OURS}/{metric}")
    values = {key.removesuffix(f"/{metric}"): value for key, value in scores.items() if key.endswith(f"/{metric}")}
    baselines = [value for key, value in values.items() if not key.startswith(OURS)]
    return Verdict(metric, values[OURS], other, max(baselines, default=None), tolerance, chance_warning(metric, values))


def promote(name: str, version: int, uri: str | None = None, tolerance: float = TOLERANCE, force: bool = False) -> Verdict:
    """Make a version the champion when it passes the gate, or in spite of it with ``force``; the history keeps both.

    ConfigError with the gate's reason when it does not pass.
    """
    verdict = judge(name, version, uri, tolerance)
    if verdict.refusal and not force:
        raise ConfigError(f"version {version} of {name!r} is not promoted: {verdict.refusal}; use --force if it must be")
    registry.promote(name, version, uri, {"by": _who(), "what": "promote", "forced": bool(verdict.refusal), "gate": asdict(verdict)})
    log.info("version %d of %s is the champion", version, name)
    return verdict


def rollback(name: str, uri: str | None = None) -> int:
    """Let champion and previous change places; returns the version that is champion now. ConfigError without a previous one."""
    previous = registry.aliases_of(name, uri).get(PREVIOUS)
    if previous is None:
        raise ConfigError(f"model {name!r} has no previous version to go back to; {MANUAL_EDITS}")
    registry.promote(name, previous, uri, {"by": _who(), "what": "rollback"})
    log.info("version %d of %s is the champion again", previous, name)
    return previous


def _who() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return "unknown"
