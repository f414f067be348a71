"""No cell is both learned from and asked, every cell is asked once, and neighbours of asked tissue stay out of training."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from cellplane.errors import DataError
from cellplane.pipelines.splits import batch_splits, block_splits, block_validation, random_splits, scorable, tiles

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


def test_validation_in_blocks_holds_out_whole_tiles_of_every_sample():
    samples = np.where(np.arange(len(PLACES)) % 3 == 0, "b", "a").astype(object)
    labels = (PLACES[:, 0] > 1000).astype(np.int64)
    kept, held = block_validation(PLACES.astype(np.float32), samples, labels, 0.15, 0)
    assert sorted([*kept, *held]) == list(range(len(PLACES)))
    assert 0.12 < len(held) / len(PLACES) <= 0.15
    for name in ("a", "b"):
        own = np.flatnonzero(samples == name)
        tile = tiles(PLACES[own].astype(np.float32).astype(np.float64))
        halves = [set(tile[np.isin(own, rows)]) for rows in (kept, held)]
        assert halves[1]
        assert not halves[0] & halves[1]
    again, other = (block_validation(PLACES.astype(np.float32), samples, labels, 0.15, seed)[1] for seed in (0, 1))
    np.testing.assert_array_equal(held, again)
    assert other.tolist() != held.tolist()


def test_validation_in_blocks_keeps_a_cell_of_every_type_and_those_without_a_place():
    places = PLACES[:640].astype(np.float32)
    labels = tiles(places.astype(np.float64))  # every type is a tile
    places[5] = np.nan
    kept, held = block_validation(places, None, labels, 0.3, 0)
    assert set(labels[kept]) == set(range(64))
    assert 5 in kept
    assert len(held) > 100
    with pytest.raises(DataError, match="validation in blocks needs cells with places"):
        block_validation(np.full((5, 2), np.nan, dtype=np.float32), None, np.arange(5), 0.3, 0)
