"""Whether anything stays behind: memory and descriptors of every serving process, while good and bad requests alternate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Protocol

import numpy as np

from cellplane.benchmark.report import Figure, at_most
from cellplane.benchmark.serve_load import LOST, Order
from cellplane.benchmark.serve_stack import Endpoint, bodies_of, loading, some_cells
from cellplane.errors import BenchmarkError
from cellplane.processes import footprint

SERVING = ("ray::ServeReplica", "ray::ProxyActor", "ray::HAProxyManager", "ray::ServeController")
CALLERS, LOOK_S = 3, 0.5  # an odd number of callers, so that each asks good and bad in turn
GROWTH_MIB = 5 * 1e6 / 2**20  # the gate's 5 MB
DESCRIPTORS = 8  # connections come and go; a leak would be hundreds
MIB = 1 << 20
Look = tuple[float, float]  # MiB of memory that is its own, descriptors


class Plan(Protocol):
    """What this part reads of the benchmark's settings."""

    @property
    def requests(self) -> int:
        """Requests under load."""


def leaks(plan: Plan, endpoint: Endpoint) -> Iterator[Figure]:
    """Growth over the second half of the requests, by a straight line: of the process that grew most, and of all together.

    The first half fills caches and pools. Which kinds of process there are depends on the proxy.
    """
    bodies, looks, stop = _good_and_bad(endpoint), list[dict[int, Look]](), Event()
    watched = {pid: name.removeprefix("ray::") for name in SERVING for pid in endpoint.processes(name)}
    watcher = Thread(target=_watch, args=(list(watched), looks, stop))
    with loading(endpoint, bodies, Order(callers=CALLERS, requests=plan.requests)) as callers:
        watcher.start()
        try:
            callers.process.wait()
        finally:
            stop.set()
            watcher.join()
    late = looks[len(looks) // 2 :]
    if len(late) < 3:
        raise BenchmarkError("too few requests to see growth in; ask for more: --requests 10000")
    grown, descriptors = {}, {}
    for pid in set.intersection(*(set(look) for look in looks)):
        memory, opened = np.array([look[pid] for look in late]).T
        steps = np.linspace(0, plan.requests / 2 / 1000, len(late))  # callers never pause: the half took its requests evenly
        grown[pid] = float(np.polyfit(steps, memory, 1)[0])
        descriptors[pid] = float(np.median(opened[-3:]) - np.median(opened[:3]))
    gone = len(watched) - len(grown)
    told = ", ".join(f"{watched[pid]} {slope:+.2f}" for pid, slope in sorted(grown.items(), key=lambda one: -one[1]))
    counts = Counter(answer.status for answer in callers.answers)
    said = ", ".join(f"{count} x {status}" for status, count in sorted(counts.items()))
    strange = sum(count for status, count in counts.items() if status == LOST or status >= 500)
    yield at_most("answers of 500 and above, good and bad requests in turn", strange, 0, "").because(said)
    yield at_most("serving processes that ended meanwhile", gone, 0, "")
    yield at_most("memory, growth of the fastest growing process by 1,000 requests", max(grown.values()), GROWTH_MIB, "MiB").because(told)
    yield at_most("memory, growth of all together by 1,000 requests", sum(grown.values()), GROWTH_MIB, "MiB")
    yield at_most("descriptors, growth of the fastest growing process", max(descriptors.values()), DESCRIPTORS, "")


def _good_and_bad(endpoint: Endpoint) -> list[Path]:
    """Two sound bodies of different size with a spoiled one after each: cut, of another format, empty, with bits flipped."""
    (small,), (large,) = bodies_of(endpoint, some_cells(8)), bodies_of(endpoint, some_cells(64))
    content = large.read_bytes()
    flipped = bytearray(content)
    flipped[len(flipped) // 3 :: 97] = bytes(byte ^ 0x55 for byte in flipped[len(flipped) // 3 :: 97])
    spoiled = {"cut": content[: len(content) // 2], "text": b"not an Arrow stream" * 50, "empty": b"", "flipped": bytes(flipped)}
    bodies = []
    for turn, (name, wrong) in enumerate(spoiled.items()):
        path = endpoint.home / f"spoiled-{name}"
        path.write_bytes(wrong)
        bodies += [(small, large)[turn % 2], path]
    return bodies


def _watch(pids: Sequence[int], looks: list[dict[int, Look]], stop: Event) -> None:
    while not stop.wait(LOOK_S):
        found = {pid: footprint(pid) for pid in pids}
        looks.append({pid: (one[0] / MIB, float(one[1])) for pid, one in found.items() if one is not None})
