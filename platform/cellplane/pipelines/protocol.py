"""What every evaluation leaves behind, whatever its task: scores by method and split, kept as they are found.

An `Entry` is one method on one split with one seed. A `Ledger` writes each as a JSON line the moment it is known, so that an
evaluation that was killed goes on behind the last one. An `Evaluation` is all entries with pictures and notes: its tables
show mean and spread, its comparisons are paired over splits (`significance`), `evaluation_report` prints it.

    ledger = Ledger(out / "entries.jsonl", fingerprint(config))
    place = Place("osmfish", "blocks", 3, seed=0)
    entry = ledger.measured(place, Method("ridge", "baseline"), lambda: Found({"pearson": 0.33}))
    evaluation = Evaluation("impute", "pearson", tuple(ledger.entries()))
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cellplane.errors import StorageError
from cellplane.pipelines.significance import Difference, paired_difference

Kind = Literal["model", "control", "baseline", "ceiling", "stranger"]
KINDS: tuple[Kind, ...] = ("model", "baseline", "control", "ceiling", "stranger")  # the order of a table's rows


@dataclass(frozen=True)
class Place:
    """Where a score was measured: a data set, how it was split ("random", "blocks", "batch", ...), which split, which seed."""

    dataset: str
    protocol: str
    split: int
    seed: int


@dataclass(frozen=True)
class Method:
    """What was measured, and what it is: ours (model), to beat (baseline), to explain (control), the most there is (ceiling).

    A stranger is no method: the row is about a type that was left out, and its columns are methods.
    """

    name: str
    kind: Kind


@dataclass(frozen=True)
class Found:
    """What measuring gave: numbers by name, and anything JSON-ready that explains them (chosen settings, answers by gene)."""

    metrics: Mapping[str, float]
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One method on one split with one seed. ``test_share``: test cells for each training cell (0: none were learned from)."""

    place: Place
    method: Method
    metrics: Mapping[str, float]
    seconds: float = 0.0
    test_share: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Entry:
        """The entry that ``dataclasses.asdict`` made plain."""
        rest = {key: plain[key] for key in ("metrics", "seconds", "test_share", "details") if key in plain}
        return cls(Place(**plain["place"]), Method(**plain["method"]), **rest)


class Ledger:
    """A file of JSON lines, one for each entry, for one writer; what it holds is not measured again.

    ``identity`` names all that decides the scores (a fingerprint of the configuration and the files): lines of another
    identity stay in the file and are not seen. A last line torn by a crash is skipped.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity = path, identity
        self._known = {(entry.place, entry.method.name): entry for entry in self._read()}

    def entries(self) -> list[Entry]:
        """All of this identity, in the order of measuring."""
        return list(self._known.values())

    def find(self, place: Place, name: str) -> Entry | None:
        """What is known of a method at a place."""
        return self._known.get((place, name))

    def measured(self, place: Place, method: Method, work: Callable[[], Found], test_share: float = 0.0) -> Entry:
        """The entry that is known, or that ``work`` finds now; it is on disk before this returns."""
        if (known := self.find(place, method.name)) is not None:
            return known
        began = time.monotonic()
        found = work()
        entry = Entry(place, method, dict(found.metrics), time.monotonic() - began, test_share, dict(found.details))
        self.add(entry)
        return entry

    def add(self, entry: Entry) -> None:
        """Appends one entry. StorageError when the disk refuses."""
        line = json.dumps({"identity": self.identity, **asdict(entry)}) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read(1) == b"\n" else "\n" + line  # the last one was torn by a crash
                file.write(line.encode())
        except OSError as error:
            raise StorageError(f"{self.path} cannot be written: {error}; free space or name another folder with -o out=...") from error
        self._known[entry.place, entry.method.name] = entry

    def _read(self) -> list[Entry]:
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        plain = [found for line in lines if (found := _parsed(line)) is not None]
        return [Entry.of(one) for one in plain if one.get("identity") == self.identity]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


@dataclass(frozen=True)
class Picture:
    """A PNG of an evaluation; the caption says what to see in it, ``alt`` what it shows to those who cannot see it ("": the title)."""

    title: str
    path: Path
    caption: str = ""
    alt: str = ""

    @property
    def described(self) -> str:
        """What stands in its place where it is not seen."""
        return self.alt or self.title


@dataclass(frozen=True)
class Row:
    """A line of a table: a method's values of every metric, one for each split and seed."""

    method: Method
    values: Mapping[str, Sequence[float]]

    def mean(self, metric: str) -> float:
        """Mean over splits and seeds; NaN when there is no number."""
        known = self._finite(metric)
        return float(np.mean(known)) if known else math.nan

    def spread(self, metric: str) -> float:
        """Sample standard deviation over splits and seeds; 0 for a single one."""
        known = self._finite(metric)
        return float(np.std(known, ddof=1)) if len(known) > 1 else 0.0

    def text(self, metric: str) -> str:
        """`0.832 +- 0.010 (15)`: mean, spread, number of splits and seeds."""
        if not (known := self._finite(metric)):
            return "-"
        return f"{self.mean(metric):.3f} +- {self.spread(metric):.3f} ({len(known)})" if len(known) > 1 else f"{known[0]:.3f}"

    def _finite(self, metric: str) -> list[float]:
        return [value for value in self.values.get(metric, ()) if math.isfinite(value)]


