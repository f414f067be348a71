"""Which sentences a worker holds at once: few bytes, and no row read twice where that can be had."""

from __future__ import annotations

import numpy as np
import pytest

from cellplane.data import work
from cellplane.data.order import sentence_rows
from cellplane.data.work import cut_spans


def dealt(sizes: list[int], max_cells: int, stored: float = 1.0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Samples of these sizes one after another in a file, as sentences: edges, and the arrays of the plan."""
    codes = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    rows, edges = sentence_rows(codes, [f"s{number}" for number in range(len(sizes))], len(codes), max_cells, seed=0)
    return edges, {"rows": rows, "stored": np.full(len(rows), stored, dtype=np.float32)}


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    monkeypatch.setattr(work, "SPAN_BYTES", 100)


def read_rows(edges: np.ndarray, arrays: dict[str, np.ndarray], spans: list[np.ndarray]) -> int:
    return sum(int(np.ptp(arrays["rows"][edges[span[0]] : edges[span[-1] + 1]])) + 1 for span in spans)


@pytest.mark.parametrize("sizes", [[40] * 10, [120] * 5, [30, 140, 20, 10, 150], [1], [149, 149]])
def test_a_sample_that_fits_is_held_whole_so_that_every_row_is_read_once(sizes):
    edges, arrays = dealt(sizes, max_cells=30)
    spans = cut_spans(edges, arrays)
    assert np.concatenate(spans).tolist() == list(range(len(edges) - 1))
    assert read_rows(edges, arrays, spans) == sum(sizes)
    assert all(edges[span[-1] + 1] - edges[span[0]] <= 150 for span in spans)


def test_a_sample_that_does_not_fit_is_cut_within_the_bytes():
    edges, arrays = dealt([500], max_cells=30)
    spans = cut_spans(edges, arrays)
    assert np.concatenate(spans).tolist() == list(range(len(edges) - 1))
    cells = [int(edges[span[-1] + 1] - edges[span[0]]) for span in spans]
    assert max(cells[:-1]) <= 100
    assert cells[-1] <= 150  # the rest ends with its sample


def test_a_sentence_larger_than_the_bytes_is_held_alone():
    edges, arrays = dealt([40, 40], max_cells=40, stored=10.0)
    assert [span.tolist() for span in cut_spans(edges, arrays)] == [[0], [1]]


def test_some_sentences_of_a_shard_are_cut_like_all():
    edges, arrays = dealt([120, 60, 60], max_cells=30)
    spans = cut_spans(edges[4:], arrays)
    assert [span.tolist() for span in spans] == [[0, 1], [2, 3]]
