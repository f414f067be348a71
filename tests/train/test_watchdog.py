"""A rank that stops is noticed, says where it stood, and is ended; one that works is left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cellplane.train.watchdog import ASKING, Peer, Watchdog, found_stacks

HANGS = """if True:
    import sys, threading, time
    from pathlib import Path
    from cellplane.train.watchdog import Watchdog
    def stuck_in_here():
        time.sleep(600)
    dog = Watchdog(Path(sys.argv[1]), 0, [], 1.0)
    dog.grace_s = 1.0
    with dog.watching():
        dog.beat(7)
        print("ready", flush=True)
        stuck_in_here()
    """


def test_work_that_goes_on_is_left_alone_and_leaves_no_file(tmp_path):
    dog = Watchdog(tmp_path, 0, [Peer.here(0)], 0.5)
    with dog.watching():
        for step in range(20):
            dog.beat(step)
            time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []


def test_the_first_step_has_more_time(tmp_path):
    with Watchdog(tmp_path, 0, [], 0.2).watching():
        time.sleep(0.6)
    assert list(tmp_path.iterdir()) == []


def test_work_that_is_stuck_says_where_and_is_ended(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", HANGS, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdout is not None
    with child.stdout:
        assert child.wait(timeout=60) == -signal.SIGKILL
    (path,) = found_stacks(tmp_path, 0)
    assert path.name == f"rank-0-pid-{child.pid}.txt"
    text = path.read_text()
    assert text.startswith("rank 0: no step for 1 s after step 7")
    assert "stuck_in_here" in text


def test_an_error_that_comes_in_time_is_not_turned_into_a_kill(tmp_path):
    dog = Watchdog(tmp_path, 0, [], 0.2)

    def wait_and_fail() -> None:
        with dog.watching():
            dog.beat(1)
            while not dog.path.read_text():
                time.sleep(0.05)
            raise RuntimeError("connection closed")

    with pytest.raises(RuntimeError, match="connection closed"):
        wait_and_fail()
    assert [path.name for path in found_stacks(tmp_path, 0)] == [dog.path.name]


def test_files_of_killed_ranks_and_of_earlier_groups_are_not_found(tmp_path):
    (tmp_path / "rank-0-pid-1.txt").write_text("")
    (tmp_path / "rank-1-pid-2.txt").write_text("stood here")
    assert found_stacks(tmp_path, time.time() + 60) == []
    assert [path.name for path in found_stacks(tmp_path, 0)] == ["rank-1-pid-2.txt"]
    assert not (tmp_path / "rank-0-pid-1.txt").exists()


@pytest.mark.parametrize(
    ("engine", "rank"), [pytest.param({"name": "torch"}, 1, marks=pytest.mark.chaos), ({"name": "deepspeed", "zero_stage": 2}, 0)]
)
def test_a_stopped_rank_ends_the_group_and_both_say_where_they_stood(engine, rank, run_config, run_workers, tmp_path, monkeypatch, losses):
    """One rank stops after step 4 as if its machine froze; the next start goes on as if nothing had happened."""
    config = run_config("r", {"engine": engine, "workers": {"collective_timeout_s": 4}})
    monkeypatch.setenv("FAULT_SIGNAL", "SIGSTOP")
    began = time.monotonic()
    codes = run_workers(config, tmp_path / "stopped", 2, f"step_rank{rank}:3")
    assert codes[rank] in (-ASKING, -signal.SIGKILL)  # it never took another step, however fast the machine
    assert codes[1 - rank] != 0
    assert time.monotonic() - began < 100
    texts = {path.name.split("-pid")[0]: path.read_text() for path in found_stacks(tmp_path / "stopped" / "runs" / "r" / "stacks", 0)}
    assert set(texts) == {"rank-0", "rank-1"}
    assert "no step for 4 s after step 4" in texts[f"rank-{1 - rank}"]
    assert "worker.py" in texts[f"rank-{rank}"]  # asked from outside
    assert run_workers(config, tmp_path / "stopped", 2) == [0, 0]
    assert run_workers(config, tmp_path / "undisturbed", 2) == [0, 0]
    assert losses(tmp_path / "stopped", "r") == losses(tmp_path / "undisturbed", "r")


def test_a_peer_is_this_very_process_not_a_later_one_with_its_number():
    peer = Peer.here(3)
    assert peer.member.pid == os.getpid()
    assert peer.member.process() is not None
    assert peer.stacks(Path("stacks")).name == f"rank-3-pid-{os.getpid()}.txt"
    assert json.dumps(peer.node)
