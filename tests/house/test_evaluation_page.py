"""The page on evaluation names only rows, scores and keys that protocols have."""

from __future__ import annotations

import re

import pytest

from cellplane.config import configs_root, read_yaml
from cellplane.pipelines import annotation_protocol, embedding_evaluation, unknown_protocol
from cellplane.pipelines.config import AnnotationConfig
from cellplane.pipelines.protocol_config import AnnotationProtocol, EmbeddingProtocol, EvaluatedData
from tests.house.source import ROOT

PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"`([^`\n]+)`", PAGE)


@pytest.mark.parametrize(
    "name", ["um_per_unit", "guard", "bases", "recipe", "control_seeds", "gene_start: components", "members", "linear"]
)
def test_a_key_on_the_page_is_one_of_a_protocol_or_recipe(name):
    assert name in QUOTED
    schemas = (AnnotationProtocol, EmbeddingProtocol, EvaluatedData, AnnotationConfig)
    assert any(name.split(":")[0] in schema.model_fields for schema in schemas)


def test_rows_on_the_page_are_those_of_the_tables():
    named = annotation_protocol
    for row in (f"cellplm, {named.OWN}", f"cellplm, {named.LOCAL}", f"cellplm, {named.ONE_CELL}", named.TUNED, f"..., {named.SHUFFLED}"):
        assert row in QUOTED
    assert f"cellplm, {embedding_evaluation.MIXED}" in QUOTED
    assert f"{embedding_evaluation.RANDOM} of NAME" in QUOTED


def test_rows_and_tables_of_unknown_types_are_those_of_the_protocol():
    assert {"cellplm", *unknown_protocol.SIMPLE, unknown_protocol.BEST_SIMPLE} <= set(QUOTED)
    assert {unknown_protocol._by_type("own"), unknown_protocol.FALSE_ALARMS, unknown_protocol.REFUSED} <= set(QUOTED)
    data = read_yaml(configs_root() / "evaluate" / "cpu_unknown.yaml")["data"]
    assert set(data) == {"pbmc3k", "osmfish", "starmap_visp"}


def test_protocols_are_shipped_for_the_data_sets_of_the_tables():
    data = {name: set(read_yaml(configs_root() / "evaluate" / f"{name}.yaml")["data"]) for name in ("cpu_annotate", "cpu_embed")}
    assert data["cpu_annotate"] >= {"pbmc3k", "cellbench", "starmap_visp", "osmfish"}
    assert data["cpu_embed"] <= data["cpu_annotate"]
