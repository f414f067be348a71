"""Other people's clients: tensors as the Open Inference Protocol has them, tables as MLflow has them, the same answers as ours."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from cellplane.client import JSON_TYPE
from cellplane.data.sources import AnnData

Ask = Callable[..., httpx.Response]
OCTETS, LENGTH = "application/octet-stream", "inference-header-content-length"


@pytest.fixture
def native(ask: Ask, cells: AnnData) -> Callable[[str], dict[str, Any]]:
    """What the native path answers to the same cells."""
    body = {"gene_ids": list(cells.var_names), "counts": cells.X.toarray().tolist(), "batch": [str(batch) for batch in cells.obs["batch"]]}
    return lambda task: ask("POST", f"/v1/models/tiny/{task}", json.dumps(body).encode(), {"content-type": JSON_TYPE}).json()


def texts(values: list[str]) -> bytes:
    return b"".join(struct.pack("<I", len(value.encode())) + value.encode() for value in values)


def tensors(cells: AnnData, form: str) -> list[tuple[str, list[int], str, Any]]:
    """(name, shape, datatype, values) of the inputs, dense or CSR."""
    genes, batch = list(cells.var_names), [str(batch) for batch in cells.obs["batch"]]
    common = [("genes", [len(genes)], "BYTES", genes), ("batch", [len(batch)], "BYTES", batch)]
    if form == "dense":
        return [*common, ("counts", list(cells.shape), "FP32", cells.X.toarray().astype("<f4"))]
    x = cells.X.tocsr()
    sparse = (
        ("indptr", "INT64", x.indptr.astype("<i8")),
        ("indices", "INT32", x.indices.astype("<i4")),
        ("data", "FP32", x.data.astype("<f4")),
    )
    return [*common, *((name, [len(values)], kind, values) for name, kind, values in sparse)]


def as_json(inputs: list[tuple[str, list[int], str, Any]], **rest: Any) -> bytes:
    plain = [
        {"name": name, "shape": shape, "datatype": kind, "data": values if isinstance(values, list) else values.tolist()}
        for name, shape, kind, values in inputs
    ]
    return json.dumps({"inputs": plain, **rest}).encode()


def as_binary(inputs: list[tuple[str, list[int], str, Any]], **rest: Any) -> tuple[bytes, dict[str, str]]:
    """As tritonclient writes it: a JSON header without data, then every tensor's bytes."""
    blobs = [texts(values) if kind == "BYTES" else values.tobytes() for _, _, kind, values in inputs]
    head = [
        {"name": name, "shape": shape, "datatype": kind, "parameters": {"binary_data_size": len(blob)}}
        for (name, shape, kind, _), blob in zip(inputs, blobs, strict=True)
    ]
    text = json.dumps({"inputs": head, **rest}).encode()
    return text + b"".join(blobs), {LENGTH: str(len(text)), "content-type": OCTETS}


def from_binary(answer: httpx.Response) -> dict[str, Any]:
    length = int(answer.headers[LENGTH])
    head, rest, found = json.loads(answer.content[:length]), answer.content[length:], {}
    for output in head["outputs"]:
        size = output["parameters"]["binary_data_size"]
        blob, rest = rest[:size], rest[size:]
        if output["datatype"] == "FP32":
            found[output["name"]] = np.frombuffer(blob, "<f4").reshape(output["shape"])
            continue
        values = []
        while blob:
            (n,) = struct.unpack_from("<I", blob)
            values.append(blob[4 : 4 + n].decode())
            blob = blob[4 + n :]
        found[output["name"]] = values
    assert not rest
    return found


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_tensors_in_json_and_in_binary_get_the_native_answer(ask: Ask, native: Any, cells: AnnData, form: str) -> None:
    expected = native("annotate")
    plain = ask("POST", "/v2/models/tiny/infer", as_json(tensors(cells, form), id="call-9"), {"content-type": JSON_TYPE}).json()
    assert (plain["model_name"], plain["model_version"], plain["id"]) == ("tiny", "3", "call-9")
    outputs = {output["name"]: np.array(output["data"]).reshape(output["shape"]) for output in plain["outputs"]}
    np.testing.assert_allclose(outputs["proba"], expected["proba"], atol=1e-6)
    assert outputs["cell_type"].tolist() == expected["cell_type"]
    assert plain["parameters"]["model_sha256"] == expected["model_sha256"]
    body, headers = as_binary(tensors(cells, form), parameters={"binary_data_output": True, "task": "embed"})
    binary = from_binary(ask("POST", "/v2/models/tiny/versions/3/infer", body, headers))
    np.testing.assert_allclose(binary["embedding"], native("embed")["embedding"], atol=1e-6)


