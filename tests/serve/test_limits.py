"""The guard alone: sizes, types, keys and time, refused before the body is read or held."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cellplane.client import ARROW_TYPE, JSON_TYPE
from serve.limits import Guard, Limits, Rate, clean_request_id
from serve.meters import Meters
from serve.security import ApiKey, ApiKeys, new_key

PATH = "/v1/models/m/annotate"
KEY, LINE = new_key("someone")
KEYS = ApiKeys((ApiKey(*LINE.split()[:2], ("predict",)),))
READ_KEY, READ_LINE = new_key("scraper", ("read",))
TWO_KEYS = ApiKeys((*KEYS.keys, ApiKey(*READ_LINE.split()[:2], ("read",))))


async def reads_everything(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that swallows the body and says how long it was."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


class Exchange:
    """One request against a guard: what was read of the body, what was answered."""

    def __init__(self, chunk: bytes = b"", chunks: int = 1) -> None:
        self.chunk, self.left, self.read = chunk, chunks, 0
        self.status, self.headers, self.body = 0, dict[str, str](), b""

    async def receive(self) -> Message:
        self.left, self.read = self.left - 1, self.read + 1
        return {"type": "http.request", "body": self.chunk, "more_body": self.left > 0}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {key.decode(): value.decode() for key, value in message["headers"]}
        self.body += message.get("body", b"")

    def run(self, guard: Guard, method: str = "POST", path: str = PATH, **headers: str) -> Exchange:
        given = {"content-type": ARROW_TYPE, **{key.replace("_", "-"): value for key, value in headers.items()}}
        raw = [(key.encode(), value.encode()) for key, value in given.items()]
        scope: dict[str, Any] = {"type": "http", "method": method, "path": path, "headers": raw}
        asyncio.run(guard(scope, self.receive, self.send))
        return self


def guard(app: ASGIApp = reads_everything, keys: ApiKeys | None = None, **limits: Any) -> Guard:
    return Guard(app, Limits(**{"max_body_bytes": 1000, "max_json_bytes": 100, **limits}), keys)


def test_a_body_within_the_limit_passes_whole() -> None:
    exchange = Exchange(b"x" * 100, 10).run(guard())
    assert (exchange.status, exchange.body) == (200, b"1000")


def test_a_declared_size_above_the_limit_is_refused_unread() -> None:
    exchange = Exchange(b"x" * 100, 10).run(guard(), content_length="1001")
    assert (exchange.status, exchange.read) == (413, 0)
    assert exchange.headers["connection"] == "close"
    assert Exchange().run(guard(), content_length="9" * 5000).status == 413
    assert Exchange(b"x").run(guard(), content_type=JSON_TYPE, content_length="101").status == 413


def test_an_undeclared_endless_body_is_dropped_at_the_limit() -> None:
    exchange = Exchange(b"x" * 100, 1_000_000).run(guard())
    assert (exchange.status, exchange.read) == (413, 11)
    assert json.loads(exchange.body)["code"] == "too_large"


OTHER_KINDS = ["", "text/plain", "application/x-python-pickle", "application/octet-stream", "multipart/form-data; boundary=x"]


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_content_types_are_refused_unread(kind: str) -> None:
    exchange = Exchange(b"x").run(guard(), content_type=kind)
    assert (exchange.status, exchange.read) == (415, 0)
    assert ARROW_TYPE in json.loads(exchange.body)["error"]


def test_a_content_type_may_have_parameters_and_any_case() -> None:
    assert Exchange(b"{}").run(guard(), content_type="Application/JSON; charset=utf-8").status == 200


def test_compressed_bodies_are_refused() -> None:
    assert Exchange(b"x").run(guard(), content_encoding="gzip").status == 415


def test_without_a_valid_key_nothing_is_read() -> None:
    for given in (None, "Bearer wrong", KEY, f"Basic {KEY}", "Bearer "):
        exchange = Exchange(b"x").run(guard(keys=TWO_KEYS), **({} if given is None else {"authorization": given}))
        assert (exchange.status, exchange.read, exchange.headers["www-authenticate"]) == (401, 0, "Bearer")
    assert Exchange(b"x").run(guard(keys=TWO_KEYS), authorization=f"Bearer {READ_KEY}").status == 403
    assert Exchange(b"x").run(guard(keys=TWO_KEYS), authorization=f"Bearer {KEY}").status == 200


def test_reading_needs_a_key_too_but_health_does_not() -> None:
    assert Exchange().run(guard(keys=KEYS), "GET", "/v1/models").status == 401
    assert Exchange().run(guard(keys=KEYS), "GET", "/v2/health/ready").status == 200
    assert Exchange().run(guard(keys=TWO_KEYS), "GET", "/metrics", authorization=f"Bearer {READ_KEY}").status == 200


def test_an_answer_that_takes_too_long_is_a_timeout() -> None:
    async def sleeps(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(30)

    exchange = Exchange().run(guard(sleeps, request_timeout_s=0.05))
    assert (exchange.status, json.loads(exchange.body)["code"]) == (408, "timeout")


def test_a_body_that_never_ends_is_a_timeout() -> None:
    exchange = Exchange()

    async def stalls() -> Message:
        await asyncio.sleep(30)
        raise AssertionError

    exchange.receive = stalls  # type: ignore[method-assign]
    assert exchange.run(guard(request_timeout_s=0.05)).status == 408


@pytest.mark.parametrize(
    ("given", "check"),
    [
        ("abc-1.2_X", lambda clean: clean == "abc-1.2_X"),
        ("a\r\nSet-Cookie: x", lambda clean: clean == "aSet-Cookiex"),
        ("x" * 500, lambda clean: clean == "x" * 64),
        ("\x00 ;", lambda clean: len(clean) == 32),
        (None, lambda clean: len(clean) == 32),
    ],
)
def test_request_ids_are_made_harmless(given: str | None, check: Callable[[str], bool]) -> None:
    assert check(clean_request_id(given))


def test_a_changed_or_missing_request_id_is_told() -> None:
    assert Exchange().run(guard(), x_request_id="a b").headers["x-request-id"] == "ab"
    assert len(Exchange().run(guard()).headers["x-request-id"]) == 32


def test_a_key_that_asks_too_often_is_told_when_to_come_back() -> None:
    limited = guard(keys=TWO_KEYS, requests_per_minute=2)
    bearer = {"authorization": f"Bearer {KEY}"}
    statuses = [Exchange(b"x").run(limited, **bearer) for _ in range(3)]
    assert [answer.status for answer in statuses] == [200, 200, 429]
    assert 1 <= int(statuses[2].headers["retry-after"]) <= 30
    assert json.loads(statuses[2].body)["code"] == "rate_limited"
    assert statuses[2].headers["connection"] == "close"
    assert Exchange(b"x").run(limited, method="GET", **bearer).status == 200, "looking is free"


def test_a_rate_recovers_with_time_and_holders_do_not_share_it() -> None:
    now = [0.0]
    rate = Rate(6, lambda: now[0])
    assert [rate.take("a") for _ in range(7)] == [0] * 6 + [10]
    assert rate.take("b") == 0
    now[0] = 9.0
    assert rate.take("a") == 1
    now[0] = 10.1
    assert rate.take("a") == 0
    now[0] = 1000.0
    assert [rate.take("a") for _ in range(7)] == [0] * 6 + [10]


def test_when_every_place_is_taken_the_next_is_refused_before_it_is_read() -> None:
    release = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await release.wait()
        await reads_everything(scope, receive, send)

    async def crowd() -> list[Exchange]:
        busy = guard(slow, max_in_flight=2)
        exchanges = [Exchange(b"x") for _ in range(4)]
        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": PATH, "headers": [(b"content-type", ARROW_TYPE.encode())]}
        asked = [asyncio.create_task(busy(dict(scope), one.receive, one.send)) for one in exchanges]
        await asyncio.sleep(0.05)
        assert [one.status for one in exchanges] == [0, 0, 503, 503]
        release.set()
        await asyncio.gather(*asked)
        again = Exchange(b"x")
        await busy(dict(scope), again.receive, again.send)
        return [*exchanges, again]

    answers = asyncio.run(crowd())
    assert [one.status for one in answers] == [200, 200, 503, 503, 200]
    assert [one.read for one in answers[2:4]] == [0, 0]
    assert answers[2].headers["retry-after"] == "1"


def test_every_answer_is_counted_refusals_too() -> None:
    meters = Meters()
    counting = Guard(reads_everything, Limits(max_body_bytes=10), meters=meters)
    assert Exchange(b"x").run(counting).status == 200
    assert Exchange(b"x" * 11).run(counting).status == 413
    assert Exchange().run(counting, "GET").status == 200
    assert Exchange().run(counting, "BREW").status == 200
    counted = {
        (method, status): meters.value("cellplane_answers_total", {"method": method, "status": status}) for method, status in COUNTED
    }
    assert counted == dict.fromkeys(COUNTED, 1.0)


COUNTED = (("POST", "200"), ("POST", "413"), ("GET", "200"), ("other", "200"))
