"""Writing while training goes on: one thread, one piece of work at a time, and no error of it lost.

The state is copied into memory that is kept for it before the thread begins, so that the training thread pays for one
copy and what is written is the state of its step, whatever happens to the weights meanwhile.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

NICENESS = 10  # the thread takes what the training threads leave of the processors


class Background:
    """Runs one piece of work in a thread of its own; an error of it is raised by the next `start`, by `wait` or by `close`."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._pending: Future[object] | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begins the work, after whatever runs has ended."""
        self.wait()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "checkpoint", initializer=_be_nice)
        self._pending = self._pool.submit(work)

    def wait(self) -> None:
        """Until nothing runs; raises what the work raised, once."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """`wait`, then ends the thread."""
        pool, self._pool = self._pool, None
        try:
            self.wait()
        finally:
            if pool is not None:
                pool.shutdown()


def _be_nice() -> None:
    if sys.platform == "linux":  # elsewhere the number of a thread is not that of a process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


class Buffers:
    """Memory that a state is copied into again and again; pinned when the state lies on a GPU."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Contiguous copies in the host's memory, valid until the next call."""
        copied = {name: self._room_for(name, tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            copied[name].copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        self._held = copied
        return copied

    def _room_for(self, name: str, tensor: Tensor) -> Tensor:
        held = self._held.get(name)
        if held is not None and held.shape == tensor.shape and held.dtype == tensor.dtype:
            return held
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