def test_only_the_outputs_that_are_asked_for_come_each_in_its_own_form(ask: Ask, cells: AnnData) -> None:
    wanted = [{"name": "cell_type", "parameters": {"binary_data": True}}]
    body, headers = as_binary(tensors(cells, "dense"), outputs=wanted)
    del headers["content-type"]  # tritonclient sends none
    answer = ask("POST", "/v2/models/tiny/infer", body, {**headers, "content-type": ""})
    assert set(from_binary(answer)) == {"cell_type"}
    assert len(from_binary(answer)["cell_type"]) == 40
    none = ask(
        "POST", "/v2/models/tiny/infer", as_json(tensors(cells, "dense"), outputs=[{"name": "nothing"}]), {"content-type": JSON_TYPE}
    )
    assert (none.status_code, "cell_type" in none.json()["error"]) == (422, True)


def test_server_model_and_readiness_are_described(ask: Ask) -> None:
    assert "binary_tensor_data" in ask("GET", "/v2").json()["extensions"]
    described = ask("GET", "/v2/models/tiny").json()
    assert described == ask("GET", "/v2/models/tiny/versions/3").json()
    assert described["versions"] == ["3"]
    assert {"genes", "counts", "indptr"} <= {tensor["name"] for tensor in described["inputs"]}
    assert {"embedding", "cell_type", "proba"} <= {tensor["name"] for tensor in described["outputs"]}
    assert ask("GET", "/v2/models/tiny/ready").json()["ready"] is True
    assert ask("GET", "/v2/models/tiny/versions/4/ready").status_code == 404
    assert ask("GET", "/v2/models/nothing").json()["error"].endswith("tiny:3")


def broken(**changes: Any) -> bytes:
    """A small good request with some fields changed."""
    inputs = {
        "genes": {"name": "genes", "shape": [2], "datatype": "BYTES", "data": ["GENE0001", "GENE0002"]},
        "counts": {"name": "counts", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]},
    }
    for name, fields in changes.items():
        inputs[name] = {**inputs.get(name, {"name": name}), **fields}
    return json.dumps({"inputs": list(inputs.values())}).encode()


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "empty"),
        (b"{", 400, "JSON"),
        (b'{"inputs": []}', 422, "inputs"),
        (b'{"inputs": [{"name": "genes", "shape": [0], "datatype": "BYTES", "data": []}], "sequence": 1}', 422, "sequence"),
        (broken(counts={"shape": [1, 3]}), 422, "2 values"),
        (broken(counts={"shape": [2]}), 422, "dimensions"),
        (broken(counts={"shape": [-1, 2]}), 422, "shape"),
        (broken(counts={"datatype": "BYTES"}), 422, "BYTES"),
        (broken(counts={"data": ["a", "b"]}), 422, "kind"),
        (broken(counts={"data": [[1, 2], [3]], "shape": [2, 2]}), 422, "row 1"),
        (broken(counts={"data": [[1], [3]], "shape": [2, 2]}), 422, "row 0"),
        (broken(counts={"data": [1, -2]}), 422, "negative"),
        (broken(counts={"data": [1, 0.5]}), 422, "integer"),
        (broken(counts={"name": "weights"}), 422, "unknown"),
        (broken(counts={"parameters": {"binary_data_size": 8}}), 422, "either"),
        (broken(counts={"data": None, "parameters": {"binary_data_size": 8}}), 400, "0 are left"),
        (broken(indptr={"shape": [2], "datatype": "INT64", "data": [0, 1]}), 422, "either 'counts'"),
        (b'{"inputs": [{"name": "counts", "shape": [1, 1], "datatype": "FP32", "data": [NaN]}]}', 422, "finite"),
        (b"[" * 50_000, 400, "JSON"),
    ],
)
def test_tensors_that_make_no_sense_are_refused_by_name(ask: Ask, body: bytes, status: int, words: str) -> None:
    answer = ask("POST", "/v2/models/tiny/infer", body, {"content-type": JSON_TYPE})
    assert (answer.status_code, words in answer.json()["error"]) == (status, True), answer.text


@pytest.mark.parametrize(
    "edges", [[0, 5, 2, 2], [1, 2, 2, 2], [0, 1, 1, 3], [0, 1, 1]], ids=["falls", "does not start at 0", "ends beyond", "is cut"]
)
def test_a_corrupt_sparse_matrix_is_refused_before_it_is_used(ask: Ask, edges: list[int]) -> None:
    inputs = [
        {"name": "genes", "shape": [20], "datatype": "BYTES", "data": [f"GENE{gene:04d}" for gene in range(1, 21)]},
        {"name": "indptr", "shape": [len(edges)], "datatype": "INT64", "data": edges},
        {"name": "indices", "shape": [2], "datatype": "INT32", "data": [1, 2]},
        {"name": "data", "shape": [2], "datatype": "FP32", "data": [1, 2]},
    ]
    answer = ask("POST", "/v2/models/tiny/infer", json.dumps({"inputs": inputs}).encode(), {"content-type": JSON_TYPE})
    assert (answer.status_code, "indptr" in answer.json()["error"]) == (422, True)


