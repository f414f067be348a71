"""Clients that are not ours, over a real connection: MLflow's own, and Triton's where it is installed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
import uvicorn

from cellplane.data.sources import AnnData
from cellplane.inference import Predictor
from serve.front import Front
from serve.limits import Guard, Limits
from serve.native import NativePaths


@pytest.fixture
def port(front: Front) -> Iterator[int]:
    """A loopback port where the whole application listens, guard included."""
    server = uvicorn.Server(uvicorn.Config(Guard(NativePaths(front, Limits()).app(), Limits()), port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred:UserWarning")  # mlflow 3.17 says so of its own client
def test_mlflows_client_gets_predictions_of_a_data_frame(port: int, cells: AnnData, predictor: Predictor) -> None:
    from mlflow.pyfunc.scoring_server.client import ScoringServerClient

    client = ScoringServerClient("127.0.0.1", port)
    client.wait_server_ready(timeout=10)
    frame = pd.DataFrame(cells.X.toarray(), columns=list(cells.var_names))
    answer = client.invoke(frame, params={"task": "annotate"}).get_predictions()
    assert len(answer) == cells.n_obs
    assert set(answer["cell_type"]) <= {*predictor.classes, "unknown"}
    assert np.isfinite(answer["confidence"]).all()


def test_tritons_client_gets_binary_tensors(port: int, cells: AnnData) -> None:
    http = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http], which is not installed")
    client = http.InferenceServerClient(f"127.0.0.1:{port}")
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.get_model_metadata("tiny")["name"] == "tiny"
    genes, counts = np.array(list(cells.var_names), dtype=object), cells.X.toarray().astype(np.float32)
    inputs = [http.InferInput("genes", [len(genes)], "BYTES"), http.InferInput("counts", list(counts.shape), "FP32")]
    for tensor, values in zip(inputs, (genes, counts), strict=True):
        tensor.set_data_from_numpy(values, binary_data=True)
    answer = client.infer("tiny", inputs, parameters={"task": "annotate"})
    assert answer.as_numpy("proba").shape == (40, 3)
    assert answer.as_numpy("cell_type").shape == (40,)
    with pytest.raises(http.InferenceServerException, match="not served"):
        client.infer("nothing", inputs)
