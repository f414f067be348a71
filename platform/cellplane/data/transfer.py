"""Sentences on a GPU straight from the bytes of the shards: three bytes an entry cross the bus, the device decodes them.

The host only copies mapped pages into pinned buffers that are used again. A side stream takes them to the device and
decodes there while the network still computes; the stream that uses a batch waits for it, the host never does. On a CPU
the same code runs without streams, which is how it is tested against the ordinary reader.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellplane.cells import CellBatch
from cellplane.data.buffers import SPARE
from cellplane.data.loader import ShardStore, prefetch
from cellplane.data.sentences import MicroBatch
from cellplane.data.shards import RawBlock

SLOTS = 4  # one being filled, two prefetched, one in use
LOW_16 = 0xFFFF


@dataclass(frozen=True)
class Arrival:
    """A batch on its way to the device; ``ready`` is None where nothing has to be waited for."""

    batch: CellBatch
    ready: Any

    def wait(self) -> CellBatch:
        """The batch, for use on the current stream, which waits for it (the host does not)."""
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.batch.crow.device)
            stream.wait_event(self.ready)
            for column in fields(self.batch):
                if (tensor := getattr(self.batch, column.name)) is not None:
                    tensor.record_stream(stream)  # its memory must not be handed out again before this stream is done
        return self.batch


class ShardTransfer:
    """Sends sentences of a store to a device. Batches are the reader's, value for value."""

    def __init__(self, store: ShardStore, device: torch.device | str, slots: int = SLOTS) -> None:
        self.store, self.device = store, torch.device(device)
        self.panels = store.panels.to(self.device)
        self._stream: Any = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._slots = [_Slot(pinned=self._stream is not None) for _ in range(slots)]
        self._sent = 0

    def send(self, sentences: Sequence[int], seeds: Sequence[int] | None = None) -> Arrival:
        """These sentences packed in the order asked for; ``sentence_seed`` as given, else 0 throughout."""
        slot = self._slots[self._sent % len(self._slots)]
        self._sent += 1
        slot.wait()
        slot.fill(self.store, sentences, seeds)
        with self._side():
            columns = {name: self._copy(host) for name, host in slot.columns.items()}
            slot.gone = self._event()
            return Arrival(decoded(columns, self.panels), self._event())

    def stream(self, micro_batches: Iterable[MicroBatch]) -> Iterator[CellBatch]:
        """The batches of these micro-batches in order, sent ahead by a thread."""
        for arrival in prefetch(self.send(micro_batch.sentences, micro_batch.seeds) for micro_batch in micro_batches):
            yield arrival.wait()

    def _copy(self, host: Tensor) -> Tensor:
        return torch.empty_like(host, device=self.device).copy_(host, non_blocking=True)

    def _side(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _event(self) -> Any:
        return None if self._stream is None else self._stream.record_event()


class _Slot:
    """Host buffers by name, grown when needed; pinned where a GPU reads them without the host."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._buffers: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}
        self.gone: Any = None  # the event after which the device has read them

    def wait(self) -> None:
        """Until the buffers may be written again."""
        if self.gone is not None:
            self.gone.synchronize()

    def fill(self, store: ShardStore, sentences: Sequence[int], seeds: Sequence[int] | None) -> None:
        """Copies the sentences' columns into the buffers, counts and genes as they are stored."""
        raw = store.raw(sentences)
        cells = store.columns([part.block for part in raw])
        if seeds is not None:
            cells["sentence_seed"] = torch.tensor(seeds, dtype=torch.int64)
        self.columns = {name: self._take(name, column.shape, column.dtype).copy_(column) for name, column in cells.items()}
        entries, over = int(cells["crow"][-1]), sum(len(part.at) for part in raw)
        gene = self._take("gene", (entries,), torch.int16 if _wide(raw, "gene") == np.uint16 else torch.int32)
        value = self._take("value", (entries,), VALUE_DTYPES[_wide(raw, "value")])
        at, exact = (self._take(name, (over,), torch.int64) for name in ("at", "exact"))
        first = first_over = 0
        for part in raw:
            span, over_span = slice(first, first + len(part.block.gene)), slice(first_over, first_over + len(part.at))
            np.copyto(_unsigned(gene)[span], part.block.gene, casting="unsafe")
            np.copyto(_unsigned(value)[span], part.block.value, casting="unsafe")
            at.numpy()[over_span] = part.at + first
            exact.numpy()[over_span] = part.exact
            first, first_over = span.stop, over_span.stop
        self.columns |= {"gene": gene, "value": value, "at": at, "exact": exact}

    def _take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = int(np.prod(shape))
        held = self._buffers.get(name)
        if held is None or held.dtype != dtype or len(held) < size:
            held = self._buffers[name] = torch.empty(int(size * SPARE), dtype=dtype, pin_memory=self._pinned)
        return held[:size].view(tuple(shape))


# PyTorch knows few operations on uint16 and uint32, so they travel as the signed type of their width.
VALUE_DTYPES = {
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.uint16): torch.int16,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float32,  # as the reader hands them out
}


def _wide(raw: Sequence[RawBlock], name: str) -> np.dtype[Any]:
    """The type that holds this column of every block: shards of one store may be encoded differently."""
    return np.result_type(np.uint8 if name == "value" else np.uint16, *(getattr(part.block, name).dtype for part in raw))


def _unsigned(column: Tensor) -> Any:
    array = column.numpy()
    return array.view(f"u{array.itemsize}") if array.dtype in (np.int16, np.int32) else array


def decoded(columns: dict[str, Tensor], panels: Tensor) -> CellBatch:
    """A CellBatch from columns on any device, their genes and values as stored; the host looks at no value."""
    gene, value, at, exact = (columns.pop(name) for name in ("gene", "value", "at", "exact"))
    if value.dtype == torch.int16:
        value = value.int() & LOW_16
    value = value.float().index_copy(0, at, exact.float()) if len(at) else value.float()
    gene = gene.long() & LOW_16 if gene.dtype == torch.int16 else gene.long()
    return CellBatch(gene=gene, value=value, panels=panels, **columns)
