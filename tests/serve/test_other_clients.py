"""Clients that are not ours, over a real connection: MLflow's own, and Triton's. Their answers are those of the native path."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from starlette.types import ASGIApp

from cellplane.data.sources import AnnData
from cellplane.inference import Predictor
from serve.front import Front
from serve.limits import Guard, Limits
from serve.native import NativePaths
from tests.serve.wire import Ask, answered, listening

try:
    import tritonclient.http as http
except ImportError:
    http = None


@pytest.fixture
def app(front: Front) -> ASGIApp:
    return Guard(NativePaths(front, Limits()).app(), Limits())


@pytest.fixture
def port(app: ASGIApp) -> Iterator[int]:
    """A loopback port where the whole application listens, guard included."""
    with listening(app) as number:
        yield number


def native(app: ASGIApp, cells: AnnData, task: str) -> dict[str, Any]:
    """What the native path says of the same cells."""
    body = {"gene_ids": list(cells.var_names), "counts": cells.X.toarray().tolist()}
    answer: dict[str, Any] = answered(app, Ask(f"/v1/models/tiny/{task}", (json.dumps(body).encode(),))).json()
    return answer


@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred:UserWarning")  # mlflow 3.17 says so of its own client
def test_mlflows_client_gets_predictions_of_a_data_frame(port: int, app: ASGIApp, cells: AnnData, predictor: Predictor) -> None:
    from mlflow.pyfunc.scoring_server.client import ScoringServerClient

    client = ScoringServerClient("127.0.0.1", port)
    client.wait_server_ready(timeout=10)
    assert client.get_version()
    frame = pd.DataFrame(cells.X.toarray(), columns=list(cells.var_names))
    answer = client.invoke(frame, params={"task": "annotate"}).get_predictions()
    assert len(answer) == cells.n_obs
    assert set(answer["cell_type"]) <= {*predictor.classes, "unknown"}
    expected = native(app, cells, "annotate")
    assert list(answer["cell_type"]) == expected["cell_type"]
    np.testing.assert_allclose(answer["confidence"], expected["confidence"], atol=1e-5)
    with pytest.raises(Exception, match="threshold"):
        client.invoke(frame, params={"treshold": 1})


@pytest.fixture
def triton(port: int) -> Iterator[Any]:
    if http is None:
        pytest.skip("needs tritonclient[http], which is not installed")
    client = http.InferenceServerClient(f"127.0.0.1:{port}")
    yield client
    client.close()


def tensor(name: str, values: np.ndarray, datatype: str, binary: bool) -> Any:
    made = http.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values, binary_data=binary)
    return made


def inputs(cells: AnnData, form: str, binary: bool = True) -> list[Any]:
    """Cells as dense counts or as CSR."""
    genes = tensor("genes", np.array(list(cells.var_names), dtype=object), "BYTES", binary)
    if form == "dense":
        return [genes, tensor("counts", cells.X.toarray().astype(np.float32), "FP32", binary)]
    x = cells.X.tocsr()
    parts = (("indptr", x.indptr, np.int64, "INT64"), ("indices", x.indices, np.int32, "INT32"), ("data", x.data, np.float32, "FP32"))
    return [genes, *(tensor(name, values.astype(dtype), datatype, binary) for name, values, dtype, datatype in parts)]


@pytest.mark.parametrize(("form", "binary"), [("dense", True), ("sparse", True), ("dense", False), ("sparse", False)])
def test_tritons_client_gets_the_native_answer(triton: Any, app: ASGIApp, cells: AnnData, form: str, binary: bool) -> None:
    answer = triton.infer("tiny", inputs(cells, form, binary), parameters={"task": "annotate"}, request_id="call-5")
    expected = native(app, cells, "annotate")
    np.testing.assert_allclose(answer.as_numpy("proba"), expected["proba"], atol=1e-5)
    assert [name if isinstance(name, str) else name.decode() for name in answer.as_numpy("cell_type")] == expected["cell_type"]
    told = answer.get_response()
    assert (told["model_name"], told["model_version"], told["id"]) == ("tiny", "3", "call-5")


@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client_chooses_its_outputs_and_their_form(triton: Any, app: ASGIApp, cells: AnnData, binary: bool) -> None:
    wanted = [http.InferRequestedOutput("embedding", binary_data=binary)]
    answer = triton.infer("tiny", inputs(cells, "sparse"), model_version="3", outputs=wanted, parameters={"task": "embed"})
    (output,) = answer.get_response()["outputs"]
    assert ("data" in output) is not binary
    np.testing.assert_allclose(answer.as_numpy("embedding"), native(app, cells, "embed")["embedding"], atol=1e-5)


def test_tritons_client_reads_health_and_metadata(triton: Any) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("tiny")
    assert triton.is_model_ready("tiny", "3")
    assert not triton.is_model_ready("tiny", "4")
    assert triton.get_server_metadata()["name"] == "cellplane"
    described = triton.get_model_metadata("tiny")
    assert (described["name"], described["versions"]) == ("tiny", ["3"])
    assert {one["name"] for one in described["inputs"]} >= {"genes", "counts", "indptr", "indices", "data"}


def test_tritons_client_is_told_what_was_wrong(triton: Any, cells: AnnData) -> None:
    for model, parameters, words in (
        ("nothing", {}, "not served"),
        ("tiny", {"task": "fly"}, "no task"),
        ("tiny", {"task": "impute"}, "does not impute"),
    ):
        with pytest.raises(http.InferenceServerException, match=words):
            triton.infer(model, inputs(cells, "dense"), parameters=parameters)
    with pytest.raises(http.InferenceServerException, match="counts"):
        triton.infer("tiny", inputs(cells, "dense")[:1])
