"""The catalogue of bad requests, row by row (C55 to C86), against guard, paths, codec and a real model in one process.

Every refusal has one shape and tells neither a traceback nor a path. Rows that are more than a request and its
refusal are in `test_catalogue_conduct`, those that need a connection in `test_catalogue_wire`.
"""

from __future__ import annotations

import gzip
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from starlette.types import ASGIApp

from cellplane.client import ARROW_TYPE, GENE_IDS, JSON_TYPE
from serve.front import Front
from serve.limits import HEADER_LENGTH, OCTETS, Guard
from serve.native import NativePaths
from tests.serve.wire import (
    COUNTS,
    DOORS,
    GENE_NAMES,
    LIMITS,
    MARKED,
    MLFLOW,
    NATIVE,
    OIP,
    Ask,
    answered,
    arrow_batches,
    arrow_body,
    arrow_table,
    assert_refused,
    good_asks,
    json_body,
    mlflow_body,
    oip_body,
)


def at_every_door(body: bytes) -> list[Ask]:
    return [Ask(target, (body,)) for target in DOORS.values()]


def arrow(body: bytes, **rest: object) -> Ask:
    return Ask(chunks=(body,), kind=ARROW_TYPE, **rest)  # type: ignore[arg-type]


def lists(values: list[list[float] | None], kind: pa.DataType) -> pa.Array:
    return pa.array(values, pa.list_(kind))


def bomb() -> bytes:
    """Fifty million zeros in a few kilobytes."""
    zeros = pa.ListArray.from_arrays(pa.array([0, 50_000_000], pa.int32()), pa.array(np.zeros(50_000_000, dtype=np.float32)))
    return arrow_body(pa.table({"counts": zeros}))


def with_offsets(*offsets: int) -> bytes:
    """Three cells whose lists point elsewhere than the writer said."""
    good, plain = struct.pack("<4i", 0, 2, 3, 4), arrow_batches([arrow_table()], 3)
    assert good in plain
    return plain.replace(good, struct.pack("<4i", *offsets), 1)


def without_row_count() -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, arrow_table().schema.with_metadata({GENE_IDS: "[]"})) as writer:
        writer.write_table(arrow_table())
    return bytes(sink.getvalue().to_pybytes())


def of_versions(version: str) -> list[Ask]:
    return [Ask(f"/v1/models/tiny:{version}/annotate", (json_body(),)), Ask(f"/v2/models/tiny/versions/{version}/infer", (oip_body(),))]


def number(text: str) -> list[Ask]:
    """A count that is this text, in each JSON body."""
    bodies = {NATIVE: json_body(), OIP: oip_body(), MLFLOW: mlflow_body()}
    return [Ask(target, (body.replace(str(MARKED).encode(), text.encode()),)) for target, body in bodies.items()]


MANY = json_body(gene=[[0]] * 101, count=[[1]] * 101)
MANY_GENES = json_body(gene_ids=[f"G{gene}" for gene in range(501)])
DENSE = {"columns": ["GENE0001"], "data": [[1]] * 101}

