"""The whole way once, on real cells: AnnData in, served answer out.

700 blood cells that scanpy's package carries (10x PBMC 68k, reduced, 10 labels) are split, sharded by Ray Data, used to
pre-train a small CellPLM on two Ray Train workers with DeepSpeed, fine-tuned for cell types, scored beside baselines on
held-out cells, registered in MLflow, served by Ray Serve, and asked over HTTP. Every step is the real component; every
step reuses what an earlier, also a killed, demo has finished.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cellplane.client import Client
from cellplane.cluster import Stack, StackConfig, connect, disconnect, down, running, up
from cellplane.config import home, load_config
from cellplane.data.config import ConvertConfig
from cellplane.data.convert import convert
from cellplane.data.sources import AnnData, column, read_h5ad, write_h5ad
from cellplane.errors import CellplaneError, DataError, ServiceError, StorageError
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.base import stratified_split
from cellplane.pipelines.config import AnnotationConfig, FinetuneConfig
from cellplane.pipelines.jobs import MODEL_ROW, JobReport, run_finetune, run_pretrain
from cellplane.tracking.registry import promote
from cellplane.train.config import PretrainConfig

log = logging.getLogger(__name__)

CELLS = "datasets/10x_pbmc68k_reduced.h5ad"  # inside the scanpy package: 700 cells, 765 genes
LABELS = "bulk_labels"
HELD_OUT = 0.2
MAX_CELLS = 64  # so that 560 cells make sentences enough for two workers
NAME = "cellplm-annotate-pbmc68k"
NEEDED_BYTES = 1 << 30
STEPS = 8
WORKERS = 2  # configs/pretrain/demo.yaml

Say = Callable[[str], None]


@dataclass
class Demo:
    """What the steps hand on to one another."""

    seed: int
    say: Say
    folder: Path
    stack: Stack | None = None
    pretrained: JobReport | None = None
    finetuned: JobReport | None = None
    url: str = ""
    difference: float = float("nan")
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def train(self) -> Path:
        """Cells to learn from."""
        return self.folder / "train.h5ad"

    @property
    def test(self) -> Path:
        """Held-out cells."""
        return self.folder / "heldout.h5ad"


def run_demo(keep: bool, seed: int, overrides: Sequence[str], say: Say) -> dict[str, Any]:
    """Runs all steps and returns the last table; see the module. ``overrides`` change the stack's configuration.

    Without ``keep`` the stack it started is stopped at the end, whatever happened.
    """
    demo = Demo(seed, say, home() / "demo" / f"seed{seed}")
    owner = home() / "demo" / "started-the-stack"
    began = time.monotonic()
    _room(demo)
    try:
        if running() is None:
            owner.touch()
        for number, (title, step) in enumerate(_steps(keep, overrides), start=1):
            with _timed(demo, number, title):
                step(demo)
        return _summary(demo, keep, time.monotonic() - began)
    finally:
        if not keep:
            _stop(demo, owner.exists())
            owner.unlink(missing_ok=True)


def _steps(keep: bool, overrides: Sequence[str]) -> list[tuple[str, Callable[[Demo], None]]]:
    return [
        ("start Ray and MLflow", lambda demo: _start(demo, keep, overrides)),
        ("split the cells", _split),
        ("convert to shards (Ray Data)", _convert),
        ("pre-train (Ray Train, DeepSpeed ZeRO 2, 2 workers)", _pretrain),
        ("fine-tune for cell types and score", _finetune),
        ("promote to champion", _promote),
        ("serve the champion (Ray Serve)", _serve),
        ("ask the endpoint", _ask),
    ]


@contextmanager
def _timed(demo: Demo, number: int, title: str) -> Iterator[None]:
    demo.say(f"[{number}/{STEPS}] {title} ...")
    began = time.monotonic()
    try:
        yield
    except CellplaneError as error:
        demo.say(f"[{number}/{STEPS}] {title} failed: {error}")
        demo.say(f"      finished steps are kept in {demo.folder}; mend the cause and run `cellplane demo` again to go on from here")
        raise
    except KeyboardInterrupt:
        demo.say(f"[{number}/{STEPS}] {title}: stopped; run `cellplane demo` again to go on from here")
        raise
    demo.timings[title] = time.monotonic() - began
    demo.say(f"      done in {demo.timings[title]:.1f} s")


def _room(demo: Demo) -> None:
    try:
        demo.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write to {demo.folder}: {error.strerror}; set CELLPLANE_HOME to a folder you may write") from error
    free = shutil.disk_usage(demo.folder).free
    if free < NEEDED_BYTES:
        raise StorageError(
            f"{free:,} bytes are free in {demo.folder}, the demo needs {NEEDED_BYTES:,}; make room or set CELLPLANE_HOME to another disk"
        )


def _start(demo: Demo, keep: bool, overrides: Sequence[str]) -> None:
    ports = [] if keep else ["mlflow_port=0", "dashboard_port=0", "serve_port=0"]  # nobody needs to remember them
    cpus = f"num_cpus={max(WORKERS, os.cpu_count() or 1)}"  # two workers also where there is one core
    demo.stack = up(load_config(StackConfig, "local", "cluster", [cpus, *ports, *overrides]), home(), demo.say)
    os.environ["MLFLOW_TRACKING_URI"] = demo.stack.mlflow_uri
    connect(demo.stack)


def _split(demo: Demo) -> None:
    if demo.train.is_file() and demo.test.is_file():
        demo.say("      reused")
        return
    cells = bundled_cells()
    kept, held_out = stratified_split(column(cells, LABELS), HELD_OUT, demo.seed)
    write_h5ad(cells[held_out].copy(), demo.test)
    write_h5ad(cells[kept].copy(), demo.train)
    demo.say(f"      {len(kept)} cells to learn from, {len(held_out)} held out, labels obs[{LABELS!r}]")


def bundled_cells() -> AnnData:
    """The cells that scanpy's package carries; DataError when the package does not."""
    found = importlib.util.find_spec("scanpy")
    places = [] if found is None else list(found.submodule_search_locations or [])
    path = Path(places[0]) / CELLS if places else Path(CELLS)
    if not path.is_file():
        raise DataError(f"scanpy's package does not carry {CELLS}; install the pinned version: make venv")
    return read_h5ad(path)


