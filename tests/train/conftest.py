"""Small shards, a tiny run over them, and workers as plain processes, so that training is tested without Ray."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from cellplane.data.config import ConvertConfig, DataKeys, SimulateConfig
from cellplane.data.convert import convert_with, write_part
from cellplane.data.simulate import simulate
from cellplane.data.sources import write_h5ad
from cellplane.tracking.journal import Journal
from cellplane.train.config import PretrainConfig
from cellplane.train.launch import RunFolder

TINY = {
    "width": 16,
    "n_blocks": 1,
    "n_heads": 2,
    "latent_width": 8,
    "n_clusters": 3,
    "cluster_width": 8,
    "decoder_width": 16,
    "decoder_bottleneck": 8,
    "kl_weight": 0.1,
    "cluster_weight": 0.1,
}
STEPS = 8
WORKER = Path(__file__).with_name("rank.py")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 cells of two samples in sentences of at most 12 cells."""
    folder = tmp_path_factory.mktemp("train")
    write_h5ad(simulate(SimulateConfig(n_cells=120, n_genes=24, n_types=3)), folder / "cells.h5ad")
    keys = DataKeys(batch_key="batch", labels_key="cell_type")
    config = ConvertConfig(inputs=(str(folder / "cells.h5ad"),), out=str(folder / "shards"), keys=keys, max_cells=12)
    convert_with(config, lambda tasks: map(write_part, tasks), lambda _: None)
    return folder / "shards"


MakeConfig = Callable[..., PretrainConfig]


@pytest.fixture(scope="session")
def run_config(shards: Path) -> MakeConfig:
    """A run of eight steps, three micro-batches each (an odd number, so that two workers share them unevenly)."""

    def make(run: str, changes: Mapping[str, Any] | None = None) -> PretrainConfig:
        plain: dict[str, Any] = {
            "shards": str(shards),
            "run": run,
            "model": TINY,
            "plan": {"cells_per_micro_batch": 24, "micro_batches_per_step": 3},
            "optimizer": {"steps": STEPS, "lr": 3e-3, "warmup_steps": 2},
            "checkpoint": {"every_steps": 3, "keep": 2, "asynchronous": False},  # so that a kill finds the same files on any machine
        }
        for section, values in (changes or {}).items():
            plain[section] = {**plain.get(section, {}), **values} if isinstance(values, Mapping) else values
        return PretrainConfig.model_validate(plain)

    return make


@pytest.fixture
def cellplane_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CELLPLANE_HOME of this test alone."""
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path))
    return tmp_path


RunWorkers = Callable[..., list[int]]


@pytest.fixture(scope="session")
def run_workers() -> RunWorkers:
    """Runs the workers of a configuration as processes under a home; their exit codes, one per rank."""

    def run(config: PretrainConfig, home: Path, world_size: int, fault: str = "") -> list[int]:
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        shared |= {"CELLPLANE_HOME": str(home), "FAULT_AT": fault, "DS_ACCELERATOR": "cpu", "LOCAL_WORLD_SIZE": str(world_size)}
        processes = []
        for rank in range(world_size):
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with (home / f"rank-{rank}.log").open("ab") as log:
                command = [sys.executable, str(WORKER), str(home / "config.json")]
                processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        try:
            return [process.wait(timeout=180) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait(timeout=30)

    return run


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], list[float]]:
    """The journalled loss of every step of a run under a home, each step once and in order."""

    def read(home: Path, run: str) -> list[float]:
        monkeypatch.setenv("CELLPLANE_HOME", str(home))
        rows = Journal(RunFolder.of(run).journal).rows()
        assert [row.step for row in rows] == list(range(1, len(rows) + 1))
        return [row.metrics["train/loss"] for row in rows]

    return read
