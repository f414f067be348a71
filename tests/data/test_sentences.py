"""Cells become sentences, and sentences steps: every one exactly once, and the same on any number of workers."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch

from cellplane.data.sentences import (
    CellTable,
    MemoryStore,
    MicroBatch,
    PlanConfig,
    SentenceWeights,
    StepPlan,
    contexts,
    deal,
    draw_weights,
    memory_store,
)
from cellplane.errors import ConfigError, DataError


def keys_of(sizes: dict[str, int], seed: int = 0) -> list[str]:
    """Keys of the cells, shuffled."""
    keys = [key for key, size in sizes.items() for _ in range(size)]
    return np.random.default_rng(seed).permutation(keys).tolist()


KEYS = keys_of({"a": 23, "b": 5, "c": 1, "d": 10})


def same(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return [rows.tolist() for rows in left] == [rows.tolist() for rows in right]


@pytest.mark.parametrize("max_cells", [1, 4, 5, 10, 100])
def test_every_cell_is_in_exactly_one_sentence(max_cells):
    rows = np.concatenate(contexts(KEYS, len(KEYS), max_cells))
    assert sorted(rows.tolist()) == list(range(len(KEYS)))


@pytest.mark.parametrize("max_cells", [1, 4, 10, 100])
def test_no_sentence_mixes_keys_or_is_too_long(max_cells):
    for rows in contexts(KEYS, len(KEYS), max_cells):
        assert len({KEYS[row] for row in rows}) == 1
        assert 1 <= len(rows) <= max_cells
        assert (np.diff(rows) > 0).all()


def test_a_long_key_is_split_evenly_into_as_few_sentences_as_possible():
    sizes = sorted(len(rows) for rows in contexts(None, 23, 10))
    assert sizes == [7, 8, 8]


def test_a_split_is_a_random_sample_of_the_key():
    first, *_ = contexts(None, 1000, 250)
    assert 400 < first.mean() < 600


def test_the_same_input_gives_the_same_sentences_and_another_seed_others():
    assert same(contexts(KEYS, 39, 10), contexts(KEYS, 39, 10))
    assert not same(contexts(KEYS, 39, 10, seed=0), contexts(KEYS, 39, 10, seed=1))


def test_a_key_is_split_alike_whatever_other_keys_there_are():
    alone = contexts(["a"] * 23, 23, 10)
    after = contexts(["b"] * 40 + ["a"] * 23, 63, 10)
    before = contexts(["a"] * 23 + ["b"] * 40, 63, 10)
    assert same(alone, before[:3])
    assert same(alone, [rows - 40 for rows in after[-3:]])


def test_no_cells_are_no_sentences():
    assert contexts(None, 0, 10) == contexts([], 0, 10) == []


def test_a_sentence_without_room_is_refused():
    with pytest.raises(DataError, match="max_cells is 0"):
        contexts(None, 3, 0)


@pytest.fixture
def table() -> CellTable:
    counts = np.random.default_rng(0).poisson(0.7, (39, 12)).astype(np.float32)
    cell, gene = np.nonzero(counts)
    crow = np.concatenate([[0], np.cumsum((counts != 0).sum(1))])
    rows = np.arange(39)
    return CellTable(
        crow=crow.astype(np.int64),
        gene=gene.astype(np.int64),
        value=counts[cell, gene],
        panel=np.ones(12, dtype=bool),
        batch=np.array(KEYS, dtype=object),
        coordinates=np.stack([rows, -rows], 1).astype(np.float32),
        labels=rows.astype(np.int64),
    )


def test_reading_gives_the_rows_of_the_sentences_in_the_order_asked(table):
    store = memory_store(table, 10)
    batch = store.read([3, 0])
    rows = np.concatenate([store.sentences[3], store.sentences[0]])
    assert batch.row.tolist() == rows.tolist()
    assert batch.labels.tolist() == rows.tolist()
    assert batch.coordinates[:, 1].tolist() == (-rows).tolist()
    assert batch.cu_seqlens.diff().tolist() == [len(store.sentences[3]), len(store.sentences[0])]
    assert batch.totals().tolist() == [float(table.value[table.crow[row] : table.crow[row + 1]].sum()) for row in rows]


def test_together_the_sentences_of_a_store_hold_every_entry_once(table):
    store = memory_store(table, 7)
    batch = store.read(range(len(store.sizes)))
    assert int(store.sizes.sum()) == batch.n_cells == 39
    assert float(batch.value.sum()) == float(table.value.sum())


def test_reading_no_sentence_gives_an_empty_batch(table):
    batch = memory_store(table, 10).read([])
    assert (batch.n_cells, batch.n_sentences, batch.n_genes) == (0, 0, 12)


def test_what_a_table_does_not_have_is_unknown_in_the_batch(table):
    bare = CellTable(table.crow, table.gene, table.value, table.panel)
    batch = MemoryStore(bare, [np.arange(39)]).read([0])
    assert batch.labels is None
    assert bool(batch.coordinates.isnan().all())
    assert torch.equal(batch.batch_index, torch.full((39,), -1))


SIZES = np.random.default_rng(1).integers(1, 300, 57)
PLAN = PlanConfig(seed=3, cells_per_micro_batch=600, micro_batches_per_step=3)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_sentence_comes_once_in_an_epoch(epoch):
    plan = StepPlan(SIZES, PLAN)
    first = sum(plan.steps_of_epoch(earlier) for earlier in range(epoch))
    steps = [plan.at(first + step) for step in range(plan.steps_of_epoch(epoch))]
    seen = [sentence for step in steps for micro_batch in step for sentence in micro_batch.sentences]
    assert sorted(seen) == list(range(57))
    assert plan.epoch_of(first) == (epoch, first)


def test_a_step_depends_on_its_number_alone_in_whatever_order_steps_are_asked():
    asked = np.random.default_rng(0).permutation(60).tolist()
    forward = [StepPlan(SIZES, PLAN).at(step) for step in range(60)]
    plan = StepPlan(SIZES, PLAN)
    shuffled = {step: plan.at(step) for step in asked}
    assert [shuffled[step] for step in range(60)] == forward


def test_a_micro_batch_keeps_to_its_cells_unless_one_sentence_is_longer():
    plan = StepPlan(np.array([100, 700, 100, 500, 650]), PLAN)
    for micro_batch in chain.from_iterable(plan.at(step) for step in range(6)):
        cells = sum((100, 700, 100, 500, 650)[sentence] for sentence in micro_batch.sentences)
        assert cells <= 600 or len(micro_batch.sentences) == 1


def test_epochs_are_ordered_differently():
    plan = StepPlan(SIZES, PLAN)
    assert plan.at(0)[0].sentences != plan.at(plan.steps_of_epoch(0))[0].sentences


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_workers_together_run_the_step_and_each_runs_equally_many(world_size):
    micro_batches = StepPlan(SIZES, PlanConfig(cells_per_micro_batch=300, micro_batches_per_step=7)).at(0)
    dealt = [deal(micro_batches, rank, world_size) for rank in range(world_size)]
    assert len({len(own) for own in dealt}) == 1
    run = [micro_batch for own in dealt for micro_batch in own if micro_batch is not None]
    assert sorted(run, key=micro_batches.index) == micro_batches


def an_epoch(plan: StepPlan, epoch: int) -> list[list[MicroBatch]]:
    """The micro-batches of every step of an epoch."""
    first = sum(plan.steps_of_epoch(earlier) for earlier in range(epoch))
    return [plan.at(first + step) for step in range(plan.steps_of_epoch(epoch))]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("epoch", [0, 2])
def test_any_number_of_ranks_sees_every_sentence_once_an_epoch_in_the_same_micro_batches(world_size, epoch):
    plans = [StepPlan(SIZES, PLAN) for _ in range(world_size)]  # every worker computes its own
    dealt = [[deal(step, rank, world_size) for step in an_epoch(plans[rank], epoch)] for rank in range(world_size)]
    together = [[own[turn] for turn in range(len(step[0])) for own in step if own[turn] is not None] for step in zip(*dealt, strict=True)]
    assert together == an_epoch(StepPlan(SIZES, PLAN), epoch)
    seen = [sentence for step in together for micro_batch in step for sentence in micro_batch.sentences]
    assert sorted(seen) == list(range(len(SIZES)))


def drawn(plan: StepPlan, epochs: int) -> np.ndarray:
    """How often each sentence comes in so many epochs."""
    steps = chain.from_iterable(an_epoch(plan, epoch) for epoch in range(epochs))
    return np.bincount([sentence for step in steps for part in step for sentence in part.sentences], minlength=len(plan.sizes))


WEIGHTS = np.random.default_rng(5).gamma(1.0, size=57)


def test_a_weighted_epoch_draws_every_sentence_as_often_as_its_weight_says():
    expected = 57 * WEIGHTS / WEIGHTS.sum()
    plan = StepPlan(SIZES, PLAN, WEIGHTS)
    once = drawn(plan, 1)
    assert once.sum() == 57
    assert (abs(once - expected) < 1).all()
    np.testing.assert_allclose(drawn(plan, 200) / 200, expected, atol=0.2)


@pytest.mark.parametrize("weight", [1.0, 0.1, 3.0])
def test_equal_weights_draw_every_sentence_once_and_a_weight_of_zero_leaves_out(weight):
    plan = StepPlan(SIZES, PLAN, np.full(57, weight))
    for epochs in (1, 2, 20):
        assert (drawn(plan, epochs) == epochs).all()
    half = np.where(np.arange(57) % 2, weight, 0.0)
    assert drawn(StepPlan(SIZES, PLAN, half), 3).tolist() == [0, 3] * 28 + [0]


def test_a_weighted_step_depends_on_its_number_alone():
    forward = [StepPlan(SIZES, PLAN, WEIGHTS).at(step) for step in range(60)]
    plan = StepPlan(SIZES, PLAN, WEIGHTS)
    shuffled = {step: plan.at(step) for step in np.random.default_rng(0).permutation(60).tolist()}
    assert [shuffled[step] for step in range(60)] == forward


def test_a_sentence_that_comes_twice_is_masked_differently():
    weights = np.ones(57)
    weights[7] = 40.0
    parts = list(chain.from_iterable(an_epoch(StepPlan(SIZES, PLAN, weights), 0)))
    seeds = [seed for part in parts for sentence, seed in zip(part.sentences, part.seeds, strict=True) if sentence == 7]
    assert len(seeds) == len(set(seeds)) > 10


@pytest.mark.parametrize("weights", [np.zeros(57), np.full(57, -1.0), np.full(57, np.nan), np.ones(3)])
def test_weights_that_draw_nothing_are_refused(weights):
    with pytest.raises(DataError, match="weight"):
        StepPlan(SIZES, PLAN, weights)


def test_a_configuration_with_weights_needs_them_computed():
    weighted = PLAN.model_copy(update={"weights": SentenceWeights(column="batch")})
    with pytest.raises(ConfigError, match=r"plan\.weights"):
        StepPlan(SIZES, weighted)


def test_weights_are_those_of_the_names_in_a_column():
    column, names = np.array([0, 1, 1, 2, -1]), ("liver", "lung", "skin")
    weights = draw_weights(SentenceWeights(column="dataset", values={"lung": 3, "skin": 0}), column, names)
    assert weights.tolist() == [1, 3, 3, 0, 1]
    with pytest.raises(ConfigError, match=r"no dataset called 'lungs'; did you mean 'lung'"):
        draw_weights(SentenceWeights(column="dataset", values={"lungs": 3}), column, names)


def test_the_state_of_a_plan_is_a_step_number():
    """A pickled or fresh plan goes on where another stood: nothing but (seed, step) decides."""
    steady = StepPlan(SIZES, PLAN)
    for step in range(40):
        steady.at(step)
    assert steady.at(40) == StepPlan(SIZES, PLAN).at(40)


def test_seeds_and_keys_depend_on_the_seed_the_epoch_and_the_step():
    one, other = StepPlan(SIZES, PLAN), StepPlan(SIZES, PLAN.model_copy(update={"seed": 4}))
    keys = [micro_batch.key for plan in (one, other) for step in range(40) for micro_batch in plan.at(step)]
    seeds = [seed for plan in (one, other) for step in range(40) for micro_batch in plan.at(step) for seed in micro_batch.seeds]
    assert len(set(keys)) == len(keys)
    assert len(set(seeds)) == len(seeds)


def test_a_sentence_has_the_same_seed_however_it_is_packed():
    def seeds(cells: int) -> dict[int, int]:
        plan = StepPlan(SIZES, PlanConfig(cells_per_micro_batch=cells))
        micro_batches = chain.from_iterable(plan.at(step) for step in range(plan.steps_of_epoch(0)))
        return dict(chain.from_iterable(zip(part.sentences, part.seeds, strict=True) for part in micro_batches))

    assert seeds(300) == seeds(5000)


def test_reading_a_micro_batch_sets_the_seeds_of_its_sentences(table):
    store = memory_store(table, 10)
    micro_batch = StepPlan(store.sizes, PLAN).at(0)[0]
    batch = micro_batch.read(store)
    assert tuple(batch.sentence_seed.tolist()) == micro_batch.seeds
    assert batch.cu_seqlens.diff().tolist() == store.sizes[list(micro_batch.sentences)].tolist()


def test_nothing_to_train_on_is_refused():
    with pytest.raises(DataError, match="no sentences"):
        StepPlan(np.zeros(0, dtype=np.int64), PLAN)
