"""Rows of the catalogue that need a connection: a body that is too long, too slow or never comes, and headers that are no headers.

A raw socket against the real application on uvicorn, the server that Ray Serve's proxy runs too.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest

from cellplane.client import ARROW_TYPE
from serve.front import Front
from serve.limits import Guard, Limits
from serve.native import NativePaths
from serve.security import ApiKey, ApiKeys, new_key
from tests.serve.wire import LIMITS, Answered, Ask, answer_of, assert_refused, head, json_body, listening

KEY, LINE = new_key("someone")
KEYS = ApiKeys((ApiKey(*LINE.split()[:2], ("predict",)),))
GIB = 2**30
SOON_S = 5.0  # an answer that needs nothing but headers takes milliseconds
MIB = 2**20


@contextmanager
def connected(front: Front, limits: Limits = LIMITS, keys: ApiKeys | None = None) -> Iterator[socket.socket]:
    """A connection to the application."""
    app = Guard(NativePaths(front, limits).app(), limits, keys)
    with listening(app) as port, socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        yield connection


def asked(connection: socket.socket, data: bytes) -> tuple[Answered, float]:
    """The answer to some bytes, and the seconds it took until the server closed the connection."""
    began = time.monotonic()
    connection.sendall(data)
    return answer_of(connection), time.monotonic() - began


def test_c55_chunks_without_end_are_cut_off_at_the_limit_and_never_held(front: Front) -> None:
    ask, chunk = Ask(kind=ARROW_TYPE), b"10000\r\n" + bytes(65536) + b"\r\n"
    with connected(front) as connection:
        tracemalloc.start()
        connection.sendall(head(ask, None))
        sent = 0
        with suppress(BrokenPipeError, ConnectionResetError):
            while sent < GIB:
                connection.sendall(chunk)
                sent += len(chunk)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        with suppress(AssertionError):  # a reset connection may have taken the answer along
            assert_refused(answer_of(connection), ask, 413, "exceeds 200000")
    assert sent < 20 * MIB, "what lies in the sockets' buffers"
    assert peak < 10 * MIB


def test_c55_the_refusal_of_a_long_body_arrives_when_the_sender_listens(front: Front) -> None:
    ask = Ask(kind=ARROW_TYPE)
    with connected(front) as connection:
        answer, _ = asked(connection, head(ask, None) + b"30d41\r\n" + bytes(200_001) + b"\r\n")
    assert_refused(answer, ask, 413, "exceeds 200000")
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize(
    ("authorization", "declared", "status", "words"),
    [
        (f"Bearer {KEY}", 300 * MIB, 413, "exceeds 200000"),
        (f"Bearer {KEY}", 9 * 10**18, 413, "exceeds 200000"),
        ("Bearer wrong", 1000, 401, "API key"),
        ("Bearer wrong", 300 * MIB, 401, "API key"),
        (None, 1000, 401, "API key"),
        (None, None, 401, "API key"),
    ],
    ids=["long", "endless", "wrong key", "wrong key, long", "no key", "no key, no length"],
)
def test_c55_c82_key_and_size_are_refused_although_the_body_never_comes(
    front: Front, authorization: str | None, declared: int | None, status: int, words: str
) -> None:
    ask = Ask(kind=ARROW_TYPE, headers={} if authorization is None else {"authorization": authorization})
    with connected(front, keys=KEYS) as connection:
        answer, took_s = asked(connection, head(ask, declared))
    assert_refused(answer, ask, status, words)
    assert took_s < SOON_S
    assert answer.headers["connection"] == "close"


def test_c79_a_body_that_stalls_is_a_timeout(front: Front) -> None:
    ask = Ask()
    with connected(front, replace(LIMITS, request_timeout_s=0.3)) as connection:
        answer, took_s = asked(connection, head(ask, 1000) + b'{"gene_ids"')
    assert_refused(answer, ask, 408, "0.3 s")
    assert 0.3 <= took_s < SOON_S


def test_c79_a_model_that_takes_too_long_is_a_timeout(front: Front) -> None:
    held, ask, body = threading.Event(), Ask(), json_body()
    inner = front._ask

    async def slow(model: str, label: str, method: str, *arguments: object) -> object:
        while not held.is_set():
            await asyncio.sleep(0.01)
        return await inner(model, label, method, *arguments)

    front._ask = slow
    with connected(front, replace(LIMITS, request_timeout_s=0.3)) as connection:
        answer, _ = asked(connection, head(ask, len(body)) + body)
        held.set()
    assert_refused(answer, ask, 408, "0.3 s")


@pytest.mark.parametrize(
    "line", [b"\x00\x01\x02 garbage\r\n\r\n", b"GET\r\n\r\n", b"POST /v1/models HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\r\n\r\n"]
)
def test_c80_a_garbled_request_line_is_a_bad_request(front: Front, line: bytes) -> None:
    """The server below us answers it, in plain text: nothing of ours has seen a request yet."""
    with connected(front) as connection:
        answer, _ = asked(connection, line)
    assert answer.status == 400
    assert len(answer.body) < 100


def test_c80_headers_without_end_are_refused(front: Front) -> None:
    ask = Ask(headers={"x-padding": "a" * 100_000})
    with connected(front) as connection:
        answer, _ = asked(connection, head(ask, 10))
    assert_refused(answer, ask, 431, "32768")


def test_a_connection_that_was_refused_leaves_the_next_one_unharmed(front: Front) -> None:
    body = json_body()
    with listening(Guard(NativePaths(front, LIMITS).app(), LIMITS)) as port:
        for declared, data, status in ((300 * MIB, b"", 413), (len(body), body, 200), (2, b"{}", 422), (len(body), body, 200)):
            with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
                answer, _ = asked(connection, head(Ask(headers={"connection": "close"}), declared) + data)
                assert answer.status == status
