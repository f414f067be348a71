"""One worker of a run: it goes on from the newest checkpoint, alone in its folder, and waits for nobody for long."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cellplane.errors import ServiceError, StorageError
from cellplane.processes import locked
from cellplane.tracking.journal import Journal
from cellplane.train.run_folder import RunFolder
from cellplane.train.watchdog import collective_limit_s, ended_after_s
from cellplane.train.worker import device_of, limit_collectives, run_worker
from tests.train.conftest import STEPS

TORCH = {"engine": {"name": "torch"}}


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one, as Ray Train would have made it."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1, timeout=timedelta(seconds=60))
    yield
    dist.destroy_process_group()


def test_every_group_gets_the_limit_also_those_that_deepspeed_makes(group):
    """Guards private names of torch: without the limit a new group waits for half an hour."""
    made = dist.new_group([0])
    backend = made._get_backend(torch.device("cpu"))
    assert backend.options._timeout == timedelta(minutes=30)
    limit_collectives(7)
    assert backend.options._timeout == timedelta(seconds=7)


def test_without_a_group_there_is_nothing_to_limit():
    limit_collectives(7)


def test_a_cpu_run_stays_on_the_cpu(run_config):
    assert device_of(run_config("r")) == torch.device("cpu")


def test_a_worker_says_how_far_it_came_and_leaves_no_stacks(run_config, cellplane_home):
    reached = []
    run_worker(run_config("r", TORCH), 1, 0, lambda metrics: reached.append(metrics["step"]))
    assert reached == [STEPS]
    assert list(RunFolder.of("r").stacks.iterdir()) == []


def test_only_one_process_trains_a_run(run_config, cellplane_home):
    with locked(RunFolder.of("r").lock, 1), pytest.raises(ServiceError, match=r"another cellplane holds .*run.lock"):
        run_worker(run_config("r", TORCH), 1, 0, lambda metrics: None, writer_wait_s=0.2)


def test_a_writer_that_was_cut_off_has_ended_before_the_other_ranks_lose_patience():
    for timeout_s in (5, 30, 300, 3600):
        assert timeout_s < ended_after_s(timeout_s) < collective_limit_s(timeout_s)


def test_a_larger_group_is_made_at_a_checkpoint_and_nowhere_else(run_config, cellplane_home):
    config = run_config("r", {**TORCH, "workers": {"count": 2, "min": 1, "max": 2}})
    asked, reached = [], []

    def room() -> bool:
        asked.append(len(Journal(RunFolder.of("r").journal).rows()))
        return len(asked) == 2

    run_worker(config, 1, 0, lambda metrics: reached.append(metrics["step"]), room)
    assert asked == [3, 6]  # checkpoints are kept every three steps
    assert reached == [6]
    assert RunFolder.of("r").checkpoints.joinpath("step-00000006").is_dir()


def test_a_fixed_group_never_asks_for_room(run_config, cellplane_home):
    def room() -> bool:
        raise AssertionError("nobody wants to know")

    run_worker(run_config("r", TORCH), 1, 0, lambda metrics: None, room)


def test_a_full_disk_is_an_error_that_says_so(run_config, tmp_path, monkeypatch):
    folder = tmp_path / "small"
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a small file system")
    try:
        monkeypatch.setenv("CELLPLANE_HOME", str(folder))
        with pytest.raises(StorageError, match="No space left"):
            run_worker(run_config("r", TORCH), 1, 0, lambda metrics: None)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_ranks_that_see_different_folders_are_told_so(run_config, tmp_path):
    """Two processes with a home each, as on two nodes without a shared file system; only one has a checkpoint."""
    code = """if True:
        import os, sys
        import torch.distributed as dist
        from cellplane.train.config import PretrainConfig
        from cellplane.train.worker import run_worker
        config = PretrainConfig.model_validate_json(sys.argv[1])
        rank = int(os.environ["RANK"])
        os.environ["CELLPLANE_HOME"] = os.path.join(sys.argv[2], str(rank))
        if rank == 0:
            run_worker(config, 1, 0, lambda metrics: None)
        dist.init_process_group("gloo", init_method="file://" + sys.argv[2] + "/rendezvous", rank=rank, world_size=2)
        run_worker(config, 2, rank, lambda metrics: None)
        """
    command = [sys.executable, "-c", code, run_config("r", TORCH).model_dump_json(), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=180)[1] for process in ranks]
    assert all("would go on from different steps, by rank: 8, 0" in text for text in said), said
    assert all("one folder that every node sees" in text for text in said)
