"""What the machine does while a run trains: processors, memory, disk and network of the node that journals.

MLflow's own monitor would open a thread to the tracker in every worker; ours are journalled with the step they belong
to, so they reach the one run once, whatever dies or restarts. Names begin with `system/`, which MLflow shows on a page
of its own. Read from Linux's /proc; elsewhere only what Python knows.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cellplane.config import home

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")


class SystemMeter:
    """Reads counters; shares and rates are means since the last sample, or since the meter was made."""

    def __init__(self) -> None:
        self._last = self._counters()

    def sample(self) -> dict[str, float]:
        """`system/...`: shares in [0, 1] (of all processors), bytes, and bytes a second; what cannot be read is left out."""
        before, now = self._last, self._counters()
        self._last = now
        elapsed = max(now["time"] - before["time"], 1e-9)
        processors = os.cpu_count() or 1
        rates = {name: (now[name] - before[name]) / elapsed for name in now.keys() & before.keys() - {"time"}}
        return {
            **{f"system/{name}_share": rates[name] / processors for name in ("cpu", "process_cpu") if name in rates},
            **{f"system/{name}_bytes_per_s": rates[name] for name in ("network_in", "network_out") if name in rates},
            "system/rss_peak_bytes": float(peak_rss_bytes()),
            "system/disk_free_bytes": float(_free_bytes()),
            **_memory(),
        }

    def _counters(self) -> dict[str, float]:
        found = {"time": time.monotonic(), "process_cpu": time.process_time()}
        for read in COUNTERS:
            try:
                found |= read()
            except (OSError, ValueError, IndexError):
                continue  # another operating system, or a container that hides it
        return found


def peak_rss_bytes() -> int:
    """The most memory this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, kilobytes here


def _busy() -> dict[str, float]:
    user, nice, system, _, _, irq, softirq, *_ = map(int, (PROC / "stat").read_text().splitlines()[0].split()[1:])
    return {"cpu": (user + nice + system + irq + softirq) / TICKS}


def _network() -> dict[str, float]:
    """Bytes of every interface but the loopback."""
    lines = (line.partition(":") for line in (PROC / "net" / "dev").read_text().splitlines()[2:])
    columns = [rest.split() for name, _, rest in lines if name.strip() != "lo"]
    return {"network_in": float(sum(int(c[0]) for c in columns)), "network_out": float(sum(int(c[8]) for c in columns))}


COUNTERS: tuple[Callable[[], dict[str, float]], ...] = (_busy, _network)


def _memory() -> dict[str, float]:
    try:
        lines = (line.split() for line in (PROC / "meminfo").read_text().splitlines())
        sizes = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}
        resident = int((PROC / "self" / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return {}
    return {"system/rss_bytes": float(resident), "system/memory_used_bytes": float(sizes["MemTotal"] - sizes["MemAvailable"])}


def _free_bytes() -> int:
    """Where everything is written to."""
    folder = next(path for path in (home(), *home().parents) if path.exists())
    return shutil.disk_usage(folder).free
