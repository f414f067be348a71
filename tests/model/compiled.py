"""Every Triton kernel compiled for real GPUs on a machine without one: started by test_triton.py in a process of its own.

A driver that launches nothing stands in for the real one, so the whole way is taken: arguments are bound as at a launch,
and ptxas turns each kernel into machine code whose needs can be read.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from cellplane.model import gpu, triton_kernels
from cellplane.model.decoder import counts_of
from cellplane.model.gpu import fused_reconstruction
from tests.model.triton_cases import Case, cells, parameters

triton = triton_kernels.triton
LAUNCHES = 8
SHARED_BYTES = 99 * 1024  # what a block may have on every GPU since Ampere
SPILLED_BYTES = 300  # a thread's, in bfloat16: a few values in thousands of instructions
DENSE = ("sums_kernel", "zeros_kernel", "dense_u_kernel", "dense_gene_kernel")


class Driver:
    """As much of a CUDA driver as a launch asks for."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target, self.launched = GPUTarget("cuda", capability, 32), []
        self.utils = self

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return device

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        self.launched.append((name, binary, shared))
        return 1, 1, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: None


def compiled(capability: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[bytes, int]]:
    """Machine code and shared memory of every kernel by name."""
    driver = Driver(capability)
    triton.runtime.driver.set_active(driver)
    triton.compiler.compiler.max_shared_mem.cache_clear()
    for name in vars(triton_kernels):
        if isinstance(function := getattr(triton_kernels, name), triton.runtime.jit.JITFunction):
            function.device_caches.clear()
    monkeypatch.setattr(gpu, "_programs", lambda device, cell_tiles: 2)
    case = Case(64, 256, 128, panels=2)
    batch, mask = cells(case)
    full, hidden = fused_reconstruction(*(tensor.requires_grad_() for tensor in parameters(case, dtype)), counts_of(batch, mask))
    (full.sum() + hidden.sum()).backward()
    return {name: (binary, shared) for name, binary, shared in driver.launched}


def read(tool: str, *arguments: str | Path) -> str:
    """What one of the tools that come with triton says of a kernel's machine code."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("capability", "dtype"), [(80, torch.bfloat16), (90, torch.float32)], ids=str)
def test_every_kernel_compiles_and_fits(monkeypatch, capability, dtype):
    kernels = compiled(capability, dtype, monkeypatch)
    assert len(kernels) == LAUNCHES
    assert max(shared for _, shared in kernels.values()) <= SHARED_BYTES


def test_on_a_hopper_dense_kernels_use_its_matrix_unit_and_hardly_spill(monkeypatch, tmp_path):
    kernels = compiled(90, torch.bfloat16, monkeypatch)
    assert len(kernels) == LAUNCHES
    for name in DENSE:
        path = tmp_path / "kernel.cubin"
        path.write_bytes(kernels[name][0])
        assert "HGMMA" in read("nvdisasm", path), name
        assert int(re.search(r"STACK:(\d+)", read("cuobjdump", "-res-usage", path)).group(1)) <= SPILLED_BYTES, name
