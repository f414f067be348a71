"""The Triton kernels without a GPU: run by the interpreter, and compiled for real ones.

Either way is chosen when triton is imported and would spoil this process for a real GPU, so each has a process of its
own: `interpreted.py` and `compiled.py` beside this file, which can also be run by hand as below.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cellplane.model import triton_kernels
from tests.house.source import ROOT

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(triton_kernels.VERSION is None, reason="triton is not installed; it comes with cellplane[dev]")


def run(file: str, folder: Path, **environment: str) -> str:
    """The report of a file's tests in a process of their own; fails as they fail."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    arguments = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    done = subprocess.run(
        arguments, cwd=ROOT, env=kept | environment | {"TRITON_CACHE_DIR": str(folder)}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


@needs_triton
def test_every_kernel_equals_the_fallback_in_the_interpreter(tmp_path):
    assert "passed" in run("interpreted.py", tmp_path, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@needs_triton
def test_every_kernel_compiles_for_real_gpus(tmp_path):
    assert "passed" in run("compiled.py", tmp_path, OMP_NUM_THREADS="1")


def test_the_kernels_can_be_imported_without_triton():
    code = (
        "import sys, torch\nsys.modules['triton'] = None\nfrom cellplane.model import gpu\nassert not gpu.available(torch.device('cuda'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT / "platform")})
