"""A report can be read by itself, says what the entries say, and one identity is one run in the tracker."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import pytest

from cellplane.pipelines.evaluation_report import log_evaluation, means, write_report
from cellplane.pipelines.protocol import Entry, Evaluation, Method, Picture, Place
from cellplane.tracking.runs import connect, local_uri

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


@pytest.fixture
def evaluation(tmp_path) -> Evaluation:
    (tmp_path / "dot.png").write_bytes(PNG)
    scores = {"cellplm": ("model", (0.8, 0.82, 0.81)), "a|b <x>": ("baseline", (0.7, 0.71, 0.72))}
    entries = tuple(
        Entry(Place("cells", "random", split, 0), Method(name, kind), {"macro_f1": value}, test_share=0.25)
        for name, (kind, values) in scores.items()
        for split, value in enumerate(values)
    )
    return Evaluation("annotate", "macro_f1", entries, (Picture("Dot", tmp_path / "dot.png", "one dot"),), ("2 types & 3 cells left out",))


def test_the_page_needs_nothing_beside_it(evaluation, tmp_path):
    text = write_report(evaluation, tmp_path).html.read_text()
    assert base64.b64encode(PNG).decode() in text
    assert 'src="data:image/png' in text
    assert "http" not in text
    assert "<script" not in text


def test_names_cannot_break_the_page_or_the_table(evaluation, tmp_path):
    report = write_report(evaluation, tmp_path)
    assert "a|b &lt;x&gt;" in report.html.read_text()
    assert "2 types &amp; 3 cells" in report.html.read_text()
    rows = [line for line in report.markdown.read_text().splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1


def test_tables_tell_mean_spread_and_a_decided_lead(evaluation, tmp_path):
    report = write_report(evaluation, tmp_path)
    text = report.markdown.read_text()
    assert "| cellplm | model | 0.810 +- 0.010 (3) |" in text
    assert "+0.100 [" in text
    assert '<td class="better">+0.100' in report.html.read_text()
    assert "![Dot](dot.png)" in text
    assert "## cells, random" in text


def test_an_undecided_lead_is_not_coloured(evaluation, tmp_path):
    noisy = tuple(
        replace(one, metrics={"macro_f1": 0.5 + 0.3 * ((one.place.split + (one.method.kind == "model")) % 2)}) for one in evaluation.entries
    )
    text = write_report(replace(evaluation, entries=noisy), tmp_path).html.read_text()
    assert 'class="undecided"' in text
    assert 'class="better"' not in text


def test_the_report_is_also_data(evaluation, tmp_path):
    plain = json.loads(write_report(evaluation, tmp_path).json.read_text())
    assert plain["tables"][0]["rows"][0]["scores"]["macro_f1"]["mean"] == pytest.approx(0.81)
    assert plain["notes"] == list(evaluation.notes)


def test_an_evaluation_is_one_run_however_often_it_is_told(evaluation, tmp_path, empty_tracker):
    (tmp_path / "mlflow.db").write_bytes(empty_tracker)
    uri, folder = local_uri(tmp_path), tmp_path / "report"
    write_report(evaluation, folder)
    first = log_evaluation(evaluation, folder, "f" * 64, {"seed": 0}, uri)
    grown = replace(evaluation, entries=(*evaluation.entries, replace(evaluation.entries[0], place=Place("cells", "random", 3, 0))))
    assert log_evaluation(grown, folder, "f" * 64, {"seed": 0}, uri) == first
    run = connect(uri).get_run(first)
    assert run.data.metrics["cells/random/cellplm/macro_f1"] == pytest.approx(means(grown)["cells/random/cellplm/macro_f1"])
    assert run.data.tags["cellplane.task"] == "annotate"
    assert "report.html" in {one.path for one in connect(uri).list_artifacts(first)}


def test_without_a_tracker_the_report_stands_alone(evaluation, tmp_path):
    write_report(evaluation, tmp_path)
    assert log_evaluation(evaluation, tmp_path, "f" * 64, {}, "http://127.0.0.1:9") is None


def test_another_configuration_in_the_same_folder_has_its_own_numbers(tmp_path, empty_tracker):
    (tmp_path / "mlflow.db").write_bytes(empty_tracker)
    uri, folder = local_uri(tmp_path), tmp_path / "out"
    folder.mkdir()
    told = {}
    for identity, score in (("a" * 40, 0.25), ("b" * 40, 0.75)):
        entry = Entry(Place("cells", "random", 0, 0), Method("cellplm", "model"), {"macro_f1": score}, 1.0)
        told[identity] = log_evaluation(Evaluation("annotate", "macro_f1", (entry,)), folder, identity, {}, uri)
    found = [connect(uri).get_run(str(run)).data.metrics for run in told.values()]
    assert [next(iter(metrics.values())) for metrics in found] == [0.25, 0.75]


def test_numbers_that_are_none_are_null_in_json():
    entry = Entry(Place("cells", "random", 0, 0), Method("cellplm", "model"), {"macro_f1": float("nan")}, 1.0)
    plain = json.loads(json.dumps(Evaluation("annotate", "macro_f1", (entry,)).plain(), allow_nan=False))
    assert plain["entries"][0]["metrics"]["macro_f1"] is None


def test_those_who_cannot_see_a_picture_are_told_what_it_shows_in_both_files(evaluation, tmp_path):
    (tmp_path / "pictures").mkdir()
    path = tmp_path / "pictures" / "a dot.png"
    path.write_bytes(PNG)
    picture = Picture("Dot", path, "One dot is enough.", 'a "dot" [1 pixel]')
    report = write_report(replace(evaluation, pictures=(picture,)), tmp_path)
    assert '![a "dot" (1 pixel)](pictures/a%20dot.png)\n\nOne dot is enough.' in report.markdown.read_text()
    text = report.html.read_text()
    assert 'alt="a &quot;dot&quot; [1 pixel]"' in text
    assert "<figcaption>One dot is enough.</figcaption>" in text
    assert json.loads(report.json.read_text())["pictures"][0]["alt"] == picture.alt


def test_leads_without_a_test_are_not_said_to_have_one(evaluation, tmp_path):
    text = write_report(replace(evaluation, splits_differ=False), tmp_path).markdown.read_text()
    assert "p value of the corrected" not in text
    assert "neither interval nor p value" in text


def test_a_wide_table_scrolls_by_itself(evaluation, tmp_path):
    text = write_report(evaluation, tmp_path).html.read_text()
    assert text.count('<div class="wide"><table>') == 1
    assert "div.wide { overflow-x: auto; }" in text
