"""Where the counts of a large file are, and those counts, range by range: judged by a sample, checked as they are read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy.sparse as sp

from cellplane.data.config import DataKeys
from cellplane.data.counts import Candidate, choose, describe, recover
from cellplane.data.reader import CellReader, count_candidates
from cellplane.errors import DataError

SAMPLE_CELLS = 256  # read at the beginning, the middle and the end to see what a place holds


class NotCountsError(DataError):
    """A place whose sample held counts holds something else further on."""


def samples_of(n_cells: int) -> list[tuple[int, int]]:
    """The row ranges that are looked at: beginning, middle and end."""
    starts = sorted({max(0, min(start, n_cells - SAMPLE_CELLS)) for start in (0, n_cells // 2, n_cells - SAMPLE_CELLS)})
    return [(start, min(start + SAMPLE_CELLS, n_cells)) for start in starts]


def sample(reader: CellReader, place: str) -> sp.csr_matrix:
    """Rows of the beginning, the middle and the end."""
    return sp.vstack([reader.rows(place, *part) for part in samples_of(reader.n_cells)], format="csr")


def look(reader: CellReader, keys: DataKeys, *, any_values: bool = False) -> tuple[str, bool, sp.csr_matrix]:
    """(place, whether counts must be recovered from logarithms, the sample); ``any_values`` takes X or the named layer as it is.

    Raises what `counts.choose` and `count_candidates` raise.
    """
    totals = reader.totals()
    if any_values:
        place = count_candidates(DataKeys(layer=keys.layer or "X"), reader.places)[0]
        return place, False, sample(reader, place) if place in reader.places else None
    candidates: list[Candidate] = [
        (place, lambda place=place: sample(reader, place) if place in reader.places else None)  # type: ignore[misc]
        for place in count_candidates(keys, reader.places)
    ]
    known = None if totals is None else np.concatenate([totals[start:stop] for start, stop in samples_of(reader.n_cells)])
    choice = choose(candidates, keys.recover_counts, known, tuple(reader.places))
    return choice.place, choice.recovered, choice.matrix


def counts_at(reader: CellReader, place: str, recovered: bool) -> Iterator[tuple[int, sp.csr_matrix, float]]:
    """(first row, counts, largest deviation of recovered ones) of all cells, some tens of MB at a time, canonical CSR.

    Raises NotCountsError at the first values that are none, DataError (NaN, infinite or too large values) and
    IntegrityError (a corrupt matrix).
    """
    columns, known = reader.matrix(place).shape[1], reader.totals() if recovered else None
    for low, rows in reader.parts(place, 0, reader.n_cells):
        matrix = rows.matrix(columns, place)
        high = low + matrix.shape[0]
        if not recovered:
            if finding := describe(matrix, place, low):
                raise NotCountsError(f"{place} begins like counts, but cells {low} to {high} hold {finding}")
            yield low, matrix, 0.0
            continue
        again = recover(matrix, None if known is None else known[low:high])
        if again is None:
            raise NotCountsError(f"the counts of cells {low} to {high} in {place} do not come back exactly")
        yield low, again.matrix, again.deviation
