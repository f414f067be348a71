"""Arrays that are handed out again once nobody looks at them: fresh memory costs more than most work that is done in it."""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

MAX_IDLE = 16  # buffers of each type that wait to be used again, beside those of batches that are in use
SPARE = 1.25  # a little larger than asked for, so that the next batch fits too


class Buffers:
    """Arrays of one type that are handed out again once nothing refers to them any more."""

    def __init__(self, dtype: DTypeLike) -> None:
        self._dtype, self._lock = np.dtype(dtype), threading.Lock()
        self._arrays: list[NDArray[Any]] = []

    def take(self, size: int) -> NDArray[Any]:
        """An array [size] with arbitrary content."""
        with self._lock:
            fitting = next((index for index in reversed(range(len(self._arrays))) if self._is_idle(index, size)), None)
            if fitting is None:
                self._arrays.append(np.empty(int(size * SPARE), dtype=self._dtype))
            else:
                self._arrays.append(self._arrays.pop(fitting))  # the last one taken is looked at first: it is still in the cache
            taken = self._arrays[-1][:size]
            if fitting is None or len(self._arrays) > MAX_IDLE:
                self._forget(1 if fitting is None else 0)
            return taken

    def _forget(self, at_least: int) -> None:
        """Drops the smallest idle arrays: those beyond MAX_IDLE, and one for a new one, as it was too small."""
        idle = sorted((index for index in range(len(self._arrays)) if self._is_idle(index)), key=lambda index: len(self._arrays[index]))
        surplus = idle[: max(at_least, len(idle) - MAX_IDLE)]
        self._arrays = [array for index, array in enumerate(self._arrays) if index not in surplus]

    def _is_idle(self, index: int, size: int = 0) -> bool:
        # referred to by the list and by the call alone: no tensor or view of it lives
        return sys.getrefcount(self._arrays[index]) <= 2 and len(self._arrays[index]) >= size
