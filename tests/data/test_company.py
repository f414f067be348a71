"""In whose company cells are read: every cell asked about once, read-only cells beside it, and nothing of theirs answered."""

from __future__ import annotations

import numpy as np
import pytest

from cellplane.data.company import CONTEXTS, READ_ONLY, context_for, store_beside, store_in
from cellplane.data.sentences import CellTable
from cellplane.errors import ConfigError, DataError

N_GENES = 6


def cells(n: int, *, seed: int = 0, batches: tuple[str, ...] = ("a", "b"), located: bool = True, panel: int = N_GENES) -> CellTable:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 3, n)
    gene = np.concatenate([np.sort(rng.permutation(panel)[:count]) for count in counts]) if n else np.zeros(0)
    return CellTable(
        crow=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        gene=gene.astype(np.int64),
        value=rng.integers(1, 9, int(counts.sum())).astype(np.float32),
        panel=np.arange(N_GENES) < panel,
        batch=np.array([batches[i % len(batches)] for i in range(n)], dtype=object) if batches else None,
        coordinates=rng.uniform(0, 100, (n, 2)).astype(np.float32) if located else None,
    )


def rows_of(store) -> list[int]:
    batch = store.read(range(len(store.sizes)))
    return batch.row[batch.row != READ_ONLY].tolist()


@pytest.mark.parametrize("context", [*CONTEXTS])
@pytest.mark.parametrize("n", [0, 1, 2, 37, 64])
def test_every_context_answers_every_cell_once(context, n):
    store, told = store_in(context, cells(n), 8)
    assert sorted(rows_of(store)) == list(range(n))
    assert store.sizes.max(initial=0) <= (1 if context == "self" else 8)
    assert told.startswith(context)


@pytest.mark.parametrize("context", [*CONTEXTS])
def test_contexts_do_not_mix_batches(context):
    table = cells(50)
    store, _ = store_in(context, table, 8)
    for sentence in range(len(store.sizes)):
        assert len(set(table.batch[store.read([sentence]).row.numpy()])) == 1


def test_a_section_holds_neighbours_and_needs_places():
    table = cells(256, batches=())

    def spread(context: str) -> float:
        store, _ = store_in(context, table, 16)
        places = [table.coordinates[store.read([index]).row.numpy()] for index in range(len(store.sizes))]
        return float(np.mean([place.std(0).mean() for place in places]))

    assert spread("section") < 0.5 * spread("own")
    with pytest.raises(ConfigError, match="spatial_key"):
        store_in("section", cells(5, located=False), 16)


def test_another_name_is_refused():
    with pytest.raises(ConfigError, match="slide"):
        store_in("slide", cells(5), 8)


@pytest.mark.parametrize("located", [True, False])
@pytest.mark.parametrize(("asked", "others"), [(1, 1), (3, 40), (40, 3), (33, 57)])
def test_beside_others_every_asked_cell_is_answered_once(asked, others, located):
    table, beside = cells(asked, located=located), cells(others, seed=1, located=located)
    store, told = store_beside(table, beside, 8)
    assert sorted(rows_of(store)) == list(range(asked))
    assert store.sizes.max() <= 8
    assert f"{others} read-only" in told


@pytest.mark.parametrize("panel", [N_GENES, 3])
def test_others_bring_their_own_counts_and_panel(panel):
    table, beside = cells(5, located=False, batches=()), cells(9, seed=1, located=False, batches=(), panel=panel)
    store, _ = store_beside(table, beside, 8)
    batch = store.read(range(len(store.sizes)))
    asked = batch.row != READ_ONLY
    assert (batch.panels[batch.panel_index[asked]].sum(1) == N_GENES).all()
    assert (batch.panels[batch.panel_index[~asked]].sum(1) == panel).all()
    totals = batch.totals().numpy()
    mine = np.add.reduceat(table.value, table.crow[:-1])
    np.testing.assert_allclose(totals[asked.numpy()], mine[batch.row[asked].numpy()])
    theirs = np.add.reduceat(beside.value, beside.crow[:-1])
    assert set(totals[~asked.numpy()].tolist()) <= set(theirs.tolist())


def test_cells_meet_others_of_their_own_batch_where_there_are_any():
    table = cells(6, batches=("a", "c"), located=False)
    beside = cells(8, seed=1, batches=("a", "b"), located=False)
    store, _ = store_beside(table, beside, 32)
    met = {}
    for rows in store.sentences:
        own = rows[rows < table.n_cells]
        met[table.batch[own[0]]] = {beside.batch[row - table.n_cells] for row in rows[rows >= table.n_cells]}
    assert met == {"a": {"a"}, "c": {"a", "b"}}  # nobody of c is there: everybody may come


def test_everybody_has_their_turn_before_one_comes_again():
    table, beside = cells(16, batches=(), located=False), cells(8, seed=1, batches=(), located=False)
    store, _ = store_beside(table, beside, 8)
    invited = np.concatenate([rows[rows >= 16] for rows in store.sentences])
    assert np.bincount(invited - 16, minlength=8).tolist() == [2] * 8


def test_the_same_cells_are_read_in_the_same_company():
    first, second = (store_beside(cells(20), cells(30, seed=1), 8)[0] for _ in range(2))
    assert [rows.tolist() for rows in first.sentences] == [rows.tolist() for rows in second.sentences]


def test_a_context_of_nobody_and_a_model_of_single_cells_are_refused():
    with pytest.raises(DataError, match="no cells"):
        store_beside(cells(3), cells(0), 8)
    with pytest.raises(ConfigError, match="alone"):
        store_beside(cells(3), cells(3), 1)


def test_one_cell_without_a_place_leaves_the_others_in_their_patches():
    table = cells(256, batches=())
    table.coordinates[7] = np.nan
    store, _ = store_in("section", table, 16)
    assert sorted(rows_of(store)) == list(range(256))
    located = [part for part in (table.coordinates[store.read([index]).row.numpy()] for index in range(len(store.sizes))) if len(part) > 1]
    assert max(float(part.std(0).mean()) for part in located) < 0.5 * float(np.nanstd(table.coordinates, 0).mean())


def test_own_means_patches_to_a_model_that_reads_places():
    table = cells(256, batches=())
    assert context_for("own", False) == "own"
    assert context_for("self", True) == "self"
    store, told = store_in(context_for("own", True), table, 16)
    section, _ = store_in("section", table, 16)
    assert [part.tolist() for part in store.sentences] == [part.tolist() for part in section.sentences]
    assert told.startswith("own: patches")
    nowhere = cells(256, batches=(), located=False)
    plain, _ = store_in("own", nowhere, 16)
    near, _ = store_in(context_for("own", True), nowhere, 16)
    assert [part.tolist() for part in near.sentences] == [part.tolist() for part in plain.sentences]
