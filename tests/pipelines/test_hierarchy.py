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
    assert read_parents(tmp_path / "tree.yaml") == BLOOD


def test_a_node_with_two_parents_is_refused(tmp_path: Path):
    (tmp_path / "tree.yaml").write_text("T: [lymphocyte, killer]", encoding="utf-8")
    with pytest.raises(ConfigError, match="'T' must have one parent"):
        read_parents(tmp_path / "tree.yaml")
    with pytest.raises(ConfigError, match="not readable"):
        read_parents(tmp_path / "nowhere.yaml")
