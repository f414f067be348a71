"""Processes, ports and private files of this machine: what the local stack is made of.

A process is remembered by pid and creation time, so that a later one with the same pid is never mistaken for it, and
is ended together with its descendants and the orphans of the session it led. Nothing is ever found by its name.
"""

from __future__ import annotations

import fcntl
import http.client
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from cellplane.errors import PortInUseError, ServiceError, StorageError

STOP_TIMEOUT_S = 15.0  # a Ray head with workers takes about 5 s to end politely
MAX_TEMP_ROOT = 24  # Ray adds about 70 characters to its temp dir, and a socket's path may have 107

# kept so that a child is reaped by whoever started it
_STARTED: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True)
class Member:
    """One recorded process; ``create_time`` (seconds since 1970) tells it from a later one with the same pid."""

    pid: int
    create_time: float

    def process(self) -> psutil.Process | None:
        """The process while it lives, else None."""
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            if self._is(process) and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None

    def family(self) -> list[psutil.Process]:
        """The process, its descendants, and orphans of the session it led."""
        found: dict[int, psutil.Process] = {}
        with suppress(psutil.Error):
            holder = psutil.Process(self.pid)
            if not self._is(holder):  # the pid, and so perhaps the session, belongs to somebody else now
                return []
            found = {process.pid: process for process in [holder, *holder.children(recursive=True)]}
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if os.getsid(process.pid) == self.pid:
                    found[process.pid] = process
        return [process for process in found.values() if _lives(process)]

    def _is(self, process: psutil.Process) -> bool:
        return bool(abs(process.create_time() - self.create_time) < 1.0)


def this_process() -> Member:
    """The process that asks."""
    return Member(os.getpid(), psutil.Process().create_time())


def usage(processes: Sequence[psutil.Process], named: str) -> dict[int, tuple[float, int]]:
    """By pid, (CPU seconds so far, bytes of memory that is its own) of those whose command line begins with ``named``."""
    found = {}
    for process in processes:
        with suppress(psutil.Error):  # it may end while we look
            if "".join(process.cmdline()).startswith(named):
                times, memory = process.cpu_times(), process.memory_info()
                found[process.pid] = (times.user + times.system, memory.rss - getattr(memory, "shared", 0))
    return found


def footprint(pid: int) -> tuple[int, int] | None:
    """(bytes of memory that is its own, open descriptors) of a process; None when it has ended."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        memory = process.memory_info()
        return memory.rss - getattr(memory, "shared", 0), process.num_fds()
    return None


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def spawn(command: Sequence[str], folder: Path, environment: Mapping[str, str], log_path: Path) -> Member:
    """Start a process in a session of its own that outlives the caller; its output goes to ``log_path``."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    _STARTED.append(process)
    return Member(process.pid, psutil.Process(process.pid).create_time())


def end(members: Sequence[Member]) -> None:
    """Ask the leaders to end, then what outlived them, and kill what is left of their families in the end."""
    everybody = {process.pid: process for member in members for process in member.family()}
    leaders = [process for member in members if (process := member.process())]
    _signal(leaders, psutil.Process.terminate)
    _wait(leaders, STOP_TIMEOUT_S)
    everybody |= {process.pid: process for member in members for process in member.family()}
    left = [process for process in everybody.values() if process not in leaders]
    _signal(left, psutil.Process.terminate)
    _wait(left, STOP_TIMEOUT_S / 3)
    left = [process for process in everybody.values() if process.is_running() and _lives(process)]
    _signal(left, psutil.Process.kill)
    _wait(left, STOP_TIMEOUT_S / 3)
    for child in [child for child in _STARTED if child.poll() is not None]:
        _STARTED.remove(child)


def _signal(processes: Sequence[psutil.Process], send: Callable[[psutil.Process], None]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            send(process)


def _wait(processes: Sequence[psutil.Process], timeout_s: float) -> None:
    """Until all ended; one that ended but was not reaped by its parent counts as ended."""
    deadline = time.monotonic() + timeout_s
    while any(process.is_running() and _lives(process) for process in processes) and time.monotonic() < deadline:
        for child in _STARTED:
            child.poll()
        time.sleep(0.05)


def port_for(host: str, wanted: int, option: str) -> int:
    """``wanted`` when it is free, any free port for 0; PortInUseError names who has it and the option to change."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, wanted))
        except OSError as error:
            advice = f"end it or choose another: -o {option}=0 takes a free one"
            raise PortInUseError(f"port {wanted} ({option}) is used by {listener(wanted)}; {advice}") from error
        return int(probe.getsockname()[1])


def listener(port: int) -> str:
    """Who listens on the port, as words for a message."""
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                with suppress(psutil.Error):
                    return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return "another process"


def interface_of(address: str) -> str | None:
    """The network interface that has this address, None when none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if address in (one.address for one in addresses):
            return str(name)
    return None


def listens(host: str, port: int) -> bool:
    """True when somebody accepts connections there."""
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def http_status(host: str, port: int, path: str, token: str | None = None) -> int:
    """The status of a GET (with ``token`` as bearer), 0 when nobody answers within 2 s."""
    return http_get(host, port, path, token)[0]


def http_get(host: str, port: int, path: str, token: str | None = None) -> tuple[int, bytes]:
    """The status and the body of a GET, as `http_status`."""
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def short_temp_dir() -> Path:
    """A fresh private folder with a path short enough for Ray's sockets."""
    root = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="cp-", dir="/tmp" if len(root) > MAX_TEMP_ROOT and os.path.isdir("/tmp") else root))


def write_private(path: Path, text: str) -> None:
    """Write at once or not at all, readable by the owner only; StorageError when the disk refuses."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; check CELLPLANE_HOME and its free space") from error


@contextmanager
def locked(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold the lock file alone; ServiceError when another process keeps it longer than ``timeout_s``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; set CELLPLANE_HOME to a folder of yours") from error
    deadline = time.monotonic() + timeout_s
    with file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ServiceError(f"another cellplane holds {path} and is busy; wait for it and try again") from None
                time.sleep(0.1)
        yield


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log, for a message."""
    with suppress(OSError):
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    return "(no log)"
