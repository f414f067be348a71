"""Processes are ended by what was recorded of them, never by mistake, and ports and locks explain themselves."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cellplane.errors import PortInUseError, ServiceError, StorageError
from cellplane.processes import Member, end, listens, locked, port_for, short_temp_dir, spawn, tail, usage, write_private

SLEEPER = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)"]
FAMILY = [
    sys.executable,
    "-c",
    "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); time.sleep(600)",
]
STUBBORN = [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_spawned_process_leads_its_session_and_writes_its_log(tmp_path: Path) -> None:
    member = spawn(SLEEPER, tmp_path, {}, tmp_path / "logs" / "x.log")
    try:
        assert os.getsid(member.pid) == member.pid
        wait_for(lambda: tail(tmp_path / "logs" / "x.log") == "here")
    finally:
        end([member])
    assert member.process() is None


def test_ending_takes_the_children_along(tmp_path: Path) -> None:
    member = spawn(FAMILY, tmp_path, {}, tmp_path / "x.log")
    wait_for(lambda: len(member.family()) == 2)
    family = member.family()
    end([member])
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)


def test_usage_is_that_of_the_processes_whose_command_begins_so(tmp_path: Path) -> None:
    member = spawn(FAMILY, tmp_path, {}, tmp_path / "x.log")
    try:
        wait_for(lambda: len(member.family()) == 2)
        found = usage(member.family(), sys.executable)
        assert found.keys() == {process.pid for process in member.family()}
        assert all(seconds >= 0 and 0 < size < 2**30 for seconds, size in found.values())
        assert usage(member.family(), "ray::") == {}
    finally:
        end([member])


def test_orphans_of_a_killed_leader_are_found_and_ended(tmp_path: Path) -> None:
    member = spawn(FAMILY, tmp_path, {}, tmp_path / "x.log")
    wait_for(lambda: len(member.family()) == 2)
    os.kill(member.pid, signal.SIGKILL)
    wait_for(lambda: member.process() is None)
    assert len(member.family()) == 1
    end([member])
    assert member.family() == []


def test_a_later_process_with_the_same_pid_is_left_alone(tmp_path: Path) -> None:
    member = spawn(SLEEPER, tmp_path, {}, tmp_path / "x.log")
    try:
        stale = replace(member, create_time=member.create_time - 1000)
        assert stale.process() is None
        assert stale.family() == []
        end([stale])
        assert member.process() is not None
    finally:
        end([member])


def test_a_process_that_ignores_the_request_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellplane.processes.STOP_TIMEOUT_S", 0.3)
    member = spawn(STUBBORN, tmp_path, {}, tmp_path / "x.log")
    wait_for(lambda: tail(tmp_path / "x.log") == "deaf")
    end([member])
    assert member.process() is None


def test_ending_nothing_is_fine() -> None:
    end([])
    end([Member(2**22 - 1, 0.0)])


def test_a_port_in_use_names_its_holder_and_the_way_out() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(PortInUseError, match=rf"port {port} \(mlflow_port\).*process {os.getpid()} .*-o mlflow_port=0"):
            port_for("127.0.0.1", port, "mlflow_port")
        assert listens("127.0.0.1", port)
    assert not listens("127.0.0.1", port)
    assert port_for("127.0.0.1", port, "mlflow_port") == port
    assert port_for("127.0.0.1", 0, "mlflow_port") > 0


def test_a_private_file_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_private(path, "a")
    write_private(path, "b")
    assert path.read_text() == "b"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret"]
    with pytest.raises(StorageError, match="CELLPLANE_HOME"):
        write_private(Path("/proc/nothing/secret"), "x")


def test_a_lock_is_held_by_one_and_waits_only_so_long(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from cellplane.processes import locked\n"
    code += "with locked(Path(sys.argv[1]), 5): print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "lock")], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ServiceError, match="busy"), locked(tmp_path / "lock", 0.2):
            pass
        other.kill()
    with locked(tmp_path / "lock", 5.0):
        pass


def test_temp_dirs_are_private_and_short_wherever_the_default_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 60)))
    folder = short_temp_dir()
    try:
        assert len(str(folder)) < 37
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    finally:
        folder.rmdir()