def _convert(demo: Demo) -> None:
    changes = [f"inputs={json.dumps([str(demo.train)])}", f"out={json.dumps(str(demo.folder / 'shards'))}", f"max_cells={MAX_CELLS}"]
    report = convert(load_config(ConvertConfig, "pbmc68k", "data", changes), None)
    demo.say(
        f"      {report.cells} cells x {report.genes} genes, {report.sentences} sentences; {report.shards_new} new, {report.shards_reused} "
        f"reused; counts recovered from logarithms, largest deviation from an integer {report.largest_deviation:.3f}"
    )


def _pretrain(demo: Demo) -> None:
    changes = [f"shards={json.dumps(str(demo.folder / 'shards'))}", f"run=demo-pretrain-seed{demo.seed}", f"plan.seed={demo.seed}"]
    config = load_config(PretrainConfig, "demo", "pretrain", changes)
    demo.pretrained = run_pretrain(config, _every(demo, max(config.optimizer.steps // 4, 1)))
    if demo.pretrained.reused:
        demo.say("      reused")


def _finetune(demo: Demo) -> None:
    assert demo.pretrained is not None
    options = {"data": str(demo.train), "test": str(demo.test), "base_model": str(demo.pretrained.model), "register_as": NAME}
    changes = [f"{key}={json.dumps(value)}" for key, value in options.items()]
    changes += [f"keys.labels_key={LABELS}", "keys.recover_counts=true", f"run=demo-annotate-seed{demo.seed}", f"seed={demo.seed}"]
    config = load_config(FinetuneConfig, "annotate", "finetune", changes)
    demo.finetuned = run_finetune(config, _every(demo, 100))
    if demo.finetuned.reused:
        demo.say("      reused")
    for method, row in (demo.finetuned.scores or {}).items():
        demo.say(f"      held-out {method:<20} accuracy {row['accuracy']:.3f}  macro-F1 {row['macro_f1']:.3f}")


def _every(demo: Demo, steps: int) -> Callable[[int, int, Any], None]:
    said: set[int] = set()

    def progress(done: int, total: int, metrics: Any) -> None:
        mark = done // steps
        if mark not in said and done:
            said.add(mark)
            demo.say(f"      step {done} of {total}: loss {metrics.get('train/loss', float('nan')):.4g}")

    return progress


def _promote(demo: Demo) -> None:
    assert demo.finetuned is not None
    assert demo.finetuned.version is not None
    promote(NAME, demo.finetuned.version, None)
    demo.say(f"      models:/{NAME}@champion is version {demo.finetuned.version}")


def _serve(demo: Demo) -> None:
    from cellplane.serve.app import deploy
    from cellplane.serve.deployment import ServeConfig

    assert demo.stack is not None
    changes = [f"name={NAME}", f"model=models:/{NAME}@champion", f"tracking_uri={demo.stack.mlflow_uri}", f"port={demo.stack.serve_port}"]
    deployed = deploy(load_config(ServeConfig, "local", "serve", changes))
    demo.url = deployed.url
    demo.say(f"      version {deployed.version} answers at {deployed.url}/v1/models/{NAME}")


def _ask(demo: Demo) -> None:
    assert demo.finetuned is not None
    cells = read_h5ad(demo.test)
    pipeline = CellTypeAnnotationPipeline.load(demo.finetuned.model)
    pipeline.config = AnnotationConfig.model_validate({"keys": {"recover_counts": True}})
    offline = pipeline.predict_proba(cells)
    with Client(demo.url) as client:
        answer = client.annotate(cells, NAME, keys=pipeline.config.keys)
    demo.difference = float(np.abs(answer.proba - offline).max())
    demo.say(f"      {len(answer.labels)} cells annotated over HTTP; largest difference from the offline prediction {demo.difference:.1e}")
    if demo.difference > 1e-5:
        raise ServiceError(f"the endpoint and the offline prediction differ by {demo.difference:.1e}, more than 1e-5: please report this")


def _summary(demo: Demo, keep: bool, seconds: float) -> dict[str, Any]:
    assert demo.stack is not None
    assert demo.finetuned is not None
    assert demo.pretrained is not None
    scores = {name: round(row["macro_f1"], 3) for name, row in (demo.finetuned.scores or {}).items()}
    table = {
        "cells": demo.folder,
        "shards": demo.folder / "shards",
        "pretrained model": demo.pretrained.model,
        "annotator": demo.finetuned.model,
        "macro-F1": ", ".join(f"{name} {value}" for name, value in scores.items()),
        "beats kNN": scores.get(MODEL_ROW, 0.0) >= scores.get("pca_knn", 1.0),
        "registered": f"models:/{NAME}@champion = version {demo.finetuned.version}",
        "MLflow run": demo.finetuned.run_id,
        "served = offline": f"largest difference {demo.difference:.1e}",
        "seconds": round(seconds, 1),
    }
    if keep:
        dashboard = f"{demo.stack.dashboard_url} (it asks for the token in {demo.stack.token_path})"
        ui = {"MLflow": demo.stack.mlflow_uri, "Ray dashboard": dashboard, "endpoint": f"{demo.url}/docs"}
        return {**table, **ui, "stop with": "cellplane down"}
    return {**table, "look again": "cellplane demo --keep"}


def _stop(demo: Demo, ours: bool) -> None:
    """Ends what the demo started; a stack that somebody else started only loses the endpoint."""
    try:
        if demo.url and not ours:
            from cellplane.serve.app import undeploy

            undeploy()
        disconnect()
    finally:
        if ours:
            down(home(), log.info)