# row: (requests, status, words of the error, chunks of the body that were read; None = no matter)
CASES: dict[str, tuple[list[Ask], int, str, int | None]] = {
    "C55 declared": ([arrow(b"x", headers={"content-length": "200001"}), Ask(headers={"content-length": "100001"})], 413, "exceeds", 0),
    "C55 declared beyond numbers": ([arrow(b"x", headers={"content-length": size}) for size in ("9" * 400, "-1", "1e9")], 413, "bytes", 0),
    "C55 chunks": ([Ask(chunks=(b"x" * 10_000,) * 1000, kind=ARROW_TYPE)], 413, "exceeds 200000", 21),
    "C56 native": ([Ask(kind=kind) for kind in ("", "text/plain", OCTETS, "a" * 5000, "\xff\xfe")], 415, ARROW_TYPE, 0),
    # no type at all passes there: Triton's client names none when its tensors are not in binary
    "C56 oip": ([Ask(OIP, kind=kind) for kind in ("text/plain", ARROW_TYPE)], 415, OCTETS, 0),
    "C56 mlflow": ([Ask(MLFLOW, kind=kind) for kind in ("text/csv", ARROW_TYPE)], 415, JSON_TYPE, 0),
    "C57": ([ask for text in (b"{", b"hello", b'{"gene_ids": ["a"],}', b"{'a': 1}") for ask in at_every_door(text)], 400, "", None),
    "C57 length of the JSON part": (
        [Ask(OIP, (oip_body(),), OCTETS, {HEADER_LENGTH: length}) for length in ("0" * 5000, "9" * 5000, "-1", "1e2", "\xb2", "99999")],
        400,
        HEADER_LENGTH,
        None,
    ),
    "C58": (
        [ask for text in (b"[" * 50_000, b'{"a":' * 19_000, b"[" * 40_000 + b"]" * 40_000) for ask in at_every_door(text)],
        400,
        "",
        None,
    ),
    "C58 inside": ([Ask(chunks=(json_body().replace(b"[[0", b"[" * 40_000 + b"[[0"),))], 400, "", None),
    "C59": ([ask for text in (b'{"gene_ids": ["\xff"]}', b"\xff\xfe{", b'{"\xc3": 1}') for ask in at_every_door(text)], 400, "", None),
    "C60 declared": ([Ask(headers={"content-encoding": name}) for name in ("gzip", "br", "deflate, gzip")], 415, "encoding", 0),
    "C60 undeclared": ([*at_every_door(gzip.compress(json_body())), arrow(gzip.compress(arrow_body()))], 415, "gzip", None),
    "C60 bomb": (at_every_door(gzip.compress(bytes(50_000_000))), 415, "gzip", None),
    "C61": ([ask for text in ("NaN", "Infinity", "-Infinity", "1e999") for ask in number(text)], 422, "", None),
    "C61 arrow": ([arrow(arrow_body(arrow_table(count=lists([[1, float("nan")], [3], [2]], pa.float32()))))], 422, "row 0", None),
    "C62 lengths": ([Ask(chunks=(json_body(count=[[1, 5], [3, 4], [2]]),))], 422, "row 1", None),
    "C62 ragged": (
        [
            Ask(chunks=(json_body(gene=None, count=None, counts=[[0] * 20, [1]]),)),
            Ask(OIP, (oip_body(counts={"data": [COUNTS[0], [3]]}),)),
            Ask(MLFLOW, (mlflow_body(dataframe_split={"columns": ["GENE0001", "GENE0002"], "data": [[1, 2], [3]]}),)),
        ],
        422,
        "row 1",
        None,
    ),
    "C63": (number('"5"') + number("true") + number("null"), 422, "", None),
    "C64": (
        [
            Ask(chunks=(json_body(surprise=1),)),
            Ask(OIP, (oip_body({"surprise": 1}),)),
            Ask(OIP, (oip_body(counts={"surprise": 1}),)),
            Ask(MLFLOW, (mlflow_body(surprise=1),)),
            Ask(MLFLOW, (mlflow_body(params={"surprise": 1}),)),
            Ask(f"{NATIVE}?surprise=1", (json_body(),)),
            arrow(arrow_body(arrow_table(surprise=pa.array([1, 2, 3])))),
        ],
        422,
        "surprise",
        None,
    ),
    "C65": ([*at_every_door(b"null"), *at_every_door(b""), arrow(b""), Ask(OIP, (b"",), OCTETS, {HEADER_LENGTH: "0"})], 400, "", None),
    "C66": (
        [arrow(body) for body in (b"garbage", b"\xff" * 64, arrow_body()[:100], arrow_body()[:-30], b"ARROW1\0\0", arrow_body()[8:])],
        400,
        "Arrow",
        None,
    ),
    "C67 whole batches missing": ([arrow(arrow_batches([arrow_table()], 6))], 400, "3 cells arrived", None),
    "C67 no row count": ([arrow(without_row_count())], 400, "n_rows", None),
    "C67 no end mark": ([arrow(arrow_batches([arrow_table()], 3)[:-8]), arrow(arrow_body() + arrow_body())], 400, "end mark", None),
    "C68": ([arrow(bomb())], 413, "once decompressed", None),
    "C69 types": (
        [
            arrow(arrow_body(arrow_table(gene=column)))
            for column in (
                lists([[0, 2], [4], [19]], pa.int64()),
                lists([[0, 2], None, [19]], pa.int32()),
                lists([[0, None], [4], [19]], pa.int32()),  # type: ignore[list-item]
                pa.array([1, 2, 3]),
                pa.array(["a", "b", "c"]),
                pa.array([None] * 3),
                pa.array([{"a": 1}] * 3),
            )
        ],
        422,
        "'gene'",
        None,
    ),
    "C69 dictionary and extension": (
        [
            arrow(arrow_body(arrow_table(batch=column)))
            for column in (
                pa.array(["a", "b", "a"]).dictionary_encode(),
                pa.ExtensionArray.from_storage(pa.json_(), pa.array(["1"] * 3)),
                pa.array([b"a", b"b", b"c"]),
                pa.array(["a", None, "c"]),
            )
        ],
        422,
        "'batch'",
        None,
    ),
    "C70": (
        [arrow(with_offsets(*offsets)) for offsets in ((0, 2, 3, 400), (0, -5, 3, 4), (0, 4, 3, 4), (-2, 2, 3, 4))],
        400,
        "Arrow",
        None,
    ),
    "C71 declared": (
        [Ask(chunks=(pickle.dumps([1]),), kind=f"application/{kind}") for kind in ("x-python-pickle", "x-python", "python-pickle")],
        415,
        "",
        0,
    ),
    "C71 undeclared": ([*at_every_door(pickle.dumps([1])), arrow(pickle.dumps([1]))], 400, "", None),
    "C72": (
        [
            Ask("/v1/models/other/annotate", (json_body(),)),
            Ask("/v2/models/other/infer", (oip_body(),)),
            Ask(MLFLOW, (mlflow_body(params={"model": "other"}),)),
            *(Ask(path, kind="", method="GET") for path in ("/v1/models/other", "/v1/models/other/card", "/v2/models/other/ready")),
        ],
        404,
        "tiny@champion",
        None,
    ),
    "C73": (
        [*of_versions("4"), Ask("/v1/models/tiny@challenger/annotate", (json_body(),)), Ask("/v2/models/tiny/versions/9", method="GET")],
        404,
        "tiny:3",
        None,
    ),
    "C74": (
        [
            ask
            for version in ("0", "-1", "1e9", "latest", "..%2f1", "%2e%2e", "%252e%252e", "1" * 10_000, "%00", "3%0a")
            for ask in of_versions(version)
        ],
        400,
        "NAME:VERSION",
        None,
    ),
    "C74 names": (
        [
            Ask(f"/v1/models/{name}", kind="", method="GET")
            for name in ("Tiny", "-a", "a" * 65, "%c3%a9", "%2e%2e", "tiny%20", "tiny:3:4", "tiny@")
        ],
        400,
        "NAME@ALIAS",
        None,
    ),
    "C75": (
        [
            *(Ask(f"/v1/models/{way}", kind="", method="GET") for way in ("..%2f..%2fetc%2fpasswd", "../../etc/passwd", "tiny/../../card")),
            Ask("/v1/models/tiny/..%2fembed", (json_body(),)),
            *(
                Ask(MLFLOW, (mlflow_body(params={"model": way}),))
                for way in ("../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "..")
            ),
        ],
        400,
        "NAME",
        None,
    ),
    "C80 headers": ([Ask(headers={"x-padding": "a" * 100_000}), Ask(headers={f"x-{n}": "a" * 500 for n in range(70)})], 431, "32768", 0),
    "C84 cells": (
        [
            Ask(chunks=(MANY,)),
            arrow(arrow_batches([arrow_table()] * 34, 102)),
            Ask(OIP, (oip_body(genes={"shape": [1], "data": ["G"]}, counts={"shape": [101, 1], "data": [1] * 101}),)),
            Ask(MLFLOW, (mlflow_body(dataframe_split=DENSE),)),
        ],
        413,
        "the limit is 100",
        None,
    ),
    "C84 rows without end": (
        [
            Ask(OIP, (oip_body(counts={"shape": shape, "data": []}, genes={"shape": [n], "data": GENE_NAMES[:n]}),))
            for shape, n in (([2**39, 0], 20), ([2**39, 0], 0), ([2**31, 0], 1), ([0, 2**39], 20))
        ],
        422,
        "columns for",
        None,
    ),
    "C84 genes": ([Ask(chunks=(MANY_GENES,)), arrow(arrow_body(gene_ids=[f"G{gene}" for gene in range(501)]))], 413, "limit is 500", None),
}


@pytest.fixture
def app(front: Front) -> ASGIApp:
    return Guard(NativePaths(front, LIMITS).app(), LIMITS)


@pytest.mark.parametrize("row", CASES)
def test_a_row_of_the_catalogue_is_answered_as_specified(app: ASGIApp, row: str) -> None:
    asks, status, words, taken = CASES[row]
    for ask in asks:
        answer = answered(app, ask)
        assert_refused(answer, ask, status, words)
        assert taken is None or answer.taken == taken, "it was read further than the refusal needed"
        if status == 413 and taken is not None:
            assert answer.headers["connection"] == "close"


def test_good_bodies_are_answered_so_that_refusals_mean_something(app: ASGIApp) -> None:
    for name, ask in good_asks().items():
        assert answered(app, ask).status == 200, name


def test_every_row_has_a_case() -> None:
    texts = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_catalogue_*.py")]
    named = {row.split()[0] for row in CASES} | {f"C{found}" for found in re.findall(r"_c(\d\d)_", "".join(texts))}
    assert {f"C{row}" for row in range(55, 87)} <= named
