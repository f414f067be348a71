"""Bodies become cells or a clear refusal; nothing is decompressed before its size is known."""

from __future__ import annotations

import json
import pickle
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from cellplane.client import ARROW_TYPE, GENE_IDS, JSON_TYPE, N_ROWS, read_answer, write_stream
from cellplane.errors import ServiceError, VocabularyError
from cellplane.genes import GeneVocabulary
from serve.codec import Cells, decode, encode, to_store
from serve.limits import Limits

LIMITS = Limits(max_cells=100, max_genes=500, max_decoded_bytes=1_000_000)
GENE_NAMES = [f"GENE{gene:04d}" for gene in range(1, 21)]


def table(**columns: object) -> pa.Table:
    """Three cells, whose columns can be replaced, added, or left out with None."""
    given: dict[str, object] = {
        "gene": pa.array([[0, 2], [], [19]], pa.list_(pa.int32())),
        "count": pa.array([[1, 5], [], [2]], pa.list_(pa.float32())),
        **columns,
    }
    return pa.table({name: values for name, values in given.items() if values is not None})


def body(content: pa.Table | None = None, **metadata: object) -> bytes:
    return write_stream(table() if content is None else content, {GENE_IDS: GENE_NAMES, **metadata})


def refusal(data: bytes, kind: str = ARROW_TYPE, limits: Limits = LIMITS) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        decode(data, kind, limits)
    return caught.value


def as_json(**changes: object) -> bytes:
    cells = {"gene_ids": GENE_NAMES, "gene": [[0, 2], [], [19]], "count": [[1, 5], [], [2]], **changes}
    return json.dumps({key: value for key, value in cells.items() if value is not None}).encode()


def assert_three_cells(cells: Cells) -> None:
    assert list(cells.gene_ids) == GENE_NAMES
    assert cells.crow.tolist() == [0, 2, 2, 3]
    assert cells.gene.tolist() == [0, 2, 19]
    assert cells.value.tolist() == [1, 5, 2]


def test_arrow_and_json_give_the_same_cells() -> None:
    assert_three_cells(decode(body(), ARROW_TYPE, LIMITS))
    assert_three_cells(decode(as_json(), JSON_TYPE, LIMITS))


def test_dense_counts_mean_the_same_as_sparse_ones() -> None:
    dense = np.zeros((3, 20))
    dense[0, [0, 2]], dense[2, 19] = [1, 5], 2
    vocabulary = GeneVocabulary.from_ids(GENE_NAMES)
    sparse_store, *_ = to_store(decode(body(), ARROW_TYPE, LIMITS), vocabulary.align, 8)
    column = pa.array(dense.tolist(), pa.list_(pa.float32()))
    for data, kind in (
        (body(table(gene=None, count=None, counts=column)), ARROW_TYPE),
        (as_json(gene=None, count=None, counts=dense.tolist()), JSON_TYPE),
    ):
        dense_store, *_ = to_store(decode(data, kind, LIMITS), vocabulary.align, 8)
        assert dense_store.table.crow.tolist() == sparse_store.table.crow.tolist()
        assert dense_store.table.gene.tolist() == sparse_store.table.gene.tolist()
        assert dense_store.table.value.tolist() == sparse_store.table.value.tolist()


def test_several_record_batches_are_one_request() -> None:
    content = table()
    metadata = {GENE_IDS: json.dumps(GENE_NAMES), N_ROWS: "3"}
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, content.schema.with_metadata(metadata)) as writer:
        for row in range(3):
            writer.write_table(content.slice(row, 1).replace_schema_metadata(metadata))
    assert_three_cells(decode(sink.getvalue().to_pybytes(), ARROW_TYPE, LIMITS))


def test_optional_columns_arrive() -> None:
    extra = {
        "sentence": pa.array([7, 7, 1], pa.int32()),
        "x_um": pa.array([1.5, None, 2], pa.float32()),
        "y_um": pa.array([0, None, 4], pa.float32()),
        "cell_id": pa.array(["a", "\u00e9", "c"]),
    }
    cells = decode(body(table(**extra)), ARROW_TYPE, LIMITS)
    assert cells.sentence is not None
    assert cells.coordinates is not None
    assert cells.cell_id is not None
    assert cells.sentence.tolist() == [7, 7, 1]
    assert np.array_equal(cells.coordinates, np.array([[1.5, 0], [np.nan, np.nan], [2, 4]], dtype=np.float32), equal_nan=True)
    assert list(cells.cell_id) == ["a", "\u00e9", "c"]


