"""Columns of the cells: samples, labels, totals and positions, as text or numbers that can be trusted."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellplane.errors import DataError

TOTAL_COLUMNS = ("n_counts", "total_counts")


@dataclass(frozen=True)
class Names:
    """A text column of n cells: ``codes`` [n] int32 are positions in the sorted ``names``, -1 = missing."""

    names: tuple[str, ...]
    codes: NDArray[np.int32]


def as_names(values: Any) -> Names:
    """Any column as sorted names and codes; names no cell has are left out."""
    codes, distinct = pd.factorize(pd.Series(values), use_na_sentinel=True)
    texts = np.array([str(value) for value in distinct], dtype=object)
    names = sorted(set(texts))
    place = {name: position for position, name in enumerate(names)}
    table = np.array([*(place[text] for text in texts), -1], dtype=np.int32)
    return Names(tuple(names), table[codes])


def known_totals(obs: Any) -> NDArray[np.float64] | None:
    """Counts of each cell over all genes as obs n_counts or total_counts tells them, [n]; None where it does not."""
    for key in TOTAL_COLUMNS:
        if key in obs:
            totals = np.asarray(obs[key], dtype=np.float64)
            return totals if np.isfinite(totals).all() else None
    return None


def as_strings(values: Any) -> NDArray[np.object_]:
    """Any column as str objects, missing values as None."""
    series = pd.Series(values)
    strings = np.array([str(value) for value in series], dtype=object)
    strings[series.isna().to_numpy()] = None
    return strings


def missing_column(key: str, known: Sequence[str], place: str = "obs") -> str:
    """The sentence that says a key is not there, and which are near."""
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {', '.join(sorted(known)[:12]) or 'none'}"
    return f"no {key!r} in {place}; {hint}"


def complete(values: NDArray[np.object_], key: str) -> NDArray[np.object_]:
    """The column itself; DataError when a cell has no value in it."""
    if missing := sum(value is None for value in values):
        raise DataError(f"{missing} of {len(values)} cells have no value in obs[{key!r}]; every cell needs its sample: fill or drop them")
    return values


def positions(values: Any, key: str) -> NDArray[np.float32]:
    """Coordinates [n, 2] float32; DataError for another shape or values that are not finite."""
    array = np.asarray(values)
    if array.ndim != 2 or array.shape[1] != 2:
        raise DataError(f"obsm[{key!r}] has shape {array.shape}; two coordinates in micrometres per cell are needed: [n, 2]")
    try:
        array = array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"obsm[{key!r}] holds {array.dtype} values that are no numbers: {error}") from error
    if wrong := int((~np.isfinite(array)).any(axis=1).sum()):
        raise DataError(f"obsm[{key!r}] has {wrong} cells with NaN or infinite coordinates; drop them first")
    return array.astype(np.float32)


def class_positions(labels: NDArray[np.object_], classes: Sequence[str]) -> NDArray[np.int64]:
    """Position of each label among the classes, [n] int64; -1 = missing or not a class."""
    known = {name: position for position, name in enumerate(classes)}
    return np.array([known.get(label, -1) for label in labels], dtype=np.int64)
