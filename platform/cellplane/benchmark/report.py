"""What a benchmark prints: one JSON line a figure as soon as it is known, and a table of them all at the end."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

Part = TypeVar("Part")


@dataclass(frozen=True)
class Figure:
    """One measured thing: ``value`` (None: could not be said, and ``note`` why) beside what is asked of it."""

    name: str
    value: float | None
    unit: str
    gate: str = ""
    holds: bool | None = None
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def because(self, note: str = "", details: dict[str, Any] | None = None) -> Figure:
        """The same figure, explained."""
        return replace(self, note=note, details=details or {})

    def line(self) -> str:
        """As JSON."""
        return json.dumps({key: value for key, value in asdict(self).items() if value not in ("", {}, None) or key == "value"})


def at_least(name: str, value: float | None, limit: float, unit: str = "x") -> Figure:
    """A figure with a lower limit."""
    return Figure(name, value, unit, f">= {limit:g}", None if value is None else value >= limit)


def at_most(name: str, value: float | None, limit: float, unit: str) -> Figure:
    """A figure with an upper limit."""
    return Figure(name, value, unit, f"<= {limit:g}", None if value is None else value <= limit)


def asked_parts(parts: Mapping[str, Part], only: Sequence[str], left_out: Sequence[str] = ()) -> Iterator[Part]:
    """The parts of a measurement that were asked for; where none was, all but those ``left_out``."""
    return (part for name, part in parts.items() if (name in only if only else name not in left_out))


def machine() -> dict[str, Any]:
    """What these figures were measured on."""
    return {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()}


def table(figures: Sequence[Figure]) -> str:
    """All figures, one a row."""
    rows = [("figure", "value", "asked", "holds", "note")]
    for figure in figures:
        value = "-" if figure.value is None else f"{figure.value:.4g} {figure.unit}"
        holds = {None: "", True: "yes", False: "NO"}[figure.holds]
        rows.append((figure.name, value, figure.gate, holds, figure.note))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip() for row in rows)
