"""A user's tree of labels, checked before anything is learned: {child: parent}, from the configuration, a small file or an ontology.

Node names are free. An OBO file, such as the Cell Ontology's, is read as it is, whether the label column holds its ids
(CL:0000084) or its names (T cell). Only what lies above the classes is kept, so a large ontology costs nothing. Where a
type has several broader ones, as in an ontology, each keeps the one that holds the fewest of the labels: every broader
name that is answered is true of the type, and few of them are skipped.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from cellplane.artifact.judgement import UNKNOWN, Tree
from cellplane.config import read_yaml
from cellplane.errors import ConfigError

CIRCLE = "the hierarchy goes in a circle: {}; take one of the pairs out"

Parents = Mapping[str, str | Sequence[str]]


def read_parents(path: Path, classes: Sequence[str]) -> dict[str, str | list[str]]:
    """{child: parent or parents} from a YAML or JSON file of such pairs, or the is_a lines of an OBO file; ConfigError for any other.

    The nodes of an ontology are its ids or its names, whichever know more of the ``classes``.
    """
    if path.suffix.lower() == ".obo":
        return _read_obo(path, classes)
    found: dict[str, str | list[str]] = {}
    for child, parent in read_yaml(path).items():
        if isinstance(parent, dict) or parent is None or parent == []:
            raise ConfigError(f"{path}: {child!r} needs a parent, found {parent!r}; write it as {child}: PARENT, or {child}: [ONE, OTHER]")
        found[child] = [str(name) for name in parent] if isinstance(parent, list) else str(parent)
    return found


def _read_obo(path: Path, classes: Sequence[str]) -> dict[str, str | list[str]]:
    terms = [term for term in _terms(path) if term.get("is_obsolete") != ["true"] and "id" in term]
    if not terms:
        raise ConfigError(f"{path} holds no [Term] of an ontology; expected an OBO file, such as the Cell Ontology's")
    called = {term["id"][0]: term.get("name", term["id"])[0] for term in terms}
    by_name = len(set(called.values()) & set(classes)) > len(set(called) & set(classes))
    names = called if by_name else {node: node for node in called}
    above = {names[term["id"][0]]: [names.get(parent, parent) for parent in term.get("is_a", [])] for term in terms}
    return {child: parents for child, parents in above.items() if parents}


def _terms(path: Path) -> Iterator[dict[str, list[str]]]:
    """The tags of every [Term]; comments behind " ! " and modifiers in braces are cut off."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable: {error}; give an OBO file") from error
    for stanza in text.split("\n["):
        if not stanza.startswith("Term]"):
            continue
        term: dict[str, list[str]] = {}
        for line in stanza.splitlines()[1:]:
            tag, colon, value = line.partition(": ")
            if colon:
                term.setdefault(tag.strip(), []).append(value.split(" ! ")[0].split(" {")[0].strip())
        yield term


def label_tree(parents: Parents, classes: Sequence[str], threshold: float) -> Tree:
    """The part of the tree at and above these classes.

    Raises ConfigError for a cycle, a class that is not in the tree, a node called "unknown", or more than one root.
    """
    if not parents:
        return Tree({}, threshold)
    above = {child: [found] if isinstance(found, str) else list(found) for child, found in parents.items()}
    nodes = {*above, *(name for found in above.values() for name in found)}
    if absent := [name for name in classes if name not in nodes]:
        near = difflib.get_close_matches(absent[0], sorted(nodes), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ConfigError(f"the hierarchy does not know {len(absent)} of the labels, e.g. {absent[0]!r}{hint} Add {absent[0]!r}: PARENT")
    if UNKNOWN in nodes:
        raise ConfigError(f"the hierarchy has a node {UNKNOWN!r}, which is what refused cells are called; rename it")
    several = any(len(found) > 1 for found in above.values())
    single = _one_each(above, classes) if several else {child: found[0] for child, found in above.items()}
    kept: dict[str, str] = {}
    for name in classes:
        for child, parent in _steps(name, single):
            kept[child] = parent
    roots = sorted({name for name in (*classes, *kept.values()) if name not in kept})
    if len(roots) > 1:
        raise ConfigError(
            f"the hierarchy has {len(roots)} roots ({', '.join(roots[:5])}), one is needed: put one node above them, e.g. cell"
        )
    return Tree(kept, threshold)


def _one_each(above: Mapping[str, Sequence[str]], classes: Sequence[str]) -> dict[str, str]:
    """One parent of each node between the classes and the lowest one above them all, if there is one: which holds fewest classes."""
    lines = {name: _above(name, above) for name in classes}
    holds = {node: {name for name, line in lines.items() if node in line} for line in lines.values() for node in line}
    common = [node for node, names in holds.items() if len(names) == len(classes)]
    lowest = [node for node in common if not any(node in _above(other, above) - {other} for other in common)]
    root = min(lowest, default="")
    inside = {node for node in holds if root in _above(node, above)} if root else set(holds)
    chosen: dict[str, str] = {}
    for node in inside - {root}:
        if open_to := [parent for parent in above.get(node, ()) if parent in inside]:
            chosen[node] = min(open_to, key=lambda parent: (len(holds[parent]), parent))
    return chosen


def _above(name: str, above: Mapping[str, Sequence[str]]) -> set[str]:
    """A node and all that lie above it; ConfigError for a cycle."""
    found, path = set[str](), list[str]()

    def visit(node: str) -> None:
        if node in path:
            raise ConfigError(CIRCLE.format(" -> ".join([*path[path.index(node) :], node])))
        if node in found:
            return
        path.append(node)
        for parent in above.get(node, ()):
            visit(parent)
        path.pop()
        found.add(node)

    visit(name)
    return found


def _steps(name: str, parents: Mapping[str, str]) -> list[tuple[str, str]]:
    """(child, parent) from a label to its root; ConfigError for a cycle."""
    path = [name]
    while path[-1] in parents:
        path.append(parents[path[-1]])
        if path[-1] in path[:-1]:
            raise ConfigError(CIRCLE.format(" -> ".join(path[path.index(path[-1]) :])))
    return list(pairwise(path))
