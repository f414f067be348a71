"""The project's own source as syntax trees, for the tests of this folder: nothing is imported or run."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLATFORM = ROOT / "platform"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One file of platform/cellplane, serve or jobs."""

    path: Path
    module: str  # as the installed package names it, e.g. cellplane.serve.codec, jobs.pretrain
    text: str
    tree: ast.Module

    @property
    def place(self) -> str:
        """The path as a reader writes it, e.g. serve/codec.py."""
        return self.path.relative_to(ROOT).as_posix()

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    def functions(self) -> Iterator[Function]:
        for node in ast.walk(self.tree):
            if isinstance(node, Function):
                yield node


@cache
def sources() -> tuple[Source, ...]:
    """Every Python file that is the project's code."""
    roots = ((PLATFORM / "cellplane", "cellplane"), (ROOT / "serve", "cellplane.serve"), (ROOT / "jobs", "jobs"))
    found = [read(path, root, package) for root, package in roots for path in sorted(root.rglob("*.py"))]
    assert len(found) > 20, "the project's source was not found where the tests look for it"
    return tuple(found)


def read(path: Path, root: Path, package: str) -> Source:
    parts = path.relative_to(root).with_suffix("").parts
    module = ".".join((package, *(part for part in parts if part != "__init__")))
    text = path.read_text(encoding="utf-8")
    return Source(path, module, text, ast.parse(text))


@cache
def modules() -> frozenset[str]:
    """Every module name of the project."""
    return frozenset(source.module for source in sources())


@cache
def lazy_names() -> dict[str, str]:
    """Which module each public name of `cellplane` comes from: the literal in its __init__."""
    init = next(source for source in sources() if source.module == "cellplane")
    for node in init.tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(target, ast.Name) and target.id == "_HOMES" for target in node.targets):
            return dict(ast.literal_eval(node.value))
    raise AssertionError("cellplane/__init__.py no longer says where its names live (_HOMES)")


def imports(source: Source) -> set[str]:
    """Dotted names a file imports, anywhere in it: at the top, in functions, for types only; relative ones resolved."""
    found: set[str] = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = absolute(source, node)
            found |= {target(base, alias.name) for alias in node.names}
    return found


def absolute(source: Source, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = source.module.split(".") if source.is_package else source.module.split(".")[:-1]
    return ".".join((*package[: len(package) - node.level + 1], *((node.module,) if node.module else ())))


def target(base: str, name: str) -> str:
    """What `from base import name` reaches: a module of the project, the home of a lazy name, or base.name of a library."""
    if base == "cellplane" and name in lazy_names():
        return lazy_names()[name]
    if f"{base}.{name}" in modules():
        return f"{base}.{name}"
    ours = base.split(".")[0] in ("cellplane", "jobs")
    return base if ours else f"{base}.{name}"


def room(module: str) -> str:
    """The room a module stands in: cellplane.data.shards -> data, cellplane.batch -> batch, jobs.pretrain -> jobs."""
    parts = module.split(".")
    if parts[0] == "jobs":
        return "jobs"
    return parts[1] if len(parts) > 1 else "cellplane"
