"""A server process that is asked good and bad requests by turns keeps its size: less than 5 MiB more for 1,000, no descriptor more.

The server is a process of its own behind a real connection; `alternating` starts, asks and measures it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serve.wire import run_beside

# MiB for 1,000 requests along a line through the second half; allocators still warm up during a short run (up to 4.4 seen)
MOST_MIB = {1500: 10.0, 10_000: 5.0}


@pytest.mark.parametrize("n_requests", [1500, pytest.param(10_000, marks=[pytest.mark.chaos, pytest.mark.full])])
def test_memory_and_descriptors_stay_as_they_are(model_path: Path, n_requests: int) -> None:
    found = run_beside("tests.serve.alternating", "ask", str(model_path), str(n_requests), "0", timeout_s=900)
    statuses = {int(status): count for status, count in found["statuses"].items()}
    assert sum(statuses.values()) == n_requests
    assert statuses[200] >= n_requests / 2, "every other one is good"
    assert max(statuses) < 500
    assert 0 not in statuses, "a connection that closed without an answer"
    assert found["mib_per_1000"] < MOST_MIB[n_requests], found
    assert found["descriptors_last"] <= found["descriptors_half"] + 2, found