@dataclass(frozen=True)
class Evaluation:
    """Entries of a task with what explains them. ``metric`` decides; ``lower_is_better`` names errors among the metrics.

    ``model`` is the row whose differences to every other row are told. ``deciding`` names the metric of protocols that are
    decided by another one; ``aims`` the best value of metrics that can be too large and too small. Where all seeds place the
    same cells (not ``splits_differ``) they say nothing about other cells, so leads are told without a test.
    """

    task: str
    metric: str
    entries: tuple[Entry, ...]
    pictures: tuple[Picture, ...] = ()
    notes: tuple[str, ...] = ()
    lower_is_better: tuple[str, ...] = ()
    model: str = "cellplm"
    deciding: Mapping[str, str] = field(default_factory=dict)
    aims: Mapping[str, float] = field(default_factory=dict)
    splits_differ: bool = True

    def tables(self) -> list[tuple[str, str]]:
        """(data set, protocol) in the order of measuring."""
        return list(dict.fromkeys((entry.place.dataset, entry.place.protocol) for entry in self.entries))

    def metrics(self) -> list[str]:
        """Names of all metrics, the deciding one first."""
        return self._metrics(self.metric, self.entries)

    def decides(self, protocol: str) -> str:
        """The metric that decides under a protocol."""
        return self.deciding.get(protocol, self.metric)

    def metrics_of(self, dataset: str, protocol: str) -> list[str]:
        """Names of the metrics of one table, the deciding one first."""
        return self._metrics(self.decides(protocol), self._entries(dataset, protocol))

    def rows(self, dataset: str, protocol: str) -> list[Row]:
        """One row for each method, ours first, then baselines, controls and ceilings."""
        found = self._entries(dataset, protocol)
        methods = sorted(dict.fromkeys(entry.method for entry in found), key=lambda method: KINDS.index(method.kind))
        return [Row(method, _values([entry for entry in found if entry.method == method], self.metrics())) for method in methods]

    def difference(self, dataset: str, protocol: str, other: str, metric: str | None = None) -> Difference | None:
        """The model's lead over another row, paired over split and seed; positive is in our favour. None without pairs."""
        name = metric or self.decides(protocol)
        ours, theirs = (self._by_place(dataset, protocol, method) for method in (self.model, other))
        pairs = [(ours[place], theirs[place]) for place in ours if place in theirs]
        pairs = [(mine, its) for mine, its in pairs if all(math.isfinite(one.metrics.get(name, math.nan)) for one in (mine, its))]
        if not pairs:
            return None
        leads = [self._merit(name, mine.metrics[name]) - self._merit(name, its.metrics[name]) for mine, its in pairs]
        if not self.splits_differ:
            return Difference(float(np.mean(leads)), math.nan, math.nan, math.nan, math.nan, len(leads))
        return paired_difference(leads, float(np.mean([mine.test_share for mine, _ in pairs])))

    def _merit(self, metric: str, value: float) -> float:
        """The value as a number that is better when larger."""
        if metric in self.aims:
            return -abs(value - self.aims[metric])
        return -value if metric in self.lower_is_better else value

    def plain(self) -> dict[str, Any]:
        """JSON-ready: every entry, and every table with its differences; null where there is no number."""
        plain: dict[str, Any] = _known(
            {
                "task": self.task,
                "metric": self.metric,
                "model": self.model,
                "notes": list(self.notes),
                "pictures": [_plain_picture(one) for one in self.pictures],
                "tables": [self._plain_table(dataset, protocol) for dataset, protocol in self.tables()],
                "entries": [asdict(entry) for entry in self.entries],
            }
        )
        return plain

    def _plain_table(self, dataset: str, protocol: str) -> dict[str, Any]:
        rows = []
        for row in self.rows(dataset, protocol):
            lead = None if row.method.name == self.model else self.difference(dataset, protocol, row.method.name)
            known = [name for name in self.metrics_of(dataset, protocol) if row.values[name]]
            scores = {name: {"mean": row.mean(name), "spread": row.spread(name)} for name in known}
            rows.append({**asdict(row.method), "scores": scores, "lead": None if lead is None else asdict(lead)})
        return {"dataset": dataset, "protocol": protocol, "metric": self.decides(protocol), "rows": rows}

    def _entries(self, dataset: str, protocol: str) -> list[Entry]:
        return [entry for entry in self.entries if (entry.place.dataset, entry.place.protocol) == (dataset, protocol)]

    @staticmethod
    def _metrics(first: str, entries: Sequence[Entry]) -> list[str]:
        return list(dict.fromkeys([first, *(name for entry in entries for name in entry.metrics)]))

    def _by_place(self, dataset: str, protocol: str, method: str) -> dict[Place, Entry]:
        wanted = (dataset, protocol, method)
        return {one.place: one for one in self.entries if (one.place.dataset, one.place.protocol, one.method.name) == wanted}


def _plain_picture(picture: Picture) -> dict[str, str]:
    return {"title": picture.title, "file": picture.path.name, "caption": picture.caption, "alt": picture.described}


def _values(entries: Sequence[Entry], metrics: Sequence[str]) -> dict[str, list[float]]:
    return {name: [float(entry.metrics[name]) for entry in entries if name in entry.metrics] for name in metrics}


def _known(value: Any) -> Any:
    """The same with None for numbers that are none, which JSON does not know."""
    if isinstance(value, Mapping):
        return {name: _known(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_known(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
