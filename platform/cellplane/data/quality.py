"""What the cells of a file look like: one pass over their counts, and the distances between them.

`validate` judges what is found here. A pass keeps a few numbers for each cell and each gene, whatever the file's size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from cellplane.data.looking import NotCountsError, counts_at
from cellplane.data.reader import CellReader
from cellplane.data.sentences import CellTable

log = logging.getLogger(__name__)

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
NAMES_AT_ONCE = 100_000
DOUBLET_MADS = 4.0  # median absolute deviations of log library size above the median
MAD_TO_SIGMA = 1.4826  # of a normal distribution
WIDE_PANEL, FEW_GENES, FEW_SHARE = 2000, 200, 0.05  # a cell of a wide panel should show 200 genes, of a small one 5 %
PLAUSIBLE_UM = (1.0, 150.0)  # between neighbours: cells of a dense culture, and the spots of a Visium slide with room above
SPACING_CELLS = 20_000  # enough nearest neighbours for a median


@dataclass
class Scan:
    """Every cell's total and number of genes seen [n], every gene's total [G]; ``wrong`` says what is no count, or is None."""

    totals: NDArray[np.float64]
    detected: NDArray[np.int64]
    gene_totals: NDArray[np.float64]
    entries: int = 0
    largest: float = 0.0
    deviation: float = 0.0
    wrong: str | None = field(default=None)


def scan(reader: CellReader, place: str, recovered: bool, progress: Callable[[int], None]) -> Scan:
    """One pass over all cells, some tens of MB at a time; it ends early at the first values that are no counts.

    Raises DataError (NaN, infinite or too large values) and IntegrityError (a corrupt matrix).
    """
    cells, columns = reader.n_cells, reader.matrix(place).shape[1]
    found = Scan(np.zeros(cells), np.zeros(cells, dtype=np.int64), np.zeros(columns))
    try:
        for low, matrix, deviation in counts_at(reader, place, recovered):
            high, found.deviation = low + matrix.shape[0], max(found.deviation, deviation)
            found.totals[low:high] = np.asarray(matrix.sum(axis=1, dtype=np.float64)).ravel()
            found.detected[low:high] = np.diff(matrix.indptr)
            found.gene_totals += np.bincount(matrix.indices, weights=matrix.data, minlength=columns)
            found.entries += matrix.nnz
            found.largest = max(found.largest, float(matrix.data.max(initial=0)))
            progress(high)
    except NotCountsError as error:
        found.wrong = str(error)
    return found


def quantiles(values: NDArray[Any]) -> dict[str, float]:
    """Quantiles by their percentage, {"0": .., "1": .., ..., "100": ..}."""
    return {f"{100 * q:.0f}": float(value) for q, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}


def high_totals(totals: NDArray[np.float64]) -> float:
    """Share of cells whose library is far above the others' (log scale): doublets hide there."""
    logged = np.log(totals[totals > 0])
    if not len(logged):
        return 0.0
    middle = np.median(logged)
    spread = MAD_TO_SIGMA * np.median(np.abs(logged - middle))
    return float((logged > middle + DOUBLET_MADS * spread).sum() / len(totals)) if spread > 0 else 0.0


def few_genes(detected: NDArray[np.int64], n_genes: int) -> tuple[int, float]:
    """How many genes a cell should show at least, and the share of cells below that."""
    floor = FEW_GENES if n_genes >= WIDE_PANEL else max(1, round(FEW_SHARE * n_genes))
    return floor, float((detected < floor).mean())


def repeated_cells(reader: CellReader) -> int:
    """How many cells have the name of an earlier one; 8 bytes a cell."""
    starts = range(0, reader.n_cells, NAMES_AT_ONCE)
    hashes = [pd.util.hash_array(_texts(reader, start), categorize=False) for start in starts]
    return int(pd.Series(np.concatenate(hashes)).duplicated().sum()) if hashes else 0


def _texts(reader: CellReader, start: int) -> NDArray[np.object_]:
    names = reader.cell_names(start, min(start + NAMES_AT_ONCE, reader.n_cells))
    return np.array([str(name) for name in names], dtype=object)


def spacing(coordinates: NDArray[np.float32], groups: Sequence[NDArray[np.int64]]) -> tuple[float, float]:
    """Median distance to the nearest neighbour at another place, in the file's unit, and the share of cells that share a place.

    ``groups`` are the cells [n] of each slide: neighbours lie on the same one. NaN where no slide has two places.
    """
    distances, doubled, seen = [], 0, 0
    for cells in groups:
        places, first = np.unique(coordinates[cells], axis=0, return_index=True)
        doubled += len(cells) - len(first)
        seen += len(cells)
        if len(places) < 2:
            continue
        step = -(-len(places) // SPACING_CELLS)
        distances.append(cKDTree(places).query(places[::step], k=2)[0][:, 1])
    return (float(np.median(np.concatenate(distances))) if distances else float("nan")), doubled / max(seen, 1)


def tell_scale(table: CellTable) -> None:
    """Warns where cells that lie side by side are so near or far that their positions are hardly micrometres."""
    if table.coordinates is None:
        return
    slides = np.zeros(table.n_cells, dtype=np.int64) if table.batch is None else np.unique(table.batch.astype(str), return_inverse=True)[1]
    distance, _ = spacing(table.coordinates, [np.flatnonzero(slides == slide) for slide in np.unique(slides)])
    if np.isfinite(distance) and not PLAUSIBLE_UM[0] <= distance <= PLAUSIBLE_UM[1]:
        log.warning(
            "neighbouring cells lie %.4g apart (median): pixels, millimetres, or only some of the cells? Positions are taken as "
            "micrometres; cellplane data validate suggests a factor",
            distance,
        )
