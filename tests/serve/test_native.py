"""The paths in process, with the real model behind them: right answers, and a clear status for every bad question."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx
import numpy as np
import pytest

from cellplane.client import ARROW_TYPE, JSON_TYPE, matrix, read_answer
from cellplane.data.config import DataKeys
from cellplane.data.sentences import memory_store
from cellplane.data.sources import AnnData, cell_table
from cellplane.inference import Predictor

Ask = Callable[..., httpx.Response]
ABOUT = {
    "model",
    "version",
    "alias",
    "run_id",
    "model_sha256",
    "vocabulary_fingerprint",
    "dtype",
    "context",
    "gene_overlap",
    "warnings",
    "request_id",
}


def json_cells(cells: AnnData) -> bytes:
    """Dense JSON of the cells' own genes, unknown ones included."""
    body = {"gene_ids": list(cells.var_names), "counts": cells.X.toarray().tolist(), "batch": [str(batch) for batch in cells.obs["batch"]]}
    return json.dumps(body).encode()


def test_arrow_json_and_the_offline_predictor_agree(ask: Ask, cells: AnnData, arrow_body: bytes, predictor: Predictor) -> None:
    table, _ = cell_table(cells, predictor.folder.vocabulary, DataKeys(batch_key="batch"))
    offline = predictor.annotate(memory_store(table, predictor.folder.max_cells))
    plain = ask("POST", "/v1/models/tiny/annotate", json_cells(cells), {"content-type": JSON_TYPE}).json()
    np.testing.assert_allclose(plain["proba"], offline.proba, atol=1e-6)
    assert plain["cell_type"] == list(offline.labels)
    assert plain["gene_overlap"] == pytest.approx(60 / 90)
    embedding, about = read_answer(ask("POST", "/v1/models/tiny:3/embed", arrow_body).content)
    from_json = ask("POST", "/v1/models/tiny@champion/embed", json_cells(cells), {"content-type": JSON_TYPE}).json()
    order = np.concatenate(memory_store(table, predictor.folder.max_cells).sentences)
    np.testing.assert_allclose(matrix(embedding["embedding"]), np.asarray(from_json["embedding"])[order], atol=1e-5)
    assert set(about) >= ABOUT
    assert set(from_json) >= ABOUT


def test_the_answer_has_the_format_that_was_asked_for(ask: Ask, arrow_body: bytes) -> None:
    for accept, expected in (("", ARROW_TYPE), ("*/*", ARROW_TYPE), (JSON_TYPE, JSON_TYPE), (f"text/html, {ARROW_TYPE};q=0.9", ARROW_TYPE)):
        answer = ask("POST", "/v1/models/tiny/annotate", arrow_body, {"accept": accept})
        assert (answer.status_code, answer.headers["content-type"]) == (200, expected)
    assert ask("POST", "/v1/models/tiny/annotate", arrow_body, {"accept": "text/html"}).status_code == 406


def test_an_answer_names_its_model_and_keeps_cell_ids(ask: Ask) -> None:
    body = {"gene_ids": [f"GENE{gene:04d}" for gene in range(1, 21)], "gene": [[1], [2]], "count": [[3], [4]], "cell_id": ["a/1", "b 2"]}
    answer = ask(
        "POST", "/v1/models/tiny/annotate", json.dumps(body).encode(), {"content-type": JSON_TYPE, "x-request-id": "call-1"}
    ).json()
    assert answer["cell_id"] == ["a/1", "b 2"]
    assert (answer["model"], answer["version"], answer["alias"], answer["run_id"]) == ("tiny", "3", "champion", "r1")
    assert (answer["request_id"], answer["n_rows"], answer["classes"]) == ("call-1", 2, ["type_0", "type_1", "type_2"])
    np.testing.assert_allclose(np.add(answer["confidence"], answer["unknown_score"]), 1, atol=1e-6)


def test_no_cells_give_an_empty_answer_of_the_right_shape(ask: Ask) -> None:
    body = {"gene_ids": [f"GENE{gene:04d}" for gene in range(1, 21)], "gene": [], "count": []}
    answer = ask("POST", "/v1/models/tiny/embed", json.dumps(body).encode(), {"content-type": JSON_TYPE, "accept": ARROW_TYPE})
    table, about = read_answer(answer.content)
    assert (table.num_rows, about["n_rows"], table["embedding"].type.list_size) == (0, 0, 8)


def test_an_all_zero_cell_gets_finite_numbers_and_a_warning(ask: Ask) -> None:
    body = {"gene_ids": [f"GENE{gene:04d}" for gene in range(1, 21)], "gene": [[], [1]], "count": [[], [2]]}
    answer = ask("POST", "/v1/models/tiny/embed", json.dumps(body).encode(), {"content-type": JSON_TYPE}).json()
    assert np.isfinite(answer["embedding"]).all()
    assert "1 cells have no counts" in answer["warnings"][0]


