"""Where the counts of a large file are, judged by a sample of its rows: all of them are checked when they are read."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from cellplane.data.config import DataKeys
from cellplane.data.counts import Candidate, choose
from cellplane.data.reader import CellReader, count_candidates

SAMPLE_CELLS = 256  # read at the beginning, the middle and the end to see what a place holds


def look(reader: CellReader, keys: DataKeys, *, any_values: bool = False) -> tuple[str, bool, sp.csr_matrix]:
    """(place, whether counts must be recovered from logarithms, the sample); ``any_values`` takes X or the named layer as it is.

    Raises what `counts.choose` and `count_candidates` raise.
    """
    cells, totals = reader.n_cells, reader.totals()
    starts = sorted({max(0, min(start, cells - SAMPLE_CELLS)) for start in (0, cells // 2, cells - SAMPLE_CELLS)})
    parts = [(start, min(start + SAMPLE_CELLS, cells)) for start in starts]

    def load(place: str) -> sp.csr_matrix | None:
        return sp.vstack([reader.rows(place, *part) for part in parts], format="csr") if place in reader.places else None

    if any_values:
        place = count_candidates(DataKeys(layer=keys.layer or "X"), reader.places)[0]
        return place, False, load(place)
    candidates: list[Candidate] = [
        (place, lambda place=place: load(place))  # type: ignore[misc]
        for place in count_candidates(keys, reader.places)
    ]
    known = None if totals is None else np.concatenate([totals[start:stop] for start, stop in parts])
    choice = choose(candidates, keys.recover_counts, known, tuple(reader.places))
    return choice.place, choice.recovered, choice.matrix
