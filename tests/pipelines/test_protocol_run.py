"""Protocols read what they are told to, keep scores under what decides them, and say what a base has seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cellplane.artifact.folder import save_model
from cellplane.data.inputs import SOURCE_DIGITS, source_sha256
from cellplane.data.sources import write_h5ad
from cellplane.errors import ColumnError, ConfigError, DataError
from cellplane.pipelines.evaluation_report import as_markdown
from cellplane.pipelines.protocol import Entry, Evaluation, Found, Method, Place
from cellplane.pipelines.protocol_config import AnnotationProtocol, EmbeddingProtocol, EvaluatedData
from cellplane.pipelines.protocol_run import ENTRIES, Ledgers, base_notes, check_protocol, finish, open_data, out_of, seen
from tests.pipelines.conftest import NOBODY

PLACE, OURS = Place("cells", "random", 0, 0), Method("cellplm", "model")


@pytest.fixture(scope="module")
def file(tmp_path_factory, cells):
    path = tmp_path_factory.mktemp("data") / "cells.h5ad"
    write_h5ad(cells, path)
    return path


def asked(path, **changes) -> EvaluatedData:
    return EvaluatedData.model_validate({"path": str(path), **changes})


def test_scores_are_kept_under_the_settings_that_decide_them(tmp_path):
    ledgers = Ledgers(tmp_path)
    ledgers.of("data", {"steps": 100}).measured(PLACE, OURS, lambda: Found({"macro_f1": 0.5}))
    ledgers.of("data", {"steps": 200}).measured(PLACE, OURS, lambda: Found({"macro_f1": 0.6}))
    again = Ledgers(tmp_path)
    assert [again.of("data", {"steps": steps}).entries()[0].metrics["macro_f1"] for steps in (100, 200)] == [0.5, 0.6]
    assert again.of("other data", {"steps": 100}).entries() == []
    assert len((tmp_path / ENTRIES).read_text().splitlines()) == 2


def test_one_question_has_one_ledger_so_that_it_sees_what_it_has_just_measured(tmp_path):
    ledgers = Ledgers(tmp_path)
    assert ledgers.of("data", {"a": 1, "b": 2}) is ledgers.of("data", {"b": 2, "a": 1})
    assert ledgers.of("data", {"a": 1}) is not ledgers.of("data", {"a": 2})


def test_a_data_set_is_known_by_its_content_and_its_keys_not_by_where_it_lies(file, tmp_path, cells):
    copy = tmp_path / "elsewhere.h5ad"
    copy.write_bytes(file.read_bytes())
    first = open_data("cells", asked(file), {}, None)
    assert open_data("cells", asked(copy), {}, None).identity == first.identity
    assert open_data("cells", asked(file, keys={"labels_key": "cell_type"}), {}, None).identity != first.identity
    write_h5ad(cells[:200].copy(), copy)
    assert open_data("cells", asked(copy), {}, None).identity != first.identity


def test_bases_are_opened_by_name(file, base_model, tmp_path):
    save_model(base_model, tmp_path / "base")
    opened = open_data("cells", asked(file), {"human": str(tmp_path / "base")}, None)
    assert list(opened.bases) == ["human"]
    assert opened.bases["human"].vocabulary == base_model.vocabulary


def test_bases_of_a_data_set_stand_before_those_for_all():
    one = {"path": "a.h5ad", "bases": {"human": "without_a", "own": "x"}}
    config = EmbeddingProtocol.model_validate({"data": {"a": one, "b": {"path": "b.h5ad"}}, "bases": {"human": "whole", "mouse": "m"}})
    assert config.bases_for("a") == {"human": "without_a", "mouse": "m", "own": "x"}
    assert config.bases_for("b") == {"human": "whole", "mouse": "m"}


def test_what_a_file_lacks_is_named_before_any_fit(file):
    with pytest.raises(ColumnError, match="sample"):
        open_data("cells", asked(file, keys={"labels_key": "cell_type", "batch_key": "sample"}), {}, None)
    with pytest.raises(DataError, match=r"obsm\['spatial'\]"):
        open_data("cells", asked(file, keys={"labels_key": "cell_type", "spatial_key": "spatial"}, guard=1), {}, None)


def test_a_protocol_needs_data_sets_that_are_there(file):
    with pytest.raises(ConfigError, match="no data set"):
        check_protocol(EmbeddingProtocol())
    with pytest.raises(ConfigError, match=r"data\.lost\.path"):
        check_protocol(EmbeddingProtocol(data={"here": asked(file), "lost": asked(file.parent / "lost.h5ad")}))
    check_protocol(EmbeddingProtocol(data={"here": asked(file)}))


def test_a_protocol_without_labels_or_seeds_or_with_a_learning_probe_is_refused():
    with pytest.raises(ValueError, match="labels_key"):
        EvaluatedData(path="a.h5ad", keys={"batch_key": "batch"})
    with pytest.raises(ValueError, match="seeds"):
        EmbeddingProtocol(seeds=())
    with pytest.raises(ValueError, match=r"probe\.transfer\.learn"):
        AnnotationProtocol(probe={})


def test_results_lie_under_the_home_unless_a_folder_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path))
    assert out_of(EmbeddingProtocol(), "embed") == tmp_path / "evaluations" / "embed"
    assert out_of(EmbeddingProtocol(out=str(tmp_path / "x")), "embed") == tmp_path / "x"


@pytest.mark.parametrize(
    ("sources", "answer", "words"),
    [(None, None, "does not say"), ("00", False, "not among the files"), ("{digits}", True, "SEEN IN PRE-TRAINING")],
)
def test_a_note_says_whether_a_base_has_seen_the_cells(file, base_model, sources, answer, words):
    told = {} if sources is None else {"sources": sources.format(digits=source_sha256(file, False)[:SOURCE_DIGITS])}
    base = replace(base_model, lineage=told)
    assert seen(base, file) is answer
    (note,) = base_notes("cells", [str(file)], {"human": base})
    assert words in note
    assert note.startswith("cells, base human")


def test_a_finished_evaluation_is_complete_without_a_tracker(tmp_path):
    entries = tuple(Entry(replace(PLACE, split=split), OURS, {"macro_f1": 0.5 + split / 10}, test_share=0.25) for split in range(3))
    evaluation = Evaluation("annotate", "macro_f1", entries, notes=("one note",))
    config = AnnotationProtocol(out=str(tmp_path), tracking_uri=NOBODY)
    finished = finish(evaluation, config, "A title")
    assert finished.run_id is None
    assert finished.report.markdown.read_text() == as_markdown(evaluation, "A title", tmp_path)
    assert all(path.stat().st_size for path in (finished.report.html, finished.report.json))
    assert np.isclose(finished.evaluation.rows("cells", "random")[0].mean("macro_f1"), 0.6)
