"""Who may die while requests are in flight: copies of the model, the process that receives requests, controller, proxy.

What fails on the bare wire is counted where nothing may fail there; where a request dies with the process that read it,
callers that try again (ours, with the same request id) must have lost nothing. Only children of this stack's own Ray head
are killed, by pid.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Protocol

from cellplane.benchmark.report import Figure, at_most
from cellplane.benchmark.serve_load import Answered, Order
from cellplane.benchmark.serve_stack import KEYS, NAME, Endpoint, bodies_of, loading, some_cells, until
from cellplane.client import Client
from cellplane.errors import ServiceError

MODEL, INGRESS = f"ray::ServeReplica:{NAME}--v", "ray::ServeReplica:cellplane:"
CONTROLLER, PROXIES = "ray::ServeController", ("ray::ProxyActor", "ray::HAProxyManager")
ROUNDS, PROXY_ROUNDS = 5, 3
CALLERS = 8


class Plan(Protocol):
    """What this part reads of the benchmark's settings."""

    @property
    def requests(self) -> int:
        """Requests under load."""


def kills(plan: Plan, endpoint: Endpoint) -> Iterator[Figure]:
    """Each kind of process in turn, each time under load until it is back."""
    yield from _replicas(plan, endpoint)
    yield from _ingress(plan, endpoint)
    yield from _unnoticed(plan, endpoint, CONTROLLER, "controller")
    yield from _proxy(endpoint)


def _replicas(plan: Plan, endpoint: Endpoint) -> Iterator[Figure]:
    """Five times one of two copies, and once both."""
    copies = len(endpoint.processes(MODEL))

    def disturb() -> None:
        for turn in range(ROUNDS + 1):
            _kill(endpoint.processes(MODEL)[: 1 if turn < ROUNDS else copies])
            until(lambda: len(endpoint.processes(MODEL)) >= copies and _answers(endpoint))

    answers = _under_load(plan, endpoint, disturb)
    yield _failed("model copies killed five times, then all at once", answers)


def _ingress(plan: Plan, endpoint: Endpoint) -> Iterator[Figure]:
    """The process that receives requests: what it has in hand goes with it, and callers of ours ask again."""
    cells, stop, lost = some_cells(8), Event(), list[str]()

    def caller(_: int) -> int:
        asked = 0
        with Client(endpoint.url, retries=8) as client:
            while not stop.is_set() or asked < plan.requests // CALLERS:
                try:
                    client.embed(cells, NAME, KEYS)
                except ServiceError as error:
                    lost.append(str(error))
                asked += 1
        return asked

    def disturb() -> None:
        before = endpoint.processes(INGRESS)
        _kill(before[:1])
        until(lambda: set(endpoint.processes(INGRESS)) - set(before) and _answers(endpoint))

    with ThreadPoolExecutor(CALLERS) as threads:
        callers = [threads.submit(caller, number) for number in range(CALLERS)]
        try:
            for _ in range(ROUNDS):
                disturb()
        finally:
            stop.set()
        asked = sum(one.result() for one in callers)
    yield at_most("requests lost through our client, ingress killed five times", len(lost), 0, "").because(f"of {asked}; {lost[:1]}")


def _unnoticed(plan: Plan, endpoint: Endpoint, named: str, what: str) -> Iterator[Figure]:
    def disturb() -> None:
        before = endpoint.processes(named)
        _kill(before)
        until(lambda: set(endpoint.processes(named)) - set(before))

    yield _failed(f"{what} killed", _under_load(plan, endpoint, disturb))


def _proxy(endpoint: Endpoint) -> Iterator[Figure]:
    """The process that listens: nobody can answer until it is back."""

    outages = []
    for _ in range(PROXY_ROUNDS):
        with Client(endpoint.url, retries=0, timeout_s=5.0) as client:
            began = time.monotonic()
            _kill([pid for proxy in PROXIES for pid in endpoint.processes(proxy)])
            until(lambda: not _answers(endpoint))
            until(lambda: _embeds(client))
        outages.append(time.monotonic() - began)
    told = ", ".join(f"{outage:.1f}" for outage in outages)
    yield at_most("proxy killed, until requests are answered again", max(outages), 10.0, "s").because(f"{told} s")


def _under_load(plan: Plan, endpoint: Endpoint, disturb: Callable[[], None]) -> Sequence[Answered]:
    """Every answer of callers on the bare wire, while something is done to the endpoint."""
    with loading(endpoint, bodies_of(endpoint, some_cells(8)), Order(callers=CALLERS, least=plan.requests)) as callers:
        time.sleep(1.0)  # requests are in flight
        disturb()
    return callers.answers


def _failed(what: str, answers: Sequence[Answered]) -> Figure:
    failed = sum(answer.status != 200 for answer in answers)
    slowest = max((answer.seconds for answer in answers), default=0.0)
    statuses = dict(Counter(answer.status for answer in answers))
    return at_most(f"requests failed, {what}", failed, 0, "").because(f"of {len(answers)}; statuses {statuses}; slowest {slowest:.1f} s")


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def _embeds(client: Client) -> bool:
    try:
        client.embed(some_cells(8), NAME, KEYS)
    except ServiceError:
        return False
    return True


def _answers(endpoint: Endpoint) -> bool:
    try:
        with Client(endpoint.url, retries=0, timeout_s=5.0) as client:
            return client.ready()
    except ServiceError:
        return False
