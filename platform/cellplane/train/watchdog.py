"""A worker that watches itself and its neighbours, because a collective that waits for a stopped rank waits for half an hour.

Every rank runs a thread that wants to hear of a step now and then. When it does not for `workers.collective_timeout_s`, it
writes where all of its threads stand into the run folder, asks silent ranks of its node to do the same (a stopped process
is continued for that moment), and those that had to be asked end with that. Their peers then fail at once, and the run starts
again from its newest checkpoint. A rank whose own work stays stuck kills itself.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cellplane.processes import Member, this_process

log = logging.getLogger(__name__)

ASKING = signal.SIGUSR1  # makes a rank write where it stands, even one whose interpreter is stuck, and end
ANSWER_S = 3.0  # a rank that is merely waiting notices by itself within this time after the first one
START_S = 120.0  # the first step also compiles, loads and connects


def grace_s(timeout_s: float) -> float:
    """Seconds that a failing collective gets, after the watchdog has spoken, to say so itself."""
    return max(10.0, timeout_s / 2)


def ended_after_s(timeout_s: float) -> float:
    """Seconds after its last step by which a rank that is stuck has ended itself, whatever became of its peers."""
    return timeout_s + grace_s(timeout_s) + 2 * ANSWER_S


def collective_limit_s(timeout_s: float) -> float:
    """Seconds after which a collective gives up by itself: later than the watchdog, which knows more and says it."""
    return 1.5 * timeout_s + 30.0


@dataclass(frozen=True)
class Peer:
    """One rank of the group, so that others on its node can find its process."""

    rank: int
    node: str
    member: Member

    @classmethod
    def here(cls, rank: int) -> Peer:
        """This process."""
        return cls(rank, platform.node(), this_process())

    def stacks(self, folder: Path) -> Path:
        """Where it writes where it stands."""
        return folder / f"rank-{self.rank}-pid-{self.member.pid}.txt"


class Watchdog:
    """Watches one rank; ``beat`` says that a step was done. Files of a run that never stalls are removed."""

    def __init__(self, folder: Path, rank: int, peers: Sequence[Peer], timeout_s: float) -> None:
        self.folder, self.rank, self.timeout_s = folder, rank, timeout_s
        self.peers = [peer for peer in peers if peer.rank != rank and peer.node == platform.node()]
        self.path = Peer.here(rank).stacks(folder)
        self.grace_s = grace_s(timeout_s)
        self._done = 0
        self._limit = time.monotonic() + max(timeout_s, START_S)
        self._ended = threading.Event()

    def beat(self, done: int) -> None:
        """``done`` steps are done: the next one has the whole time again."""
        self._done, self._limit = done, time.monotonic() + self.timeout_s

    @contextmanager
    def watching(self) -> Iterator[Watchdog]:
        """Watches for the duration of a block."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", encoding="utf-8") as file:
            # chained to the signal's own meaning, the end: a stopped rank that is continued must not go on for a step or more
            faulthandler.register(ASKING, file=file, all_threads=True, chain=True)
            thread = threading.Thread(target=self._watch, args=(file.fileno(),), name="cellplane-watchdog", daemon=True)
            thread.start()
            try:
                yield self
            finally:
                self._ended.set()
                thread.join()
                faulthandler.unregister(ASKING)
                with suppress(OSError):
                    if self.path.stat().st_size == 0:
                        self.path.unlink()

    def _watch(self, descriptor: int) -> None:
        while not self._ended.wait(min(1.0, self.timeout_s / 10)):
            if time.monotonic() > self._limit:
                self._alarm(descriptor)
                return

    def _alarm(self, descriptor: int) -> None:
        log.error("rank %d: no step for %.0f s after step %d; where it stands is in %s", self.rank, self.timeout_s, self._done, self.path)
        os.write(descriptor, f"rank {self.rank}: no step for {self.timeout_s:g} s after step {self._done}\n".encode())
        faulthandler.dump_traceback(descriptor, all_threads=True)
        _within(ANSWER_S, lambda: all(self._answered(peer) for peer in self.peers))
        for peer in self.peers:
            if peer.member.process() is not None and not self._answered(peer):
                self._ask_and_end(peer)
        if not self._ended.wait(self.grace_s):
            os.kill(os.getpid(), signal.SIGKILL)  # this rank's own work is stuck: nothing gentler reaches it

    def _answered(self, peer: Peer) -> bool:
        with suppress(OSError):
            return peer.stacks(self.folder).stat().st_size > 0
        return peer.member.process() is None  # ended properly and removed its file, or died

    def _ask_and_end(self, peer: Peer) -> None:
        log.error("rank %d does not answer; it is ended, and what it was doing is in %s", peer.rank, peer.stacks(self.folder))
        with suppress(OSError):
            _ask_main_thread(peer.member.pid)
            os.kill(peer.member.pid, signal.SIGCONT)
            _complete(peer.stacks(self.folder))
            os.kill(peer.member.pid, signal.SIGKILL)


def _ask_main_thread(pid: int) -> None:
    """Asks the thread that trains: it must answer before it does anything else, or its frames change while they are written."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "tgkill") or library.tgkill(pid, pid, ASKING) != 0:
        os.kill(pid, ASKING)


def _complete(path: Path) -> None:
    """Waits until a file has begun and does not grow any more."""
    deadline, before = time.monotonic() + ANSWER_S, 0
    while time.monotonic() < deadline:
        time.sleep(0.5)
        size = path.stat().st_size
        if size and size == before:
            return
        before = size


def _within(seconds: float, happened: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def found_stacks(folder: Path, since: float) -> list[Path]:
    """Files in which ranks wrote where they stood after ``since`` (seconds since 1970); empty ones of killed ranks are removed."""
    found = []
    for path in sorted(folder.glob("rank-*.txt")):
        with suppress(OSError):
            stat = path.stat()
            if stat.st_size == 0:
                path.unlink()
            elif stat.st_mtime >= since:
                found.append(path)
    return found
