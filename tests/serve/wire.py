"""Requests as bytes: an ASGI driver that sends exactly what it is told, small good bodies in every format, a socket to send half of one."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import uvicorn
from starlette.types import ASGIApp, Message

from cellplane.client import ARROW_TYPE, GENE_IDS, JSON_TYPE, N_ROWS, write_stream
from serve.deployment import ServeConfig
from serve.front import Front
from serve.limits import HEADER_LENGTH, OCTETS, Guard, Limits
from serve.native import NativePaths
from serve.replica import ModelReplica
from serve.routes import Model, Table, Version

GENE_NAMES = [f"GENE{gene:04d}" for gene in range(1, 21)]
MARKED = 777  # a count that stands in a body once, so that a test can replace it
COUNTS = [[1, *[0] * 18, 2], [0, 3, MARKED, *[0] * 17]]  # two cells of these genes
LIMITS = Limits(max_body_bytes=200_000, max_json_bytes=100_000, max_decoded_bytes=1_000_000, max_cells=100, max_genes=500)
NATIVE, OIP, MLFLOW = "/v1/models/tiny/annotate", "/v2/models/tiny/infer", "/invocations"

LEAKS = re.compile(r"Traceback|File \"|site-packages|\.py\b|/(work|tmp|home|usr|root|etc)/")  # of our machine; what was sent may be quoted
DOORS = {"native": NATIVE, "oip": OIP, "mlflow": MLFLOW}


@dataclass(frozen=True)
class Ask:
    """One request, byte for byte; ``chunks`` is the body as it arrives."""

    target: str = NATIVE
    chunks: Sequence[bytes] = (b"",)
    kind: str = JSON_TYPE
    headers: Mapping[str, str] = field(default_factory=dict)
    method: str = "POST"

    def raw_headers(self) -> list[tuple[bytes, bytes]]:
        """As a server hands them on: lower case, content type first."""
        given = {"content-type": self.kind, **self.headers} if self.kind else self.headers
        return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in given.items()]


@dataclass(frozen=True)
class Answered:
    """What came back, and how many chunks of the body were taken for it."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    taken: int

    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


