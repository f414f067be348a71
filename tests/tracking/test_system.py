"""What the machine does is read from its counters: shares lie between nothing and all, and rise with the work."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from cellplane.tracking import system
from cellplane.tracking.system import SystemMeter, peak_rss_bytes


def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_a_sample_has_every_figure_in_its_range():
    meter = SystemMeter()
    spin(0.05)
    found = meter.sample()
    assert set(found) == {
        "system/cpu_share",
        "system/process_cpu_share",
        "system/network_in_bytes_per_s",
        "system/network_out_bytes_per_s",
        "system/rss_bytes",
        "system/rss_peak_bytes",
        "system/memory_used_bytes",
        "system/disk_free_bytes",
    }
    assert 0 <= found["system/process_cpu_share"] <= 1
    assert 0 <= found["system/cpu_share"] <= 1.2  # its clock ticks a hundred times a second
    assert 1e6 < found["system/rss_bytes"] <= found["system/rss_peak_bytes"] * 1.01
    assert found["system/memory_used_bytes"] > found["system/rss_bytes"] / 2
    assert found["system/disk_free_bytes"] > 0


ALONE = """
import time
from cellplane.tracking.system import SystemMeter

meter = SystemMeter()
end = time.process_time() + 0.2
while time.process_time() < end:
    pass
busy = meter.sample()["system/process_cpu_share"]
time.sleep(0.2)
print(busy, meter.sample()["system/process_cpu_share"])
"""


def test_shares_are_of_the_time_since_the_last_sample():
    """In a process of its own: threads that other tests left behind take time of this one."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True)
    busy, idle = map(float, done.stdout.split())
    assert idle < busy / 2


def test_the_peak_stays_when_memory_is_given_back():
    before = peak_rss_bytes()
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    grown = peak_rss_bytes()
    del block
    assert peak_rss_bytes() >= grown >= before
    assert SystemMeter().sample()["system/rss_peak_bytes"] >= grown


def test_without_proc_what_python_knows_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr(system, "PROC", tmp_path)
    meter = SystemMeter()
    spin(0.02)
    assert set(meter.sample()) == {"system/process_cpu_share", "system/rss_peak_bytes", "system/disk_free_bytes"}


@pytest.mark.parametrize("exists", [True, False])
def test_the_disk_is_the_one_that_is_written_to_even_before_the_folder_is_there(monkeypatch, tmp_path, exists):
    home = tmp_path if exists else tmp_path / "not" / "yet"
    monkeypatch.setenv("CELLPLANE_HOME", str(home))
    assert SystemMeter().sample()["system/disk_free_bytes"] > 0
    assert home.exists() is exists
