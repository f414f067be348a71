"""One side of a measurement: a process that sets something up once and then runs it as often as it is asked.

Needs the standard library alone, so that it also runs in the environment of another package. Requests and answers are
JSON lines; whatever the measured code prints goes to the error stream.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Command = Callable[..., dict[str, Any] | None]


def serve(commands: Mapping[str, Command]) -> None:
    """Answers requests {"command": name, ...arguments} until the input ends; a failed command's answer has an "error"."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        command = request.pop("command")
        try:
            answer = commands[command](**request) or {}
        except MemoryError as error:
            answer = {"error": f"{command}: out of memory: {error}"}
        except (RuntimeError, ValueError, OSError, LookupError, TypeError, ImportError, ArithmeticError) as error:
            answer = {"error": f"{command}: {type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def measured(run: Callable[[], object]) -> dict[str, float]:
    """Runs it once: wall_s, cpu_s (all threads), and the resident memory in bytes before, at the peak and after."""
    before = resident_bytes("VmRSS")
    reset_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "wall_s": wall,
        "cpu_s": cpu,
        "before_bytes": before,
        "peak_bytes": resident_bytes("VmHWM"),
        "after_bytes": resident_bytes("VmRSS"),
    }


def reset_peak() -> None:
    """Makes the kernel forget this process's peak memory so far (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_bytes(field: str = "VmRSS") -> int:
    """Resident memory now (VmRSS) or at its peak (VmHWM) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {field}")
