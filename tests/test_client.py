"""The client against a small real HTTP server: what it sends, how it tries again, what it says when it cannot."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp

from cellplane import client as client_module
from cellplane.client import ARROW_TYPE, GENE_IDS, N_ROWS, Client, WireCells, read_answer, read_metadata, write_stream
from cellplane.data.config import DataKeys
from cellplane.data.sources import AnnData, read_h5ad, write_h5ad
from cellplane.errors import ColumnError, ConfigError, DataError, ServiceError, VocabularyError
from cellplane.genes import GeneVocabulary

VOCABULARY = GeneVocabulary.from_ids([f"GENE{gene:02d}" for gene in range(20)])
CLASSES = ["A", "B"]


@pytest.fixture
def cells() -> AnnData:
    """Twelve cells of two batches, 30 genes in another order than the model's 20; gene i of cell c counts c + i."""
    genes = [f"GENE{gene:02d}" for gene in reversed(range(30))]
    counts = np.add.outer(np.arange(12), np.arange(30)).astype(np.float32)
    obs = pd.DataFrame({"batch": ["x", "y"] * 6}, index=[f"c{cell}" for cell in range(12)])
    adata = AnnData(X=sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=genes))
    adata.obsm["spatial"] = np.stack([np.arange(12.0), np.zeros(12)], axis=1)
    return adata


@dataclass
class Endpoint:
    """A server that speaks the wire format; ``script`` holds failures to give first: a status, or "close"."""

    port: int = 0
    script: list[Any] = field(default_factory=list)
    requests: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    max_cells: int = 4
    request_cells: int = 100
    versions: Iterator[str] = field(default_factory=lambda: iter(["v1"] * 1000))

    def info(self) -> dict[str, Any]:
        limits = {"max_cells": self.request_cells}
        return {
            "name": "m",
            "task": "annotate",
            "max_cells": self.max_cells,
            "limits": limits,
            "vocabulary_fingerprint": VOCABULARY.fingerprint,
        }

    def answer(self, path: str, body: bytes) -> tuple[str, bytes]:
        """Each cell's answer is its own total, so that rows can be told apart."""
        if body:
            table = pa.ipc.open_stream(body).read_all()
            totals = np.array([sum(row) for row in table["count"].to_pylist()], dtype=np.float32)
            about = {
                "model": "m",
                "version": "3",
                "model_sha256": next(self.versions),
                "warnings": ["w"],
                "classes": CLASSES,
                "run_id": None,
            }
            proba = pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(totals, 2)), 2)
            columns = {"embedding": proba}
            if path.endswith("annotate"):
                labels = pa.array([CLASSES[int(total) % 2] for total in totals], pa.string())
                columns = {"cell_type": labels, "confidence": pa.array(totals), "proba": proba}
            return ARROW_TYPE, write_stream(pa.table(columns), about)
        known = {
            "/v2/health/ready": {"ready": True},
            "/v1/models": {"models": [self.info()]},
            "/v1/models/m": self.info(),
            "/v1/models/m/genes": {"gene_ids": VOCABULARY.gene_ids, "namespace": VOCABULARY.namespace},
        }
        return "application/json", json.dumps(known[path]).encode()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    scripted = Endpoint()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {key.lower(): value for key, value in self.headers.items()}
            scripted.requests.append((self.command, self.path, headers, body))
            fault = scripted.script.pop(0) if scripted.script and (body or scripted.script[0] != "later") else None
            if fault == "close":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            status, extra = fault if isinstance(fault, tuple) else (fault or 200, {})
            kind, data = ("application/json", b'{"error": "no such thing", "code": "x"}') if fault else scripted.answer(self.path, body)
            self.send_response(status)
            for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **extra}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = handle_any

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        scripted.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield scripted
        server.shutdown()
        thread.join()