def test_mutated_binary_requests_never_break_the_server(ask: Ask, cells: AnnData) -> None:
    rng = np.random.default_rng(3)
    good, headers = as_binary(tensors(cells[:5].copy(), "sparse"), parameters={"binary_data_output": True, "task": "embed"})
    statuses = []
    for _ in range(300):
        mutated = bytearray(good)
        for place in rng.integers(0, len(good), rng.integers(1, 6)):
            mutated[place] = rng.integers(0, 256)
        cut = len(good) if rng.random() < 0.7 else int(rng.integers(0, len(good)))
        statuses.append(ask("POST", "/v2/models/tiny/infer", bytes(mutated[:cut]), headers).status_code)
    assert max(statuses) < 500
    assert statuses.count(200) < 250


def frame(cells: AnnData) -> dict[str, Any]:
    return {"columns": list(cells.var_names), "data": cells.X.toarray().tolist()}


def test_mlflow_tables_get_the_native_answer(ask: Ask, cells: AnnData) -> None:
    one = cells[cells.obs["batch"] == cells.obs["batch"].iloc[0]].copy()
    body = {"gene_ids": list(one.var_names), "counts": one.X.toarray().tolist()}
    expected = ask("POST", "/v1/models/tiny/annotate", json.dumps(body).encode(), {"content-type": JSON_TYPE}).json()
    records = [{gene: count for gene, count in zip(one.var_names, row, strict=True) if count} for row in one.X.toarray().tolist()]
    for form in ({"dataframe_split": frame(one)}, {"dataframe_records": records}, {"inputs": body}):
        answer = ask("POST", "/invocations", json.dumps({**form, "params": {"task": "annotate"}}).encode(), {"content-type": JSON_TYPE})
        assert answer.status_code == 200, answer.text
        rows = answer.json()["predictions"]
        assert [row["cell_type"] for row in rows] == expected["cell_type"]
        np.testing.assert_allclose([row["confidence"] for row in rows], expected["confidence"], atol=1e-5)
        assert answer.json()["about"]["version"] == "3"
    assert ask("GET", "/ping").status_code == ask("GET", "/health").status_code == 200
    assert ask("GET", "/version").text


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 422, "exactly one"),
        ({"dataframe_split": {"columns": ["GENE0001"], "data": [[1, 2]]}}, 422, "row 0"),
        ({"dataframe_split": {"columns": ["GENE0001"], "data": [["a"]]}}, 422, "dataframe_split"),
        ({"instances": [[1]]}, 422, "instances"),
        ({"dataframe_records": [{"GENE0001": 1}], "params": {"model": "nothing"}}, 404, "tiny"),
        ({"dataframe_records": [{"GENE0001": 1}], "params": {"tresh": 1}}, 422, "threshold"),
    ],
)
def test_mlflow_requests_that_make_no_sense_are_refused(ask: Ask, body: dict[str, Any], status: int, words: str) -> None:
    answer = ask("POST", "/invocations", json.dumps(body).encode(), {"content-type": JSON_TYPE})
    assert (answer.status_code, words in answer.json()["error"]) == (status, True), answer.text


def test_options_of_a_task_shape_its_answer(ask: Ask, cells: AnnData, native: Any) -> None:
    body = json.dumps({"gene_ids": list(cells.var_names), "counts": cells.X.toarray().tolist()}).encode()
    headers = {"content-type": JSON_TYPE}
    plain = ask("POST", "/v1/models/tiny/annotate", body, headers).json()
    unsure = ask("POST", "/v1/models/tiny/annotate?threshold=1", body, headers).json()
    assert set(unsure["cell_type"]) == {"unknown"}
    two = ask("POST", "/v1/models/tiny/annotate?top_k=2", body, headers).json()
    assert "proba" not in two
    assert [row[0] for row in two["top_cell_type"]] == [plain["classes"][int(np.argmax(row))] for row in plain["proba"]]
    assert all(first >= second for first, second in two["top_proba"])
    short = ask("POST", "/v1/models/tiny/embed?dtype=float16", body, headers).json()
    np.testing.assert_allclose(short["embedding"], ask("POST", "/v1/models/tiny/embed", body, headers).json()["embedding"], atol=5e-3)
    assert short["dtype"] == "float16"


def test_metrics_count_what_was_answered_and_refused(ask: Ask, cells: AnnData, native: Any) -> None:
    native("annotate")
    native("denoise")
    text = ask("GET", "/metrics").text
    assert 'cellplane_requests_total{model="tiny",status="200",task="annotate",version="3"} 1' in text
    assert 'cellplane_requests_total{model="tiny",status="409",task="denoise",version="3"} 1' in text
    assert 'cellplane_cells_total{model="tiny",version="3"} 40' in text
    assert 'cellplane_request_seconds_bucket{model="tiny",task="annotate",version="3",le="+Inf"} 1' in text
