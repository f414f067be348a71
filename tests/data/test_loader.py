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
from cellplane.data import buffers, loader
from cellplane.data.config import ConvertConfig, DataKeys, SimulateConfig
from cellplane.data.convert import convert_with, write_part
from cellplane.data.loader import ShardStore, prefetch
from cellplane.data.sentences import SentenceWeights
from cellplane.data.simulate import simulate
from cellplane.data.sources import write_h5ad
from cellplane.errors import ConfigError, IntegrityError

KEYS = DataKeys(batch_key="batch", labels_key="cell_type")


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch) -> None:
    """What a node remembers of shards is this test's own."""
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / "home"))


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


def opened_elsewhere(store: ShardStore, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that another process of this node checks when it opens the store."""
    checked: list[str] = []
    check = loader.check_shard
    with monkeypatch.context() as patch:
        patch.setattr(loader, "_verified", {})  # what this process knows by itself
        patch.setattr(loader, "check_shard", lambda path, entry: (checked.append(entry.name), check(path, entry)))
        ShardStore(store.folder)
    return checked


def test_bytes_are_checked_once_per_process_and_node(store, monkeypatch):
    shards = [entry.name for entry in store.manifest.shards]
    assert opened_elsewhere(store, monkeypatch) == []
    (store.folder / shards[0]).touch()
    assert opened_elsewhere(store, monkeypatch) == [shards[0]]
    monkeypatch.setattr(loader, "REMEMBERED_S", -1.0)
    assert opened_elsewhere(store, monkeypatch) == shards


def test_a_shard_that_was_refused_is_refused_again_by_every_process(store, monkeypatch):
    path = store.folder / store.manifest.shards[0].name
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(IntegrityError, match=path.name):
            opened_elsewhere(store, monkeypatch)


def test_without_a_place_to_remember_bytes_are_checked_by_every_process(store, monkeypatch, tmp_path):
    (tmp_path / "a-file").touch()
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / "a-file"))
    shards = [entry.name for entry in store.manifest.shards]
    assert opened_elsewhere(store, monkeypatch) == shards == opened_elsewhere(store, monkeypatch)


def test_what_another_start_of_the_machine_remembered_is_forgotten(store, monkeypatch):
    monkeypatch.setattr(loader, "_boot", lambda: "another")
    assert opened_elsewhere(store, monkeypatch) == [entry.name for entry in store.manifest.shards]
    assert [path.name for path in (loader._remembered()).parent.iterdir()] == ["another"]


def test_sentences_weigh_what_their_sample_or_data_set_weighs(store):
    assert store.draw_weights(None) is None
    rows = store.manifest.sentences
    by_dataset = store.draw_weights(SentenceWeights(column="dataset", values={"b": 2.5}))
    assert by_dataset.tolist() == [2.5 if row.dataset == 1 else 1.0 for row in rows]
    sample = store.manifest.batch_names[2]
    by_sample = store.draw_weights(SentenceWeights(column="batch", values={sample: 0}))
    assert by_sample.tolist() == [0.0 if row.batch == 2 else 1.0 for row in rows]
    with pytest.raises(ConfigError, match="no dataset called 'c'"):
        store.draw_weights(SentenceWeights(column="dataset", values={"c": 1}))


def test_as_many_buffers_as_batches_in_use_are_used_again(store, monkeypatch):
    monkeypatch.setattr(buffers, "MAX_IDLE", 4)

    def read(times: int) -> set[int]:
        held = [store.read([0]) for _ in range(times)]
        return {batch.value.data_ptr() for batch in held}

    assert read(4) == read(4)
    assert len(read(9)) == 9
    for _ in range(3):
        read(1)
    assert len(store._values._arrays) <= 5


def test_a_buffer_that_became_too_small_is_replaced(store):
    small, large = int(store.sizes.argmin()), range(len(store.sizes))
    store.read([small])
    store.read(large)
    assert len(store._values._arrays) == 1


def test_batches_handed_over_by_a_thread_are_not_overwritten_while_they_are_used(store):
    sentences = [index % len(store.sizes) for index in range(60)]
    expected = {index: store.read([index]).value.clone() for index in set(sentences)}
    previous: list[CellBatch] = []
    for index, batch in zip(sentences, prefetch(store.read([index]) for index in sentences), strict=True):
        previous = [*previous[-2:], batch]
        time.sleep(0.001)  # the thread reads on
        assert torch.equal(batch.value, expected[index])
    del batch, previous


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


def test_prefetching_one_ahead_holds_one_item_beside_the_one_in_hand():
    made = []
    items = prefetch((made.append(number) or number for number in range(10)), ahead=1)
    assert next(items) == 0
    deadline = time.monotonic() + 20
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2]
    assert list(items) == list(range(1, 10))


def test_a_producer_is_closed_when_its_consumer_stops():
    closed = threading.Event()

    def produce():
        try:
            yield from range(1000)
        finally:
            closed.set()

    items = prefetch(produce())
    next(items)
    items.close()
    assert closed.is_set()
