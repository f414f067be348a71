"""The doctor finds what is in the way and says how to mend it, without importing anything heavy."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cellplane import doctor
from cellplane.doctor import examine


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def found(name: str) -> doctor.Check:
    return next(check for check in examine() if check.name == name)


def test_every_red_line_has_a_fix_and_every_green_one_has_none() -> None:
    checks = examine()
    assert all(bool(check.fix) != check.ok for check in checks)
    assert all(check.found for check in checks)
    assert len({check.name for check in checks}) == len(checks)


def test_all_packages_of_the_stack_are_looked_at_and_fit() -> None:
    packages = {check.name: check for check in doctor._packages()}
    assert {"torch", "ray", "deepspeed", "mlflow", "anndata", "pyarrow"} <= packages.keys()
    assert [name for name, check in packages.items() if not check.ok] == []


@pytest.mark.parametrize(
    ("version", "ranges", "expected"),
    [
        ("2.13.0+cpu", ">=2.11,<3", True),
        ("2.13.0+cpu", "<3,>=2.11", True),
        ("2.9.1", ">=2.11", False),
        ("3.0", "<3", False),
        ("3.0.0", "<=3", True),
        ("0.20.0", "<0.20,>=0.19.8", False),
        ("1.0", "", True),
    ],
)
def test_versions_are_compared_as_numbers(version: str, ranges: str, expected: bool) -> None:
    assert doctor._fits(version, ranges) is expected


def test_a_missing_package_is_red_and_named() -> None:
    check = doctor._package("no-such-package-of-ours>=3")
    assert not check.ok
    assert check.fix == "pip install 'no-such-package-of-ours>=3'"


def test_nothing_heavy_is_imported() -> None:
    code = "import sys; from cellplane.doctor import examine; examine()\n"
    code += "sys.exit(bool({'torch', 'ray', 'mlflow', 'deepspeed'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ}).returncode == 0


def test_the_examination_leaves_no_trace(tmp_path: Path) -> None:
    examine()
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_cannot_be_written_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLPLANE_HOME", "/proc/cellplane")
    check = found("home")
    assert not check.ok
    assert "CELLPLANE_HOME" in check.fix


def test_a_port_in_use_is_red_with_the_option_to_change() -> None:
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind(("127.0.0.1", 8000))
        except OSError:
            pytest.skip("somebody else uses port 8000 just now")
        holder.listen()
        check = found("port 8000")
    assert not check.ok
    assert str(os.getpid()) in check.found
    assert "serve_port=0" in check.fix


def test_a_dead_tracker_is_red_and_its_password_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:1")
    check = found("tracker")
    assert not check.ok
    assert "secret" not in check.found + check.fix
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mlruns")
    assert "sqlite" in found("tracker").fix


def test_a_local_tracker_file_is_fine() -> None:
    assert found("tracker").ok


def test_spinning_threads_are_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert not found("threads").ok
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("GOMP_SPINCOUNT", "0")
    assert found("threads").ok
