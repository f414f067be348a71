"""A stack of its own for measuring an endpoint, with versions of a small model, and callers in another process.

It is started with the commands a user types, in a temporary folder: two good versions, one that answers NaN, one whose
golden answers differ, one with a flipped bit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellplane.artifact.folder import ModelFolder, load_model, save_model
from cellplane.benchmark.serve_load import LOST, Answered, Order
from cellplane.client import Client, WireCells
from cellplane.data.config import DataKeys, SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData
from cellplane.errors import BenchmarkError
from cellplane.genes import GeneVocabulary
from cellplane.model.cellplm import CellPLM
from cellplane.model.config import ModelConfig
from cellplane.pipelines.golden import with_golden
from cellplane.processes import Member, usage
from cellplane.tracking.registry import promote, register
from cellplane.tracking.runs import RunSpec, TrackedRun, local_uri

NAME = "measured"
GENES, MAX_CELLS = 2000, 256
GOOD, NEXT, NAN, GOLDEN, FLIPPED = 1, 2, 3, 4, 5
WAIT_S = 180.0
KEYS = DataKeys(batch_key="batch")
LET_IN = 48  # by HAProxy, of the 64 that the endpoint holds: who is let in is not refused again behind the door
SETTINGS = ("num_cpus=0", "replicas=2", "max_ongoing_requests=16", "max_queued_requests=32", f"startup_timeout_s={WAIT_S:g}")


@dataclass(frozen=True)
class Endpoint:
    """A running stack: its folder, its registry, its address."""

    home: Path
    url: str

    def processes(self, named: str) -> list[int]:
        """Pids of this stack's own Ray processes whose title begins so; children of its recorded head, nobody else's."""
        recorded = json.loads((self.home / "stack.json").read_text(encoding="utf-8"))["members"]["ray"]
        return sorted(usage(Member(recorded["pid"], recorded["create_time"]).family(), named))

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


class Loading:
    """Callers at work in their process; ``answers`` and the processor's ``cpu_s`` that asking took once they have stopped."""

    def __init__(self, order: Order) -> None:
        self.order, self.answers, self.cpu_s = order, list[Answered](), 0.0
        self.process = subprocess.Popen([sys.executable, "-m", "cellplane.benchmark.serve_load"], stdin=subprocess.PIPE, text=True)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asdict(order)))
        self.process.stdin.close()

    def end(self) -> None:
        """Wait for the callers and read what they found. BenchmarkError when their process failed."""
        if self.process.wait() != 0:
            raise BenchmarkError("the process of the callers failed; its error stands above")
        found = json.loads(Path(self.order.out).read_text(encoding="utf-8"))
        self.answers, self.cpu_s = [Answered(**answer) for answer in found["answers"]], found["cpu_s"]


@contextmanager
def loading(endpoint: Endpoint, bodies: Sequence[Path], order: Order) -> Iterator[Loading]:
    """Callers at work during the block; at its end they stop as the order says. They ask for embeddings where it names no path."""
    with tempfile.TemporaryDirectory(dir=endpoint.home) as folder:
        sent = replace(order, url=endpoint.url, path=order.path or f"/v1/models/{NAME}/embed", bodies=tuple(map(str, bodies)))
        load = Loading(replace(sent, out=f"{folder}/answers.json", stop=f"{folder}/stop"))
        try:
            yield load
            if order.least:
                Path(load.order.stop).touch()
            load.end()
        finally:
            load.process.terminate()
            load.process.wait()


def load(endpoint: Endpoint, bodies: Sequence[Path], order: Order) -> list[Answered]:
    """What the callers of an order found; BenchmarkError when nothing answers."""
    with loading(endpoint, bodies, order) as load:
        pass
    if all(answer.status == LOST for answer in load.answers):
        raise BenchmarkError(f"nothing answered at {endpoint.url}")
    return load.answers


def percentile(answers: Sequence[Answered], percent: int) -> float:
    """A percentile of the seconds that answers took; 0 without any."""
    return float(np.percentile([answer.seconds for answer in answers], percent)) if answers else 0.0


def until(what: Callable[[], object]) -> float:
    """Seconds until it is so; BenchmarkError when it never is."""
    began = time.monotonic()
    while not what():
        if time.monotonic() - began > WAIT_S:
            raise BenchmarkError(f"the endpoint did not come to the expected state within {WAIT_S:g} s")
        time.sleep(0.05)
    return time.monotonic() - began


def forwards_of(endpoint: Endpoint) -> tuple[float, float]:
    """(requests, forwards) of the version that answers, so far."""
    with Client(endpoint.url) as client:
        text = client.metrics()
    label = f'version="{endpoint.version()}"'
    rows = {
        line.split("{")[0]: float(line.split()[-1]) for line in text.splitlines() if line.startswith("cellplane_forward") and label in line
    }
    return rows.get("cellplane_forward_requests_total", 0.0), rows.get("cellplane_forward_total", 0.0)


def some_cells(n_cells: int) -> AnnData:
    """Simulated cells of the served model's genes."""
    return simulate(SimulateConfig(n_cells=n_cells, n_genes=GENES, n_types=3, n_batches=1, seed=1))


def bodies_of(endpoint: Endpoint, cells: AnnData) -> list[Path]:
    """The cells as a request of their own, in a file."""
    folder = load_model(endpoint.home / f"v{GOOD}")
    wire = WireCells.of(cells, KEYS, folder.vocabulary, MAX_CELLS)
    path = endpoint.home / f"body-{cells.n_obs}"
    path.write_bytes(wire.body(list(range(len(wire.sentences))))[0])
    return [path]


@contextmanager
def an_endpoint(proxy: str = "auto") -> Iterator[Endpoint]:
    """A stack with the versions in its registry, the first one served; gone afterwards. ``proxy`` as `cellplane up` takes it."""
    with tempfile.TemporaryDirectory(prefix="cellplane-benchmark-", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        _register_versions(home)
        try:
            settings = ("num_cpus=2", f"proxy={proxy}", f"max_requests={LET_IN}", *(f"{name}=0" for name in PORTS))
            command(home, "up", *(word for setting in settings for word in ("-o", setting)))
            promote(NAME, GOOD, local_uri(home))
            options = [word for setting in SETTINGS for word in ("-o", setting)]
            url = command(home, "serve", f"models:/{NAME}@champion", "--name", NAME, *options)["url"]
            yield Endpoint(home, url)
        finally:
            command(home, "down")


PORTS = ("mlflow_port", "dashboard_port", "ray_port", "serve_port")


def command(home: Path, *words: str) -> dict[str, Any]:
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
