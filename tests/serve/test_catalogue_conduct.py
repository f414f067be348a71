"""Rows of the catalogue that are more than a request and its refusal: what does not happen, who waits, what a crowd sees.

In one process, with the real application and model; a roll-out during another (C77) needs no model at all.
"""

from __future__ import annotations

import asyncio
import pickle
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from starlette.types import ASGIApp

from cellplane.client import ARROW_TYPE, JSON_TYPE
from cellplane.inference import Predictor
from serve.front import Front
from serve.limits import OCTETS, Guard
from serve.native import NativePaths
from serve.rollout import Rollouts
from serve.routes import Model, Table, Version
from serve.security import ApiKey, ApiKeys, new_key
from tests.serve.wire import DOORS, LIMITS, OIP, Answered, Ask, answered, assert_refused, exchange, good_asks, json_body, oip_body, wait_for


@pytest.fixture
def app(front: Front) -> ASGIApp:
    return Guard(NativePaths(front, LIMITS).app(), LIMITS)


def test_c71_a_pickle_is_never_read(app: ASGIApp, tmp_path: Path) -> None:
    """Rows above show the refusals; here, that what the pickle would do does not happen."""
    mark = tmp_path / "ran"
    for target in DOORS.values():
        for kind in (JSON_TYPE, ARROW_TYPE, OCTETS, "application/x-python-pickle"):
            assert answered(app, Ask(target, (pickle.dumps(Touch(mark)),), kind)).status in (400, 415)
    assert not mark.exists()


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.file,)


def test_c75_what_looks_like_a_path_is_only_text_where_text_belongs(app: ASGIApp) -> None:
    """Batches and cell ids are labels, so they pass; a task is looked up among names, so it is not found (404, not 400)."""
    way = "../../passwd"
    body = json_body(batch=[way] * 3, cell_id=[way] * 3)
    assert answered(app, Ask(chunks=(body,))).json()["cell_id"] == [way] * 3
    assert_refused(answered(app, Ask(OIP, (oip_body({"parameters": {"task": way}}),))), Ask(OIP), 404, "no task")
    ask = Ask(f"/v1/models/tiny/denoise?target_batch={way}", (json_body(),))
    assert_refused(answered(app, ask), ask, 409, "annotate")


def test_c76_a_model_that_starts_is_not_ready_and_says_when_to_ask_again(front: Front) -> None:
    starting = Table({"tiny": Model("tiny", {"3": Version("3", "/m/3", state="starting")}, {"champion": "3"})})
    front.table = lambda: starting
    app = Guard(NativePaths(front, LIMITS).app(), LIMITS)
    asks = [good_asks()[name] for name in ("json", "arrow", "oip", "oip binary", "mlflow")]
    asks += [
        Ask(path, kind="", method="GET") for path in ("/v2/health/ready", "/ping", "/health", "/v2/models/tiny/ready", "/v1/models/tiny")
    ]
    for ask in asks:
        answer = answered(app, ask)
        assert_refused(answer, ask, 503, "try again soon")
        assert int(answer.headers["retry-after"]) >= 1
    assert answered(app, Ask("/v2/health/live", method="GET")).status == 200
    assert answered(app, Ask("/v1/models", method="GET")).json()["versions"][0]["state"] == "starting"


class OneAtATime:
    """A stage where every start waits to be let go, one after the other."""

    def __init__(self) -> None:
        self.started, self.go = list[str](), threading.Semaphore(0)

    def start(self, model: str, version: Version) -> None:
        self.started.append(version.label)
        assert self.go.acquire(timeout=10)

    def check(self, model: str, version: Version) -> Version:
        return version

    def stop(self, model: str, version: Version) -> None:
        pass


def test_c77_a_deployment_during_another_waits_its_turn_and_the_same_one_happens_once() -> None:
    """There is no path to deploy by; the router's roll-outs queue up by model."""
    stage = OneAtATime()
    rollouts = Rollouts(stage, lambda table: None)
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(rollouts.put, "m", Version("1", "/m/1"))
        wait_for(lambda: stage.started == ["1"])
        twin, second = (threads.submit(rollouts.put, "m", Version(label, f"/m/{label}")) for label in "12")
        time.sleep(0.05)
        assert stage.started == ["1"], "the second waits"
        stage.go.release(2)
        for put in (first, twin, second):
            put.result(10)
    assert stage.started == ["1", "2"]
    assert all(version.state == "ready" for version in rollouts.table.models["m"].versions.values())


