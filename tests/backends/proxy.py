"""A network that breaks, between a client and a real HTTP server: it refuses, cuts or hangs after so many requests.

The server behind it never knows. What it was told before the fault it keeps, half a body that was cut off it never gets.
"""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REFUSALS = {"500": 500, "503": 503}
MODES = ("500", "503", "cut", "cut_answer", "hang")
HANG_S = 60.0


class Proxy:
    """Forwards every request; once `broken`, those after the first ``after`` meet the fault until the block ends."""

    def __init__(self, port: int) -> None:
        self.behind = port
        self.requests: list[str] = []  # "PUT /bucket/key" since the last `count`
        self._mode, self._left = "", 0
        self._lock, self._healed = threading.Lock(), threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextmanager
    def broken(self, mode: str, after: int = 0) -> Iterator[None]:
        """The fault, from the request number ``after`` on (from 0)."""
        with self._lock:
            self._mode, self._left = mode, after
            self._healed.clear()
        try:
            yield
        finally:
            with self._lock:
                self._mode = ""
            self._healed.set()

    def count(self) -> None:
        """Forgets the requests so far."""
        self.requests.clear()

    def close(self) -> None:
        """Ends it."""
        self._healed.set()
        self._server.shutdown()
        self._server.server_close()

    def next_fault(self, line: str) -> str:
        """The fault that this request meets, "" for none."""
        with self._lock:
            self.requests.append(line)
            if self._mode and self._left > 0:
                self._left -= 1
                return ""
            return self._mode

    def wait_healed(self) -> None:
        """Until the fault is over, or the client has surely gone."""
        self._healed.wait(HANG_S)


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            fault = proxy.next_fault(f"{self.command} {self.path.split('?')[0]}")
            if fault == "hang":
                proxy.wait_healed()
                self._cut()
                return
            body = self._body(cut=fault == "cut")
            if fault == "cut":
                self._cut()
                return
            if fault in REFUSALS:
                self._answer(
                    REFUSALS[fault],
                    {"Content-Type": "application/xml"},
                    b"<Error><Code>ServiceUnavailable</Code><Message>busy</Message></Error>",
                )
                return
            connection = http.client.HTTPConnection("127.0.0.1", proxy.behind, timeout=HANG_S)
            headers = {key: value for key, value in self.headers.items() if key.lower() not in ("transfer-encoding", "expect")}
            connection.request(self.command, self.path, body=body, headers=headers)
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            self._answer(answer.status, dict(answer.getheaders()), content, cut=fault == "cut_answer")

        def _body(self, cut: bool) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                return self._chunks()
            length = int(self.headers.get("Content-Length") or 0)
            return self.rfile.read(length // 2 if cut else length)

        def _chunks(self) -> bytes:
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline() not in (b"\r\n", b"\n", b""):
                pass
            return b"".join(parts)

        def _answer(self, status: int, headers: dict[str, str], content: bytes, cut: bool = False) -> None:
            self.send_response_only(status)
            for key, value in headers.items():
                if key.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(key, value)
            length = headers.get("Content-Length", str(len(content))) if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if cut else content)
            if cut:
                self._cut()

        def _cut(self) -> None:
            self.close_connection = True
            self.wfile.flush()
            try:
                self.connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                return

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    return Handler