def test_a_sentence_column_is_kept_and_a_batch_column_is_split() -> None:
    vocabulary = GeneVocabulary.from_ids(GENE_NAMES)
    by_sentence, _, warnings = to_store(
        decode(body(table(sentence=pa.array([7, 1, 7], pa.int32()))), ARROW_TYPE, LIMITS), vocabulary.align, 1
    )
    assert [rows.tolist() for rows in by_sentence.sentences] == [[1], [0, 2]]
    assert any("trained with up to 1" in warning for warning in warnings)
    by_batch, _, _ = to_store(decode(body(table(batch=pa.array(["b", "a", "b"]))), ARROW_TYPE, LIMITS), vocabulary.align, 8)
    assert sorted(rows.tolist() for rows in by_batch.sentences) == [[0, 2], [1]]


def test_repeated_genes_of_a_cell_are_summed_and_empty_cells_flagged() -> None:
    twice = table(gene=pa.array([[3, 3], [], [1]], pa.list_(pa.int32())))
    store, report, warnings = to_store(decode(body(twice), ARROW_TYPE, LIMITS), GeneVocabulary.from_ids(GENE_NAMES).align, 8)
    assert store.table.gene.tolist() == [3, 1]
    assert store.table.value.tolist() == [6, 2]
    assert report["overlap"] == 1.0
    assert report["count_share"] == 1.0
    assert any(warning.startswith("1 cells have no counts") for warning in warnings)


def test_foreign_genes_are_a_vocabulary_error() -> None:
    with pytest.raises(VocabularyError, match="0 of 20 genes"):
        to_store(decode(body(), ARROW_TYPE, LIMITS), GeneVocabulary.from_ids(f"ENSG{gene:011d}" for gene in range(30)).align, 8)


def list_of(values: list[list[object]], kind: pa.DataType) -> pa.Array:
    return pa.array(values, pa.list_(kind))


BAD_ARROW = {
    "gene int64": (422, "gene", {"gene": list_of([[0, 2], [], [19]], pa.int64())}),
    "count float64": (422, "count", {"count": list_of([[1, 5], [], [2]], pa.float64())}),
    "count text": (422, "count", {"count": pa.array(["1", "2", "3"])}),
    "batch dictionary": (422, "batch", {"batch": pa.array(["a", "b", "a"]).dictionary_encode()}),
    "unknown column": (422, "celltype", {"celltype": pa.array(["a", "b", "c"])}),
    "missing cell": (422, "gene", {"gene": list_of([[0, 2], None, [19]], pa.int32())}),  # type: ignore[list-item]
    "missing gene": (422, "gene", {"gene": list_of([[0, None], [], [19]], pa.int32())}),
    "missing batch": (422, "batch", {"batch": pa.array(["a", None, "c"])}),
    "no counts": (422, "counts are missing", {"count": None}),
    "ragged": (422, "row 2", {"count": list_of([[1, 5], [], [2, 3]], pa.float32())}),
    "negative": (422, "row 2", {"count": list_of([[1, 5], [], [-2]], pa.float32())}),
    "NaN": (422, "row 0", {"count": list_of([[1, float("nan")], [], [2]], pa.float32())}),
    "infinite": (422, "row 0", {"count": list_of([[1, float("inf")], [], [2]], pa.float32())}),
    "normalised": (422, "row 0", {"count": list_of([[1.5, 5], [], [2]], pa.float32())}),
    "too large": (422, "16777216", {"count": list_of([[2.0**25, 5], [], [2]], pa.float32())}),
    "gene too high": (422, "row 2", {"gene": list_of([[0, 2], [], [20]], pa.int32())}),
    "gene negative": (422, "row 0", {"gene": list_of([[0, -1], [], [1]], pa.int32())}),
    "dense and sparse": (422, "not both", {"counts": list_of([[1], [1], [1]], pa.float32())}),
    "x alone": (422, "x_um", {"x_um": pa.array([1, 2, 3], pa.float32())}),
    "far away": (422, "row 1", {"x_um": pa.array([1, 1e30, 3], pa.float32()), "y_um": pa.array([1, 2, 3], pa.float32())}),
    "mixed sentence": (422, "two batches", {"sentence": pa.array([1, 1, 2], pa.int32()), "batch": pa.array(["a", "b", "c"])}),
}


