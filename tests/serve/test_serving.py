"""A real Ray Serve deployment over HTTP: right, alone and in a crowd, and not bothered by a dying replica."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch

from cellplane.artifact.folder import load_model, save_model
from cellplane.client import ARROW_TYPE, JSON_TYPE, Client, WireCells, matrix, read_answer
from cellplane.data.config import DataKeys
from cellplane.data.sentences import memory_store
from cellplane.data.sources import AnnData, cell_table
from cellplane.errors import ConfigError, IntegrityError, PortInUseError, ServiceError
from cellplane.inference import Predictor
from serve.app import Deployed, deploy, undeploy
from serve.deployment import ServeConfig
from serve.security import new_key
from tests.serve.wire import Ask, answer_of, head

pytestmark = pytest.mark.cluster

BATCHES = DataKeys(batch_key="batch")
KEY, KEY_LINE = new_key("tests")
LIMIT = 2_000_000


def config_for(model: Path, **changes: Any) -> ServeConfig:
    return ServeConfig(name="tiny", model=str(model), **{"port": 0, "num_cpus": 0.1, "replicas": 2, "max_body_bytes": LIMIT, **changes})


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(KEY_LINE)
    return file


@pytest.mark.usefixtures("ray_cluster")
def test_an_endpoint_that_must_not_start_says_why_and_starts_nothing(model_path: Path) -> None:
    with pytest.raises(ConfigError, match="api_keys_file"):
        deploy(config_for(model_path, host="0.0.0.0"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(PortInUseError, match=str(taken.getsockname()[1])):
            deploy(config_for(model_path, port=taken.getsockname()[1]))


@pytest.fixture(scope="module")
def endpoint(ray_cluster: None, model_path: Path, key_file: Path) -> Iterator[Deployed]:
    yield deploy(config_for(model_path, api_keys_file=key_file))
    undeploy()


@pytest.fixture
def client(endpoint: Deployed) -> Iterator[Client]:
    with Client(endpoint.url, api_key=KEY, retries=0) as connected:
        yield connected


Post = Callable[..., httpx.Response]


@pytest.fixture
def post(endpoint: Deployed) -> Iterator[Post]:
    with httpx.Client(base_url=endpoint.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60, trust_env=False) as http:
        yield lambda body, kind=ARROW_TYPE, **headers: http.post(
            "/v1/models/tiny/embed", content=body, headers={"content-type": kind, **headers}
        )


def offline(predictor: Predictor, cells: AnnData) -> Any:
    return memory_store(cell_table(cells, predictor.folder.vocabulary, BATCHES)[0], predictor.folder.max_cells)


def test_the_served_answer_is_the_offline_one(client: Client, predictor: Predictor, cells: AnnData) -> None:
    expected = predictor.annotate(offline(predictor, cells))
    answer = client.annotate(cells, "tiny", BATCHES)
    np.testing.assert_allclose(answer.proba, expected.proba, atol=1e-5)
    assert list(answer.labels) == list(expected.labels)
    np.testing.assert_allclose(client.embed(cells, "tiny", BATCHES), predictor.embed(offline(predictor, cells)), atol=1e-5)


def test_an_answer_says_who_gave_it(client: Client, predictor: Predictor, cells: AnnData) -> None:
    about = client.annotate(cells, "tiny").about
    assert (about["model"], about["model_sha256"]) == ("tiny", predictor.folder.model_sha256)
    assert about["vocabulary_fingerprint"] == client.models()[0]["vocabulary_fingerprint"]
    assert client.ready()


def test_json_equals_arrow(post: Post, predictor: Predictor, cells: AnnData) -> None:
    body = {"gene_ids": list(cells.var_names), "counts": cells.X.toarray().tolist(), "batch": list(map(str, cells.obs["batch"]))}
    data = json.dumps(body).encode()
    plain = post(data, JSON_TYPE).json()
    table, about = read_answer(post(data, JSON_TYPE, accept=ARROW_TYPE).content)
    np.testing.assert_allclose(plain["embedding"], matrix(table["embedding"]), atol=1e-7)
    np.testing.assert_allclose(plain["embedding"], predictor.embed(offline(predictor, cells)), atol=1e-5)
    assert plain["model_sha256"] == about["model_sha256"]


def test_bad_requests_are_refused_over_http_too(endpoint: Deployed, post: Post, arrow_body: bytes) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(50 * LIMIT // 65536):
            yield bytes(65536)

    assert post(arrow_body[:100]).status_code == 400
    assert post(arrow_body, "text/plain").status_code == 415
    assert post(bytes(LIMIT + 1)).status_code == 413
    with contextlib.suppress(httpx.WriteError, httpx.ReadError):  # a connection closed while we still send is a refusal too
        assert post(chunks()).status_code == 413
    refused = httpx.post(f"{endpoint.url}/v1/models/tiny/embed", content=arrow_body, headers={"content-type": ARROW_TYPE}, trust_env=False)
    assert (refused.status_code, refused.json()["code"]) == (401, "unauthenticated")
    assert httpx.get(f"{endpoint.url}/v2/health/ready", trust_env=False).json() == {"ready": True}
    with Client(endpoint.url, api_key="wrong") as stranger, pytest.raises(ServiceError, match="API key"):
        stranger.models()


@pytest.mark.parametrize(
    ("headers", "declared", "status"),
    [
        ({"authorization": "Bearer wrong"}, 1000, 401),
        ({"authorization": "Bearer wrong"}, 300 * 2**20, 401),
        ({}, None, 401),
        ({"authorization": f"Bearer {KEY}"}, 300 * 2**20, 413),
        ({"authorization": f"Bearer {KEY}", "x-padding": "a" * 40_000}, 10, 431),
    ],
)
def test_what_headers_tell_is_refused_although_the_body_never_comes(
    endpoint: Deployed, headers: dict[str, str], declared: int | None, status: int
) -> None:
    """Through Serve's proxy too, which hands a request on as soon as it has its headers."""
    with socket.create_connection(("127.0.0.1", int(endpoint.url.rpartition(":")[2])), timeout=30) as connection:
        connection.sendall(head(Ask(kind=ARROW_TYPE, headers=headers), declared))
        assert answer_of(connection).status == status


