"""What an ingress counts for Prometheus, by model and version, in the text format that scrapers read.

Counts are of the ingress replica that is asked; with several, a scraper sees each of them in turn.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ABOUT = {
    "cellplane_answers_total": ("counter", "Everything that was answered over HTTP, refusals and defects too, by method and status."),
    "cellplane_requests_total": ("counter", "Requests by outcome, the HTTP status."),
    "cellplane_request_seconds": ("histogram", "Time from a decoded request to its answer."),
    "cellplane_cells_total": ("counter", "Cells answered."),
    "cellplane_annotated_cells_total": ("counter", "Cells that were given a cell type, or none."),
    "cellplane_unknown_cells_total": ("counter", "Cells annotated as unknown."),
    "cellplane_confidence_sum": ("counter", "Sum over annotated cells of the confidence in their cell type."),
    "cellplane_gene_overlap_sum": ("counter", "Sum over requests of the share of their genes that the model knows."),
    "cellplane_replica_deaths_total": ("counter", "Calls that were repeated because a model replica died."),
    "cellplane_forward_total": ("counter", "Forwards of the network; several requests share one."),
    "cellplane_forward_requests_total": ("counter", "Requests that were answered by forwards."),
    "cellplane_forward_cells_total": ("counter", "Cells that went through forwards."),
    "cellplane_shadow_requests_total": ("counter", "Copies of requests that a shadow was asked, by outcome: same, other, failed, skipped."),
}
Labels = tuple[tuple[str, str], ...]


class Meters:
    """Counters and one histogram; adding to them is safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, dict[Labels, float]] = defaultdict(lambda: defaultdict(float))
        self._times: dict[Labels, list[float]] = {}

    def add(self, name: str, labels: Mapping[str, str], amount: float = 1.0) -> None:
        """Count something of ABOUT."""
        with self._lock:
            self._counts[name][_key(labels)] += amount

    def put(self, name: str, labels: Mapping[str, str], value: float) -> None:
        """Set something of ABOUT that is counted elsewhere."""
        with self._lock:
            self._counts[name][_key(labels)] = value

    def time(self, labels: Mapping[str, str], seconds: float) -> None:
        """Note how long a request took."""
        with self._lock:
            row = self._times.setdefault(_key(labels), [0.0] * (len(BUCKETS_S) + 2))
            for place, bound in enumerate(BUCKETS_S):
                row[place] += seconds <= bound
            row[-2] += 1
            row[-1] += seconds

    def value(self, name: str, labels: Mapping[str, str]) -> float:
        """A counter as it stands."""
        with self._lock:
            return self._counts[name].get(_key(labels), 0.0)

    def text(self) -> str:
        """All of it, as a scraper reads it."""
        lines: list[str] = []
        with self._lock:
            for name, (kind, told) in ABOUT.items():
                lines += [f"# HELP {name} {told}", f"# TYPE {name} {kind}"]
                if kind == "histogram":
                    for labels, row in self._times.items():
                        lines += _histogram(name, labels, row)
                lines += [f"{name}{_written(labels)} {value:g}" for labels, value in self._counts[name].items()]
        return "\n".join(lines) + "\n"


def _key(labels: Mapping[str, str]) -> Labels:
    return tuple(sorted(labels.items()))


def _written(labels: Labels) -> str:
    escaped = [(name, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for name, value in labels]
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}" if labels else ""


def _histogram(name: str, labels: Labels, row: list[float]) -> list[str]:
    bounds = [*(f"{bound:g}" for bound in BUCKETS_S), "+Inf"]
    lines = [f"{name}_bucket{_written((*labels, ('le', bound)))} {count:g}" for bound, count in zip(bounds, row, strict=False)]
    return [*lines, f"{name}_count{_written(labels)} {row[-2]:g}", f"{name}_sum{_written(labels)} {row[-1]:.6g}"]