@pytest.fixture
def client(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setattr(client_module, "FIRST_WAIT_S", 0.01)
    with Client(f"http://127.0.0.1:{endpoint.port}", timeout_s=5) as connected:
        yield connected


def totals(cells: AnnData) -> np.ndarray[Any, Any]:
    """Each cell's sum over the model's genes: the answer the endpoint gives."""
    return np.asarray(cells[:, list(VOCABULARY.gene_ids)].X.sum(axis=1)).ravel()


def test_answers_come_back_in_the_callers_order_and_are_written(client: Client, endpoint: Endpoint, cells: AnnData) -> None:
    answer = client.annotate(cells, "m", DataKeys(batch_key="batch"))
    np.testing.assert_array_equal(answer.confidence, totals(cells))
    assert list(answer.labels) == [CLASSES[int(total) % 2] for total in totals(cells)]
    assert list(cells.obs["cellplm_cell_type"]) == list(answer.labels)
    assert list(cells.obs["cellplm_cell_type"].cat.categories) == CLASSES
    np.testing.assert_array_equal(cells.obs["cellplm_confidence"], answer.confidence)
    assert cells.obsm["cellplm_cell_type_proba"].shape == (12, 2)
    assert cells.uns["cellplm"]["count_source"] == "X"
    assert cells.uns["cellplm"]["n_shared"] == 20
    assert answer.about["warnings"] == ["w"]


def test_answers_that_rest_on_few_genes_are_told_as_they_are_offline(client: Client, cells: AnnData) -> None:
    few = cells[:, [name for name in cells.var_names if name not in VOCABULARY.gene_ids[:8]]].copy()
    client.embed(few, "m")
    assert few.uns["cellplm"]["warnings"] == ["w", "12 of the model's 20 genes were measured here: answers rest on few genes"]


def test_embeddings_are_written_and_the_file_can_be_saved(client: Client, cells: AnnData, tmp_path: Any) -> None:
    embedding = client.embed(cells, "m")
    np.testing.assert_array_equal(cells.obsm["X_cellplm"], embedding)
    np.testing.assert_array_equal(embedding[:, 0], totals(cells))
    write_h5ad(cells, tmp_path / "out.h5ad")
    assert read_h5ad(tmp_path / "out.h5ad").uns["cellplm"]["model_sha256"] == "v1"


def test_whole_sentences_of_one_batch_are_sent_with_only_the_shared_genes(client: Client, endpoint: Endpoint, cells: AnnData) -> None:
    client.embed(cells, "m", DataKeys(batch_key="batch", spatial_key="spatial"))
    ((_, path, headers, body),) = [request for request in endpoint.requests if request[0] == "POST"]
    assert (path, headers["content-type"]) == ("/v1/models/m/embed", ARROW_TYPE)
    table = pa.ipc.open_stream(body).read_all()
    assert read_metadata(table.schema, GENE_IDS) == list(VOCABULARY.gene_ids)
    assert read_metadata(table.schema, N_ROWS) == 12
    sent = pd.DataFrame({"sentence": table["sentence"].to_pylist(), "cell": np.asarray(table["x_um"]).astype(int)})
    for _, rows in sent.groupby("sentence")["cell"]:
        assert len(rows) == 3  # six cells a batch, at most four a sentence, split evenly
        assert len({cell % 2 for cell in rows}) == 1
    assert sorted(sent["cell"]) == list(range(12))


def test_long_work_is_cut_between_sentences(client: Client, endpoint: Endpoint, cells: AnnData) -> None:
    endpoint.request_cells = 7
    np.testing.assert_array_equal(client.embed(cells, "m")[:, 0], totals(cells))
    sizes = [pa.ipc.open_stream(body).read_all().num_rows for method, _, _, body in endpoint.requests if method == "POST"]
    assert sizes == [4, 4, 4]
    endpoint.request_cells = 3
    with pytest.raises(DataError, match="4 cells, a request may have 3"):
        client.embed(cells, "m")


def test_no_cells_still_ask_for_the_shape(client: Client, cells: AnnData) -> None:
    assert client.embed(cells[:0].copy(), "m").shape == (0, 2)


def test_the_genes_are_asked_for_once(client: Client, endpoint: Endpoint, cells: AnnData) -> None:
    client.embed(cells, "m")
    client.embed(cells, "m")
    assert [path for _, path, _, _ in endpoint.requests].count("/v1/models/m/genes") == 1


SLOW_DOWN = [(503, {"Retry-After": "0"}), (503, {"Retry-After": "soon"})]
NO_PATHS_YET = (404, {"Content-Type": "text/plain"})  # a proxy that was just replaced


@pytest.mark.parametrize("fault", [500, 502, 503, *SLOW_DOWN, NO_PATHS_YET, "close"])
def test_a_passing_failure_is_tried_again_under_the_same_request_id(client: Client, endpoint: Endpoint, fault: object) -> None:
    endpoint.script = [fault, fault]
    table, _ = client._post("/v1/models/m/embed", write_stream(pa.table({"count": pa.array([[1.0]])}), {}))
    assert table.num_rows == 1
    ids = [headers["x-request-id"] for _, _, headers, _ in endpoint.requests]
    assert len(ids) == 3
    assert len(set(ids)) == 1


def test_retry_after_is_honoured_within_reason(client: Client, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(client_module, "time", SimpleNamespace(**{**vars(time), "sleep": slept.append}))  # of the client alone
    endpoint.script = [(503, {"Retry-After": "7"}), (503, {"Retry-After": "99999"}), 503]
    client.models()
    assert slept == [7, 30, pytest.approx(0.04)]


def test_a_lasting_failure_is_told_with_status_and_words(client: Client, endpoint: Endpoint) -> None:
    endpoint.script = [503] * 4
    with pytest.raises(ServiceError, match="503: no such thing") as caught:
        client.models()
    assert (caught.value.status, len(endpoint.requests)) == (503, 4)


@pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 422])
def test_a_refusal_is_not_tried_again(client: Client, endpoint: Endpoint, status: int) -> None:
    endpoint.script = [status]
    with pytest.raises(ServiceError, match="no such thing") as caught:
        client.model("other")
    assert (caught.value.status, len(endpoint.requests)) == (status, 1)


