"""What the loader reads is what the files held, in any order, and buffers are used again only when nobody looks at them."""

from __future__ import annotations

import threading
import time

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cellplane.cells import CellBatch
from cellplane.data import loader
from cellplane.data.config import ConvertConfig, DataKeys, SimulateConfig
from cellplane.data.convert import convert_with, write_part
from cellplane.data.loader import ShardStore, prefetch
from cellplane.data.simulate import simulate
from cellplane.data.sources import write_h5ad
from cellplane.errors import IntegrityError

KEYS = DataKeys(batch_key="batch", labels_key="cell_type")


@pytest.fixture
def sources():
    """Two data sets that share half of their genes, with large counts in one."""
    first = simulate(SimulateConfig(n_cells=90, n_genes=30))
    second = simulate(SimulateConfig(n_cells=50, n_genes=30, n_types=6, seed=1))
    second.var_names = [f"GENE{n:04d}" for n in range(16, 46)]
    second.X[3, 5] = 300
    second.X[4, 6] = 100_000
    return first, second


@pytest.fixture
def store(sources, tmp_path) -> ShardStore:
    for name, source in zip("ab", sources, strict=True):
        write_h5ad(source, tmp_path / f"{name}.h5ad")
    inputs = tuple(str(tmp_path / f"{name}.h5ad") for name in "ab")
    config = ConvertConfig(inputs=inputs, out=str(tmp_path / "shards"), keys=KEYS, max_cells=20, shard_bytes=5000)
    convert_with(config, lambda tasks: map(write_part, tasks), lambda _: None)
    return ShardStore(tmp_path / "shards")


def dense(batch: CellBatch) -> np.ndarray:
    return sp.csr_matrix((batch.value.numpy(), batch.gene.numpy(), batch.crow.numpy()), shape=(batch.n_cells, batch.n_genes)).toarray()


def union(sources: tuple[ad.AnnData, ...]) -> np.ndarray:
    """Both sources over 45 genes, one below the other."""
    both = np.zeros((140, 45), dtype=np.float32)
    both[:90, :30] = sources[0].X.toarray()
    both[90:, 15:] = sources[1].X.toarray()
    return both


def test_every_cell_is_read_exactly_once_with_its_own_counts(store, sources):
    batch = store.read(range(len(store.sizes)))
    assert sorted(batch.row.tolist()) == list(range(140))
    np.testing.assert_array_equal(dense(batch), union(sources)[batch.row.numpy()])


def test_samples_data_sets_panels_and_labels_follow_their_cells(store, sources):
    batch = store.read(range(len(store.sizes)))
    rows = batch.row.numpy()
    assert list(store.vocabulary.gene_ids) == [f"GENE{n:04d}" for n in range(1, 46)]  # order of first appearance
    names = np.array(store.manifest.batch_names)[batch.batch_index.numpy()]
    expected = [f"a/{b}" for b in sources[0].obs["batch"]] + [f"b/{b}" for b in sources[1].obs["batch"]]
    np.testing.assert_array_equal(names, np.array(expected)[rows])
    labels = np.array(store.class_names)[batch.labels.numpy()]
    types = [*sources[0].obs["cell_type"], *sources[1].obs["cell_type"]]
    np.testing.assert_array_equal(labels, np.array(types)[rows])
    np.testing.assert_array_equal(batch.dataset_index.numpy(), rows >= 90)
    np.testing.assert_array_equal(batch.panel_index.numpy(), rows >= 90)
    assert batch.panels[0].tolist() == [True] * 30 + [False] * 15
    assert batch.panels[1].tolist() == [False] * 15 + [True] * 30
    assert (store.n_batches, store.n_datasets) == (4, 2)
    assert batch.coordinates.isnan().all()


def test_no_sentence_mixes_samples_or_exceeds_its_size(store):
    assert store.sizes.max() <= 20
    for index, size in enumerate(store.sizes):
        batch = store.read([index])
        assert batch.n_cells == size
        assert len(batch.batch_index.unique()) == 1


def test_sentences_come_in_the_order_asked_for(store):
    alone = {index: store.read([index]) for index in (5, 0, 3)}
    together = store.read([5, 0, 3])
    for part, index in zip(together.sentences(), (5, 0, 3), strict=True):
        torch.testing.assert_close(part.value, alone[index].value)
        torch.testing.assert_close(part.gene, alone[index].gene)
        torch.testing.assert_close(part.row, alone[index].row)
    assert together.sentence_seed.tolist() == [0, 0, 0]
    assert store.read([]).n_cells == 0


def test_a_batch_that_is_looked_at_is_never_overwritten(store):
    kept = [store.read([index]) for index in range(len(store.sizes))]
    view = store.read([0]).value[3:9]
    before = [batch.value.clone() for batch in kept]
    copied = view.clone()
    for _ in range(30):
        store.read([1, 2])
    for batch, value in zip(kept, before, strict=True):
        torch.testing.assert_close(batch.value, value)
    torch.testing.assert_close(view, copied)


def test_memory_is_used_again_once_a_batch_is_gone(store):
    addresses = {store.read([0, 1]).value.data_ptr() for _ in range(20)}
    assert len(addresses) == 1


def test_a_damaged_shard_is_refused_by_name(store):
    entry = store.manifest.shards[1]
    path = store.folder / entry.name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=entry.name):
        ShardStore(store.folder)


def test_bytes_are_checked_once_per_process(store, monkeypatch):
    checked = []
    monkeypatch.setattr(loader, "check_shard", lambda path, entry: checked.append(entry.name))
    ShardStore(store.folder)
    assert checked == []
    touched = store.folder / store.manifest.shards[0].name
    touched.touch()
    ShardStore(store.folder)
    assert checked == [store.manifest.shards[0].name]


def test_prefetching_changes_neither_order_nor_errors():
    assert list(prefetch(range(50))) == list(range(50))
    assert list(prefetch([])) == []

    def fails():
        yield 1
        raise KeyError("here")

    items = prefetch(fails())
    assert next(items) == 1
    with pytest.raises(KeyError, match="here"):
        next(items)


def test_prefetching_stays_two_ahead_and_ends_with_its_consumer():
    made = []

    def endless():
        while True:
            made.append(len(made))
            yield made[-1]

    items = prefetch(endless())
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    deadline = time.monotonic() + 20
    while len(made) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) <= 6  # three taken, two waiting, one in the producer's hand
    items.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "cellplane-prefetch"]
