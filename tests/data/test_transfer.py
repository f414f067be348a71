"""Batches that travel as the bytes of the shards are those of the ordinary reader, and buffers are not written too early."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from cellplane.cells import CellBatch
from cellplane.data import transfer
from cellplane.data.config import ConvertConfig, DataKeys, SimulateConfig
from cellplane.data.convert import convert_with, write_part
from cellplane.data.loader import ShardStore
from cellplane.data.sentences import MicroBatch
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData, write_h5ad
from cellplane.data.transfer import ShardTransfer, decoded

KEYS = DataKeys(batch_key="batch", labels_key="cell_type", spatial_key="spatial")


def converted(folder: Path, **sources: AnnData) -> ShardStore:
    for name, source in sources.items():
        write_h5ad(source, folder / f"{name}.h5ad")
    inputs = tuple(str(folder / f"{name}.h5ad") for name in sources)
    config = ConvertConfig(inputs=inputs, out=str(folder / "shards"), keys=KEYS, max_cells=20, shard_bytes=5000)
    convert_with(config, lambda tasks: map(write_part, tasks), lambda _: None)
    return ShardStore(folder / "shards")


def with_counts(source: AnnData, counts: dict[tuple[int, int], int]) -> None:
    changed = source.X.tolil()
    for place, count in counts.items():
        changed[place] = count
    source.X = changed.tocsr()


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ShardStore:
    """One data set in bytes with a few escapes, one so deep that it needs two bytes a value, and escapes beyond those."""
    shallow = simulate(SimulateConfig(n_cells=50, n_genes=30, spatial=True))
    with_counts(shallow, {(3, 5): 255, (4, 6): 70_000, (5, 7): 16_000_000})
    deep = simulate(SimulateConfig(n_cells=40, n_genes=30, spatial=True, seed=1))
    deep.X = deep.X * 300
    with_counts(deep, {(0, 0): 65_535, (1, 1): 100_000})
    store = converted(tmp_path_factory.mktemp("shards"), shallow=shallow, deep=deep)
    assert {reader.encoding for reader in store._readers} == {"uint8", "uint16"}
    return store


def same(found: CellBatch, expected: CellBatch) -> None:
    for column in fields(CellBatch):
        ours, theirs = getattr(found, column.name), getattr(expected, column.name)
        assert (ours is None) == (theirs is None), column.name
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True, msg=column.name)


def test_every_sentence_alone_and_all_together_are_the_readers(store):
    sender = ShardTransfer(store, "cpu")
    for sentences in (*([index] for index in range(len(store.sizes))), range(len(store.sizes)), [2, 0]):
        same(sender.send(sentences).wait(), store.read(sentences))


def test_no_sentence_gives_an_empty_batch(store):
    same(ShardTransfer(store, "cpu").send([]).wait(), store.read([]))


def test_counts_that_are_no_whole_numbers_travel_as_they_are(tmp_path):
    store = converted(tmp_path, a=simulate(SimulateConfig(n_cells=20, n_genes=30, spatial=True)))
    part = store.raw([0])[0]
    halves = part._replace(block=type(part.block)(**{**vars(part.block), "value": part.block.value.astype(np.float32) / 2}))
    expected = store.read([0])
    store.raw = lambda sentences: [halves]
    found = ShardTransfer(store, "cpu").send([0]).wait()
    torch.testing.assert_close(found.value, expected.value / 2, rtol=0, atol=0)


def test_genes_beyond_two_bytes_survive(store):
    columns = {name: column.clone() for name, column in vars(store.read([0])).items() if column is not None}
    panels = columns.pop("panels")
    columns["gene"] = torch.full_like(columns["gene"], 70_000).int()
    found = decoded(columns | {"at": torch.zeros(0, dtype=torch.int64), "exact": torch.zeros(0, dtype=torch.int64)}, panels)
    assert set(found.gene.tolist()) == {70_000}


def test_a_batch_keeps_its_values_while_buffers_are_used_again(store):
    sender = ShardTransfer(store, "cpu", slots=1)
    first = sender.send([0]).wait()
    kept = first.gene.clone(), first.value.clone(), first.row.clone()
    for index in range(1, len(store.sizes)):
        sender.send([index])
    assert all(torch.equal(one, other) for one, other in zip(kept, (first.gene, first.value, first.row), strict=True))


def test_a_buffer_is_not_written_before_the_device_has_read_it(store):
    order: list[str] = []

    class Event:
        def synchronize(self) -> None:
            order.append("waited")

    sender = ShardTransfer(store, "cpu", slots=1)
    sender.send([0])
    slot = sender._slots[0]
    slot.gone, fill = Event(), slot.fill
    slot.fill = lambda *given: (order.append("written"), fill(*given))[1]
    sender.send([1])
    assert order == ["waited", "written"]


def test_micro_batches_stream_in_order_with_their_seeds(store):
    planned = [MicroBatch((index,), (index + 7,), index) for index in range(len(store.sizes))]
    for micro_batch, found in zip(planned, ShardTransfer(store, "cpu").stream(planned), strict=True):
        same(found, micro_batch.read(store))


def test_three_bytes_an_entry_cross_the_bus(store):
    slot = transfer._Slot(pinned=False)
    slot.fill(store, [0], None)
    entry_bytes = slot.columns["gene"].element_size() + slot.columns["value"].element_size()
    assert entry_bytes == (3 if store._readers[store.manifest.sentences[0].shard].encoding == "uint8" else 4)