def test_another_web_server_is_called_one(client: Client, endpoint: Endpoint) -> None:
    endpoint.script = [(404, {"Content-Type": "text/html"})] * 4
    with pytest.raises(ServiceError, match="something else than cellplane"):
        client.models()


def test_keys_may_be_given_by_their_entries(client: Client) -> None:
    assert client_module._read_keys({"batch_key": "donor"}) == DataKeys(batch_key="donor")
    with pytest.raises(ConfigError, match="batch_key"):
        client_module._read_keys({"batch_keys": "donor"})


def test_nobody_listening_is_a_service_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_WAIT_S", 0.0)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with Client(f"http://127.0.0.1:{unused.getsockname()[1]}", retries=1) as nowhere:
            for call in (nowhere.models, nowhere.ready):
                with pytest.raises(ServiceError, match="nothing answers") as caught:
                    call()
                assert (caught.value.status, caught.value.exit_code) == (0, 4)


def test_a_slow_endpoint_is_not_asked_twice(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(endpoint, "answer", lambda *_: (release.wait(10), ("application/json", b"{}"))[1])
    with Client(f"http://127.0.0.1:{endpoint.port}", timeout_s=0.2) as hurried, pytest.raises(ServiceError, match="in time"):
        hurried.models()
    release.set()
    assert len(endpoint.requests) == 1


def test_ready_tells_yes_and_no(client: Client, endpoint: Endpoint) -> None:
    assert client.ready()
    endpoint.script = [503]
    assert not client.ready()


def test_the_key_is_sent(endpoint: Endpoint) -> None:
    with Client(f"http://127.0.0.1:{endpoint.port}/", api_key="k") as keyed:
        keyed.models()
    assert endpoint.requests[0][2]["authorization"] == "Bearer k"


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://host", "http://"])
def test_an_address_must_be_one(url: str) -> None:
    with pytest.raises(ConfigError, match="http://host:port"):
        Client(url)


def test_a_version_change_between_two_requests_is_noticed(client: Client, endpoint: Endpoint, cells: AnnData) -> None:
    endpoint.request_cells, endpoint.versions = 4, iter(["v1", "v1", "v2"])
    with pytest.raises(ServiceError, match="another model version"):
        client.embed(cells, "m")
    assert "X_cellplm" not in cells.obsm


def test_bad_data_is_found_before_anything_is_sent(client: Client, endpoint: Endpoint, cells: AnnData) -> None:
    with pytest.raises(ColumnError, match="batch"):
        client.embed(cells, "m", DataKeys(batch_key="bach"))
    foreign = cells.copy()
    foreign.var_names = [f"other{gene}" for gene in range(30)]
    with pytest.raises(VocabularyError):
        client.embed(foreign, "m")
    assert not [request for request in endpoint.requests if request[0] == "POST"]


def cut(body: bytes) -> bytes:
    return body[: len(body) // 2]


def without_count(body: bytes) -> bytes:
    table = pa.ipc.open_stream(body).read_all()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.slice(0, 1))
    whole: bytes = sink.getvalue().to_pybytes()
    return whole


@pytest.mark.parametrize("damage", [cut, without_count, lambda _: b"<html>"])
def test_an_answer_that_is_not_whole_is_not_taken(damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(ServiceError):
        read_answer(damage(write_stream(pa.table({"a": [1, 2]}), {"model": "m"})))


def test_a_request_body_holds_counts_exactly(cells: AnnData) -> None:
    wire = WireCells.of(cells, DataKeys(), VOCABULARY, 100)
    body, rows = wire.body([0])
    table = pa.ipc.open_stream(body).read_all()
    dense = np.zeros((12, 20), dtype=np.float32)
    for cell, (gene, count) in enumerate(zip(table["gene"].to_pylist(), table["count"].to_pylist(), strict=True)):
        dense[rows[cell], gene] = count
    np.testing.assert_array_equal(dense, cells[:, list(VOCABULARY.gene_ids)].X.toarray())
