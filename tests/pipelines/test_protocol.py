"""Scores are kept as they are found: a killed evaluation goes on, and its tables and differences pair what belongs together."""

from __future__ import annotations

import json
import math

import pytest

from cellplane.errors import StorageError
from cellplane.pipelines.protocol import Entry, Evaluation, Found, Ledger, Method, Place, Row

OURS, RIDGE, RANDOM = Method("cellplm", "model"), Method("ridge", "baseline"), Method("random weights", "control")


def place(split: int, protocol: str = "random", seed: int = 0) -> Place:
    return Place("simulated", protocol, split, seed)


def entry(method: Method, split: int, score: float, protocol: str = "random") -> Entry:
    return Entry(place(split, protocol), method, {"pearson": score, "rmse": 1 - score}, test_share=0.25)


def evaluation(*entries: Entry) -> Evaluation:
    return Evaluation("impute", "pearson", entries, lower_is_better=("rmse",))


def test_what_a_ledger_knows_is_not_measured_again(tmp_path):
    asked = []

    def work() -> Found:
        asked.append(1)
        return Found({"pearson": 0.5}, {"k": 15})

    first = Ledger(tmp_path / "entries.jsonl", "a").measured(place(0), OURS, work, 0.25)
    again = Ledger(tmp_path / "entries.jsonl", "a").measured(place(0), OURS, work)
    assert again == first
    assert again.details == {"k": 15}
    assert len(asked) == 1
    Ledger(tmp_path / "entries.jsonl", "a").measured(place(1), OURS, work)
    assert len(asked) == 2


def test_another_configuration_does_not_see_the_scores_of_this_one(tmp_path):
    Ledger(tmp_path / "entries.jsonl", "a").measured(place(0), OURS, lambda: Found({"pearson": 0.5}))
    assert Ledger(tmp_path / "entries.jsonl", "b").entries() == []
    Ledger(tmp_path / "entries.jsonl", "b").measured(place(0), OURS, lambda: Found({"pearson": 0.7}))
    assert [one.metrics["pearson"] for one in Ledger(tmp_path / "entries.jsonl", "a").entries()] == [0.5]


def test_a_line_torn_by_a_crash_is_measured_again(tmp_path):
    path = tmp_path / "entries.jsonl"
    ledger = Ledger(path, "a")
    ledger.measured(place(0), OURS, lambda: Found({"pearson": 0.5}))
    ledger.measured(place(1), OURS, lambda: Found({"pearson": 0.6}))
    path.write_bytes(path.read_bytes()[:-20])
    torn = Ledger(path, "a")
    assert [one.place.split for one in torn.entries()] == [0]
    torn.measured(place(1), OURS, lambda: Found({"pearson": 0.7}))
    assert [one.metrics["pearson"] for one in Ledger(path, "a").entries()] == [0.5, 0.7]


def test_a_disk_that_refuses_is_said(tmp_path):
    (tmp_path / "taken").write_text("a file")
    ledger = Ledger(tmp_path / "taken" / "entries.jsonl", "a")
    with pytest.raises(StorageError, match="out="):
        ledger.measured(place(0), OURS, lambda: Found({"pearson": 0.5}))


def test_rows_stand_in_the_order_model_baseline_control():
    found = evaluation(entry(RANDOM, 0, 0.1), entry(RIDGE, 0, 0.3), entry(OURS, 0, 0.4), entry(OURS, 1, 0.6))
    rows = found.rows("simulated", "random")
    assert [row.method for row in rows] == [OURS, RIDGE, RANDOM]
    assert rows[0].values["pearson"] == [0.4, 0.6]
    assert rows[0].mean("pearson") == pytest.approx(0.5)
    assert rows[0].spread("pearson") == pytest.approx(0.02**0.5)
    assert rows[0].text("pearson") == "0.500 +- 0.141 (2)"
    assert rows[1].text("pearson") == "0.300"


def test_unknown_scores_are_left_out_of_a_mean():
    row = Row(OURS, {"pearson": [0.4, math.nan], "nll": [math.nan]})
    assert row.mean("pearson") == 0.4
    assert row.text("nll") == "-"
    assert math.isnan(row.mean("nll"))


def test_protocols_of_one_data_set_have_tables_of_their_own():
    found = evaluation(entry(OURS, 0, 0.4), entry(OURS, 0, 0.2, "blocks"))
    assert found.tables() == [("simulated", "random"), ("simulated", "blocks")]
    assert [row.values["pearson"] for row in found.rows("simulated", "blocks")] == [[0.2]]


def test_a_lead_is_paired_by_split_whatever_the_order_of_measuring():
    ours = [entry(OURS, split, score) for split, score in enumerate((0.4, 0.9, 0.2))]
    ridge = [entry(RIDGE, split, score) for split, score in ((2, 0.1), (0, 0.3), (1, 0.8), (7, 0.0))]
    lead = evaluation(*ours, *ridge).difference("simulated", "random", "ridge")
    assert lead is not None
    assert lead.pairs == 3
    assert lead.mean == pytest.approx(0.1)
    error = evaluation(*ours, *ridge).difference("simulated", "random", "ridge", "rmse")
    assert error is not None
    assert error.mean == pytest.approx(0.1), "a smaller error is a lead"
    assert evaluation(*ours).difference("simulated", "random", "ridge") is None


def test_an_evaluation_is_json_and_comes_back():
    found = evaluation(entry(OURS, 0, 0.4), entry(OURS, 1, 0.5), entry(RIDGE, 0, 0.3), entry(RIDGE, 1, 0.3))
    plain = json.loads(json.dumps(found.plain()))
    assert tuple(Entry.of(one) for one in plain["entries"]) == found.entries
    rows = {row["name"]: row for row in plain["tables"][0]["rows"]}
    assert rows["cellplm"]["lead"] is None
    assert rows["ridge"]["lead"]["mean"] == pytest.approx(0.15)


def test_seeds_that_place_the_same_cells_are_not_tested_as_if_they_were_other_cells():
    entries = tuple(
        Entry(Place("cells", "zero-shot", 0, seed), Method(name, kind), {"nmi": value}, 1.0)
        for name, kind, value in (("cellplm", "model", 0.7), ("PCA50", "baseline", 0.6))
        for seed in range(3)
    )
    told = Evaluation("embed", "nmi", entries, splits_differ=False).difference("cells", "zero-shot", "PCA50")
    assert told.mean == pytest.approx(0.1)
    assert told.verdict == "undecided"
    assert told.text() == "+0.100"
    assert Evaluation("embed", "nmi", entries).difference("cells", "zero-shot", "PCA50").verdict == "better"
