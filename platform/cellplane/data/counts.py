"""What makes a matrix raw counts, and how log1p-normalised values give their counts back.

Normalising multiplies every cell by one factor and takes log1p, so a cell's smallest non-zero value is that of its
smallest count, nearly always 1, and dividing by it undoes the factor. Whether that came out exactly can be proven:
each entry must land near an integer, and one factor per cell must reproduce every stored value within the file's
rounding. Nothing here knows about files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from cellplane.errors import CountsNotFoundError, DataError, IntegrityError

MAX_EXACT_COUNT = 2**24  # float32 holds every integer up to here
MAX_DEVIATION = 0.25  # of a recovered count from its integer, before rounding
MAX_LOG_VALUE = 20.0  # log1p of half a billion: larger values are no logarithms of counts
COARSEST_DECIMALS, FINEST_DECIMALS = 2, 6
FLOAT32_STEP = 2.0**-23  # relative distance of neighbouring float32 values
ASK_FOR_THEM = (
    "set recover_counts=true among its keys (data convert, validate: --recover-counts; else -o keys.recover_counts=true, "
    "where a recipe reads the file -o recipe.keys.recover_counts=true)"
)
SUGGESTION_CELLS = 200  # enough to say whether recovering is worth a try


@dataclass(frozen=True)
class Recovered:
    """Counts that came back from log values: ``deviation`` is the largest distance from an integer, ``decimals`` the file's grid."""

    matrix: sp.csr_matrix
    deviation: float
    decimals: int | None


@dataclass(frozen=True)
class Choice:
    """The place whose counts are used, and the counts, CSR float32."""

    place: str
    matrix: sp.csr_matrix
    recovered: bool = False
    deviation: float = 0.0


Candidate = tuple[str, Callable[[], sp.csr_matrix | None]]


def choose(
    candidates: Sequence[Candidate], recover_counts: bool, totals: NDArray[np.float64] | None = None, there: Sequence[str] = ()
) -> Choice:
    """The first place that holds raw counts, else (when asked) the first whose counts can be recovered exactly.

    ``totals`` [n], where known, are the cells' counts over all genes: recovered ones may not exceed them. Raises
    CountsNotFoundError listing what was seen in every place, which others are ``there``, and whether recovering would work.
    """
    seen: list[tuple[str, str]] = []
    logged: list[tuple[str, sp.csr_matrix]] = []
    for place, load in candidates:
        matrix = load()
        finding = "absent" if matrix is None else describe(matrix, place)
        if matrix is not None and finding is None:
            return Choice(place, matrix.astype(np.float32))
        seen.append((place, str(finding)))
        if matrix is not None and could_be_log(matrix):
            logged.append((place, matrix))
    for place, matrix in logged:
        cells = matrix.shape[0] if recover_counts else min(matrix.shape[0], SUGGESTION_CELLS)
        tried = recover(matrix[:cells], None if totals is None else totals[:cells])
        if tried is not None and recover_counts:
            return Choice(place, tried.matrix, recovered=True, deviation=tried.deviation)
        if tried is not None:
            hint = f"{place} is log1p-normalised and its counts come back exactly: {ASK_FOR_THEM}"
            raise CountsNotFoundError(f"{_listing(seen)}; {hint}")
    others = sorted(set(there) - {place for place, _ in candidates})
    also = f" (not looked at: {', '.join(others)})" if others else ""
    raise CountsNotFoundError(
        f"{_listing(seen)}{also}; put the raw counts into layers['counts'], or name their layer with --layer (keys.layer)"
    )


def _listing(seen: Sequence[tuple[str, str]]) -> str:
    return "no raw counts found: " + ", ".join(f"{place}: {finding}" for place, finding in seen)


def describe(matrix: sp.csr_matrix, place: str, first: int = 0) -> str | None:
    """None when these are raw counts, else what they seem to be. Raises DataError on NaN, inf and counts too large to be exact.

    ``first`` is the number of the first row's cell in its file, for the message.
    """
    data = matrix.data if matrix.dtype != np.float16 else matrix.data.astype(np.float32)
    if data.dtype == bool:
        return "binarised (bool)"
    if not np.issubdtype(data.dtype, np.number) or np.iscomplexobj(data):
        return f"not numbers ({data.dtype})"
    if len(data) == 0 or _exact_counts(data):
        return None
    for wrong, name in ((np.isnan(data), "NaN"), (np.isinf(data), "infinite")):
        if wrong.any():
            where = f"the first at {_position(matrix, wrong, first)}"
            raise DataError(f"{place} holds {int(wrong.sum())} {name} values, {where}; counts are finite numbers")
    if (negative := data < 0).any():
        return f"{int(negative.sum())} negative values, the first at {_position(matrix, negative, first)}: looks scaled"
    if not (data == np.rint(data)).all():
        return "non-integer, looks log1p-normalised" if could_be_log(matrix) else "non-integer, looks normalised"
    if (large := data > MAX_EXACT_COUNT).any():
        where = f"the first at {_position(matrix, large, first)}"
        raise DataError(f"{place} holds counts above {MAX_EXACT_COUNT}, {where}: float32 cannot hold them exactly; check the units")
    return None


def _exact_counts(data: NDArray[Any]) -> bool:
    if not (data.min() >= 0 and data.max() <= MAX_EXACT_COUNT):  # false for NaN too
        return False
    return data.dtype.kind in "iu" or bool((np.rint(data) == data).all())


def _position(matrix: sp.csr_matrix, where: NDArray[np.bool_], first: int) -> str:
    entry = int(np.argmax(where))
    cell = first + int(np.searchsorted(matrix.indptr, entry, side="right")) - 1
    return f"cell {cell}, gene {int(matrix.indices[entry])}"