@pytest.mark.parametrize("case", BAD_ARROW)
def test_arrow_cells_that_make_no_sense_are_refused_by_name(case: str) -> None:
    status, words, columns = BAD_ARROW[case]
    error = refusal(body(table(**columns)))
    assert error.status == status
    assert words in error.message


@pytest.mark.parametrize("genes", [None, "GENE1", [1, 2], {"a": 1}])
def test_gene_names_must_be_a_list_of_names(genes: object) -> None:
    assert refusal(body(gene_ids=genes)).status == 422


def test_no_genes_and_too_many_genes() -> None:
    assert refusal(body(gene_ids=[])).status == 422
    assert refusal(body(gene_ids=[str(gene) for gene in range(501)])).status == 413


NOT_ARROW = [
    b"",
    b"garbage",
    b"\xff\xff\xff\xff" + b"\x00" * 40,
    body()[:-40],
    body()[:200],
    b"ARROW1\x00\x00",
    b"\x80\x04cposix\nsystem\n",
]


@pytest.mark.parametrize("data", NOT_ARROW)
def test_what_is_not_an_arrow_stream_is_a_bad_request(data: bytes) -> None:
    assert refusal(data).status == 400


def test_a_stream_cut_at_a_batch_boundary_is_noticed() -> None:
    content = table()
    metadata = {GENE_IDS: json.dumps(GENE_NAMES), N_ROWS: "3"}
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, content.schema.with_metadata(metadata)) as writer:
        writer.write_table(content.slice(0, 2).replace_schema_metadata(metadata))
    error = refusal(sink.getvalue().to_pybytes())
    assert (error.status, "2 cells arrived" in error.message) == (400, True)
    without = pa.BufferOutputStream()
    with pa.ipc.new_stream(without, content.schema.with_metadata({GENE_IDS: "[]"})) as writer:
        writer.write_table(content)
    assert refusal(without.getvalue().to_pybytes()).status == 400