async def exchange(app: ASGIApp, ask: Ask) -> Answered:
    """One request through an application, without a server between; what the application raises besides is a server's log line."""
    path, _, query = ask.target.partition("?")
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "method": ask.method}
    scope |= {"path": unquote(path), "raw_path": path.encode(), "query_string": query.encode(), "root_path": ""}
    scope |= {"headers": ask.raw_headers(), "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80)}
    taken, started, parts = 0, dict[str, Any](), list[bytes]()

    async def receive() -> Message:
        nonlocal taken
        if taken >= len(ask.chunks):
            await asyncio.sleep(3600)
        taken += 1
        return {"type": "http.request", "body": ask.chunks[taken - 1], "more_body": taken < len(ask.chunks)}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            started.update(message)
        parts.append(message.get("body", b""))

    with suppress(Exception):
        await app(scope, receive, send)
    headers = {name.decode(): value.decode() for name, value in started["headers"]}
    return Answered(started["status"], headers, b"".join(parts), taken)


def json_body(**changes: Any) -> bytes:
    """Three cells of twenty genes as native JSON; None leaves a key out."""
    cells = {"gene_ids": GENE_NAMES, "gene": [[0, 2], [4], [19]], "count": [[1, MARKED], [3], [2]], **changes}
    return json.dumps({key: value for key, value in cells.items() if value is not None}).encode()


def arrow_table(**columns: Any) -> pa.Table:
    """The same three cells; columns may be replaced, added, or left out with None."""
    given = {
        "gene": pa.array([[0, 2], [4], [19]], pa.list_(pa.int32())),
        "count": pa.array([[1, 5], [3], [2]], pa.list_(pa.float32())),
        **columns,
    }
    return pa.table({name: values for name, values in given.items() if values is not None})


def arrow_body(table: pa.Table | None = None, **metadata: Any) -> bytes:
    """A stream as the client writes it."""
    return write_stream(arrow_table() if table is None else table, {GENE_IDS: GENE_NAMES, **metadata})


def arrow_batches(batches: Sequence[pa.Table], n_rows: int) -> bytes:
    """A stream of several record batches that says it has ``n_rows``."""
    schema = batches[0].schema.with_metadata({GENE_IDS: json.dumps(GENE_NAMES), N_ROWS: str(n_rows)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_table(batch.replace_schema_metadata(schema.metadata))
    return bytes(sink.getvalue().to_pybytes())


def oip_inputs(**changes: Any) -> list[dict[str, Any]]:
    """Two cells of twenty genes as tensors; a dict changes an input's fields, None leaves it out."""
    inputs: dict[str, Any] = {
        "genes": {"name": "genes", "shape": [20], "datatype": "BYTES", "data": GENE_NAMES},
        "counts": {"name": "counts", "shape": [2, 20], "datatype": "FP32", "data": [*COUNTS[0], *COUNTS[1]]},
    }
    for name, fields in changes.items():
        inputs[name] = None if fields is None else {**inputs.get(name, {"name": name}), **fields}
    return [tensor for tensor in inputs.values() if tensor is not None]


def oip_body(rest: Mapping[str, Any] | None = None, **changes: Any) -> bytes:
    """A body of the Open Inference Protocol in JSON."""
    return json.dumps({"inputs": oip_inputs(**changes), **(rest or {})}).encode()


def oip_binary(rest: Mapping[str, Any] | None = None) -> tuple[bytes, dict[str, str]]:
    """Twenty genes and two cells as CSR in binary, and the header that says how long the JSON part is."""
    genes = b"".join(struct.pack("<I", len(name)) + name.encode() for name in GENE_NAMES)
    blobs = {
        "genes": ("BYTES", [20], genes),
        "indptr": ("INT64", [3], struct.pack("<3q", 0, 2, 3)),
        "indices": ("INT32", [3], struct.pack("<3i", 0, 4, 19)),
        "data": ("FP32", [3], struct.pack("<3f", 1, 5, 2)),
    }
    inputs = [
        {"name": name, "datatype": kind, "shape": shape, "parameters": {"binary_data_size": len(blob)}}
        for name, (kind, shape, blob) in blobs.items()
    ]
    head = json.dumps({"inputs": inputs, **(rest or {})}).encode()
    return head + b"".join(blob for _, _, blob in blobs.values()), {HEADER_LENGTH: str(len(head))}


def mlflow_body(**changes: Any) -> bytes:
    """Two cells of twenty genes as a data frame; keys beside it may be added."""
    frame = {"columns": GENE_NAMES, "data": COUNTS}
    return json.dumps({"dataframe_split": frame, **changes}).encode()


def good_asks(tasks: Sequence[str] = ("annotate", "embed")) -> dict[str, Ask]:
    """One answered request of every format, for a model with these tasks."""
    first, last = (f"/v1/models/tiny/{task}" for task in (tasks[0], tasks[-1]))
    binary, header = oip_binary({"parameters": {"task": tasks[-1], "binary_data_output": True}})
    names = {"batch": ["a", "b", "a"], "cell_id": ["1", "2", "3"]}
    places = {"x_um": [1.0, None, 2.5], "y_um": [0.5, None, 1.0]}
    columns = {
        **{name: pa.array(values) for name, values in names.items()},
        **{name: pa.array(values, pa.float32()) for name, values in places.items()},
    }
    return {
        "json": Ask(first, (json_body(),)),
        "json full": Ask(first, (json_body(sentence=[0, 1, 0], **names, **places),)),
        "arrow": Ask(last, (arrow_body(),), ARROW_TYPE),
        "arrow full": Ask(last, (arrow_body(arrow_table(**columns)),), ARROW_TYPE),
        "oip": Ask(OIP, (oip_body(),)),
        "oip binary": Ask(OIP, (binary,), OCTETS, header),
        "mlflow": Ask(MLFLOW, (mlflow_body(),)),
        "mlflow records": Ask(
            MLFLOW, (json.dumps({"dataframe_records": [dict(zip(GENE_NAMES, row, strict=True)) for row in COUNTS]}).encode(),)
        ),
    }


def with_body(ask: Ask, body: bytes) -> Ask:
    """The same request with another body."""
    return replace(ask, chunks=(body,))


@contextmanager
def listening(app: ASGIApp) -> Iterator[int]:
    """A loopback port where a real server runs the application, in a thread of this process."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def wait_for(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    """Until the condition holds; AssertionError when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def head(ask: Ask, declared: int | None) -> bytes:
    """The request line and headers as text; ``declared`` None announces chunks."""
    length = "transfer-encoding: chunked" if declared is None else f"content-length: {declared}"
    given = [f"{name.decode()}: {value.decode('latin-1')}" for name, value in ask.raw_headers()]
    return "\r\n".join([f"{ask.method} {ask.target} HTTP/1.1", "host: test", *given, length, "", ""]).encode("latin-1")


def answer_of(connection: socket.socket) -> Answered:
    """What a server says until it closes the connection."""
    received = b""
    with suppress(ConnectionResetError):  # it closes while we were still sending
        while piece := connection.recv(65536):
            received += piece
    assert received, "the connection was closed without a word"
    first, _, body = received.partition(b"\r\n\r\n")
    line, *lines = first.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (text.partition(":") for text in lines)}
    return Answered(int(line.split()[1]), headers, body, 0)


def answered(app: ASGIApp, ask: Ask) -> Answered:
    return asyncio.run(exchange(app, ask))


def assert_refused(answer: Answered, ask: Ask, status: int, words: str) -> None:
    """The status, one shape of error, and nothing of our machine in it."""
    assert answer.status == status, (ask, answer)
    said = answer.json()
    assert set(said) == ({"error"} if ask.target.startswith("/v2") else {"error", "code"})
    assert isinstance(said["error"], str)
    assert words in said["error"], (ask, said)
    assert len(said["error"]) < 1000
    assert not LEAKS.search(said["error"].replace("/openapi.json", "")), said
    assert answer.headers["content-type"] == JSON_TYPE


def application(model: Path, limits: Limits = LIMITS) -> ASGIApp:
    """The whole application over a model folder, its replica in this process, as version 3 of `tiny`."""
    replica = ModelReplica(ServeConfig(name="tiny", model=str(model)), Version("3", str(model), run_id="r1", state="ready"))

    async def ask(model: str, label: str, method: str, *arguments: object) -> object:
        return await getattr(replica, method)(*arguments)

    table = Table({"tiny": Model("tiny", {"3": replica.version}, {"champion": "3"})}, epoch=1)
    return Guard(NativePaths(Front(lambda: table, ask), limits).app(), limits)


def run_beside(module: str, *arguments: str, timeout_s: float) -> dict[str, Any]:
    """What a module of tests/ prints as its last line, JSON, run in a process of its own: a crash of the interpreter is seen here."""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "platform"), str(root)])}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