def could_be_log(matrix: sp.csr_matrix) -> bool:
    """Whether all values lie where logarithms of normalised counts do."""
    data = matrix.data
    return data.dtype.kind == "f" and len(data) > 0 and bool(data.min() > 0) and bool(data.max() < MAX_LOG_VALUE)


def recover(matrix: sp.csr_matrix, totals: NDArray[np.float64] | None = None) -> Recovered | None:
    """Counts of log1p-normalised rows, or None unless every cell's come back exactly.

    Exact: each entry of expm1(x) / smallest within 0.25 of an integer, and one factor per cell that reproduces every
    x within half the file's decimal grid. ``totals`` [n], where known, bound each cell's recovered sum.
    """
    values = matrix.data.astype(np.float64)
    if len(values) == 0:
        return Recovered(matrix.astype(np.float32), 0.0, None)
    starts, lengths = matrix.indptr[:-1], np.diff(matrix.indptr)
    filled = lengths > 0
    starts, lengths = starts[filled], lengths[filled]
    normalised = np.expm1(values)
    ratio = normalised / np.repeat(np.minimum.reduceat(normalised, starts), lengths)
    counts = np.rint(ratio)
    deviation = float(np.abs(ratio - counts).max())
    decimals = decimal_grid(values)
    half = 0.5 * 10.0**-decimals if decimals is not None else 4 * FLOAT32_STEP * np.maximum(values, 1e-3)
    slack = FLOAT32_STEP * np.maximum(values, 1.0)
    lowest = np.maximum.reduceat(np.expm1(values - half - slack) / counts, starts)
    highest = np.minimum.reduceat(np.expm1(values + half + slack) / counts, starts)
    exact = deviation <= MAX_DEVIATION and bool((lowest <= highest).all()) and counts.max() <= MAX_EXACT_COUNT
    if not exact or (totals is not None and (np.add.reduceat(counts, starts) > totals[filled] + 0.5).any()):
        return None
    return Recovered(sp.csr_matrix((counts.astype(np.float32), matrix.indices, matrix.indptr), shape=matrix.shape), deviation, decimals)


def decimal_grid(values: NDArray[np.float64]) -> int | None:
    """To how many decimals all values are rounded, 2 to 6; None when they are not."""
    for decimals in range(COARSEST_DECIMALS, FINEST_DECIMALS + 1):
        if (np.abs(values - np.round(values, decimals)) <= FLOAT32_STEP * np.maximum(np.abs(values), 1.0)).all():
            return decimals
    return None


def canonical(matrix: Any, place: str) -> sp.csr_matrix:
    """Any matrix as CSR with sorted, unique indices and no stored zeros; the argument is never changed.

    Raises IntegrityError on a corrupt sparse structure and DataError on masked arrays, before any native operation.
    """
    if isinstance(matrix, np.ma.MaskedArray):
        raise DataError(f"{place} is a masked array; fill the masked entries first")
    if not sp.issparse(matrix):
        dense = np.asarray(matrix)
        if not (np.issubdtype(dense.dtype, np.number) or dense.dtype == bool):
            raise DataError(f"{place} holds {dense.dtype} values; counts are numbers")
        return sp.csr_matrix(dense)
    if matrix.format in ("csr", "csc"):
        check_structure(matrix.indptr, matrix.indices, tuple(matrix.shape) if matrix.format == "csr" else tuple(matrix.shape[::-1]), place)
        kind = sp.csr_matrix if matrix.format == "csr" else sp.csc_matrix
        matrix = kind((matrix.data, matrix.indices, matrix.indptr), shape=matrix.shape, copy=False)  # own flags, shared arrays
    rows = sp.csr_matrix(matrix, copy=False)
    if not rows.has_canonical_format:
        rows = sp.csr_matrix((summable(rows.data), rows.indices, rows.indptr), shape=rows.shape, copy=True)
        rows.sum_duplicates()
    if len(rows.data) and not rows.data.all():
        rows = rows.copy()
        rows.eliminate_zeros()
    return rows


def summable(data: NDArray[Any]) -> NDArray[Any]:
    """The values in a type that holds their sums: a byte would silently make 44 of 200 + 100."""
    wide = {"u": np.uint64, "i": np.int64, "f": np.promote_types(np.float32, data.dtype) if data.dtype.kind == "f" else None}
    return data.astype(wide.get(data.dtype.kind) or data.dtype, copy=False)


def check_structure(
    indptr: NDArray[np.integer], indices: NDArray[np.integer], shape: tuple[int, ...], place: str, n_entries: int | None = None
) -> None:
    """IntegrityError unless these describe a compressed matrix of ``shape`` (rows, columns).

    ``n_entries`` counts the indices where only the row starts are at hand yet.
    """
    problem = None
    n_entries = len(indices) if n_entries is None else n_entries
    if len(indptr) != shape[0] + 1:
        problem = f"{len(indptr) - 1} row starts for {shape[0]} rows"
    elif int(indptr[0]) != 0 or (np.diff(indptr) < 0).any() or int(indptr[-1]) != n_entries:
        problem = "row starts that do not ascend from 0 to the number of entries"
    elif int(np.diff(indptr).max(initial=0)) > shape[1]:
        problem = f"a row with more entries than its {shape[1]} columns"
    elif len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= shape[1]):
        problem = f"column indices outside 0 to {shape[1] - 1}"
    if problem:
        raise IntegrityError(f"{place} is a corrupt sparse matrix: {problem}; write the file again from its source")
