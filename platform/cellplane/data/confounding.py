"""Whether cell type and batch can be told from each other (PROTOCOLS 5).

A type that was measured in one batch alone differs from the others by its batch too: an annotator may learn the batch, and
taking the batch out takes the type with it. Nothing can mend that afterwards, so it is said where it begins.
"""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np
from numpy.typing import ArrayLike

from cellplane.data.config import UNLABELLED, DataKeys
from cellplane.data.sources import AnnData, column

log = logging.getLogger(__name__)

FEW_CELLS = 10  # of a type: fewer may lie in one batch by chance
MOST_NAMED = 12


def confounding(data: AnnData, keys: DataKeys) -> str | None:
    """What to say of types that lie in one batch alone, by ``keys.labels_key`` and ``batch_key``; it is told in the log too.

    None without such types, and without one of the two columns.
    """
    if keys.labels_key is None or keys.batch_key is None or {keys.labels_key, keys.batch_key} - set(data.obs.columns):
        return None
    said = confounded(column(data, keys.labels_key), column(data, keys.batch_key))
    if said is not None:
        log.warning("%s", said)
    return said


def confounded(types: ArrayLike, batches: ArrayLike) -> str | None:
    """The same for labels and batches as text, [n] each, None where one is missing: a sentence with the types, or None.

    Batches count that hold labelled cells, and types of at least 10 cells.
    """
    pairs = Counter(zip(np.asarray(types, dtype=object), np.asarray(batches, dtype=object), strict=True))
    cells: dict[str, dict[str, int]] = {}
    for (name, batch), count in pairs.items():
        if name is not None and name not in UNLABELLED and batch is not None:
            cells.setdefault(name, {})[batch] = count
    total = len({batch for found in cells.values() for batch in found})
    alone = {name: found for name, found in sorted(cells.items()) if len(found) == 1 and sum(found.values()) >= FEW_CELLS}
    if total < 2 or not alone:
        return None
    table = [f"{name}: {count} cells, all in {batch}" for name, found in alone.items() for batch, count in found.items()]
    more = [f"and {len(table) - MOST_NAMED} more"] if len(table) > MOST_NAMED else []
    what = f"{len(alone)} of {len(cells)} cell types lie in one of {total} batches alone, so what sets them apart may be the batch"
    return f"{what}: {'; '.join([*table[:MOST_NAMED], *more])}"
