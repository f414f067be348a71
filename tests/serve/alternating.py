"""An endpoint in a process of its own, and good and bad requests by turns at it: what its memory and descriptors do.

python -m tests.serve.alternating serve MODEL_FOLDER     the endpoint; says its port and runs until its input ends
python -m tests.serve.alternating ask MODEL_FOLDER 10000 0    starts one, asks it, prints the report as JSON
"""

from __future__ import annotations

import asyncio
import http.client
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import uvicorn

from cellplane.client import ARROW_TYPE
from tests.serve.fuzzing import spoiled
from tests.serve.wire import Ask, application, good_asks

GOODBYE_S = 120.0  # on a machine that is very busy
LOOKS = 100  # of memory and descriptors over a run
MIB = 2**20


def serve(model: Path) -> None:
    """The endpoint, until standard input ends."""
    server = uvicorn.Server(uvicorn.Config(application(model), port=0, log_level="critical", lifespan="off", timeout_graceful_shutdown=10))

    def say_and_wait() -> None:
        while not server.started:
            threading.Event().wait(0.01)
        print(server.servers[0].sockets[0].getsockname()[1], flush=True)
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=say_and_wait, daemon=True).start()
    asyncio.run(server.serve())


def alternating(seed: int) -> Iterator[Ask]:
    """A good request, a bad one, and so on."""
    good = cycle(good_asks().values())
    refused = cycle((Ask("/v1/models/other/embed"), Ask(kind="text/plain"), Ask(kind=ARROW_TYPE, headers={"content-length": "300000000"})))
    for index in range(sys.maxsize):
        yield next(good)
        yield next(refused) if index % 5 == 4 else spoiled(seed, index)[1]


def run(model: Path, n_requests: int, seed: int) -> dict[str, Any]:
    """Growth of memory over the second half by a straight line, MiB for 1,000 requests, and of descriptors."""
    command = [sys.executable, "-m", "tests.serve.alternating", "serve", str(model)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        port, process = int(child.stdout.readline()), psutil.Process(child.pid)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        asks, statuses, looks = alternating(seed), Counter[int](), list[tuple[int, float, int]]()
        for index in range(n_requests):
            statuses[_status(connection, next(asks))] += 1
            if index % (n_requests // LOOKS) == 0:
                looks.append((index, process.memory_info().rss / MIB, process.num_fds()))
        connection.close()
    finally:
        child.stdin.close()
        try:
            child.wait(GOODBYE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            raise
    late = np.array(looks[len(looks) // 2 :])
    slope = float(np.polyfit(late[:, 0] / 1000, late[:, 1], 1)[0])
    told = {"mib_per_1000": round(slope, 3), "rss_first_mib": round(looks[0][1], 1), "rss_half_mib": round(float(late[0, 1]), 1)}
    told |= {"rss_last_mib": round(looks[-1][1], 1), "descriptors_half": int(late[0, 2]), "descriptors_last": looks[-1][2]}
    return told | {
        "descriptors_most": max(look[2] for look in looks),
        "statuses": {str(status): statuses[status] for status in sorted(statuses)},
    }


def _status(connection: http.client.HTTPConnection, ask: Ask) -> int:
    """The status of a request sent as it is, on a connection that is kept where the server keeps it."""
    body = b"".join(ask.chunks)
    connection.putrequest(ask.method, ask.target, skip_accept_encoding=True)
    for name, value in ask.raw_headers():
        connection.putheader(name, value)
    if "content-length" not in ask.headers:
        connection.putheader("content-length", str(len(body)))
    connection.endheaders()
    with suppress(BrokenPipeError, ConnectionResetError):  # refused before all was sent; the answer is there
        connection.send(body)
    try:
        answer = connection.getresponse()
        answer.read()
    except (http.client.HTTPException, ConnectionResetError):
        connection.close()
        return 0
    return answer.status


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(Path(sys.argv[2]))
    else:
        print(json.dumps(run(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
