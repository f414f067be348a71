"""What an endpoint does when it matters: versions change under load, too many ask at once, requests are packed.

A stack of its own is started with the commands a user types, in a temporary folder, with versions of a small model in
its registry: two good ones, one that answers NaN, one whose golden answers differ, one with a flipped bit. The load
comes from a second process.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellplane.artifact.folder import ModelFolder, load_model, save_model
from cellplane.benchmark.report import Figure, asked_parts, at_least, at_most
from cellplane.benchmark.serve_load import LOST, Answered, Order
from cellplane.client import Client, WireCells
from cellplane.data.config import DataKeys, SimulateConfig
from cellplane.data.sentences import memory_store
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData, cell_table
from cellplane.errors import BenchmarkError
from cellplane.genes import GeneVocabulary
from cellplane.inference import Predictor
from cellplane.model.cellplm import CellPLM
from cellplane.model.config import ModelConfig
from cellplane.pipelines.golden import with_golden
from cellplane.tracking.promotion import rollback
from cellplane.tracking.registry import promote, register
from cellplane.tracking.runs import RunSpec, TrackedRun, local_uri

NAME = "measured"
GENES, MAX_CELLS = 2000, 256
GOOD, NEXT, NAN, GOLDEN, FLIPPED = 1, 2, 3, 4, 5
BROKEN = {NAN: "NaN at warm-up", GOLDEN: "golden mismatch", FLIPPED: "bad checksum"}
WAIT_S = 180.0
KEYS = DataKeys(batch_key="batch")
SETTINGS = ("num_cpus=0", "max_ongoing_requests=16", "max_queued_requests=32", f"startup_timeout_s={WAIT_S:g}")
CROWD, CALLERS, CELLS_EACH, OVERLOAD = 32, 16, 64, 160  # callers at once; overload: ten times those that are answered at once


@dataclass(frozen=True)
class ServeBenchmark:
    """What to measure: requests under load (the gate asks 10000), seconds of overload (the gate asks 60), the parts."""

    requests: int = 500
    seconds: int = 5
    only: tuple[str, ...] = ()

    def run(self) -> Iterator[Figure]:
        """Every figure as soon as it is known. Raises BenchmarkError when the stack does not start."""
        logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a request otherwise
        with _endpoint() as endpoint:
            for part in asked_parts(PARTS, self.only):
                yield from part(self, endpoint)


@dataclass(frozen=True)
class Endpoint:
    """A running stack: its folder, its registry, its address."""

    home: Path
    url: str

    @property
    def registry(self) -> str:
        """The address of its registry."""
        return local_uri(self.home)

    def version(self) -> str:
        """Who answers to the model's name now."""
        with Client(self.url) as client:
            return str(client.model(NAME)["version"])

    def reason(self, version: int) -> str:
        """Why a version does not serve; empty while that is not known."""
        with Client(self.url) as client:
            rows = [row for row in client.versions(NAME) if row["version"] == str(version)]
        return str(rows[0]["reason"] or "") if rows else ""


def crowd(plan: ServeBenchmark, endpoint: Endpoint) -> Iterator[Figure]:
    """Random requests at once, in contexts that differ in a few cells, beside the offline predictor."""
    cells, rng = _cells(CELLS_EACH), np.random.default_rng(0)
    parts = [cells[np.sort(rng.choice(CELLS_EACH, rng.integers(1, CELLS_EACH), replace=False))].copy() for _ in range(plan.requests)]
    predictor = Predictor.load(endpoint.home / f"v{endpoint.version()}")

    def ask(part: AnnData) -> Any:
        with Client(endpoint.url) as client:
            return client.embed(part, NAME, KEYS)

    with ThreadPoolExecutor(CROWD) as threads:
        served = list(threads.map(ask, parts))
    worst = 0.0
    for part, answer in zip(parts, served, strict=True):
        store = memory_store(cell_table(part, predictor.vocabulary, KEYS)[0], predictor.max_cells)
        worst = max(worst, float(np.abs(answer - predictor.embed(store)).max()))
    yield at_most("served beside offline, largest difference", worst, 1e-5, "").because(f"{plan.requests} requests, {CROWD} at once")


def packing(plan: ServeBenchmark, endpoint: Endpoint) -> Iterator[Figure]:
    """How many requests share a forward, and cells/s beside the bare packed model in this process."""
    cells = _cells(CELLS_EACH)
    before = _forwards(endpoint)
    answers = _load(endpoint, _bodies(endpoint, cells), Order(callers=CALLERS, requests=plan.requests))
    requests, forwards = (now - then for now, then in zip(_forwards(endpoint), before, strict=True))
    seconds = max(answer.at + answer.seconds for answer in answers) - min(answer.at for answer in answers)
    served = CELLS_EACH * sum(answer.status == 200 for answer in answers) / seconds
    predictor = Predictor.load(endpoint.home / f"v{endpoint.version()}")
    table = cell_table(_cells(CELLS_EACH * CALLERS), predictor.vocabulary, DataKeys())[0]
    store = memory_store(table, CELLS_EACH)
    predictor.embed(store)
    began = time.perf_counter()
    predictor.embed(store)
    bare = table.n_cells / (time.perf_counter() - began)
    yield at_least("requests that share a forward", requests / max(forwards, 1), 1.5, "requests").because(
        f"{CALLERS} callers of {CELLS_EACH} cells"
    )
    yield Figure("cells/s served beside the bare packed model", served / bare, "x").because(
        f"{served:.0f} beside {bare:.0f} cells/s; a tiny model, so this is the wire's cost; 0.7 is asked at 85M"
    )


