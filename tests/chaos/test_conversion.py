"""A conversion killed at moments nobody chose, over and over, ends in the bytes of one that was left alone."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cellplane.data.config import ConvertConfig, DataKeys, SimulateConfig
from cellplane.data.convert import convert_with, write_part
from cellplane.data.manifest import verify_shards
from cellplane.data.simulate import simulate
from cellplane.data.sources import write_h5ad

pytestmark = pytest.mark.chaos

CHILD = """if True:
    import json, sys
    from cellplane.config import validate
    from cellplane.data import planning, work
    from cellplane.data.config import ConvertConfig
    from cellplane.data.convert import convert_with, write_part
    planning.RANGE_BYTES = work.SPAN_BYTES = 100_000
    print("ready", flush=True)
    convert_with(validate(ConvertConfig, json.loads(sys.argv[1]), ""), lambda tasks: map(write_part, tasks), lambda _: None)
    """


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every visible file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if not path.name.startswith(".")}


def config_for(out: Path, path: Path) -> ConvertConfig:
    keys = DataKeys(batch_key="batch", labels_key="cell_type")
    return ConvertConfig(inputs=(str(path),), out=str(out), keys=keys, max_cells=100, shard_bytes=200_000)


def interrupted(config: ConvertConfig, seconds: float) -> bool:
    """Start a conversion, kill it after some time; whether it was still running."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, config.model_dump_json()], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == "ready\n"
        time.sleep(seconds)
        child.kill()
        return child.wait() == -signal.SIGKILL


def test_twenty_kills_at_random_moments_leave_no_trace(tmp_path):
    path = tmp_path / "cells.h5ad"
    write_h5ad(simulate(SimulateConfig(n_cells=3000, n_genes=300)), path)
    never = config_for(tmp_path / "never", path)
    convert_with(never, lambda tasks: map(write_part, tasks), lambda _: None)
    moments, killed = random.Random(0), 0
    config = config_for(tmp_path / "shards", path)
    for _ in range(20):
        killed += interrupted(config, moments.uniform(0.0, 0.5))
        if (tmp_path / "shards" / "manifest.json").exists():
            verify_shards(tmp_path / "shards")  # where there is a manifest, all it names is there
            assert json.loads((tmp_path / "shards" / "manifest.json").read_bytes())
    convert_with(config, lambda tasks: map(write_part, tasks), lambda _: None)
    assert killed > 5
    assert contents(tmp_path / "shards") == contents(tmp_path / "never")
    assert not list((tmp_path / "shards").rglob("*.tmp"))