def test_a_zstd_bomb_is_refused_before_it_is_decompressed() -> None:
    lists = pa.ListArray.from_arrays(pa.array([0, 50_000_000], pa.int32()), pa.array(np.zeros(50_000_000, dtype=np.float32)))
    bomb = write_stream(pa.table({"counts": lists}), {GENE_IDS: GENE_NAMES})
    assert len(bomb) < 100_000  # 200 MB inside
    del lists
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    error = refusal(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.status == 413
    assert peak < 5_000_000
    assert pa.total_allocated_bytes() - before < 5_000_000


def test_deeply_nested_metadata_and_too_many_batches_are_refused() -> None:
    deep = pa.BufferOutputStream()
    with pa.ipc.new_stream(deep, table().schema.with_metadata({GENE_IDS: "[" * 100_000, N_ROWS: "3"})) as writer:
        writer.write_table(table())
    assert refusal(deep.getvalue().to_pybytes()).status == 400
    many = pa.BufferOutputStream()
    with pa.ipc.new_stream(many, table().schema) as writer:
        for _ in range(1100):
            writer.write_table(table())
    assert refusal(many.getvalue().to_pybytes()).status == 413


def test_more_cells_than_allowed_are_refused_in_both_formats() -> None:
    many = pa.table({"gene": list_of([[0]] * 101, pa.int32()), "count": list_of([[1]] * 101, pa.float32())})
    assert refusal(body(many)).status == 413
    assert refusal(as_json(gene=[[0]] * 101, count=[[1]] * 101), JSON_TYPE).status == 413


BAD_JSON = {
    "empty": (400, b""),
    "not JSON": (400, b"{"),
    "trailing comma": (400, b'{"gene_ids": ["a"],}'),
    "null": (400, b"null"),
    "list": (400, b"[]"),
    "deep": (400, b"[" * 50_000),
    "not UTF-8": (400, b'{"gene_ids": ["\xff"]}'),
    "NaN": (422, as_json(count=[[1, float("nan")], [], [2]])),
    "Infinity": (422, as_json(count=[[1, float("inf")], [], [2]])),
    "1e999": (422, as_json().replace(b"5", b"1e999")),
    "beyond float32": (422, as_json().replace(b"5", b"1e300")),
    "text": (422, as_json(count=[[1, "5"], [], [2]])),
    "bool": (422, as_json(count=[[1, True], [], [2]])),
    "null count": (422, as_json(count=[[1, None], [], [2]])),
    "unknown key": (422, as_json(threshold=0.5)),
    "ragged": (422, as_json(count=[[1, 5], [1], [2]])),
    "fewer rows": (422, as_json(count=[[1, 5], []])),
    "huge position": (422, as_json(gene=[[0, 10**30], [], [19]])),
    "fraction as position": (422, as_json(gene=[[0, 1.5], [], [19]])),
    "no gene names": (422, as_json(gene_ids=None)),
    "short batch": (422, as_json(batch=["a"])),
    "ragged dense": (422, as_json(gene=None, count=None, counts=[[1], [2], [3]])),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_is_refused(case: str) -> None:
    status, data = BAD_JSON[case]
    assert refusal(data, JSON_TYPE).status == status


def test_a_json_refusal_names_key_and_row_but_not_the_value() -> None:
    error = refusal(as_json(count=[[1, 5], ["my secret"], [2]]), JSON_TYPE)
    assert "'count', row 1" in error.message
    assert "secret" not in error.message
    assert "'treshold'" in refusal(as_json(treshold=1), JSON_TYPE).message


@pytest.mark.parametrize("n_cells", [0, 2])
def test_an_answer_says_the_same_in_both_formats(n_cells: int) -> None:
    columns = {
        "cell_type": np.array(["T", "B"][:n_cells], dtype=object),
        "confidence": np.array([0.5, 0.25][:n_cells], dtype=np.float32),
        "proba": np.array([[0.5, 0.1, 0.4], [0.25, 0.5, 0.25]], dtype=np.float32)[:n_cells],
    }
    about = {"model": "m", "version": None, "context": {"seed": 0}, "warnings": ["\u00e9"]}
    answer, said = read_answer(encode(columns, about, ARROW_TYPE))
    plain = json.loads(encode(columns, about, JSON_TYPE))
    assert said == {**about, N_ROWS: n_cells}
    assert plain == {**said, **answer.to_pydict()}


def test_mutated_arrow_bodies_are_read_or_refused_never_worse() -> None:
    good = body(table(batch=pa.array(["a", "b", "a"]), sentence=pa.array([1, 2, 3], pa.int32())))
    rng = np.random.default_rng(0)
    statuses = []
    for _ in range(1000):
        mutated = bytearray(good)
        for place in rng.integers(0, len(good), rng.integers(1, 8)):
            mutated[place] = rng.integers(0, 256)
        try:
            decode(bytes(mutated[: rng.integers(1, len(good) + 1)] if rng.random() < 0.2 else mutated), ARROW_TYPE, LIMITS)
        except ServiceError as error:
            statuses.append(error.status)
    assert len(statuses) > 500
    assert set(statuses) <= {400, 413, 422}


def test_names_of_genes_travel_as_their_text_and_are_read_once() -> None:
    first, second = (decode(body(), ARROW_TYPE, LIMITS).gene_ids for _ in range(2))
    assert list(first) == GENE_NAMES
    assert first is second
    sent = pickle.dumps(decode(body(), ARROW_TYPE, LIMITS), 5)
    assert json.dumps(GENE_NAMES).encode() in sent
    assert pickle.loads(sent).gene_ids is first
    other = decode(body(**{GENE_IDS: [*GENE_NAMES[:-1], "ANOTHER"]}), ARROW_TYPE, LIMITS).gene_ids
    assert other[-1] == "ANOTHER"
