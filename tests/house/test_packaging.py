"""The wheel holds every package and every shipped configuration, and works far from the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.source import PLATFORM, PYPROJECT, ROOT

BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "platform", "serve", "configs")
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def run(arguments: list[str], folder: Path, **environment: str) -> str:
    """Standard output of a command; its complaints are the failure when it ends badly."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "CELLPLANE_"))}
    done = subprocess.run(arguments, cwd=folder, env=kept | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel was installed; it is built from a copy, so that the checkout stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    copy.mkdir()
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy2(ROOT / name, copy / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "./source"], folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    run([*pip, "install", "--no-deps", "--no-index", "--target", str(folder / "target"), str(wheel)], folder)
    return folder / "target"


def test_the_package_list_equals_the_tree():
    packages = {"cellplane." + path.parent.name for path in (PLATFORM / "cellplane").glob("*/__init__.py")}
    assert set(SETUPTOOLS["packages"]) == packages | {"cellplane", "cellplane.serve", "cellplane.configs"}


def test_every_listed_package_has_its_folder():
    places = SETUPTOOLS["package-dir"]
    for name in SETUPTOOLS["packages"]:
        home = max((package for package in places if f"{name}.".startswith(f"{package}.")), key=len)
        folder = ROOT / places[home] / name.removeprefix(home).lstrip(".")
        assert folder.is_dir(), name
        assert name == "cellplane.configs" or (folder / "__init__.py").is_file(), name


def test_folders_of_code_are_packages():
    folders = {path.parent for root in (PLATFORM / "cellplane", ROOT / "serve", ROOT / "jobs") for path in root.rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_the_source_root_is_no_package():
    assert not (PLATFORM / "__init__.py").exists()


def test_the_wheel_holds_every_module_and_every_config(installed):
    code = {path.relative_to(PLATFORM) for path in (PLATFORM / "cellplane").rglob("*.py")}
    code |= {Path("cellplane/serve") / path.relative_to(ROOT / "serve") for path in (ROOT / "serve").rglob("*.py")}
    configs = {Path("cellplane") / path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")}
    assert configs
    assert not {path for path in code | configs | {Path("cellplane/py.typed")} if not (installed / path).is_file()}


def test_jobs_and_tests_stay_out_of_the_wheel(installed):
    assert not (installed / "jobs").exists()
    assert not (installed / "tests").exists()


def test_the_wheel_is_found_before_the_checkout(installed, tmp_path):
    code = "import cellplane.config as c, cellplane.serve as s; print(c.__file__, s.__file__, c.configs_root())"
    for place in run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(installed)).split():
        assert Path(place).is_relative_to(installed)


def test_shipped_configs_are_shown_from_another_folder(installed, tmp_path):
    names = sorted(path.parent.name + "/" + path.stem for path in (ROOT / "configs" / "pretrain").glob("*.yaml"))
    assert names, "no configuration for pre-training is shipped"
    shown = run([sys.executable, "-m", "cellplane.cli.main", "config", "show", names[0]], tmp_path, PYTHONPATH=str(installed))
    assert "model:" in shown
    assert not list(tmp_path.iterdir()), "showing a configuration must not write anything"


def test_the_entry_point_exists(installed, tmp_path):
    module, function = PYPROJECT["project"]["scripts"]["cellplane"].split(":")
    code = f"from {module} import {function}; print(callable({function}))"
    assert run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(installed)).strip() == "True"


def test_the_lock_pins_every_dependency_and_names_no_place():
    lines = [line for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines), "one name==version a line, no local tags"
    assert lines == sorted(lines, key=str.lower)
    locked = {plain(line.split("==")[0]) for line in lines}
    wanted = [*PYPROJECT["project"]["dependencies"], *PYPROJECT["project"]["optional-dependencies"]["dev"]]
    assert {plain(re.split(r"[\[<>=; ]", line)[0]) for line in wanted} - locked <= {"build"}


def test_the_lock_and_the_makefile_agree_on_torch():
    (pinned,) = re.findall(r"^torch==\S+$", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"TORCH := {pinned}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


def plain(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()
