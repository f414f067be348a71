"""What the tasks of `cellplane try` share: the hidden part measured once, the answer written once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from cellplane.artifact.folder import ModelFolder, load_model
from cellplane.config import home
from cellplane.data.sources import AnnData
from cellplane.pipelines.protocol import Entry, Evaluation, Ledger, Picture
from cellplane.pipelines.try_config import TryConfig
from cellplane.pipelines.verdict import Verdict
from cellplane.tracking.registry import resolve_model

Say = Callable[[str], None]
Answer: TypeAlias = "AnnData | ModelFolder | None"
BOOTSTRAP = (
    "The interval comes from drawing the hidden units again (paired bootstrap, 95 %). It does not cover what another seed of the "
    "network or other samples would change: repeat with --seed 1 before a small lead decides anything."
)


@dataclass(frozen=True)
class Bench:
    """Where a trial is made: what was measured before, who is told of progress, and the folder of its pictures."""

    ledger: Ledger
    say: Say
    pictures: Path


@dataclass(frozen=True)
class Tried:
    """What came out: the verdict, all scores, pictures, notes that a reader needs to believe it, and ``how`` sure it is."""

    verdict: Verdict
    evaluation: Evaluation
    how: str = BOOTSTRAP


@dataclass(frozen=True)
class Task:
    """How a task is tried, and how the winner answers: the AnnData or model to write, None when there is nothing to; and why."""

    config: type[Any]
    measure: Callable[[Any, Bench], Tried]
    answer: Callable[[Any, str], tuple[Answer, str]]


def how_long(seconds: float) -> str:
    """`about 40 s`, `about 3 min`."""
    return f"about {max(10, round(seconds, -1)):.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"


def still_to_go(spent: Sequence[float], parts: int) -> str:
    """What the parts that were measured let expect of the others; nothing before the first one."""
    return f", {how_long(sum(spent) / len(spent) * (parts - len(spent)))} to go" if spent else ""


def base_of(config: TryConfig) -> Any:
    """The base model, verified; None from scratch."""
    if config.base_model is None:
        return None
    return load_model(resolve_model(config.base_model, config.tracking_uri, home() / "cache").path)


def evaluation_of(metric: str, entries: Sequence[Entry], task: str, notes: Sequence[str], pictures: Sequence[Picture]) -> Evaluation:
    """The scores as every evaluation shows them; what explains each score by cell stays in the ledger."""
    bare = tuple(replace(entry, details={}) for entry in entries)
    lower = ("nats",) if metric == "nats" else ()
    return Evaluation(task, metric, bare, tuple(pictures), tuple(notes), lower_is_better=lower)
