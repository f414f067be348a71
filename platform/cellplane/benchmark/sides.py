"""Two processes that are measured in turn, A B A B, while nothing else runs.

A ratio counts only what both sides did under the same conditions: rounds in which other processes took more than a tenth
of the machine are measured again, and no ratio is given where too few quiet rounds were found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

from cellplane.errors import BenchmarkError

FOREIGN_LIMIT = 0.10  # of all cores' time
PACKAGE_PARENT = Path(__file__).resolve().parents[2]


class Side:
    """A worker process (see `worker`); ends with its context."""

    def __init__(self, name: str, module: str, python: Path | None = None, threads: int = 2) -> None:
        self.name = name
        environment = os.environ | {
            "PYTHONPATH": str(PACKAGE_PARENT),
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "passive",
            "GOMP_SPINCOUNT": "0",
            "PYTHONWARNINGS": "ignore",
        }
        command = [str(python or sys.executable), "-m", module]
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the side; an unread pipe would stop a talkative worker)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, env=environment
        )

    @property
    def pid(self) -> int:
        """The worker's process."""
        return self._process.pid

    def ask(self, command: str, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The worker's answer. Raises BenchmarkError when it failed or ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"command": command, **(arguments or {})}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said when it ended is read below
        line = self._process.stdout.readline()
        if not line:
            raise BenchmarkError(f"{self.name} ended (exit code {self._process.wait()}): {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchmarkError(f"{self.name}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self._said.seek(0)
        return " ".join(self._said.read().strip().splitlines()[-3:])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for stream in (self._process.stdin, self._process.stdout, self._said):
            if stream is not None:
                stream.close()
        self._process.terminate()
        self._process.wait()


@dataclass
class Rounds:
    """What quiet rounds gave: per side the answers, in order; ``foreign`` the other processes' share in every round."""

    answers: dict[str, list[dict[str, Any]]]
    foreign: list[float] = field(default_factory=list)
    discarded: int = 0

    def median(self, side: str, key: str) -> float:
        """Median of one figure of one side."""
        return median(float(answer[key]) for answer in self.answers[side])

    def spread(self, side: str, key: str) -> float:
        """(largest - smallest) / median."""
        values = [float(answer[key]) for answer in self.answers[side]]
        return (max(values) - min(values)) / median(values)

    def ratio(self, faster: str, slower: str, key: str = "wall_s") -> float | None:
        """How many times less of ``key`` one side takes than the other; None where no round was quiet."""
        if not self.foreign:
            return None
        return self.median(slower, key) / self.median(faster, key)


def alternate(
    runs: Mapping[str, tuple[Side, Callable[[Side], dict[str, Any]]]], rounds: int, patience: int = 3, beside: Sequence[Side] = ()
) -> Rounds:
    """Runs every side once a round, in turn; a round with foreign load is measured again, at most ``patience`` x rounds in all.

    Where no round was quiet the last ones are kept, so that figures can be shown, and `Rounds.ratio` is None. What sides
    ``beside`` them do, at the same time and for them, is no foreign load.
    """
    sides = {side.pid: side for side, _ in runs.values()}
    found, noisy = Rounds({name: [] for name in runs}), Rounds({name: [] for name in runs})
    for _ in range(rounds * patience):
        meter = LoadMeter([*sides, *(side.pid for side in beside)])
        answers = {name: run(side) for name, (side, run) in runs.items()}
        share = meter.foreign()
        target = found if share <= FOREIGN_LIMIT else noisy
        for name, answer in answers.items():
            target.answers[name].append(answer)
        if share <= FOREIGN_LIMIT:
            found.foreign.append(share)
        if len(found.foreign) == rounds:
            break
    found.discarded = len(next(iter(noisy.answers.values())))
    return found if found.foreign else Rounds(noisy.answers, [], found.discarded)


class LoadMeter:
    """The share of the machine that processes other than these (and this one) take from now on."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = [os.getpid(), *pids]
        self._start = (time.monotonic(), _busy_s(), self._ours_s())

    def foreign(self) -> float:
        """Of all cores' time since the start."""
        began, busy, ours = self._start
        elapsed = (time.monotonic() - began) * (os.cpu_count() or 1)
        return max(0.0, (_busy_s() - busy) - (self._ours_s() - ours)) / max(elapsed, 1e-9)

    def _ours_s(self) -> float:
        return sum(_process_s(pid) for pid in self._pids)


TICKS = os.sysconf("SC_CLK_TCK")


def _busy_s() -> float:
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:])
    return (user + nice + system + irq + softirq) / TICKS


def _process_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICKS  # its own user and system time and its ended children's
