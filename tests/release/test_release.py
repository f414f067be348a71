"""What a release does on a machine that has never seen the repository: `make release`. Needs a package index; minutes.

The wheel and the sdist are built as they are published; an environment is made with the pinned packages and the wheel
alone; every verb runs from an empty folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.source import PYPROJECT, ROOT

pytestmark = pytest.mark.release
VERSION = PYPROJECT["project"]["version"]
ESTIMATOR = """
from pathlib import Path
import anndata, cellplane
assert "site-packages" in cellplane.__file__, cellplane.__file__
cells = anndata.read_h5ad("cells.h5ad")
pipeline = cellplane.CellTypeAnnotationPipeline(config={"optimizer": {"steps": 20}, "keys": {"labels_key": "cell_type"}})
pipeline.fit(cells[:200].copy())
pipeline.save(Path("annotator"))
again = cellplane.CellTypeAnnotationPipeline.load(Path("annotator"))
assert list(again.predict(cells[200:].copy())) == list(pipeline.predict(cells[200:].copy()))
print(again.score(cells[200:].copy()))
"""


def run(arguments: list[str], folder: Path, **environment: str) -> str:
    """Standard output of a command of that environment; its complaints are the failure when it ends badly."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "CELLPLANE_", "VIRTUAL_ENV"))}
    done = subprocess.run(arguments, cwd=folder, env=kept | environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dist/ with the sdist and the wheel that is built from it, from the committed files alone."""
    folder = tmp_path_factory.mktemp("built")
    archive = subprocess.run(["git", "archive", "--format=tar", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    (folder / "source.tar").write_bytes(archive)
    with tarfile.open(folder / "source.tar") as files:
        files.extractall(folder / "source", filter="data")
    run([sys.executable, "-m", "venv", str(folder / "builder")], folder)
    python = str(folder / "builder" / "bin" / "python")
    run(
        [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "build>=1.3", *PYPROJECT["build-system"]["requires"]],
        folder,
    )
    run([python, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder / "source")], folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def cellplane(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command, in an environment of its own."""
    folder = tmp_path_factory.mktemp("fresh")
    run([sys.executable, "-m", "venv", str(folder / "venv")], folder)
    pip = [str(folder / "venv" / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    lock = ROOT / "requirements.lock"
    (torch,) = [line for line in lock.read_text(encoding="utf-8").splitlines() if line.startswith("torch==")]
    run([*pip, torch], folder)
    run([*pip, "-r", str(lock)], folder)
    run([*pip, "--no-deps", str(built / f"cellplane-{VERSION}-py3-none-any.whl")], folder)
    return folder / "venv" / "bin" / "cellplane"


@pytest.fixture(scope="module")
def place(cellplane: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder to work in; the local stack that was started there is down afterwards."""
    folder = tmp_path_factory.mktemp("place")
    yield folder
    subprocess.run([str(cellplane), "down"], cwd=folder, env={**os.environ, "CELLPLANE_HOME": str(folder / "home")}, check=False)


def ask(cellplane: Path, place: Path, *words: str) -> str:
    return run([str(cellplane), *words], place, CELLPLANE_HOME=str(place / "home"))


def test_the_sdist_holds_what_the_wheel_is_made_of(built: Path) -> None:
    with tarfile.open(built / f"cellplane-{VERSION}.tar.gz") as files:
        sources = {name.partition("/")[2] for name in files.getnames()}
    with zipfile.ZipFile(built / f"cellplane-{VERSION}-py3-none-any.whl") as files:
        shipped = set(files.namelist())
    places = {"cellplane/serve/": "serve/", "cellplane/configs/": "configs/", "cellplane/": "platform/cellplane/"}
    for name in shipped:
        start = next((start for start in places if name.startswith(start)), None)
        assert start is None or name.replace(start, places[start], 1) in sources, name
    assert {"LICENSE", "README.md", "pyproject.toml"} <= sources


def test_help_and_doctor(cellplane: Path, place: Path) -> None:
    assert "pretrain" in ask(cellplane, place, "--help")
    assert VERSION in ask(cellplane, place, "--version")
    checks = json.loads(subprocess.run([str(cellplane), "doctor", "--json"], cwd=place, capture_output=True, text=True, check=False).stdout)
    packages = [check for check in checks["checks"] if "needs" in check["found"]]
    assert len(packages) > 15
    assert all(check["ok"] for check in packages)


def test_from_simulated_cells_to_a_pretrained_model(cellplane: Path, place: Path) -> None:
    ask(cellplane, place, "data", "simulate", "--out", "cells.h5ad")
    ask(cellplane, place, "data", "convert", "cells.h5ad", "--out", "shards")
    told = ask(cellplane, place, "pretrain", "--config", "demo", "--shards", "shards", "-o", "optimizer.steps=4", "--json")
    assert json.loads(told)["step"] == 4


def test_the_estimators(place: Path, cellplane: Path) -> None:
    score = float(run([str(cellplane.parent / "python"), "-c", ESTIMATOR], place, CELLPLANE_HOME=str(place / "home")))
    assert 0 <= score <= 1


def test_the_local_stack_comes_up_and_goes(cellplane: Path, place: Path) -> None:
    ports = [word for name in ("mlflow_port", "dashboard_port", "ray_port", "serve_port") for word in ("-o", f"{name}=0")]
    ask(cellplane, place, "up", *ports)
    assert json.loads(ask(cellplane, place, "status", "--json"))
    ask(cellplane, place, "down")