def test_c78_more_than_can_wait_are_told_when_to_come_back(front: Front) -> None:
    limits = replace(LIMITS, max_in_flight=2)
    app, ask = Guard(NativePaths(front, limits).app(), limits), good_asks()["json"]

    async def crowd() -> list[Answered]:
        return await asyncio.gather(*(exchange(app, ask) for _ in range(10)))

    answers = asyncio.run(crowd())
    assert [answer.status for answer in answers] == [200] * 2 + [503] * 8
    for answer in answers[2:]:
        assert_refused(answer, ask, 503, "try again soon")
        assert (answer.headers["retry-after"], answer.taken) == ("1", 0)
    assert answered(app, ask).status == 200, "places come back"


@pytest.mark.parametrize("where", ["annotate", "folder"])
def test_c81_a_bug_tells_the_request_id_and_nothing_else(app: ASGIApp, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret in /srv/tasks.py")

    monkeypatch.setattr(Predictor, where, broken if where == "annotate" else property(broken), raising=False)
    for name in ("json", "oip", "mlflow"):
        ask = replace(good_asks()[name], headers={"x-request-id": "call-81"})
        answer = answered(app, ask)
        assert_refused(answer, ask, 500, "report request id call-81")
        assert b"secret" not in answer.body


def test_c82_without_the_right_key_nothing_is_read(front: Front) -> None:
    key, line = new_key("someone")
    other, other_line = new_key("scraper", ("read",))
    keys = ApiKeys(tuple(ApiKey(*text.split()[:2], tuple(text.split()[2].split(","))) for text in (line, other_line)))
    app = Guard(NativePaths(front, LIMITS).app(), LIMITS, keys)
    given = (
        (None, 401),
        ("Bearer wrong", 401),
        (f"Basic {key}", 401),
        (f"Bearer {key}x", 401),
        ("Bearer \xff", 401),
        (f"Bearer {other}", 403),
    )
    for authorization, status in given:
        for ask in (
            *good_asks().values(),
            Ask("/v1/models", method="GET"),
            Ask("/metrics", method="GET"),
            Ask("/openapi.json", method="GET"),
        ):
            sent = replace(ask, headers={**ask.headers, **({} if authorization is None else {"authorization": authorization})})
            answer = answered(app, sent)
            if status == 403 and ask.method == "GET":  # it may look
                assert answer.status == 200
                continue
            assert_refused(answer, sent, status, "API key")
            assert answer.taken == 0
            assert status == 403 or answer.headers["www-authenticate"] == "Bearer"
    for ask in good_asks().values():
        assert answered(app, replace(ask, headers={**ask.headers, "authorization": f"Bearer {key}"})).status == 200


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "POST"])
def test_c83_a_wrong_method_is_told_the_right_one(app: ASGIApp, method: str) -> None:
    right = "GET" if method == "POST" else "POST"
    targets = ("/v1/models", "/v2/models/tiny", "/ping", "/metrics") if method == "POST" else DOORS.values()
    for target in targets:
        ask = Ask(target, (json_body(),), method=method)
        answer = answered(app, ask)
        assert_refused(answer, ask, 405, "method")
        assert answer.headers["allow"] == right


def test_c85_request_ids_are_made_harmless_and_may_come_twice(app: ASGIApp) -> None:
    """A harmless id is echoed as a header by Serve's proxy (`test_serving`); here the answer itself names it."""

    def echoed(given: str | None) -> tuple[str, str | None]:
        answer = answered(app, Ask(chunks=(json_body(),), headers={} if given is None else {"x-request-id": given}))
        assert answer.status == 200
        return answer.json()["request_id"], answer.headers.get("x-request-id")

    assert [echoed("call-1") for _ in range(2)] == [("call-1", None)] * 2
    assert echoed("a\r\nset-cookie: x") == ("aset-cookiex", "aset-cookiex")
    assert echoed("x" * 5000) == ("x" * 64, "x" * 64)
    fresh = {echoed(None), echoed(""), echoed("\x00\xff")}
    assert len(fresh) == 3
    assert all(re.fullmatch(r"[0-9a-f]{32}", said) and said == header for said, header in fresh)


def test_c86_an_answer_is_the_same_alone_and_in_a_crowd(app: ASGIApp) -> None:
    """Requests that differ in one count: the most tempting neighbours there are."""
    asks = [Ask("/v1/models/tiny/embed", (json_body(count=[[1, 5], [3], [2 + twin]]),)) for twin in range(24)]

    async def together() -> list[Answered]:
        return await asyncio.gather(*(exchange(app, ask) for ask in asks))

    alone = [answered(app, ask).json()["embedding"] for ask in asks]
    assert np.abs(np.array(alone[0]) - np.array(alone[1])).max() > 1e-4, "twins must differ, or a leak would not show"
    for answer, expected in zip(asyncio.run(together()), alone, strict=True):
        np.testing.assert_allclose(answer.json()["embedding"], expected, atol=1e-6)