def test_a_request_id_comes_back_once(post: Post, arrow_body: bytes) -> None:
    answer = post(arrow_body, **{"x-request-id": "call-7"})
    assert answer.headers["x-request-id"] == "call-7"
    assert read_answer(answer.content)[1]["request_id"] == "call-7"


def model_replicas() -> list[psutil.Process]:
    """Processes of this test's own cluster that hold the model."""
    own = psutil.Process().children(recursive=True)
    return [process for process in own if "ServeReplica:tiny--v" in " ".join(process.cmdline())]


def ask_from_many(post: Post, bodies: list[bytes], meanwhile: Callable[[], object]) -> list[httpx.Response]:
    """All bodies from eight threads; ``meanwhile`` runs once a fifth has been answered and more are in flight."""
    answered, started = threading.Semaphore(0), threading.Event()

    def one(body: bytes) -> httpx.Response:
        answer = post(body)
        answered.release()
        return answer

    def disturb() -> None:
        for _ in range(len(bodies) // 5):
            answered.acquire()
        started.set()
        meanwhile()

    with ThreadPoolExecutor(9) as threads:
        disturbed = threads.submit(disturb)
        answers = list(threads.map(one, bodies))
        disturbed.result()
    assert started.is_set()
    return answers


def test_a_crowd_and_a_dying_replica_change_no_answer(post: Post, predictor: Predictor, cells: AnnData) -> None:
    wires = [WireCells.of(cells[start : start + 10].copy(), BATCHES, predictor.folder.vocabulary, 16) for start in (0, 10, 20, 30)]
    bodies = [wire.body(next(iter(wire.parts(100))))[0] for wire in wires]
    alone = [matrix(read_answer(post(body).content)[0]["embedding"]) for body in bodies]
    before = model_replicas()
    assert len(before) == 2

    def hold_then_kill() -> None:
        os.kill(before[0].pid, signal.SIGSTOP)  # what it has in hand stays there
        time.sleep(0.3)
        os.kill(before[0].pid, signal.SIGKILL)

    answers = ask_from_many(post, bodies * 60, hold_then_kill)
    assert [answer.status_code for answer in answers] == [200] * 240
    for index, answer in enumerate(answers):
        np.testing.assert_allclose(matrix(read_answer(answer.content)[0]["embedding"]), alone[index % 4], atol=1e-5)
    assert not before[0].is_running() or before[0].status() == psutil.STATUS_ZOMBIE


CROWD, AT_ONCE = 120, 32  # `python -m jobs.benchmark serve --only crowd` asks 500


def test_random_requests_in_a_crowd_get_their_offline_answers(post: Post, endpoint: Deployed, predictor: Predictor, cells: AnnData) -> None:
    """Random sizes, and contexts that differ in a few cells only: the most tempting neighbours there are."""
    rng = np.random.default_rng(0)
    picks = [np.sort(rng.choice(40, int(rng.integers(1, 40)), replace=False)) for _ in range(CROWD)]
    asked = [cells[pick].copy() for pick in picks]
    wires = [WireCells.of(part, BATCHES, predictor.folder.vocabulary, 16) for part in asked]
    bodies = [wire.body(next(iter(wire.parts(100)))) for wire in wires]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        answers = list(threads.map(lambda sent: post(sent[0]), bodies))
    assert {answer.status_code for answer in answers} == {200}
    for part, (_, rows), answer in zip(asked, bodies, answers, strict=True):
        expected = predictor.embed(offline(predictor, part))[rows]
        np.testing.assert_allclose(matrix(read_answer(answer.content)[0]["embedding"]), expected, atol=1e-5)
    text = httpx.get(f"{endpoint.url}/metrics", headers={"authorization": f"Bearer {KEY}"}, trust_env=False).text
    load = {line.split("{")[0]: float(line.split()[-1]) for line in text.splitlines() if line.startswith("cellplane_forward_")}
    assert load["cellplane_forward_requests_total"] > load["cellplane_forward_total"], "requests that waited together shared forwards"


def test_a_damaged_or_senseless_model_is_refused_and_the_old_one_stays(
    endpoint: Deployed, client: Client, model_path: Path, key_file: Path, tmp_path: Path
) -> None:
    damaged = save_model(load_model(model_path), tmp_path / "damaged")
    content = bytearray((damaged / "weights.safetensors").read_bytes())
    content[-5] ^= 1
    (damaged / "weights.safetensors").write_bytes(content)
    good = load_model(model_path)
    nan = {name: torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor for name, tensor in good.weights.items()}
    senseless = save_model(dataclasses.replace(good, weights=nan), tmp_path / "senseless")
    for folder, words in ((damaged, r"weights\.safetensors"), (senseless, "NaN")):
        with pytest.raises(IntegrityError, match=words):
            deploy(config_for(folder, api_keys_file=key_file, port=int(endpoint.url.rpartition(":")[2])))
    assert client.model("tiny")["model_sha256"] == good.model_sha256


def test_another_address_is_refused_while_the_endpoint_runs(model_path: Path, endpoint: Deployed) -> None:
    for port in (0, int(endpoint.url.rpartition(":")[2]) - 1):
        with pytest.raises(ServiceError, match="already runs"):
            deploy(config_for(model_path, port=port))


def test_another_model_takes_over_without_a_failed_request(
    endpoint: Deployed, client: Client, post: Post, model_path: Path, key_file: Path, tmp_path: Path, arrow_body: bytes
) -> None:
    torch.manual_seed(1)
    old = load_model(model_path)
    weights = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in old.weights.items()}
    new = load_model(save_model(dataclasses.replace(old, weights=weights), tmp_path / "new"))
    done = threading.Event()

    def replace_it() -> None:
        deploy(config_for(tmp_path / "new", api_keys_file=key_file, port=int(endpoint.url.rpartition(":")[2])))
        done.set()

    change = threading.Thread(target=replace_it)
    change.start()
    answers = [post(arrow_body)]
    while not done.is_set() and change.is_alive():
        answers.append(post(arrow_body))
    change.join()
    answers.append(post(arrow_body))
    assert {answer.status_code for answer in answers} == {200}
    seen = [read_answer(answer.content)[1]["model_sha256"] for answer in answers]
    assert set(seen) == {old.model_sha256, new.model_sha256}
    assert seen[-1] == client.model("tiny")["model_sha256"] == new.model_sha256
