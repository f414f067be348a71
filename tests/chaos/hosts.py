"""Hosts of a cluster as network namespaces of this machine: own address, own loopback, own Ray folder, one shared folder.

Between them is a switch in a namespace of its own, where callers from outside stand. A host dies (every process of it is
killed at once) or its cable is pulled (its processes go on and nobody hears of them). Needs root; what is made has a name
of its own, and `Hosts.end` removes it and ends only what runs inside.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cellplane.processes import write_private

CELLPLANE = (sys.executable, "-c", "from cellplane.cli.main import run; run()")
RAY = (sys.executable, "-m", "ray.scripts.scripts")
RAY_PORT = 6379
START_S = 180.0  # some seconds, but on a busy machine
ADDRESS = "10.77.0.{number}"
NEW_NETWORK = 0x40000000  # CLONE_NEWNET of setns(2)
# `ip netns exec` has given it mounts of its own; the host's name leads to its loopback, as Debian sets it up
SETTLED = 'hostname "$1" && mount --bind "$0/hosts" /etc/hosts && mount --bind "$0" "$2" && shift 2 && exec "$@"'


class Host:
    """One machine: what runs on it sees its own network, and its own folder at ``ray_folder``."""

    def __init__(self, namespace: str, address: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.namespace, self.address, self.folder = namespace, address, folder
        self.ray_folder = folder.parent / "ray"  # one path, another folder on each host
        self.environment = {**os.environ, **environment}
        self.log = folder / "ray.log"
        self.processes: list[subprocess.Popen[bytes]] = []
        folder.mkdir()
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {folder.name}\n", encoding="utf-8")

    def started(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """A process on this host, writing to ``log``."""
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", SETTLED]
        inside += [str(self.folder), self.folder.name, str(self.ray_folder), *command]
        with log.open("ab") as out:
            process = subprocess.Popen(
                inside,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                env={**self.environment, **(environment or {})},
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def run(self, command: Sequence[str], log: Path, timeout_s: float = 240) -> None:
        """Runs a command here to its end; its log is shown when it fails."""
        process = self.started(command, log)
        try:
            code = process.wait(timeout_s)
        finally:
            process.kill()
            process.wait()
        assert code == 0, log.read_text(encoding="utf-8")[-4000:]

    def pids(self) -> list[int]:
        """Everything that runs here."""
        found = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False)
        return [int(pid) for pid in found.stdout.split()]

    def die(self) -> None:
        """Kills everything that runs here at the same moment; it is gone when this returns."""
        deadline = time.monotonic() + 30
        while pids := self.pids():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert time.monotonic() < deadline, f"still on {self.namespace}: {pids}"
            time.sleep(0.02)


class Hosts:
    """A head and others, with so many CPUs each, under ``folder``, whose ``home`` all see; Ray runs once `start_ray` was called."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None, cpus: Sequence[int] = (1, 1)) -> None:
        self.folder, self.home, self.cpus = folder, folder / "home", cpus
        self.home.mkdir()
        (folder / "ray").mkdir()
        self.token = secrets.token_hex(32)
        write_private(folder / "token", self.token)
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ADDRESS": f"{ADDRESS.format(number=1)}:{RAY_PORT}",
            "CELLPLANE_HOME": str(self.home),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            **(environment or {}),
        }
        self.name = f"cp{secrets.token_hex(3)}"
        self.outside = f"{self.name}-out"
        self.hosts: list[Host] = []
        try:
            self._build()
        except BaseException:
            self.end()
            raise

    @property
    def head(self) -> Host:
        """Where Ray's head and drivers run."""
        return self.hosts[0]

    @property
    def other(self) -> Host:
        """The host that is lost."""
        return self.hosts[1]

    def _build(self) -> None:
        ip("netns", "add", self.outside)
        ip("-n", self.outside, "link", "set", "lo", "up")
        ip("-n", self.outside, "link", "add", "switch", "type", "bridge")
        ip("-n", self.outside, "addr", "add", "10.77.0.254/24", "dev", "switch")
        ip("-n", self.outside, "link", "set", "switch", "up")
        for number in range(1, len(self.cpus) + 1):
            self._add_host(number)

    def _add_host(self, number: int) -> None:
        namespace, address = f"{self.name}-{number}", ADDRESS.format(number=number)
        self.hosts.append(Host(namespace, address, self.folder / f"host-{number}", self.environment))
        ip("netns", "add", namespace)
        ip("-n", namespace, "link", "set", "lo", "up")
        ip("-n", self.outside, "link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", namespace)
        ip("-n", self.outside, "link", "set", f"port{number}", "master", "switch", "up")
        ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
        ip("-n", namespace, "link", "set", "eth0", "up")

    def start_ray(self) -> None:
        """A head on the first host, a node on each other one; returns when all of them run."""
        place = (f"--port={RAY_PORT}", f"--temp-dir={self.head.ray_folder}", "--dashboard-host=127.0.0.1")
        self._start(1, self._answers, "--head", *place)
        for number in range(2, len(self.hosts) + 1):
            self.join(number)

    def join(self, number: int = 2) -> None:
        """Starts Ray's node on a host, and waits until it says so."""
        log = self.hosts[number - 1].log
        begin = log.stat().st_size if log.exists() else 0
        self._start(number, lambda: b"Ray runtime started" in log.read_bytes()[begin:], f"--address={self.environment['RAY_ADDRESS']}")

    def _start(self, number: int, is_there: Callable[[], bool], *options: str) -> None:
        host = self.hosts[number - 1]
        shown = ("--block", "--disable-usage-stats", f"--num-cpus={self.cpus[number - 1]}", f"--node-ip-address={host.address}")
        started = host.started([*RAY, "start", *options, *shown], host.log)
        wait_for(lambda: is_there() or started.poll() is not None, START_S)
        assert started.poll() is None, host.log.read_text(encoding="utf-8")[-2000:]

    def _answers(self) -> bool:
        with seen_from(self.outside), socket.socket() as probe:
            return probe.connect_ex((self.head.address, RAY_PORT)) == 0

    def unplug(self) -> None:
        """Pulls the second host's cable out of the switch: nothing is refused, everything is lost."""
        ip("-n", self.outside, "link", "set", "port2", "down")

    def plug(self) -> None:
        """Puts the cable back."""
        ip("-n", self.outside, "link", "set", "port2", "up")

    def end(self) -> None:
        """Ends what runs on the hosts and removes them."""
        for host in reversed(self.hosts):
            host.die()
        for process in (process for host in self.hosts for process in host.processes):
            process.kill()
            process.wait(30)
        for namespace in (*(host.namespace for host in self.hosts), self.outside):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


@contextmanager
def seen_from(namespace: str) -> Iterator[None]:
    """Sockets that this thread opens in the block are there: on a host, or at the switch, on none."""
    with open("/proc/thread-self/ns/net", "rb") as here, open(f"/run/netns/{namespace}", "rb") as there:
        _enter(there.fileno())
        try:
            yield
        finally:
            _enter(here.fileno())


def _enter(network: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(network, NEW_NETWORK) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def ip(*arguments: str) -> None:
    """Runs `ip`; its own words when it fails."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def why_not() -> str:
    """Why this machine lets us have no network namespaces; empty when it does."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "needs Linux with iproute2"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    probe = f"cp{secrets.token_hex(3)}"
    try:
        ip("netns", "add", probe)
        ip("-n", probe, "link", "add", "switch", "type", "bridge")
        ip("-n", probe, "link", "add", "port", "type", "veth", "peer", "name", "other")
    except OSError as error:
        return f"network namespaces are not allowed here ({error})"
    finally:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return ""


def wait_for(what: Callable[[], object], timeout_s: float) -> None:
    """Until it is true; polls a state, never a time."""
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.1)
