"""A tree of labels is checked before anything is learned; only what lies above the classes is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cellplane.errors import ConfigError
from cellplane.pipelines.hierarchy import label_tree, read_parents

BLOOD = {"CD4 T": "T", "CD8 T": "T", "T": "lymphocyte", "B": "lymphocyte", "Mono": "leukocyte", "lymphocyte": "leukocyte"}
CLASSES = ("B", "CD4 T", "CD8 T", "Mono")


def test_what_lies_above_the_classes_is_kept_and_nothing_else():
    tree = label_tree({**BLOOD, "neuron": "cell"}, CLASSES, 0.8)
    assert tree.parents == BLOOD
    assert tree.path("CD4 T") == ["CD4 T", "T", "lymphocyte", "leukocyte"]


def test_ontology_ids_are_names_like_any_other():
    tree = label_tree({"CL:0000624": "CL:0000084", "CL:0000625": "CL:0000084"}, ("CL:0000624", "CL:0000625"), 0.9)
    assert tree.path("CL:0000625")[-1] == "CL:0000084"


def test_no_tree_is_no_tree():
    assert label_tree({}, CLASSES, 0.8).parents == {}


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ({**BLOOD, "leukocyte": "T"}, "in a circle: lymphocyte -> leukocyte -> T -> lymphocyte"),
        ({name: parent for name, parent in BLOOD.items() if name != "CD4 T"}, r"does not know 1 of the labels, e.g. 'CD4 T'; did you mean"),
        ({**BLOOD, "Mono": "myeloid"}, r"2 roots \(leukocyte, myeloid\)"),
        ({**BLOOD, "leukocyte": "unknown"}, "rename"),
        ({"B": "B"}, r"does not know 3|circle"),
    ],
    ids=["circle", "absent", "roots", "unknown", "itself"],
)
def test_a_tree_that_cannot_be_used_is_refused(parents, message):
    with pytest.raises(ConfigError, match=message):
        label_tree(parents, CLASSES, 0.8)


@pytest.mark.parametrize("written", [json.dumps(BLOOD), "\n".join(f"{child}: {parent}" for child, parent in BLOOD.items())])
def test_json_and_yaml_files_are_read(tmp_path: Path, written):
    (tmp_path / "tree.yaml").write_text(written, encoding="utf-8")
    assert read_parents(tmp_path / "tree.yaml", CLASSES) == BLOOD


def test_files_that_are_no_tree_are_refused(tmp_path: Path):
    (tmp_path / "tree.yaml").write_text("T: {lymphocyte: 1}", encoding="utf-8")
    with pytest.raises(ConfigError, match="'T' needs a parent"):
        read_parents(tmp_path / "tree.yaml", CLASSES)
    for name in ("nowhere.yaml", "nowhere.obo"):
        with pytest.raises(ConfigError, match="not readable"):
            read_parents(tmp_path / name, CLASSES)
    (tmp_path / "text.obo").write_text("format-version: 1.2\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"no \[Term\]"):
        read_parents(tmp_path / "text.obo", CLASSES)


ONTOLOGY = """format-version: 1.2

[Term]
id: X:1
name: cell

[Term]
id: X:2
name: lymphocyte
is_a: X:1 ! cell
is_a: X:9 ! thing of another ontology

[Term]
id: X:3
name: T cell
is_a: X:2 {source="x"} ! lymphocyte

[Term]
id: X:4
name: CD4 T
is_a: X:3 ! T cell
is_a: X:7 ! helper

[Term]
id: X:5
name: CD8 T
is_a: X:3 ! T cell
is_a: X:8 ! killer

[Term]
id: X:6
name: NK
is_a: X:2 ! lymphocyte
is_a: X:8 ! killer

[Term]
id: X:7
name: helper
is_a: X:1 ! cell

[Term]
id: X:8
name: killer
is_a: X:1 ! cell

[Term]
id: X:10
name: old
is_obsolete: true

[Typedef]
id: part_of
name: part of
"""


@pytest.mark.parametrize("classes", [("CD4 T", "CD8 T", "NK"), ("X:4", "X:5", "X:6")], ids=["names", "ids"])
def test_an_ontology_is_read_by_names_or_ids_and_every_step_is_one_of_its_own(tmp_path: Path, classes):
    (tmp_path / "cells.obo").write_text(ONTOLOGY, encoding="utf-8")
    parents = read_parents(tmp_path / "cells.obo", classes)
    tree = label_tree(parents, classes, 0.8)
    for child, parent in tree.parents.items():
        assert parent in parents[child]
    assert {tree.path(name)[-1] for name in classes} == {"lymphocyte" if classes[0] == "CD4 T" else "X:2"}  # the lowest above all
    assert tree.path(classes[1])[:2] == [classes[1], "T cell" if classes[0] == "CD4 T" else "X:3"]


def test_of_several_parents_the_one_with_the_fewest_labels_below_is_kept():
    tree = label_tree({"CD4": ["T", "blood"], "CD8": ["T", "blood"], "B": ["blood"], "T": ["blood"]}, ("CD4", "CD8", "B"), 0.8)
    assert tree.path("CD4") == ["CD4", "T", "blood"]
    with pytest.raises(ConfigError, match="in a circle"):
        label_tree({"CD4": ["T", "blood"], "T": ["CD4"]}, ("CD4", "T"), 0.8)
    with pytest.raises(ConfigError, match="2 roots"):
        label_tree({"CD4": ["T", "helper"], "B": ["lymphocyte"]}, ("CD4", "B"), 0.8)
