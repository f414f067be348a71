"""Every type is left out once a seed, told by itself and in means with and without a sister, and no fit is done twice."""

from __future__ import annotations

import json

import pytest

from cellplane.artifact.folder import save_model
from cellplane.data.config import SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import write_h5ad
from cellplane.errors import ConfigError, DataError
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.protocol import Entry, Method, Place
from cellplane.pipelines.task_protocols import UnknownProtocol
from cellplane.pipelines.unknown_protocol import BEST_SIMPLE, report_entries, run_unknown_protocol
from tests.pipelines.conftest import NOBODY, RECIPE

QUICK = {**RECIPE, "optimizer": {"steps": 12, "lr": 1e-2, "warmup_steps": 2}, "validate_every": 6}
SIMPLE = {"max_probability", "entropy", "knn_distance", "pca_distance"}
SCORES = {"cellplm", *SIMPLE}
BY_TYPE = {f"{context} context: by type" for context in ("own", "self")}


@pytest.fixture(scope="module")
def place(tmp_path_factory, base_model):
    """A folder with cells of three types, and a base."""
    folder = tmp_path_factory.mktemp("unknown")
    write_h5ad(simulate(SimulateConfig(n_cells=150, n_genes=150, n_types=3)), folder / "cells.h5ad")
    save_model(base_model, folder / "base")
    return folder


def configured(place, out="out", **changes) -> UnknownProtocol:
    data = {"three": {"path": str(place / "cells.h5ad"), "types": ["type_0", "type_2"], **changes.pop("three", {})}}
    plain = {"data": data, "recipe": QUICK, "seeds": [0], "out": str(place / out), "tracking_uri": NOBODY}
    return UnknownProtocol.model_validate({**plain, **changes})


@pytest.fixture(scope="module")
def done(place):
    lines: list[str] = []
    return run_unknown_protocol(configured(place), lines.append), lines


def test_every_score_of_every_type_is_there_in_both_contexts(done):
    evaluation, lines = done[0].evaluation, done[1]
    assert len(lines) == 2, "one line a fit"
    means = [name for _, name in evaluation.tables() if name not in BY_TYPE]
    assert {name for _, name in evaluation.tables()} > BY_TYPE
    for protocol in means:
        rows = {row.method.name: row for row in evaluation.rows("three", protocol)}
        assert rows.keys() == SCORES | {BEST_SIMPLE}
        assert all(0 <= row.mean("auroc") <= 1 and 0 <= row.mean("fpr_at_95_tpr") <= 1 for row in rows.values())
        assert 0 <= rows["cellplm"].mean("refusal_rate_known") <= 1
        assert not rows["entropy"].values["refusal_rate_known"]
        assert rows[BEST_SIMPLE].mean("auroc") >= max(rows[name].mean("auroc") for name in SIMPLE)
    for protocol in BY_TYPE:
        rows = evaluation.rows("three", protocol)
        assert [row.method.name.split(":")[0] for row in rows] == ["type_0", "type_2"]
        assert all(" sister" in row.method.name for row in rows)
        assert evaluation.metrics_of("three", protocol)[0] == "cellplm"
        assert {*evaluation.metrics_of("three", protocol)} == SCORES | {"fpr_at_95_tpr", "refusal_rate_known"}


def test_the_report_holds_types_means_and_the_asked_rate(done):
    told = done[0].report.markdown.read_text()
    assert "## three, own context: by type" in told
    assert "refusal_rate_known (0.05 is best)" in told
    assert "fpr_at_95_tpr (lower is better)" in told
    assert "at or above the best simple score" in told
    assert "three: nearest known types" in told
    assert json.loads(done[0].report.json.read_text())["metric"] == "auroc"
    assert "<table" in done[0].report.html.read_text()


def test_nothing_is_fitted_twice_and_another_type_is_fitted_alone(place, done, monkeypatch):
    fitted = []
    original = CellTypeAnnotationPipeline.fit

    def watched(self, data, *rest):
        fitted.append(set(data.obs["cell_type"].astype(str)))
        return original(self, data, *rest)

    monkeypatch.setattr(CellTypeAnnotationPipeline, "fit", watched)
    again: list[str] = []
    assert run_unknown_protocol(configured(place), again.append).evaluation.entries == done[0].evaluation.entries
    assert (again, fitted) == ([], [])
    every = run_unknown_protocol(configured(place, three={"types": None}), again.append).evaluation
    assert fitted == [{"type_0", "type_2"}]
    assert len(every.rows("three", "own context: by type")) == 3


def test_a_fit_whose_last_score_was_lost_in_a_kill_is_done_once_more(place, done):
    ledger = place / "cut" / "entries.jsonl"
    ledger.parent.mkdir()
    lines = (place / "out" / "entries.jsonl").read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[:14]))  # ten of the first type, four of the second
    said: list[str] = []
    finished = run_unknown_protocol(configured(place, out="cut"), said.append)
    assert len(said) == 1
    assert {entry.method.name for entry in finished.evaluation.entries} == {entry.method.name for entry in done[0].evaluation.entries}


def test_a_base_has_rows_of_its_own(place):
    three = {"types": ["type_1"], "bases": {"demo": str(place / "base")}, "max_cells": 60}
    finished = run_unknown_protocol(configured(place, out="based", three=three, contexts=["own"]))
    (means,) = [name for _, name in finished.evaluation.tables() if not name.endswith("by type")]
    rows = {row.method.name: row.method.kind for row in finished.evaluation.rows("three", means)}
    assert rows["cellplm from demo"] == "model"
    assert rows["entropy from demo"] == "baseline"
    assert "pca_distance from demo" not in rows, "no network is part of it"
    assert any("base demo" in note for note in finished.evaluation.notes)


def test_a_type_whose_centroid_is_near_anothers_is_in_the_table_of_sisters():
    def entry(kind: int, name: str, correlation: float, seed: int) -> Entry:
        told = {"type": f"t{kind}", "nearest_type": "T", "nearest_correlation": correlation}
        method = Method(name, "model" if name == "cellplm" else "baseline")
        return Entry(Place("d", "own", kind, seed), method, {"auroc": 0.5}, details=told)

    found = report_entries([entry(kind, name, (0.96, 0.94, 0.93)[kind], seed) for kind in range(3) for seed in (0, 1) for name in SCORES])
    means = {one.place.split: one.place.protocol.removeprefix("own context: types ") for one in found if one.method.name == "cellplm"}
    assert means == {0: "with a sister", 1: "without a sister", 2: "without a sister"}
    named = {one.method.name for one in found if one.place.protocol.endswith("by type")}
    assert named == {"t0: sister T", "t1: no sister", "t2: no sister"}


def test_what_cannot_be_evaluated_says_so(place):
    with pytest.raises(ConfigError, match="no cells of type 'type_9'"):
        run_unknown_protocol(configured(place, out="none", three={"types": ["type_9"]}))
    write_h5ad(simulate(SimulateConfig(n_cells=60, n_genes=30, n_types=2)), place / "two.h5ad")
    with pytest.raises(DataError, match="three are needed"):
        run_unknown_protocol(configured(place, out="none", three={"path": str(place / "two.h5ad"), "types": None}))
    with pytest.raises(ConfigError, match="no data set"):
        run_unknown_protocol(UnknownProtocol())
