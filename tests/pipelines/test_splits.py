"""No cell is both learned from and asked, every cell is asked once, and neighbours of asked tissue stay out of training."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from cellplane.errors import DataError
from cellplane.pipelines.splits import batch_splits, block_splits, random_splits, scorable, tiles

LABELS = np.array(["a"] * 50 + ["b"] * 10 + ["c"] * 9 + ["NA"] * 20 + ["Ambiguous"] * 20 + [None] * 3, dtype=object)
PLACES = np.random.default_rng(0).uniform(0, 2000, (1500, 2))


def test_rare_types_and_cells_without_a_type_are_not_scored():
    assert set(LABELS[scorable(LABELS)]) == {"a", "b"}
    assert scorable(LABELS, 9).sum() == 69


@pytest.mark.parametrize("splits", [lambda: random_splits(LABELS[:60], 0), lambda: batch_splits(LABELS[:69])])
def test_every_cell_is_asked_once_and_never_learned_from(splits):
    found = list(splits())
    asked = np.concatenate([split.test for split in found])
    assert sorted(asked) == list(range(len(asked)))
    for split in found:
        assert sorted([*split.train, *split.test]) == list(range(len(asked)))
        assert split.test_share == len(split.test) / len(split.train)


def test_a_random_split_holds_every_type_and_follows_its_seed():
    first, again, other = (list(random_splits(LABELS[:60], seed)) for seed in (0, 0, 1))
    assert all((LABELS[split.test] == "b").sum() == 2 for split in first)
    assert all((one.test == two.test).all() for one, two in zip(first, again, strict=True))
    assert any(one.test.tolist() != two.test.tolist() for one, two in zip(first, other, strict=True))


def test_leaving_a_sample_out_needs_two():
    with pytest.raises(DataError, match="two of them"):
        list(batch_splits(["one"] * 5))


def test_no_cell_near_asked_tissue_is_learned_from():
    found = list(block_splits(PLACES, 0))
    assert sorted(np.concatenate([split.test for split in found])) == list(range(len(PLACES)))
    for split in found:
        assert cdist(PLACES[split.train], PLACES[split.test]).min() > 100
        assert not set(split.train) & set(split.test)


def test_tiles_hold_equally_many_cells_that_lie_together():
    tile = tiles(PLACES)
    sizes = np.bincount(tile)
    assert len(sizes) == 64
    assert sizes.max() - sizes.min() <= 2
    spread = np.mean([PLACES[tile == number].std(0).mean() for number in range(64)])
    assert spread < PLACES.std(0).mean() / 5


def test_coordinates_that_cannot_be_blocks_are_refused():
    with pytest.raises(DataError, match="micrometres"):
        list(block_splits(PLACES / 100, 0))
    with pytest.raises(DataError, match="finite"):
        list(block_splits(np.full((10, 2), np.nan), 0))
