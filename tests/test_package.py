"""A job takes its code and configuration along, and nothing that is data, secret or somebody's environment."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cellplane import package
from cellplane.errors import ConfigError
from cellplane.package import CODE, CONFIG, pack

KEPT = ("notes.txt", "lists/genes.txt", "lists/data/deeper.yaml")
LEFT = (
    *("cells.h5ad", "logs/old.txt", "data/table.csv", "models/readme.txt", "lists/big.parquet", "counts.zarr/zarr.json"),
    *(".env", ".git/config", "secrets/word", "tls.pem", "credentials", "ray_token", "lists/__pycache__/x.py"),
    *("python/pyvenv.cfg", "python/lib.py", "mine/manifest.json", "mine/notes.txt", "home/runs/mine/config.yaml"),
)


@pytest.fixture
def working(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    for name in (*KEPT, *LEFT):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    monkeypatch.setenv("CELLPLANE_HOME", str(folder / "home"))
    return folder


def own(packed: package.Package) -> set[str]:
    """What of a package is not the code."""
    return {name for name in packed.files if not name.startswith(f"{CODE}/")}


def test_data_secrets_and_environments_stay_at_home(working: Path) -> None:
    assert own(pack(working, "kind: data\n")) == set(KEPT)


def test_the_code_that_goes_along_runs_without_the_checkout(working: Path, tmp_path: Path) -> None:
    written = pack(working, "kind: data\ninputs: [/x.h5ad]\nout: /y\n").write(tmp_path / "job.zip")
    with zipfile.ZipFile(written) as archive:
        archive.extractall(tmp_path / "there")
    look = "import cellplane, sys, cellplane.serve; from cellplane.config import configs_root; print(cellplane.__file__, configs_root())"
    isolated = {"PYTHONPATH": str(tmp_path / "there/platform"), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", look], env=isolated, cwd=tmp_path, capture_output=True, text=True, check=True)
    root = tmp_path / "there" / CODE
    assert done.stdout.split() == [str(root / "__init__.py"), str(root / "configs")]
    assert (tmp_path / "there" / CONFIG).read_text().startswith("kind: data")


def test_the_same_content_makes_the_same_bytes(working: Path, tmp_path: Path) -> None:
    first = pack(working, "kind: data\n").write(tmp_path / "a.zip").read_bytes()
    (working / "notes.txt").touch()
    assert pack(working, "kind: data\n").write(tmp_path / "b.zip").read_bytes() == first
    assert pack(working, "kind: tune\n").write(tmp_path / "c.zip").read_bytes() != first


def test_too_much_is_refused_and_the_largest_files_are_named(working: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = pack(working, "").size_bytes
    (working / "large.csv").write_bytes(bytes(3 * 1024**2))
    (working / "lists/larger.csv").write_bytes(bytes(5 * 1024**2))
    monkeypatch.setattr(package, "LIMIT_BYTES", code + 4 * 1024**2)
    with pytest.raises(ConfigError, match=r"largest: lists/larger\.csv \(5 MiB\), large\.csv \(3 MiB\).*--working-dir"):
        pack(working, "").write(tmp_path / "job.zip")
    assert not (tmp_path / "job.zip").exists()


def test_a_folder_of_countless_files_is_left_early(working: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "MOST_FILES", 2)
    with pytest.raises(ConfigError, match="more than 2 files"):
        pack(working, "")


def test_a_package_knows_what_it_holds(working: Path) -> None:
    packed = pack(working, "")
    assert all(packed.holds(name) for name in ("notes.txt", "./lists/genes.txt", "lists", "lists/*.txt"))
    assert not any(packed.holds(name) for name in ("cells.h5ad", "list", f"../{working.name}/notes.txt", "data"))


def test_a_working_folder_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        pack(tmp_path / "nowhere", "")
