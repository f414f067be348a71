"""What sentences weigh is known before any forward, and idle ranks keep the others company at weight 0."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cellplane.data.loader import ShardStore
from cellplane.data.sentences import PlanConfig, StepPlan, deal
from cellplane.model.config import MaskingConfig
from cellplane.train.objective import MaskedObjective, work_of


@pytest.fixture(scope="module")
def store(shards) -> ShardStore:
    return ShardStore(Path(shards))


@pytest.fixture
def plan(store) -> StepPlan:
    return StepPlan(store.sizes, PlanConfig(cells_per_micro_batch=24, micro_batches_per_step=3))


def test_a_sentence_weighs_the_cells_that_will_be_masked_in_it(store, plan):
    objective = MaskedObjective(store, MaskingConfig())
    for step in range(3):
        planned = plan.at(step)
        works, total = work_of(objective, planned, planned)
        for work in works:
            assert work.mask is not None
            chosen = torch.bincount(work.batch.sentence_of_cell()[work.mask.hidden_C > 0], minlength=work.batch.n_sentences)
            assert bool((chosen <= work.weights).all())  # a chosen cell may hide nothing by chance, none hides unchosen
        assert total == sum(float(work.weights.sum()) for work in works)


def test_given_weights_take_the_place_of_those(store, plan):
    given = np.arange(len(store.sizes), dtype=np.float64)
    objective = MaskedObjective(store, MaskingConfig(), given)
    planned = plan.at(0)
    works, total = work_of(objective, planned, planned)
    expected = [given[list(micro_batch.sentences)] for micro_batch in planned]
    assert [work.weights.tolist() for work in works] == [weights.tolist() for weights in expected]
    assert total == sum(weights.sum() for weights in expected)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_every_micro_batch_counts_once_whatever_the_number_of_workers(store, plan, world_size):
    objective, planned = MaskedObjective(store, MaskingConfig()), plan.at(0)
    shares = [work_of(objective, planned, deal(planned, rank, world_size)) for rank in range(world_size)]
    assert len({len(works) for works, _ in shares}) == 1  # collectives need equally many on every rank
    assert len({total for _, total in shares}) == 1
    counted = sum(float(work.weights.sum()) for works, _ in shares for work in works)
    assert counted == shares[0][1]
    keys = sorted(work.key for works, _ in shares for work in works if work.weights.any())
    assert keys == sorted(micro_batch.key for micro_batch in planned)


def test_work_moves_as_a_whole_and_stays_what_it_is(store, plan):
    planned = plan.at(0)
    (work, *_), _ = work_of(MaskedObjective(store, MaskingConfig()), planned, planned)
    moved = work.to(torch.device("cpu"))
    assert moved.key == work.key
    assert torch.equal(moved.weights, work.weights)
    assert torch.equal(moved.batch.value, work.batch.value)
    assert replace(work, mask=None).to(torch.device("cpu")).mask is None
    assert moved.to(torch.device("meta")).batch.gene.device.type == "meta"
