"""A user's tree of labels, checked before anything is learned: {child: parent}, from the configuration or a small file.

Node names are free; Cell Ontology ids (CL:0000084) work as they are when the label column holds them. Only what lies above
the classes is kept, so a large ontology costs nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from cellplane.artifact.judgement import UNKNOWN, Tree
from cellplane.config import read_yaml
from cellplane.errors import ConfigError


def read_parents(path: Path) -> dict[str, str]:
    """{child: parent} from a YAML or JSON file of such pairs; ConfigError for anything else in it."""
    parents: dict[str, str] = {}
    for child, parent in read_yaml(path).items():
        if isinstance(parent, list | dict) or parent is None:
            raise ConfigError(f"{path}: {child!r} must have one parent, found {parent!r}; write it as {child}: PARENT")
        parents[child] = str(parent)
    return parents


def label_tree(parents: Mapping[str, str], classes: Sequence[str], threshold: float) -> Tree:
    """The part of the tree at and above these classes.

    Raises ConfigError for a cycle, a class that is not in the tree, a node called "unknown", or more than one root.
    """
    if not parents:
        return Tree({}, threshold)
    nodes = {*parents, *parents.values()}
    if absent := [name for name in classes if name not in nodes]:
        near = difflib.get_close_matches(absent[0], sorted(nodes), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ConfigError(f"the hierarchy does not know {len(absent)} of the labels, e.g. {absent[0]!r}{hint} Add {absent[0]!r}: PARENT")
    if UNKNOWN in nodes:
        raise ConfigError(f"the hierarchy has a node {UNKNOWN!r}, which is what refused cells are called; rename it")
    kept: dict[str, str] = {}
    for name in classes:
        for child, parent in _steps(name, parents):
            kept[child] = parent
    roots = sorted({name for name in (*classes, *kept.values()) if name not in kept})
    if len(roots) > 1:
        raise ConfigError(
            f"the hierarchy has {len(roots)} roots ({', '.join(roots[:5])}), one is needed: put one node above them, e.g. cell"
        )
    return Tree(kept, threshold)


def _steps(name: str, parents: Mapping[str, str]) -> list[tuple[str, str]]:
    """(child, parent) from a label to its root; ConfigError for a cycle."""
    path = [name]
    while path[-1] in parents:
        path.append(parents[path[-1]])
        if path[-1] in path[:-1]:
            raise ConfigError(f"the hierarchy goes in a circle: {' -> '.join(path[path.index(path[-1]) :])}; take one of the pairs out")
    return list(pairwise(path))
