"""What a request may cost, enforced before anything expensive happens.

The guard is a raw ASGI middleware: it answers 401, 403, 413 and 415 before the body is read, and counts the bytes
while they stream in. A framework's dependency would run only after the whole body lies in memory.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cellplane.client import ARROW_TYPE, JSON_TYPE
from cellplane.errors import ServiceError, VocabularyError

from .meters import Meters
from .security import ApiKeys

CODES = {
    400: "bad_request",
    401: "unauthenticated",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    406: "not_acceptable",
    408: "timeout",
    409: "unsupported_task",
    413: "too_large",
    415: "unsupported_media_type",
    422: "invalid_cells",
    429: "rate_limited",
    431: "headers_too_large",
    500: "internal",
    503: "unavailable",
}
OPEN_PATHS = ("/v2/health/live", "/v2/health/ready", "/ping", "/health")  # probes carry no key
OCTETS, HEADER_LENGTH = "application/octet-stream", "inference-header-content-length"  # tensors behind JSON, see `oip`
REQUEST_ID = "cellplane.request_id"  # key of the ASGI scope
MAX_HEADER_BYTES = 32 * 1024  # names and values together; keys and ids take a few hundred
GZIP = b"\x1f\x8b"  # what a gzip file begins with, and neither JSON nor an Arrow stream nor a length before them
METHODS = ("GET", "POST")  # that anything here answers; others are counted together
BATCH_JOB = "send fewer cells a call, or use the batch job: cellplane predict"
MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most one request may bring: bytes as sent, bytes after decompression, cells, genes, seconds; and requests at once."""

    max_body_bytes: int = 64 * MIB
    max_json_bytes: int = 16 * MIB
    max_decoded_bytes: int = 256 * MIB
    max_cells: int = 10_000
    max_genes: int = 100_000
    request_timeout_s: float = 60.0
    requests_per_minute: int | None = None
    max_in_flight: int | None = None

    def body_bytes(self, content_type: str) -> int:
        """Bytes a body of this type may have: parsed JSON takes tenfold its size, so it may have fewer."""
        return min(self.max_json_bytes, self.max_body_bytes) if content_type == JSON_TYPE else self.max_body_bytes


def refuse(status: int, message: str) -> ServiceError:
    """The error that becomes this HTTP status and message."""
    return ServiceError(message, status)


def status_of(error: BaseException) -> int:
    """The HTTP status of an error that a model's replica raised; 500 for what was not foreseen."""
    if isinstance(error, ServiceError) and error.status:
        return error.status
    return 422 if isinstance(error, VocabularyError) else 500


def error_body(status: int, message: str, path: str = "") -> bytes:
    """The one shape of every error: what went wrong, and a code programs can read; under /v2 the protocol knows no code."""
    code = {} if path == "/v2" or path.startswith("/v2/") else {"code": CODES.get(status, "error")}
    return json.dumps({"error": message, **code}).encode()


def error_headers(status: int) -> dict[str, str]:
    """Headers that belong to a status: how to authenticate, when to come back, that the rest of a body is not wanted."""
    return {401: {"www-authenticate": "Bearer"}, 413: {"connection": "close"}, 503: {"retry-after": "1"}}.get(status, {})


def clean_request_id(given: str | None) -> str:
    """The caller's id with anything unusual taken out, at most 64 characters; a fresh one when nothing is left."""
    return re.sub(r"[^A-Za-z0-9._-]", "", given or "")[:64] or uuid.uuid4().hex


