"""Encoding keeps every entry in its place, and says what it cannot keep; orders of cells are those promised."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.sparse as sp

from cellplane.data.encode import PIECE, Encoded, Encoder, NotWholeError, gathered
from cellplane.data.matrices import RawRows
from cellplane.data.order import hilbert, sentence_patches, sentence_rows, sentence_runs
from cellplane.data.sentences import contexts
from cellplane.errors import DataError, IntegrityError


def encoder(positions: list[int] | np.ndarray, encoding: str = "uint8", counts: bool = True) -> Encoder:
    places = np.asarray(positions, dtype=np.int64)
    return Encoder(places, int(places.max()) + 1, encoding, counts, "a.h5ad: X")


def raw(rows: list[list[tuple[int, float]]], dtype: type = np.float32) -> RawRows:
    """Rows of (column, value)."""
    flat = [entry for row in rows for entry in row]
    indptr = np.cumsum([0, *map(len, rows)])
    return RawRows(indptr, np.array([c for c, _ in flat], dtype=np.int32), np.array([v for _, v in flat], dtype=dtype))


def listed(cells: Encoded) -> list[list[tuple[int, float]]]:
    """The rows of (gene, value) that are stored, escapes resolved."""
    value = cells.x.astype(np.float64)
    value[cells.escaped()] = cells.exact
    entries = list(zip(cells.gene.tolist(), value.tolist(), strict=True))
    return [entries[start:end] for start, end in zip(cells.crow[:-1], cells.crow[1:], strict=True)]


ROWS = [[(2, 5), (0, 255)], [], [(1, 0), (2, 256), (0, 70_000)]]


@pytest.mark.parametrize("encoding", ["uint8", "uint16", "float32", "float64"])
def test_entries_keep_their_order_and_zeros_in_every_encoding(encoding):
    cells = encoder([0, 1, 2], encoding)(raw(ROWS), 0)
    assert listed(cells) == ROWS
    assert cells.x.dtype == encoding
    assert listed(cells.take(np.array([2, 0, 1]))) == [ROWS[2], ROWS[0], ROWS[1]]
    assert listed(Encoded.join([cells.take(np.array([2])), cells])) == [ROWS[2], *ROWS]


def test_columns_go_to_their_positions_and_unknown_ones_go():
    cells = encoder([7, -1, 3])(raw(ROWS), 0)
    assert listed(cells) == [[(3, 5), (7, 255)], [], [(3, 256), (7, 70_000)]]


def test_repeated_entries_and_columns_of_one_gene_are_added_up():
    assert listed(encoder([0, 1, 2])(raw([[(1, 200), (1, 200), (0, 1)], [(2, 1)]]), 0)) == [[(0, 1), (1, 400)], [(2, 1)]]
    assert listed(encoder([0, 1, 0])(raw([[(0, 200), (2, 200)], [(1, 4)]]), 0)) == [[(0, 400)], [(1, 4)]]


def test_pieces_join_without_a_seam():
    rng = np.random.default_rng(0)
    data = rng.integers(1, 400, 3 * PIECE + 17).astype(np.float32)
    columns = np.arange(len(data), dtype=np.int32) % 1000
    edges = np.arange(0, len(data), 1000)
    cells = encoder(rng.permutation(1000))(RawRows(np.append(edges, len(data)), columns, data), 0)
    value = cells.x.astype(np.float32)
    value[cells.escaped()] = cells.exact
    np.testing.assert_array_equal(value, data)


@pytest.mark.parametrize("value", [0.5, -1, np.nan, np.inf, 2.0**25])
def test_what_is_no_count_is_named_with_its_place(value):
    with pytest.raises(DataError, match=r"a\.h5ad: X.*cell"):
        encoder([0, 1])(raw([[(0, 1)], [(1, value)]]), 100)


def test_other_values_ask_for_another_encoding():
    with pytest.raises(NotWholeError):
        encoder([0, 1], counts=False)(raw([[(0, 0.5)]]), 0)
    with pytest.raises(DataError, match="no 64-bit float holds exactly"):
        encoder([0, 1], "float64", counts=False)(raw([[(0, 2**60 + 1)]], np.int64), 0)


@pytest.mark.parametrize("column", [-1, 2, 10**6])
def test_columns_that_do_not_exist_are_refused(column):
    with pytest.raises(IntegrityError, match="column indices outside 0 to 1"):
        encoder([0, 1])(raw([[(0, 1), (column, 1)]]), 0)


def test_sentences_are_those_of_contexts():
    names = ("d", "a", "c")
    codes = np.random.default_rng(1).integers(0, 3, 1000).astype(np.int32)
    rows, edges = sentence_rows(codes, names, 1000, 64, seed=3)
    expected = contexts([names[code] for code in codes], 1000, 64, seed=3)
    assert len(edges) == len(expected) + 1
    for start, end, sentence in zip(edges[:-1], edges[1:], expected, strict=True):
        np.testing.assert_array_equal(rows[start:end], sentence)


def test_the_curve_visits_every_point_of_a_grid_by_single_steps():
    grid = np.stack(np.meshgrid(np.arange(32), np.arange(32)), axis=-1).reshape(-1, 2).astype(np.float32)
    walk = grid[np.argsort(hilbert(grid))]
    assert (np.abs(np.diff(walk, axis=0)).sum(axis=1) == 1).all()
    assert (hilbert(np.zeros((3, 2), dtype=np.float32)) == 0).all()  # all in one place


@pytest.mark.parametrize("codes", [None, np.array([1, 0, 1, 0, 1, 1], dtype=np.int32)])
def test_every_order_holds_every_cell_once_and_no_two_samples_together(codes):
    places = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    for rows, edges in (sentence_patches(codes, places, 2), sentence_runs(codes, 6, 2), sentence_rows(codes, ("a", "b"), 6, 2, 0)):
        assert sorted(rows.tolist()) == list(range(6))
        assert np.diff(edges).max() <= 2
        if codes is not None:
            assert all(len(set(codes[rows[start:end]])) == 1 for start, end in itertools.pairwise(edges))
    assert sp.issparse(raw(ROWS).matrix(3, "X"))


@pytest.mark.parametrize(("dtype", "encoding"), [(np.int8, "uint8"), (np.int8, "uint16"), (np.int16, "uint16"), (np.int32, "uint8")])
def test_negative_integers_never_pass_for_large_ones(dtype, encoding):
    """In an unsigned byte -2 is 254, and back in a signed one it is -2 again: as if it had been kept."""
    rows = raw([[(0, 1), (1, -2)]], dtype)
    with pytest.raises(DataError, match="cells 7 to 7 hold 1 negative values, the first at cell 7, gene 1"):
        encoder([0, 1], encoding)(rows, 7)
    with pytest.raises(NotWholeError):
        encoder([0, 1], encoding, counts=False)(rows, 7)
    assert listed(encoder([0, 1], encoding)(raw([[(0, 1), (1, 100)]], dtype), 7)) == [[(0, 1), (1, 100)]]


def test_infinite_halves_are_no_counts():
    with pytest.raises(DataError, match="1 infinite values, the first at cell 5, gene 1"):
        encoder([0, 1])(raw([[(0, 1), (1, np.inf)]], np.float16), 5)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int8, np.int16, np.float16])
def test_sums_of_repeated_entries_are_as_large_as_they_are(dtype):
    most = 2048 if dtype is np.float16 else int(np.iinfo(dtype).max)
    assert listed(encoder([0, 1])(raw([[(1, most), (1, most), (1, 1)]], dtype), 0)) == [[(1, 2 * most + 1)]]
    assert listed(encoder([0, 0])(raw([[(0, most), (1, most)]], dtype), 0)) == [[(0, 2 * most)]]


@pytest.mark.parametrize("sizes", [[7], [3, 0, 4], [1, 1, 1, 4]])
@pytest.mark.parametrize("kept", [0, 3, 7])
def test_cells_of_several_parts_are_gathered_as_if_they_were_one(sizes, kept):
    """Rows with and without escaped values, in any order, some not at all."""
    rng = np.random.default_rng(len(sizes))
    matrix = sp.random(7, 5, 0.6, format="csr", dtype=np.float32, random_state=rng)
    matrix.data = rng.choice([1, 3, 254, 255, 300, 70_000], len(matrix.data)).astype(np.float32)
    encode, edges = encoder(range(5)), np.cumsum([0, *sizes])
    cut = [matrix[start:end] for start, end in itertools.pairwise(edges)]
    parts = [encode(RawRows(part.indptr.astype(np.int64), part.indices, part.data), 0) for part in cut]
    rows, all_rows = rng.permutation(7)[:kept], [row for part in parts for row in listed(part)]
    assert listed(gathered(parts, rows)) == [all_rows[row] for row in rows]
    assert parts == []