def test_few_of_the_models_genes_give_a_warning(ask: Ask, predictor: Predictor) -> None:
    known = predictor.folder.vocabulary.gene_ids
    some = {"gene_ids": [*known[:12], "elsewhere"], "gene": [[1, 12]], "count": [[3, 37]]}
    answer = ask("POST", "/v1/models/tiny/embed", json.dumps(some).encode(), {"content-type": JSON_TYPE}).json()
    assert answer["warnings"] == [
        f"12 of the model's {len(known)} genes were measured here: answers rest on few genes",
        "genes that the model knows carry 7.5% of the counts: answers rest on a small part of what was measured",
    ]
    every = {"gene_ids": list(known), "gene": [[1]], "count": [[3]]}
    assert ask("POST", "/v1/models/tiny/embed", json.dumps(every).encode(), {"content-type": JSON_TYPE}).json()["warnings"] == []


def test_discovery_says_what_is_served(ask: Ask, predictor: Predictor) -> None:
    assert ask("GET", "/v2/health/live").json() == {"live": True}
    assert ask("GET", "/v2/health/ready").json() == {"ready": True}
    (model,) = ask("GET", "/v1/models").json()["models"]
    assert model == ask("GET", "/v1/models/tiny@champion").json()
    assert (model["name"], model["version"], model["tasks"], model["max_cells"]) == ("tiny", "3", ["annotate", "embed"], 16)
    assert set(model["limits"]) == {"max_cells", "max_genes", "max_body_bytes", "max_decoded_bytes"}
    assert ask("GET", "/v1/models/tiny/genes").json()["gene_ids"] == list(predictor.folder.vocabulary.gene_ids)
    assert ask("GET", "/v1/models/tiny:3/card").text == "# A tiny model\n"


def test_openapi_describes_bodies_and_answers(ask: Ask) -> None:
    document = ask("GET", "/openapi.json").json()
    post = document["paths"]["/v1/models/{model}/{task}"]["post"]
    assert set(post["requestBody"]["content"]) == {ARROW_TYPE, JSON_TYPE}
    assert "gene_ids" in post["requestBody"]["content"][JSON_TYPE]["schema"]["properties"]
    assert {"ModelInfo", "ErrorBody", "GeneList"} <= set(document["components"]["schemas"])


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("POST", "/v1/models/other/annotate", 404, "tiny@champion"),
        ("POST", "/v1/models/tiny:4/annotate", 404, "tiny:3"),
        ("POST", "/v1/models/tiny@challenger/annotate", 404, "tiny:3"),
        ("GET", "/v1/models/other/card", 404, "tiny"),
        ("POST", "/v1/models/tiny/translate", 404, "annotate, embed"),
        ("POST", "/v1/models/tiny:0/annotate", 400, "NAME:VERSION"),
        ("POST", "/v1/models/tiny:latest/annotate", 400, "NAME:VERSION"),
        ("POST", "/v1/models/tiny:-1/annotate", 400, "NAME:VERSION"),
        ("GET", "/v1/models/%2e%2e", 400, "NAME"),
        ("GET", "/v1/models/" + "a" * 10_000, 400, "NAME"),
        ("GET", "/v1/models/..%2f..%2fetc", 400, "NAME"),
        ("GET", "/v1/nothing", 404, "/openapi.json"),
        ("GET", "/v1/models/tiny/annotate", 405, "method"),
        ("POST", "/v1/models/tiny/annotate?treshold=1", 422, "threshold, top_k"),
        ("POST", "/v1/models/tiny/annotate?threshold=2", 422, "0 to 1"),
        ("POST", "/v1/models/tiny/annotate?top_k=0", 422, "from 1"),
        ("POST", "/v1/models/tiny/embed?dtype=int8", 422, "float16"),
        ("POST", "/v1/models/tiny/denoise", 409, "annotate, embed"),
    ],
)
def test_a_wrong_address_gets_a_clear_status(ask: Ask, arrow_body: bytes, method: str, path: str, status: int, words: str) -> None:
    answer = ask(method, path, arrow_body if method == "POST" else None)
    assert (answer.status_code, set(answer.json())) == (status, {"error", "code"})
    assert words in answer.json()["error"]


def test_foreign_genes_are_refused_with_a_hint(ask: Ask) -> None:
    body = {"gene_ids": [f"ENSMUSG{gene:011d}" for gene in range(30)], "gene": [[1]], "count": [[3]]}
    answer = ask("POST", "/v1/models/tiny/annotate", json.dumps(body).encode(), {"content-type": JSON_TYPE})
    assert answer.status_code == 422
    assert "ensembl_mouse" in answer.json()["error"]


def test_an_unforeseen_error_tells_the_request_id_and_nothing_else(
    ask: Ask, arrow_body: bytes, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret /a/path")

    monkeypatch.setattr(Predictor, "embed", broken)
    answer = ask("POST", "/v1/models/tiny/embed", arrow_body, {"x-request-id": "call-2"})
    assert answer.status_code == 500
    assert answer.json() == {"error": "something went wrong here; report request id call-2", "code": "internal"}


def test_mutated_requests_never_break_the_server(ask: Ask, arrow_body: bytes, cells: AnnData) -> None:
    rng = np.random.default_rng(1)
    statuses = []
    for kind, good in ((ARROW_TYPE, arrow_body), (JSON_TYPE, json_cells(cells[:5]))):
        for _ in range(200):
            mutated = bytearray(good)
            for place in rng.integers(0, len(good), rng.integers(1, 6)):
                mutated[place] = rng.integers(0, 256)
            statuses.append(ask("POST", "/v1/models/tiny/embed", bytes(mutated), {"content-type": kind}).status_code)
    assert max(statuses) < 500
    assert statuses.count(200) < 300
