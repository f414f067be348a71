"""What a device can do at most: operations, function values and bytes a second, and how much it holds.

Known GPUs are looked up in their makers' data sheets: dense products (no sparsity), without TF32, which PyTorch leaves
off. A processor, and a GPU that is not listed, is measured once by a short product.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch

from cellplane.errors import ConfigError
from cellplane.model.linear import affine

GIB = 1 << 30
VALUES = 1 << 18  # a megabyte, which stays in the cache, as the pieces of the likelihood do
SIDE = 1024  # of the square matrices a product is measured with: 2.1 GFLOP, a few milliseconds
COPIED_BYTES = 128 << 20  # more than a processor's caches hold
TURNS = 6  # the best one counts: others may be using the machine


@dataclass(frozen=True)
class Device:
    """``flops`` by precision, ``values_per_s`` of an elementary function (log1p) and ``bytes_per_s`` of memory are peaks.

    ``memory_bytes`` is what one holds. ``measured``: here, not looked up.
    """

    name: str
    flops: Mapping[str, float] = field(default_factory=dict)
    values_per_s: float = 0.0
    bytes_per_s: float = 0.0
    memory_bytes: int = 0
    measured: bool = False


def _gpu(name: str, float32: float, bfloat16: float, terabytes_per_s: float, gib: float) -> Device:
    """Peaks in TFLOP/s. A multiprocessor has 16 units for functions beside 128 for float32's multiply-adds: one in 16 operations."""
    flops = {"float32": float32 * 1e12, "bfloat16": bfloat16 * 1e12}
    return Device(name, flops, float32 * 1e12 / 16, terabytes_per_s * 1e12, int(gib * GIB))


# By a part of the name that CUDA gives them; the first that fits counts, so longer names stand before shorter ones.
GPUS = {
    "b200": _gpu("b200", 75, 2250, 8.0, 180),
    "h200": _gpu("h200", 67, 989, 4.8, 141),
    "h100 pcie": _gpu("h100 pcie", 51, 756, 2.0, 80),
    "h100": _gpu("h100", 67, 989, 3.35, 80),
    "a100-pcie-40gb": _gpu("a100-pcie-40gb", 19.5, 312, 1.555, 40),
    "a100-sxm4-40gb": _gpu("a100-sxm4-40gb", 19.5, 312, 1.555, 40),
    "a100": _gpu("a100", 19.5, 312, 2.0, 80),
    "l40s": _gpu("l40s", 91.6, 362, 0.864, 48),
    "l4": _gpu("l4", 30.3, 121, 0.3, 24),
    "a10g": _gpu("a10g", 35, 70, 0.6, 24),
    "rtx 4090": _gpu("rtx 4090", 82.6, 165, 1.008, 24),
    "rtx 3090": _gpu("rtx 3090", 35.6, 71, 0.936, 24),
    "t4": _gpu("t4", 8.1, 8.1, 0.32, 16),  # without bfloat16: it is computed as float32
    "v100": _gpu("v100", 15.7, 15.7, 0.9, 32),  # the same
}


def named_device(name: str) -> Device:
    """A listed GPU, or `cpu`: this machine's processor. ConfigError lists what there is."""
    wanted = name.strip().lower()
    if wanted == "cpu":
        return device_of(torch.device("cpu"))
    if wanted not in GPUS:
        raise ConfigError(f"device {name!r} is not known; choose one of cpu, {', '.join(sorted(GPUS))}")
    return GPUS[wanted]


def device_of(device: torch.device) -> Device:
    """The device PyTorch computes on here: looked up by its name, or measured once in this process."""
    if device.type != "cuda":
        return _measured(device.type, torch.get_num_threads())
    name = torch.cuda.get_device_name(device).lower()
    listed = next((found for part, found in GPUS.items() if part in name.replace("nvidia ", "")), None)
    return listed or _measured(str(device), 0)


@cache
def _measured(device: str, threads: int) -> Device:  # noqa: ARG001  (other threads, another figure)
    where = torch.device(device)
    flops = {name: _product_flops(where, getattr(torch, name)) for name in ("float32", "bfloat16")}
    return Device(device, flops, _function_values(where), _copied_bytes(where), _memory_bytes(where), measured=True)


def _product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The same product as our dense layers', so that it takes the same way."""
    a, b = (torch.ones(SIDE, SIDE, dtype=dtype, device=device) for _ in range(2))
    with torch.no_grad():
        return 2 * SIDE**3 / _fastest(lambda: affine(a, b, None), device)


def _function_values(device: torch.device) -> float:
    values = torch.ones(VALUES, device=device)
    out = torch.empty_like(values)
    return VALUES / _fastest(lambda: torch.log1p(values, out=out), device)


def _copied_bytes(device: torch.device) -> float:
    """Read and written."""
    source = torch.ones(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / _fastest(lambda: target.copy_(source), device)


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(TURNS + 1):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])  # the first one also loads kernels


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
