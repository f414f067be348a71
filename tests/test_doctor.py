"""The doctor finds what is in the way and says how to mend it, without importing anything heavy."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from cellplane import doctor
from cellplane.data.gene_tables import make_table, write_table
from cellplane.doctor import examine


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / "home"))
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", *doctor.TOKEN_FILES, *doctor.TOKENS_IN_ENVIRONMENT):
        monkeypatch.delenv(name, raising=False)


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


def test_a_token_that_others_can_read_is_red_until_it_is_closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("abc")
    token.chmod(0o640)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    check = found("token token")
    assert not check.ok
    assert check.fix.endswith(f"chmod 600 {token}")
    assert "abc" not in check.found + check.fix
    token.chmod(0o600)
    assert found("token token").ok


@pytest.mark.parametrize("content", [None, ""])
def test_a_token_that_is_not_there_is_red(content: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    token = tmp_path / "token"
    if content is not None:
        token.write_text(content)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    assert not found("token token").ok


def test_the_local_stacks_own_token_is_looked_at(tmp_path: Path) -> None:
    assert found("tokens").ok
    own = tmp_path / "home" / "ray_token"
    own.parent.mkdir()
    own.write_text("abc")
    own.chmod(0o644)
    assert not found("token ray_token").ok


@pytest.mark.parametrize(("address", "ok"), [("127.0.0.1:1", False), ("http://127.0.0.1:1", False), ("nowhere", False), ("auto", True)])
def test_a_cluster_that_does_not_answer_is_red(address: str, ok: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert found("cluster").ok is ok


def test_a_cluster_that_answers_is_green(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{head.getsockname()[1]}")
        assert found("cluster").ok


def test_installed_gene_tables_are_named_and_damaged_ones_are_red(tmp_path: Path) -> None:
    assert "genes install" in found("gene tables").found
    genes = pd.DataFrame({"id": ["ENSG00000000001"], "symbol": ["A1"], "coding": [True]})
    write_table(make_table("human", genes, pd.DataFrame({"alias": [], "approved": []})), [])
    assert found("gene tables").found == "human (1 genes)"
    (manifest,) = (tmp_path / "home" / "genes").rglob("*.json")
    manifest.write_text("{")
    check = found("gene tables")
    assert not check.ok
    assert "install" in check.fix


def test_a_card_that_this_torch_cannot_use_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.Path, "is_dir", lambda path: True)
    monkeypatch.setattr(doctor.Path, "iterdir", lambda path: iter(["card"]))
    monkeypatch.setattr(doctor, "_installed", lambda package: "2.13.0+cpu")
    (check,) = doctor._gpus()
    assert not check.ok
    monkeypatch.setattr(doctor, "_installed", lambda package: "2.13.0+cu129")
    (check,) = doctor._gpus()
    assert check.ok
