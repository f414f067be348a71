"""What an endpoint does when it matters: versions change under load, processes die, too many ask at once, requests are packed.

The stack, its versions and its callers are those of `serve_stack`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from cellplane.benchmark.report import Figure, asked_parts, at_least, at_most
from cellplane.benchmark.serve_kills import kills
from cellplane.benchmark.serve_leaks import leaks
from cellplane.benchmark.serve_load import Order
from cellplane.benchmark.serve_size import sizes
from cellplane.benchmark.serve_stack import (
    FLIPPED,
    GOLDEN,
    GOOD,
    KEYS,
    NAME,
    NAN,
    NEXT,
    Endpoint,
    an_endpoint,
    bodies_of,
    forwards_of,
    load,
    loading,
    percentile,
    some_cells,
    until,
)
from cellplane.client import Client
from cellplane.data.config import DataKeys
from cellplane.data.sentences import memory_store
from cellplane.data.sources import AnnData, cell_table
from cellplane.inference import Predictor
from cellplane.tracking.promotion import rollback
from cellplane.tracking.registry import promote

BROKEN = {NAN: "NaN at warm-up", GOLDEN: "golden mismatch", FLIPPED: "bad checksum"}
CROWD, CALLERS, CELLS_EACH, OVERLOAD = 32, 16, 64, 160  # callers at once; overload: ten times those that are answered at once


@dataclass(frozen=True)
class ServeBenchmark:
    """What to measure: requests under load (the gate asks 10000), seconds of overload (60), what receives HTTP, the parts."""

    requests: int = 500
    seconds: int = 5
    proxy: str = "auto"
    only: tuple[str, ...] = ()

    def run(self) -> Iterator[Figure]:
        """Every figure as soon as it is known. Raises BenchmarkError when the stack does not start."""
        logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a request otherwise
        with an_endpoint(self.proxy) as endpoint:
            for part in asked_parts(PARTS, self.only):
                yield from part(self, endpoint)


def crowd(plan: ServeBenchmark, endpoint: Endpoint) -> Iterator[Figure]:
    """Random requests at once, in contexts that differ in a few cells, beside the offline predictor."""
    cells, rng = some_cells(CELLS_EACH), np.random.default_rng(0)
    parts = [cells[np.sort(rng.choice(CELLS_EACH, rng.integers(1, CELLS_EACH), replace=False))].copy() for _ in range(plan.requests)]
    predictor = Predictor.load(endpoint.home / f"v{endpoint.version()}")

    def ask(part: AnnData) -> Any:
        with Client(endpoint.url) as client:
            return client.embed(part, NAME, KEYS)

    with ThreadPoolExecutor(CROWD) as threads:
        served = list(threads.map(ask, parts))
    worst = 0.0
    for part, answer in zip(parts, served, strict=True):
        store = memory_store(cell_table(part, predictor.vocabulary, KEYS)[0], predictor.max_cells)
        worst = max(worst, float(np.abs(answer - predictor.embed(store)).max()))
    yield at_most("served beside offline, largest difference", worst, 1e-5, "").because(f"{plan.requests} requests, {CROWD} at once")


def packing(plan: ServeBenchmark, endpoint: Endpoint) -> Iterator[Figure]:
    """How many requests share a forward, and cells/s beside the bare packed model in this process."""
    cells = some_cells(CELLS_EACH)
    before = forwards_of(endpoint)
    answers = load(endpoint, bodies_of(endpoint, cells), Order(callers=CALLERS, requests=plan.requests))
    requests, forwards = (now - then for now, then in zip(forwards_of(endpoint), before, strict=True))
    seconds = max(answer.at + answer.seconds for answer in answers) - min(answer.at for answer in answers)
    served = CELLS_EACH * sum(answer.status == 200 for answer in answers) / seconds
    predictor = Predictor.load(endpoint.home / f"v{endpoint.version()}")
    table = cell_table(some_cells(CELLS_EACH * CALLERS), predictor.vocabulary, DataKeys())[0]
    store = memory_store(table, CELLS_EACH)
    predictor.embed(store)
    began = time.perf_counter()
    predictor.embed(store)
    bare = table.n_cells / (time.perf_counter() - began)
    yield at_least("requests that share a forward", requests / max(forwards, 1), 1.5, "requests").because(
        f"{CALLERS} callers of {CELLS_EACH} cells"
    )
    yield Figure("cells/s served beside the bare packed model", served / bare, "x").because(
        f"{served:.0f} beside {bare:.0f} cells/s; a tiny model, so this is the wire's cost; `sizes` has the 85M one"
    )


def rollout(plan: ServeBenchmark, endpoint: Endpoint) -> Iterator[Figure]:
    """A promotion, three broken versions, and the way back, while callers never stop asking."""
    bodies = bodies_of(endpoint, some_cells(8))
    quiet = load(endpoint, bodies, Order(callers=4, requests=max(plan.requests // 5, 50)))
    with loading(endpoint, bodies, Order(callers=4, least=plan.requests)) as callers:
        promote(NAME, NEXT, endpoint.registry)
        started = until(lambda: endpoint.version() == str(NEXT))
        told = {}
        for broken, what in BROKEN.items():
            promote(NAME, broken, endpoint.registry)
            until(partial(endpoint.reason, broken))
            told[what] = endpoint.reason(broken)
            promote(NAME, NEXT, endpoint.registry)
        promote(NAME, GOOD, endpoint.registry)
        until(lambda: endpoint.version() == str(GOOD))
        began = time.monotonic()
        rollback(NAME, endpoint.registry)
        until(lambda: endpoint.version() == str(NEXT))
        back = time.monotonic() - began
    answers = callers.answers
    failed = [answer for answer in answers if answer.status != 200]
    strange = {answer.version for answer in answers if answer.status == 200} - {str(GOOD), str(NEXT)}
    counts = dict(Counter(answer.status for answer in answers))
    yield at_most("requests failed in roll-outs", len(failed), 0, "").because(f"of {len(answers)}; statuses {counts}")
    yield at_most("answers by a broken or unnamed version", len(strange), 0, "").because(", ".join(map(str, strange)))
    yield at_least("broken versions that were told apart", len(told), len(BROKEN), "").because(details=told)
    yield at_most("rollback, until the old version answers", back, 1.0, "s").because(f"a new version answered after {started:.1f} s")
    slow = percentile(answers, 99) / percentile(quiet, 99)
    yield at_most("p99 while versions change, beside quiet", slow, 2.0, "x").because(f"{percentile(answers, 99) * 1e3:.0f} ms")


def overload(plan: ServeBenchmark, endpoint: Endpoint) -> Iterator[Figure]:
    """Many more callers than are answered at once: who is refused is told so at once, and when to come back.

    First callers that come back when they were told to, as our client does; then ones that never pause, who keep the same
    two cores busy with being refused.
    """
    for patient in (True, False):
        kind = "" if patient else ", callers that never pause"
        order = Order(callers=OVERLOAD, seconds=plan.seconds, patient=patient)
        answers = load(endpoint, bodies_of(endpoint, some_cells(CELLS_EACH)), order)
        counts = Counter(answer.status for answer in answers)
        refused = [answer for answer in answers if answer.status == 503]
        silent = [answer for answer in refused if answer.retry_after is None]
        said = ", ".join(f"{count} x {status}" for status, count in sorted(counts.items()))
        strange = len(answers) - counts[200] - counts[503]
        yield at_most(f"answers in overload that are neither 200 nor 503{kind}", strange, 0, "").because(said)
        yield at_most(f"503 without Retry-After{kind}", len(silent), 0, "")
        slow, note = percentile(refused, 99), f"{OVERLOAD} callers for {plan.seconds} s; median {percentile(refused, 50):.3f} s"
        name = f"503, 99th percentile{kind}"
        yield (at_most(name, slow, 0.25, "s") if patient else Figure(name, slow, "s")).because(note)
        accepted = [answer for answer in answers if answer.status == 200]
        yield Figure(f"accepted in overload, 99th percentile{kind}", percentile(accepted, 99), "s")


PARTS: dict[str, Callable[[ServeBenchmark, Endpoint], Iterator[Figure]]] = {
    "crowd": crowd,
    "packing": packing,
    "rollout": rollout,
    "overload": overload,
    "kills": kills,
    "leaks": leaks,
    "sizes": lambda plan, endpoint: sizes(endpoint),  # noqa: ARG005  (same call for every part)
}
