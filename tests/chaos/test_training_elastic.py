"""A node is lost and another one comes: the group shrinks, grows at a checkpoint, and the losses do not notice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from cellplane.tracking.journal import Journal
from cellplane.train.launch import pretrain
from cellplane.train.run_folder import RunFolder

pytestmark = [pytest.mark.chaos, pytest.mark.own_cluster]

STEPS, KEPT, LOST_AFTER = 40, 5, 8
SAME = 1e-5  # whoever was lost and when, which no plan decides; test_worlds holds chosen changes to 1e-6
SHRINK_S = 120.0


class Node:
    """A second node of the cluster: `ray start` as a process of ours."""

    def __init__(self, address: str, folder: Path) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={address}", "--num-cpus=1", "--block"]
        environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
        with (folder / "node.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def lose(self) -> None:
        """Ends the node's raylet and its workers at the same moment, as a power cut would; they are gone when it returns."""
        lost = psutil.Process(self.process.pid).children(recursive=True)
        for process in lost:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        assert not psutil.wait_procs(lost, timeout=30)[1]

    def end(self) -> None:
        for process in (*psutil.Process(self.process.pid).children(recursive=True), self.process):
            with suppress(psutil.Error, OSError):
                process.kill()
        self.process.wait(timeout=30)


class Cluster:
    """A head of one CPU in this process, and nodes of one CPU that come and go."""

    def __init__(self, folder: Path) -> None:
        import ray

        ray.init(address="local", num_cpus=1, include_dashboard=False, _temp_dir=str(folder), log_to_driver=False, configure_logging=False)
        self.address, self.folder = ray.get_runtime_context().gcs_address, folder
        self.nodes: list[Node] = []

    def add_node(self) -> None:
        before = living_nodes()
        self.nodes.append(Node(self.address, self.folder))
        wait_for(lambda: living_nodes() > before)

    def end(self) -> None:
        import ray

        for node in self.nodes:
            node.end()
        ray.shutdown()


def living_nodes() -> int:
    import ray

    return sum(node["Alive"] for node in ray.nodes())


@pytest.fixture
def two_nodes() -> Iterator[Cluster]:
    """A Ray cluster of two nodes of one CPU on this machine; the driver is on the first."""
    with tempfile.TemporaryDirectory(prefix="cp-", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(Path(folder))
        try:
            cluster.add_node()
            yield cluster
        finally:
            cluster.end()


def wait_for(what: Callable[[], Any], timeout_s: float = 180) -> Any:
    """The first true answer; polls a state, never a time."""
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.05)
    return found


def writers(folder: RunFolder) -> list[int]:
    """Process ids of rank 0, from the files in which it would say where it stands."""
    return [
        int(path.stem.rpartition("-")[2]) for path in folder.stacks.glob("rank-0-pid-*.txt") if alive(int(path.stem.rpartition("-")[2]))
    ]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Storm(threading.Thread):
    """Takes the second node away once rank 0 stands after a known step, and brings another one while one worker trains."""

    def __init__(self, cluster: Cluster, folder: RunFolder, flag: Path) -> None:
        super().__init__(daemon=True)
        self.cluster, self.folder, self.flag = cluster, folder, flag
        self.lost_ms = self.back_ms = 0.0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._take()
            self._bring()
        except BaseException as error:  # shown by the test
            self.error = error

    def _take(self) -> None:
        wait_for(self.flag.exists)
        (first,) = writers(self.folder)
        self.cluster.nodes[-1].lose()
        self.lost_ms = time.time() * 1000
        with suppress(ProcessLookupError):  # rank 0 was on the node that is gone
            os.kill(first, signal.SIGCONT)
        self.first = first

    def _bring(self) -> None:
        (second,) = wait_for(lambda: [pid for pid in writers(self.folder) if pid != self.first])
        os.kill(second, signal.SIGSTOP)  # else so small a run would be over before a node has started
        self.cluster.add_node()
        self.back_ms = time.time() * 1000
        os.kill(second, signal.SIGCONT)


def test_a_lost_node_shrinks_the_group_and_a_new_one_grows_it_at_a_checkpoint(
    two_nodes, run_config, run_workers, cellplane_home, tmp_path_factory, monkeypatch, losses, record_property
):
    config = run_config(
        "r",
        {
            "workers": {"count": 2, "min": 1, "max": 2, "max_failures": 1, "collective_timeout_s": 120},
            "optimizer": {"steps": STEPS},
            "checkpoint": {"every_steps": KEPT},
        },
    )
    folder, flag = RunFolder.of("r"), cellplane_home / "stopped"
    monkeypatch.setenv("FAULT_AT", f"step_rank0:{LOST_AFTER - 1}:{flag}")
    monkeypatch.setenv("FAULT_SIGNAL", "SIGSTOP")
    storm = Storm(two_nodes, folder, flag)
    storm.start()
    outcome = pretrain(config)
    storm.join(60)
    assert storm.error is None
    assert outcome.steps == STEPS
    starts = folder.starts()
    assert [start.workers for start in starts] == [2, 1, 2]
    assert starts[1].step == LOST_AFTER // KEPT * KEPT  # nothing is lost but the interval
    assert starts[2].step % KEPT == 0
    rows = {row.step: row.time_ms for row in Journal(folder.journal).rows()}
    shrink_s = (rows[starts[1].step + 1] - storm.lost_ms) / 1000
    grow_s = (rows[starts[2].step + 1] - storm.back_ms) / 1000
    print(
        json.dumps(
            {
                "shrink_s": round(shrink_s, 1),
                "regrow_s": round(grow_s, 1),
                "regrown_at": starts[2].step,
                "starts": [s.because for s in starts],
            }
        )
    )
    assert shrink_s < SHRINK_S
    undisturbed = tmp_path_factory.mktemp("undisturbed")
    assert run_workers(config, undisturbed, 2) == [0, 0]
    assert losses(cellplane_home, "r") == pytest.approx(losses(undisturbed, "r"), rel=SAME)
