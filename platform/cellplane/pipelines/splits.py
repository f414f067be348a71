"""Which cells are learned from and which are asked: by sample, at random within every type, or by blocks of tissue.

Neighbouring cells of one slide know one another's anatomy, so a random split flatters whatever looks at positions. Blocks hold
out whole tiles, and the cells in a guard band around them are neither learned from nor asked (PROTOCOLS 2).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from cellplane.data.config import UNLABELLED
from cellplane.errors import DataError

FOLDS, TILES, GUARD_UM = 5, 8, 100.0
FEWEST_CELLS = 10  # of a type: fewer cannot be dealt to five folds with two in each
NO_TYPE = (*UNLABELLED, "Ambiguous")  # texts that name no type


@dataclass(frozen=True)
class Split:
    """Rows to learn from and rows to ask, ascending and disjoint; ``protocol`` says how, ``number`` which."""

    protocol: str
    number: int
    train: NDArray[np.int64]
    test: NDArray[np.int64]

    @property
    def test_share(self) -> float:
        """Test cells for each training cell."""
        return len(self.test) / len(self.train)


def scorable(labels: ArrayLike, fewest: int = FEWEST_CELLS) -> NDArray[np.bool_]:
    """Cells [n] whose label names a type that has at least ``fewest`` cells."""
    known = np.asarray(labels, dtype=object)
    sizes = Counter(name for name in known if name is not None and name not in NO_TYPE)
    return np.array([sizes.get(name, 0) >= fewest for name in known])


def batch_splits(batches: ArrayLike) -> Iterator[Split]:
    """Every sample left out in turn, in the order of their names; DataError for fewer than two."""
    known = np.asarray(batches, dtype=object).astype(str)
    names = sorted(set(known))
    if len(names) < 2:
        raise DataError(f"leaving one sample out needs two of them, found {names}")
    for number, name in enumerate(names):
        yield Split("batch", number, np.flatnonzero(known != name), np.flatnonzero(known == name))


def random_splits(labels: ArrayLike, seed: int, folds: int = FOLDS) -> Iterator[Split]:
    """The cells of every type shuffled and dealt to folds in turn: each cell is asked once."""
    known = np.asarray(labels, dtype=object).astype(str)
    generator = np.random.default_rng(seed)
    order = np.concatenate([generator.permutation(np.flatnonzero(known == name)) for name in sorted(set(known))])
    fold = np.empty(len(known), dtype=np.int64)
    fold[order] = np.arange(len(known)) % folds
    yield from _by_fold("random", fold)


def block_splits(places_um: ArrayLike, seed: int, folds: int = FOLDS, guard_um: float = GUARD_UM) -> Iterator[Split]:
    """8 x 8 tiles of equally many cells dealt to folds; cells within the guard band of a test cell are not learned from.

    ``places_um`` [n, 2] in micrometres. DataError when a place is unknown, or the guard bands leave nothing to learn from.
    """
    places = np.asarray(places_um, dtype=np.float64)
    if places.ndim != 2 or places.shape[1] != 2 or not np.isfinite(places).all():
        raise DataError(f"blocks need finite coordinates of shape [cells, 2], found shape {places.shape}; leave out cells without a place")
    dealt = np.random.default_rng(seed).permutation(np.arange(TILES * TILES) % folds)
    for split in _by_fold("blocks", dealt[tiles(places)]):
        distance, _ = cKDTree(places[split.test]).query(places[split.train])
        kept = split.train[distance > guard_um]
        if not len(kept):
            raise DataError(f"a guard band of {guard_um:g} um leaves no cell to learn from: are the coordinates in micrometres?")
        yield Split(split.protocol, split.number, kept, split.test)


def block_validation(
    places: NDArray[np.float32], samples: NDArray[np.object_] | None, labels: NDArray[np.int64], share: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(kept, held out) rows, ascending: whole tiles are drawn by the seed until ``share`` of the cells is held out.

    Every sample has 8 x 8 tiles of its own. Cells without a place are kept, and of a type that lies in drawn tiles alone the first
    cell. DataError where no cell has a place.
    """
    placed = np.flatnonzero(np.isfinite(places).all(1))
    if not len(placed):
        raise DataError("validation in blocks needs cells with places: set keys.spatial_key, or validation to random")
    sample = np.zeros(len(placed), dtype=object) if samples is None else samples[placed]
    tile = np.zeros(len(placed), dtype=np.int64)
    for number, name in enumerate(sorted(set(sample), key=str)):
        tile[sample == name] = number * TILES * TILES + tiles(places[placed[sample == name]].astype(np.float64))
    names, sizes = np.unique(tile, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    drawn = names[order[: max(1, int(np.searchsorted(sizes[order].cumsum(), share * len(labels), side="right")))]]
    held = np.zeros(len(labels), dtype=bool)
    held[placed[np.isin(tile, drawn)]] = True
    for label in np.setdiff1d(labels, labels[~held]):
        held[np.flatnonzero(labels == label)[0]] = False
    return np.flatnonzero(~held), np.flatnonzero(held)


def tiles(places: NDArray[np.float64], side: int = TILES) -> NDArray[np.int64]:
    """The tile of every cell [n]: ``side`` columns of equally many cells, each cut into ``side`` tiles of equally many."""
    column = _quantile(places[:, 0], side)
    row = np.zeros(len(places), dtype=np.int64)
    for number in range(side):
        row[column == number] = _quantile(places[column == number, 1], side)
    return column * side + row


def _quantile(values: NDArray[Any], parts: int) -> NDArray[np.int64]:
    rank = np.empty(len(values), dtype=np.int64)
    rank[np.argsort(values, kind="stable")] = np.arange(len(values))
    return rank * parts // max(len(values), 1)


def _by_fold(protocol: str, fold: NDArray[np.int64]) -> Iterator[Split]:
    for number in range(int(fold.max()) + 1):
        yield Split(protocol, number, np.flatnonzero(fold != number), np.flatnonzero(fold == number))