def rollout(plan: ServeBenchmark, endpoint: Endpoint) -> Iterator[Figure]:
    """A promotion, three broken versions, and the way back, while callers never stop asking."""
    bodies = _bodies(endpoint, _cells(8))
    quiet = _load(endpoint, bodies, Order(callers=4, requests=max(plan.requests // 5, 50)))
    with _loading(endpoint, bodies, Order(callers=4, least=plan.requests)) as load:
        promote(NAME, NEXT, endpoint.registry)
        started = _until(lambda: endpoint.version() == str(NEXT))
        told = {}
        for broken, what in BROKEN.items():
            promote(NAME, broken, endpoint.registry)
            _until(partial(endpoint.reason, broken))
            told[what] = endpoint.reason(broken)
            promote(NAME, NEXT, endpoint.registry)
        promote(NAME, GOOD, endpoint.registry)
        _until(lambda: endpoint.version() == str(GOOD))
        began = time.monotonic()
        rollback(NAME, endpoint.registry)
        _until(lambda: endpoint.version() == str(NEXT))
        back = time.monotonic() - began
    answers = load.answers
    failed = [answer for answer in answers if answer.status != 200]
    strange = {answer.version for answer in answers if answer.status == 200} - {str(GOOD), str(NEXT)}
    counts = dict(Counter(answer.status for answer in answers))
    yield at_most("requests failed in roll-outs", len(failed), 0, "").because(f"of {len(answers)}; statuses {counts}")
    yield at_most("answers by a broken or unnamed version", len(strange), 0, "").because(", ".join(map(str, strange)))
    yield at_least("broken versions that were told apart", len(told), len(BROKEN), "").because(details=told)
    yield at_most("rollback, until the old version answers", back, 1.0, "s").because(f"a new version answered after {started:.1f} s")
    slow = _percentile(answers, 99) / _percentile(quiet, 99)
    yield at_most("p99 while versions change, beside quiet", slow, 2.0, "x").because(f"{_percentile(answers, 99) * 1e3:.0f} ms")


def overload(plan: ServeBenchmark, endpoint: Endpoint) -> Iterator[Figure]:
    """Many more callers than are answered at once: who is refused is told so at once, and when to come back."""
    answers = _load(endpoint, _bodies(endpoint, _cells(CELLS_EACH)), Order(callers=OVERLOAD, seconds=plan.seconds))
    counts = Counter(answer.status for answer in answers)
    refused = [answer for answer in answers if answer.status == 503]
    silent = [answer for answer in refused if answer.retry_after is None]
    said = ", ".join(f"{count} x {status}" for status, count in sorted(counts.items()))
    yield at_most("answers in overload that are neither 200 nor 503", len(answers) - counts[200] - counts[503], 0, "").because(said)
    yield at_most("503 without Retry-After", len(silent), 0, "")
    yield at_most("503, 99th percentile", _percentile(refused, 99), 0.25, "s").because(f"{OVERLOAD} callers for {plan.seconds} s")
    yield Figure("accepted in overload, 99th percentile", _percentile([answer for answer in answers if answer.status == 200], 99), "s")


PARTS: dict[str, Callable[[ServeBenchmark, Endpoint], Iterator[Figure]]] = {
    "crowd": crowd,
    "packing": packing,
    "rollout": rollout,
    "overload": overload,
}


class Loading:
    """Callers at work in their process; ``answers`` once they have stopped."""

    def __init__(self, order: Order) -> None:
        self.order, self.answers = order, list[Answered]()
        self.process = subprocess.Popen([sys.executable, "-m", "cellplane.benchmark.serve_load"], stdin=subprocess.PIPE, text=True)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asdict(order)))
        self.process.stdin.close()

    def end(self) -> None:
        """Wait for the callers and read what they found. BenchmarkError when their process failed."""
        if self.process.wait() != 0:
            raise BenchmarkError("the process of the callers failed; its error stands above")
        found = json.loads(Path(self.order.out).read_text(encoding="utf-8"))
        self.answers = [Answered(**answer) for answer in found["answers"]]


@contextmanager
def _loading(endpoint: Endpoint, bodies: Sequence[Path], order: Order) -> Iterator[Loading]:
    """Callers at work during the block; at its end they stop as the order says."""
    with tempfile.TemporaryDirectory(dir=endpoint.home) as folder:
        sent = replace(order, url=endpoint.url, path=f"/v1/models/{NAME}/embed", bodies=tuple(map(str, bodies)))
        load = Loading(replace(sent, out=f"{folder}/answers.json", stop=f"{folder}/stop"))
        try:
            yield load
            if order.least:
                Path(load.order.stop).touch()
            load.end()
        finally:
            load.process.terminate()
            load.process.wait()


def _load(endpoint: Endpoint, bodies: Sequence[Path], order: Order) -> list[Answered]:
    with _loading(endpoint, bodies, order) as load:
        pass
    if all(answer.status == LOST for answer in load.answers):
        raise BenchmarkError(f"nothing answered at {endpoint.url}")
    return load.answers


def _percentile(answers: Sequence[Answered], percent: int) -> float:
    return float(np.percentile([answer.seconds for answer in answers], percent)) if answers else 0.0


def _until(what: Callable[[], object]) -> float:
    """Seconds until it is so; BenchmarkError when it never is."""
    began = time.monotonic()
    while not what():
        if time.monotonic() - began > WAIT_S:
            raise BenchmarkError(f"the endpoint did not come to the expected state within {WAIT_S:g} s")
        time.sleep(0.05)
    return time.monotonic() - began


def _forwards(endpoint: Endpoint) -> tuple[float, float]:
    """(requests, forwards) of the version that answers, so far."""
    with Client(endpoint.url) as client:
        text = client.metrics()
    label = f'version="{endpoint.version()}"'
    rows = {
        line.split("{")[0]: float(line.split()[-1]) for line in text.splitlines() if line.startswith("cellplane_forward") and label in line
    }
    return rows.get("cellplane_forward_requests_total", 0.0), rows.get("cellplane_forward_total", 0.0)


def _cells(n_cells: int) -> AnnData:
    return simulate(SimulateConfig(n_cells=n_cells, n_genes=GENES, n_types=3, n_batches=1, seed=1))


def _bodies(endpoint: Endpoint, cells: AnnData) -> list[Path]:
    """The cells as a request of their own, in a file."""
    folder = load_model(endpoint.home / f"v{GOOD}")
    wire = WireCells.of(cells, KEYS, folder.vocabulary, MAX_CELLS)
    path = endpoint.home / f"body-{cells.n_obs}"
    path.write_bytes(wire.body(list(range(len(wire.sentences))))[0])
    return [path]


@contextmanager
def _endpoint() -> Iterator[Endpoint]:
    """A stack with the versions in its registry, the first one served; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="cellplane-benchmark-", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        _register_versions(home)
        try:
            _command(home, "up", "-o", "num_cpus=2", *(word for name in PORTS for word in ("-o", f"{name}=0")))
            promote(NAME, GOOD, local_uri(home))
            options = [word for setting in SETTINGS for word in ("-o", setting)]
            url = _command(home, "serve", f"models:/{NAME}@champion", "--name", NAME, *options)["url"]
            yield Endpoint(home, url)
        finally:
            _command(home, "down")


PORTS = ("mlflow_port", "dashboard_port", "ray_port", "serve_port")


def _command(home: Path, *words: str) -> dict[str, Any]:
    """What a cellplane command answers; BenchmarkError with the end of what it said when it fails."""
    start = [sys.executable, "-m", "cellplane.cli.main", *words, "--json"]
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    done = subprocess.run(start, capture_output=True, text=True, env={**kept, "CELLPLANE_HOME": str(home)}, check=False)
    if done.returncode != 0:
        raise BenchmarkError(f"`cellplane {words[0]}` failed: {done.stderr[-500:]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _register_versions(home: Path) -> None:
    """Versions 1 to 5 of the model, sound and broken."""
    torch.manual_seed(0)
    config = ModelConfig(n_genes=GENES, width=64, n_blocks=2, n_heads=2, latent="ae", latent_width=32, decoder="none", gene_init_sd=0.5)
    genes = GeneVocabulary.from_ids([f"GENE{gene:04d}" for gene in range(1, GENES + 1)])
    plain = ModelFolder(config=config, weights={}, vocabulary=genes, task="pretrain", max_cells=MAX_CELLS)
    sound = [with_golden(replace(plain, weights=CellPLM(config).state_dict())) for _ in range(3)]
    nan = {name: torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor for name, tensor in sound[0].weights.items()}
    others = CellPLM(config).state_dict()
    for number, model in enumerate([*sound[:2], replace(sound[0], weights=nan), replace(sound[0], weights=others), sound[2]], start=1):
        path = save_model(model, home / f"v{number}")
        run = TrackedRun.open(RunSpec(run_key=f"v{number}", experiment="benchmark", name=f"v{number}"), local_uri(home))
        run.log_artifacts(path, "model")
        register(path, run.run_id, NAME, local_uri(home))
        run.finish()
        if number == FLIPPED:
            _flip(next(file for file in home.rglob("weights.safetensors") if run.run_id in str(file)))


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
