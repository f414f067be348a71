"""The load that measures an endpoint: every request is written down as it was, and the broken versions are really broken."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cellplane.artifact.folder import load_model
from cellplane.benchmark.serve_leaks import _good_and_bad
from cellplane.benchmark.serve_load import LOST, Answered, Order
from cellplane.benchmark.serve_stack import FLIPPED, GOLDEN, GOOD, NAME, NAN, NEXT, Endpoint, Loading, _register_versions, percentile
from cellplane.client import ARROW_TYPE, write_stream
from cellplane.errors import BenchmarkError, IntegrityError, ServiceError
from cellplane.inference import Predictor
from cellplane.pipelines.golden import check_golden
from cellplane.tracking.registry import list_models, resolve_model
from serve.codec import decode
from serve.limits import Limits


class Script:
    """A server that gives one answer after the other: a status, or "close"."""

    def __init__(self) -> None:
        self.script: list[int | str] = []
        self.asked = 0
        self.port = 0

    def next(self) -> int | str:
        self.asked += 1
        return self.script.pop(0) if self.script else 200


@pytest.fixture
def server() -> Iterator[Script]:
    script, body = Script(), write_stream(pa.table({"embedding": [1.0]}), {"version": "7"})

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            status = script.next()
            if status == "close":
                self.close_connection = True
                return
            self.send_response(int(status))
            if status == 503:
                self.send_header("retry-after", "1")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Quiet."""

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    script.port = listening.server_port
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    yield script
    listening.shutdown()
    thread.join()
    listening.server_close()


@pytest.fixture
def order(server: Script, tmp_path: Path) -> Order:
    (tmp_path / "body").write_bytes(b"cells")
    where = {"bodies": (str(tmp_path / "body"),), "out": str(tmp_path / "out.json"), "stop": str(tmp_path / "stop")}
    return Order(callers=1, url=f"http://127.0.0.1:{server.port}", path="/", **where)


def carried_out(order: Order) -> list[Answered]:
    load = Loading(order)
    load.end()
    return load.answers


def test_every_request_is_written_down_as_it_was(server: Script, order: Order) -> None:
    server.script = [200, 503, "close", 500, 200]
    answers = carried_out(replace(order, requests=5))
    assert [answer.status for answer in answers] == [200, 503, LOST, 500, 200]
    assert [answer.version for answer in answers] == ["7", None, None, None, "7"]
    assert [answer.retry_after for answer in answers] == [None, "1", None, None, None]
    assert server.asked == 5, "callers on the bare wire never try again"
    assert json.loads(Path(order.out).read_text())["cpu_s"] > 0


def test_callers_go_on_until_they_are_stopped_and_have_asked_enough(server: Script, order: Order) -> None:
    Path(order.stop).touch()
    answers = carried_out(replace(order, callers=3, least=30))
    assert 30 <= len(answers) <= 32


def test_a_load_that_fails_is_an_error_and_not_a_figure(order: Order) -> None:
    with pytest.raises(BenchmarkError, match="callers failed"):
        carried_out(replace(order, bodies=("nowhere",), requests=1))


def test_percentiles_are_of_seconds() -> None:
    answers = [Answered(0.0, seconds / 100, 200) for seconds in range(101)]
    assert percentile(answers, 99) == pytest.approx(0.99)
    assert percentile([], 99) == 0


def test_the_broken_versions_are_broken_in_their_own_ways(tmp_path: Path) -> None:
    _register_versions(tmp_path)
    uri = Endpoint(tmp_path, "").registry
    assert sorted(model.version for model in list_models(uri)) == [GOOD, NEXT, NAN, GOLDEN, FLIPPED]

    def predictor(version: int) -> Predictor:
        return Predictor(load_model(resolve_model(f"models:/{NAME}/{version}", uri, tmp_path / "cache").path))

    assert check_golden(predictor(GOOD)) <= 1e-5
    assert check_golden(predictor(NEXT)) <= 1e-5
    assert np.isnan(predictor(NAN).folder.weights[next(iter(predictor(NAN).folder.weights))].float().numpy()).any()
    with pytest.raises(IntegrityError, match="golden answers"):
        check_golden(predictor(GOLDEN))
    with pytest.raises(IntegrityError, match=r"weights\.safetensors"):
        predictor(FLIPPED)


def test_what_is_to_leave_nothing_behind_alternates_sound_and_refused_bodies(tmp_path: Path) -> None:
    _register_versions(tmp_path)
    bodies = [path.read_bytes() for path in _good_and_bad(Endpoint(tmp_path, ""))]
    assert [decode(body, ARROW_TYPE, Limits()).n_cells for body in bodies[::2]] == [8, 64, 8, 64]
    for body in bodies[1::2]:
        with pytest.raises(ServiceError) as refused:
            decode(body, ARROW_TYPE, Limits())
        assert refused.value.status in (400, 413, 422)
