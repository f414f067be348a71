"""Micro-batches for a GPU: the bytes of the shards cross the bus, and are decoded, dropped and masked on the device.

It happens in the loop's own thread for reading and on a stream of its own, while the network computes the step before; the
values are those of `MaskedObjective`, bit for bit. On a CPU the same code runs without streams, which is how it is tested.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cellplane.cells import CellBatch
from cellplane.data.loader import ShardStore
from cellplane.data.sentences import MicroBatch
from cellplane.data.transfer import ShardTransfer
from cellplane.model.config import MaskingConfig
from cellplane.model.masking import Mask
from cellplane.train.objective import MaskedObjective, Objective


class StagedObjective:
    """An Objective whose micro-batches lie on the device when they are prepared."""

    def __init__(self, store: ShardStore, masking: MaskingConfig, device: torch.device) -> None:
        self._masked = MaskedObjective(store, masking)
        self._transfer = ShardTransfer(store, device)
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def weights(self) -> NDArray[np.float64]:
        """See Objective."""
        return self._masked.weights()

    def prepare(self, micro_batch: MicroBatch) -> tuple[CellBatch, Mask]:
        """See Objective. Returns when the device is done, so that any stream may use it; its user must `Work.hold` the memory."""
        with self._side():
            batch = self._transfer.send(micro_batch.sentences, micro_batch.seeds).wait()
            prepared = self._masked.masked(micro_batch, batch)
        if self._stream is not None:
            self._stream.synchronize()
        return prepared

    def _side(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def objective_for(store: ShardStore, masking: MaskingConfig, device: torch.device) -> Objective:
    """How a run on this device prepares its micro-batches."""
    return StagedObjective(store, masking, device) if device.type == "cuda" else MaskedObjective(store, masking)
