"""The model card says what the model is, in Markdown whose tables hold whatever the names are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cellplane.artifact.card import model_card
from tests.tiny import TINY, tiny_folder

SCORES = {"cellplm": {"macro_f1": 0.91234, "accuracy": 0.9}, "logistic regression": {"macro_f1": 0.8, "accuracy": 0.85}}


def tables(card: str) -> list[list[str]]:
    """Rows of every table, without the rules."""
    rows = [
        line.replace("\\|", "/").strip("|").split("|") for line in card.splitlines() if line.startswith("|") and not line.startswith("|-")
    ]
    return [[cell.strip() for cell in row] for row in rows]


def test_the_card_names_task_genes_network_context_and_classes():
    card = model_card(tiny_folder())
    assert card.startswith("# CellPLM 16 x 2: a cell type annotator\n")
    table = dict(tables(card))
    assert table["genes"] == "24 (symbol)"
    assert table["network"] == "width 16, 2 blocks, flowformer"
    assert table["context"] == "sentences of at most 8 cells of one batch"
    assert table["cell types"] == "B, NK, T"
    assert table["run id"] == "abc"
    assert tiny_folder().vocabulary.fingerprint[:16] in card


def test_a_model_without_classes_has_no_line_for_them():
    card = model_card(tiny_folder(TINY))
    assert "a pre-trained cell language model" in card
    assert "cell types" not in card


def test_scores_stand_method_by_method():
    rows = tables(model_card(tiny_folder(), SCORES))
    assert ["method", "macro_f1", "accuracy"] in rows
    assert ["cellplm", "0.912", "0.900"] in rows
    assert ["logistic regression", "0.800", "0.850"] in rows


@pytest.mark.parametrize("scores", [None, {}])
def test_without_scores_there_is_no_table_of_them(scores):
    assert "Held-out" not in model_card(tiny_folder(), scores)


def test_a_metric_that_one_method_does_not_have_is_left_open():
    rows = tables(model_card(tiny_folder(), {**SCORES, "majority": {"accuracy": 0.4, "auroc": 0.5}}))
    assert ["method", "macro_f1", "accuracy", "auroc"] in rows
    assert ["majority", "", "0.400", "0.500"] in rows


def test_names_cannot_break_the_tables():
    model = replace(tiny_folder(), classes=("CD4|CD8", "B", "a\nb"), lineage={"source": "x | y\n# z"})
    rows = tables(model_card(model, {"a|b": {"f1": 1.0}}))
    assert all(len(row) == 2 for row in rows)
    assert dict(rows)["cell types"] == "CD4/CD8, B, a b"
    assert dict(rows)["source"] == "x / y # z"


def test_the_card_is_the_same_for_the_same_model():
    assert model_card(tiny_folder(), SCORES) == model_card(tiny_folder(), SCORES)
