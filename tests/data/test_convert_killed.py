"""A conversion killed at any point and run again gives the bytes of one that was not; through runs and straight alike."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cellplane.data import planning, work
from cellplane.data.config import ConvertConfig, DataKeys, SimulateConfig
from cellplane.data.convert import ConvertReport, convert_with, write_part
from cellplane.data.manifest import read_manifest, verify_shards
from cellplane.data.simulate import simulate
from cellplane.data.sources import write_h5ad

KEYS = DataKeys(batch_key="batch", labels_key="cell_type")
SMALL = {"RANGE_BYTES": 4000, "SPAN_BYTES": 2000}  # so that a few cells go through several runs and spans

POINTS = (
    "before_plan:0",
    "after_plan:0",
    "before_table:0",
    "after_table:1",
    "before_range:0",
    "before_range:2",
    "before_run:1",
    "after_range:1",
    "before_shard:0",
    "before_shard:2",
    "in_shard:0",
    "in_shard:4",
    "shard_written:0",
    "before_rename:0",
    "before_rename:5",
    "after_shard:1",
    "before_move:0",
    "before_move:3",
    "after_moves:0",
    "before_manifest:0",
    "before_cleanup:0",
    "in_cleanup:0",
)
PUBLISHED = ("before_cleanup:0", "in_cleanup:0")

KILLER = """if True:
    import json, os, sys
    from cellplane.config import validate
    from cellplane.data import planning, work
    from cellplane.data.config import ConvertConfig
    from cellplane.data.convert import convert_with, write_part
    planning.RANGE_BYTES, work.SPAN_BYTES = json.loads(sys.argv[1])
    ends = {}
    for fault, text in json.loads(sys.stdin.read()).items():
        if (child := os.fork()) == 0:
            os.environ["FAULT_AT"] = fault
            convert_with(validate(ConvertConfig, json.loads(text), ""), lambda tasks: map(write_part, tasks), lambda _: None)
            os._exit(0)
        ends[fault] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(ends))
    """


def run(config: ConvertConfig) -> ConvertReport:
    return convert_with(config, lambda tasks: map(write_part, tasks), lambda _: None)


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every visible file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if not path.name.startswith(".")}


def config_for(out: Path, *inputs: Path) -> ConvertConfig:
    return ConvertConfig(inputs=tuple(map(str, inputs)), out=str(out), keys=KEYS, max_cells=16, shard_bytes=4000)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_h5ad(simulate(SimulateConfig(n_cells=120, n_genes=40)), folder / "cells.h5ad")
    return folder / "cells.h5ad"


@pytest.fixture(scope="module")
def killed(tmp_path_factory, inputs) -> tuple[dict[str, int], dict[str, ConvertConfig]]:
    """One conversion killed at each point: how it ended, and its config."""
    folder = tmp_path_factory.mktemp("killed")
    configs = {fault: config_for(folder / fault.replace(":", "_"), inputs) for fault in POINTS}
    texts = json.dumps({fault: config.model_dump_json() for fault, config in configs.items()})
    command = [sys.executable, "-c", KILLER, json.dumps(list(SMALL.values()))]
    done = subprocess.run(command, input=texts, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), configs


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, inputs) -> dict[str, str]:
    """What a conversion that read the file straight wrote: no runs, one span."""
    out = tmp_path_factory.mktemp("never") / "shards"
    run(config_for(out, inputs))
    return contents(out)


@pytest.fixture
def through_runs(monkeypatch) -> None:
    monkeypatch.setattr(planning, "RANGE_BYTES", SMALL["RANGE_BYTES"])
    monkeypatch.setattr(work, "SPAN_BYTES", SMALL["SPAN_BYTES"])


def test_the_points_are_at_least_ten_and_those_in_the_code():
    modules = ("convert", "work", "files")
    source = "".join((Path(work.__file__).parent / f"{name}.py").read_text() for name in modules)
    named = {part.split('"')[0] for part in source.split('fault("')[1:]}
    assert named == {point.split(":")[0] for point in POINTS}
    assert len(named) >= 10


@pytest.mark.parametrize("fault", POINTS)
def test_a_conversion_killed_anywhere_and_run_again_gives_the_same_bytes(killed, uninterrupted, through_runs, fault):
    ends, configs = killed
    out = Path(configs[fault].out)
    assert ends[fault] == -signal.SIGKILL
    assert (out / "manifest.json").exists() == (fault in PUBLISHED)
    report = run(configs[fault])
    if fault.startswith(("before_move", "after_moves", "before_manifest", *(point.split(":")[0] for point in PUBLISHED))):
        assert report.shards_new == 0  # what was finished is not written twice
    assert contents(out) == uninterrupted
    assert not list(out.rglob("*.tmp"))
    assert not (out / ".staging").exists()


def test_finished_ranges_are_not_read_again(inputs, tmp_path, through_runs, monkeypatch):
    config = config_for(tmp_path / "shards", inputs)
    texts: list[str] = []

    def stopping(tasks):
        for text in tasks:
            if '"kind": "shard"' in text:
                raise KeyboardInterrupt
            texts.append(text)
            yield write_part(text)

    with pytest.raises(KeyboardInterrupt):
        convert_with(config, stopping, lambda _: None)
    assert sum('"kind": "range"' in text for text in texts) > 2
    monkeypatch.setattr(work, "write_run", None)  # would be called to write one
    assert run(config).cells == 120


def test_a_run_that_a_disk_cut_short_is_written_again(inputs, tmp_path, through_runs, uninterrupted):
    config = config_for(tmp_path / "shards", inputs)

    def until_the_first_shard(tasks):
        for text in tasks:
            if '"kind": "shard"' in text:
                raise KeyboardInterrupt
            yield write_part(text)

    with pytest.raises(KeyboardInterrupt):
        convert_with(config, until_the_first_shard, lambda _: None)
    for number, path in enumerate(sorted((tmp_path / "shards" / ".staging" / "runs").glob("*.run"))[:3]):
        path.write_bytes(path.read_bytes()[: -1 - number * 60])
    run(config)
    assert contents(tmp_path / "shards") == uninterrupted


def test_a_source_is_read_once_however_its_samples_are_spread(inputs, tmp_path, through_runs, monkeypatch):
    rows: list[int] = []
    encoded = work._encoded

    def counting(source, arrays, reader, start, stop):
        for first, cells, deviation in encoded(source, arrays, reader, start, stop):
            rows.extend(range(first, first + cells.n_cells))
            yield first, cells, deviation

    monkeypatch.setattr(work, "_encoded", counting)
    run(config_for(tmp_path / "shards", inputs))
    assert sorted(rows) == list(range(120))
    assert verify_shards(tmp_path / "shards").cells == 120


def test_a_shard_that_was_damaged_is_written_again_without_runs(inputs, tmp_path, through_runs, uninterrupted):
    out = tmp_path / "shards"
    run(config_for(out, inputs))
    victim = out / read_manifest(out).shards[1].name
    content = bytearray(victim.read_bytes())
    content[-20] ^= 4  # the size stays, so the runs are not made again
    victim.write_bytes(content)
    assert run(config_for(out, inputs)).shards_new == 1
    assert contents(out) == uninterrupted
