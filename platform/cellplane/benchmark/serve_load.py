"""Callers that ask an endpoint without pause, in a process of their own, and write down what each answer was.

Run as `python -m cellplane.benchmark.serve_load`; the order comes as JSON on standard input, the answers go to a file.
Callers speak bare HTTP and never try again: what fails on the wire is counted.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cellplane.client import ARROW_TYPE, read_answer
from cellplane.errors import ServiceError

LOST = 0  # status of a request whose connection broke


@dataclass(frozen=True)
class Order:
    """Who asks what: ``bodies`` files in turn, from ``callers`` threads, until ``requests`` were answered or ``seconds`` are over.

    When the ``stop`` file appears they end too, once ``least`` requests were answered.
    """

    callers: int
    url: str = ""
    path: str = ""
    bodies: tuple[str, ...] = ()
    out: str = ""
    stop: str = ""
    requests: int = 10**9
    seconds: float = 1e9
    least: int = 0
    content_type: str = ARROW_TYPE
    patient: bool = False  # who is refused waits as long as Retry-After says before asking again


@dataclass(frozen=True)
class Answered:
    """One request: when it was asked (seconds since 1970), how long it took, its status, who answered, Retry-After."""

    at: float
    seconds: float
    status: int
    version: str | None = None
    retry_after: str | None = None


def main() -> None:
    """Carries out one order."""
    order = Order(**json.load(sys.stdin))
    bodies = [Path(body).read_bytes() for body in order.bodies]
    answers: list[Answered] = []
    until = time.monotonic() + order.seconds

    def wanted() -> bool:
        if Path(order.stop).exists():
            return len(answers) < order.least
        return len(answers) < order.requests and time.monotonic() < until

    def caller(first: int) -> None:
        connection, turn = _connect(order.url), first
        while wanted():
            answer = _ask(connection, order, bodies[turn % len(bodies)])
            answers.append(answer)
            turn += order.callers
            if order.patient and answer.retry_after and wanted():
                time.sleep(float(answer.retry_after))
            if answer.status == LOST:
                connection.close()
                connection = _connect(order.url)

    began = time.process_time()  # without what starting took
    threads = [threading.Thread(target=caller, args=(number,)) for number in range(order.callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {"answers": [asdict(answer) for answer in answers], "cpu_s": time.process_time() - began}
    Path(order.out).write_text(json.dumps(found), encoding="utf-8")


def _connect(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)


def _ask(connection: http.client.HTTPConnection, order: Order, body: bytes) -> Answered:
    at, began = time.time(), time.perf_counter()
    try:
        connection.request("POST", order.path, body, {"content-type": order.content_type, "accept": order.content_type})
        answer = connection.getresponse()
        content = answer.read()
    except (OSError, http.client.HTTPException):
        return Answered(at, time.perf_counter() - began, LOST)
    seconds, about = time.perf_counter() - began, dict[str, Any]()
    if answer.status == 200:
        with suppress(ServiceError, ValueError):  # counted as an answer that names no version
            about = read_answer(content)[1] if order.content_type == ARROW_TYPE else json.loads(content)
    return Answered(at, seconds, answer.status, about.get("version"), answer.headers.get("retry-after"))


if __name__ == "__main__":
    main()