def content_type_of(headers: Mapping[str, str]) -> str:
    """The media type of a body without its parameters, in lower case."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def refuse_unreadable(body: bytes, wanted: str) -> None:
    """ServiceError 400 for an empty body, 415 for a compressed one that did not say so."""
    if not body:
        raise refuse(400, f"the body is empty; send {wanted}")
    if body.startswith(GZIP):
        raise refuse(415, "the body is compressed by gzip; send it as it is (Arrow compresses inside)")


class Rate:
    """How often each holder of a key may ask: ``per_minute`` on average, as many at once after a quiet minute."""

    def __init__(self, per_minute: int, now: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._now = per_minute, now
        self._left: dict[str, tuple[float, float]] = {}  # requests left, and when that was so

    def take(self, holder: str) -> int:
        """0 when the holder may ask now, else the whole seconds to wait."""
        left, then = self._left.get(holder, (float(self.per_minute), self._now()))
        left = min(self.per_minute, left + (self._now() - then) * self.per_minute / 60)
        allowed = left >= 1
        self._left[holder] = (left - allowed, self._now())
        return 0 if allowed else math.ceil((1 - left) * 60 / self.per_minute)


class Guard:
    """ASGI middleware: who may ask, of what type and size a body may be, and how long an answer may take."""

    def __init__(self, app: ASGIApp, limits: Limits, keys: ApiKeys | None = None, meters: Meters | None = None) -> None:
        self.app, self.limits, self.keys, self.meters = app, limits, keys, meters or Meters()
        self._in_flight = 0
        self.rate = None if limits.requests_per_minute is None else Rate(limits.requests_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse one request; other scopes (start-up and shutdown) pass."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(raw=scope["headers"])
        scope[REQUEST_ID] = clean_request_id(headers.get("x-request-id"))
        answer = _Answer(send, scope, headers.get("x-request-id"))
        try:
            holder = self._admit(scope, headers)
            if self.rate is not None and scope["method"] == "POST" and (wait_s := self.rate.take(holder)):
                message = f"more than {self.limits.requests_per_minute} requests in a minute with this key; wait {wait_s} s"
                await answer.error(429, message, {"retry-after": str(wait_s)})
                return
            async with asyncio.timeout(self.limits.request_timeout_s) as deadline:
                with self._place(scope):
                    await self.app(scope, self._counted(receive, content_type_of(headers)), answer.send)
        except ServiceError as error:
            await answer.error(error.status, error.message)
        except TimeoutError:
            if not deadline.expired():
                raise
            await answer.error(408, f"no answer within {self.limits.request_timeout_s:g} s; {BATCH_JOB}")
        finally:
            if answer.status:
                method = scope["method"] if scope["method"] in METHODS else "other"
                self.meters.add("cellplane_answers_total", {"method": method, "status": str(answer.status)})

    def _admit(self, scope: Scope, headers: Headers) -> str:
        """The name of the key's holder, empty without keys; raises what can be said from path and headers alone."""
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            raise refuse(431, f"the headers exceed {MAX_HEADER_BYTES} bytes")
        holder = ""
        if self.keys is not None and scope["path"] not in OPEN_PATHS:
            holder = self.keys.check(headers.get("authorization"), "predict" if scope["method"] == "POST" else "read")
        if ".." in re.split("[/:@]", scope["path"]):
            raise refuse(400, "a path has no part `..`; a model is asked for as NAME, NAME@ALIAS or NAME:VERSION")
        if scope["method"] != "POST":
            return holder
        kind, accepted = content_type_of(headers), _accepted(scope["path"])
        if kind not in accepted and not (OCTETS in accepted and not kind):  # Triton's client names no type
            raise refuse(415, f"content type {kind[:80]!r} is not understood; send {' or '.join(accepted)}")
        if (encoding := headers.get("content-encoding", "identity").lower()) != "identity":
            raise refuse(415, f"content encoding {encoding[:40]!r} is not understood; send the body as it is (Arrow compresses inside)")
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared[:20]) > self.limits.body_bytes(kind):
            raise self._too_large(kind)
        return holder

    @contextmanager
    def _place(self, scope: Scope) -> Iterator[None]:
        """One of the places for requests in flight; ServiceError 503 at once, before anything is read, when all are taken."""
        if scope["method"] != "POST":
            yield
            return
        if self.limits.max_in_flight is not None and self._in_flight >= self.limits.max_in_flight:
            raise refuse(503, "as many requests as can wait are waiting; try again soon")
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    def _counted(self, receive: Receive, kind: str) -> Receive:
        limit, seen = self.limits.body_bytes(kind), 0

        async def counting() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise self._too_large(kind)
            return message

        return counting

    def _too_large(self, kind: str) -> ServiceError:
        return refuse(413, f"the body exceeds {self.limits.body_bytes(kind)} bytes; {BATCH_JOB}")


def _accepted(path: str) -> tuple[str, str] | tuple[str]:
    """The content types a path reads."""
    if path.startswith("/v2/"):
        return JSON_TYPE, OCTETS
    return (JSON_TYPE,) if path == "/invocations" else (ARROW_TYPE, JSON_TYPE)


class _Answer:
    """Sends an answer with its request id, and an error only while nothing else was sent."""

    def __init__(self, send: Send, scope: Scope, given: str | None) -> None:
        self._send, self.status, self._path = send, 0, scope["path"]  # status: 0 while nothing was sent
        # Serve's proxy echoes the caller's header by itself; a second one would make a list of it
        self._header = [] if given == scope[REQUEST_ID] else [(b"x-request-id", scope[REQUEST_ID].encode())]

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = int(message["status"])
            message = {**message, "headers": [*message.get("headers", ()), *self._header]}
        await self._send(message)

    async def error(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        if self.status:
            return
        body = error_body(status, text, self._path)
        extra = {
            **error_headers(status),
            **(headers or {}),
            "content-type": JSON_TYPE,
            "content-length": str(len(body)),
            "connection": "close",
        }
        await self.send({"type": "http.response.start", "status": status, "headers": [(k.encode(), v.encode()) for k, v in extra.items()]})
        await self._send({"type": "http.response.body", "body": body})
