"""Figures of a run for Prometheus come from the end of its journal, and trouble with them ends nothing."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest

from cellplane.tracking.journal import Journal
from cellplane.train.gauges import GAUGES, TAIL_BYTES, exported, newest


def test_the_newest_value_of_each_is_found(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    for step in range(1, 4):
        journal.append(step, {"train/loss": 10.0 / step, "train/cells_per_s": 100.0, "system/rss_bytes": 1.0})
    journal.append(2, {"val/loss": 7.0})
    assert newest(journal.path) == {
        "cellplane_train_step": 3.0,
        "cellplane_train_loss": 10.0 / 3,
        "cellplane_train_cells_per_s": 100.0,
        "cellplane_val_loss": 7.0,
    }


def test_a_journal_that_is_not_there_or_torn_tells_what_it_can(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert newest(path) == {}
    Journal(path).append(5, {"train/loss": 2.0})
    with path.open("ab") as file:
        file.write(b'{"step": 6, "metr')
    assert newest(path)["cellplane_train_step"] == 5.0


def test_only_the_end_of_a_long_journal_is_read(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    row = b'{"step":%d,"time_ms":1,"metrics":{"train/loss":%d.0}}\n'
    path.write_bytes(b"".join(row % (step, step) for step in range(4000)))
    assert path.stat().st_size > 2 * TAIL_BYTES
    assert newest(path) == {"cellplane_train_step": 3999.0, "cellplane_train_loss": 3999.0}


def test_gauges_follow_while_training_runs_and_are_right_at_its_end(tmp_path: Path) -> None:
    journal, seen = Journal(tmp_path / "journal.jsonl"), dict[str, float]()
    with exported(journal.path, seen.__setitem__, every_s=0.01):
        journal.append(1, {"train/loss": 3.0})
        until = time.monotonic() + 10
        while not seen and time.monotonic() < until:
            time.sleep(0.01)
        assert seen["cellplane_train_step"] == 1.0
        journal.append(2, {"train/loss": 2.0})
    assert seen == {"cellplane_train_step": 2.0, "cellplane_train_loss": 2.0}
    assert set(seen) <= set(GAUGES)


def test_trouble_with_gauges_is_told_and_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Journal(tmp_path / "journal.jsonl").append(1, {"train/loss": 3.0})

    def refuses(name: str, value: float) -> None:
        raise RuntimeError("no metrics agent")

    with exported(tmp_path / "journal.jsonl", refuses, every_s=60):
        pass
    assert "no metrics agent" in caplog.text


@pytest.mark.cluster
def test_prometheus_finds_a_runs_figures_at_rays_port(ray_cluster: None) -> None:
    import ray

    from cellplane.train.launch import _gauges

    @ray.remote(num_cpus=0)
    class Worker:
        def look(self, step: float) -> None:
            self.set = getattr(self, "set", None) or _gauges("probe")
            self.set("cellplane_train_step", step)

    worker = Worker.remote()
    ray.get(worker.look.remote(41.0), timeout=120)
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    url, until = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", time.monotonic() + 90
    while True:
        ray.get(worker.look.remote(42.0), timeout=120)
        lines = [line for line in httpx.get(url, trust_env=False).text.splitlines() if line.startswith("ray_cellplane_train_step{")]
        if lines and 'run="probe"' in lines[0] and lines[0].endswith(" 42.0"):
            return
        assert time.monotonic() < until, lines
        time.sleep(1)
