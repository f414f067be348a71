"""What an annotator learned about its answers goes with the model: calibrated, strangers refused, broader names, one identity."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn.base import clone

from cellplane.artifact.folder import load_model, save_model
from cellplane.data.sentences import memory_store
from cellplane.data.sources import AnnData, cell_table
from cellplane.errors import ConfigError, DataError
from cellplane.inference import Predictor
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.base import NotFittedError
from cellplane.pipelines.config import AnnotationConfig
from tests.pipelines.conftest import RECIPE

TYPES = ("type_0", "type_1", "type_2", "type_3")
SHORT = {**RECIPE, "optimizer": {"steps": 5}}
PARENTS = {"type_0": "left", "type_1": "left", "type_2": "right", "type_3": "right", "left": "cell", "right": "cell"}


@pytest.fixture(scope="module")
def unsure(training: AnnData) -> CellTypeAnnotationPipeline:
    """A pipeline that has learned next to nothing; treat as read-only."""
    return CellTypeAnnotationPipeline(config=SHORT).fit(training)


def bare(pipeline: CellTypeAnnotationPipeline) -> CellTypeAnnotationPipeline:
    """The same model as an earlier version saved it."""
    older = CellTypeAnnotationPipeline()
    older.adopt(replace(pipeline.folder_, attachments={}))
    return older


def test_probabilities_are_scaled_by_what_validation_cells_taught_and_no_label_changes(fitted, query):
    plain, calibrated = bare(fitted), fitted
    assert fitted._fitted().judgement.temperature != 1
    assert plain.predict(query).tolist() == calibrated.predict(query).tolist()
    assert not np.allclose(plain.predict_proba(query), calibrated.predict_proba(query))


def test_calibration_can_be_left_out(training, query):
    pipeline = CellTypeAnnotationPipeline(config={**SHORT, "calibrate": False}).fit(training)
    np.testing.assert_array_equal(pipeline.predict_proba(query), bare(pipeline).predict_proba(query))


def test_the_endpoints_predictor_answers_as_the_pipeline(fitted, query, tmp_path):
    predictor = Predictor.load(fitted.save(tmp_path / "model"))
    table, _ = cell_table(query, predictor.vocabulary, fitted.config.keys.model_copy(update={"labels_key": None}))
    answer = predictor.annotate(memory_store(table, predictor.max_cells))
    np.testing.assert_array_equal(answer.proba, fitted.predict_proba(query))
    np.testing.assert_array_equal(answer.unknown_score, fitted.unknown_scores(query))


def test_a_folder_of_an_earlier_version_loads_and_keeps_its_identity(fitted, query, tmp_path):
    older = bare(fitted)
    path = older.save(tmp_path / "old")
    assert "judgement" not in json.loads((path / "config.json").read_text(encoding="utf-8"))
    loaded = CellTypeAnnotationPipeline.load(path)
    np.testing.assert_array_equal(loaded.predict_proba(query), older.predict_proba(query))
    with pytest.raises(DataError, match="fit it again"):
        loaded.unknown_scores(query)
    with pytest.raises(DataError, match="fit it again"):
        loaded.predict(query, {"unknown": {"reject": True}})
    data = query.copy()
    loaded.predict(data, key_added="cellplm")
    assert "cellplm_unknown_score" not in data.obs


def test_what_changes_the_answers_changes_the_identity(fitted, tmp_path):
    plain = load_model(save_model(fitted.folder_, tmp_path / "plain"))
    judgement = fitted._fitted().judgement
    refusing = replace(fitted.folder_, attachments=replace(judgement, reject=True).attachments())
    assert load_model(save_model(refusing, tmp_path / "refusing")).model_sha256 != plain.model_sha256
    assert load_model(save_model(plain, tmp_path / "again")).model_sha256 == plain.model_sha256


def test_a_type_that_was_never_learned_is_mostly_refused_and_known_cells_are_not(training, query):
    known = training[(training.obs["cell_type"] != "type_3").to_numpy()].copy()
    asked = {"reject": True, "refusal_rate": 0.2}
    pipeline = CellTypeAnnotationPipeline(config={**RECIPE, "unknown": asked, "validation_share": 0.3}).fit(known)
    strange = (query.obs["cell_type"] == "type_3").to_numpy()
    scores = pipeline.unknown_scores(query)
    assert np.median(scores[strange]) > np.quantile(scores[~strange], 0.8)
    refused = pipeline.predict(query) == "unknown"
    assert refused[strange].mean() > 0.5 > 0.35 > refused[~strange].mean()


def test_one_call_may_ask_for_refusal_at_another_rate(fitted, query):
    shares = []
    for rate in (0.05, 0.3, 0.6):
        asked = {"unknown": {"reject": True, "refusal_rate": rate}}
        shares.append(float(np.mean(fitted.predict(query, asked) == "unknown")))
    assert shares == sorted(shares)
    assert 0.3 < shares[-1] < 0.9
    assert "unknown" not in fitted.predict(query)


def test_when_all_cells_are_refused_that_is_answered_scored_and_said(fitted, query, caplog):
    refusing = CellTypeAnnotationPipeline()
    judgement = fitted._fitted().judgement
    strict = replace(judgement, reject=True, rule=replace(judgement.rule, known=judgement.rule.known * 0 - 1e9))
    refusing.adopt(replace(fitted.folder_, attachments=strict.attachments()))
    assert set(refusing.predict(query)) == {"unknown"}
    assert refusing.score(query, ["cell_type"])["accuracy"] == 0
    assert "100 of 100 labelled cells were answered unknown" in caplog.text


def test_unsure_cells_get_a_broader_name(unsure, fitted, query, training):
    asked = {"hierarchy": {"parents": PARENTS}}
    data = query.copy()
    labels = unsure.predict(data, asked, key_added="cellplm")
    assert {"left", "right", "cell"} & set(labels)
    assert set(labels) <= {*TYPES, "left", "right", "cell"}
    assert data.obs["cellplm_cell_type"].tolist() == labels.tolist()
    assert (data.obs["cellplm_confidence"] >= 0.8 - 1e-6).all()
    kept = CellTypeAnnotationPipeline(config={**SHORT, "hierarchy": {"parents": PARENTS}}).fit(training)
    assert kept.predict(query).tolist() == labels.tolist()
    assert np.mean(np.isin(fitted.predict(query, asked), TYPES)) > 0.7


def test_a_tree_may_come_from_a_file_and_a_wrong_one_is_refused_before_any_work(training, query, tmp_path, unsure):
    file = tmp_path / "tree.json"
    file.write_text(json.dumps(PARENTS), encoding="utf-8")
    from_file = unsure.predict(query, {"hierarchy_file": str(file)})
    assert from_file.tolist() == unsure.predict(query, {"hierarchy": {"parents": PARENTS}}).tolist()
    with pytest.raises(ConfigError, match="keep one"):
        unsure.predict(query, {"hierarchy_file": str(file), "hierarchy": {"parents": PARENTS}})
    pipeline = CellTypeAnnotationPipeline(config={**SHORT, "hierarchy": {"parents": PARENTS}})
    with pytest.raises(ConfigError, match="does not know 1 of the labels"):
        pipeline.fit(_renamed(training, "type_3", "typo"))


def _renamed(data: AnnData, before: str, after: str) -> AnnData:
    out = data.copy()
    out.obs["cell_type"] = out.obs["cell_type"].astype(str).replace(before, after)
    return out


def test_numbers_as_labels_may_have_broader_names(training, query):
    data = training.copy()
    data.obs["cluster"] = data.obs["cell_type"].cat.codes
    parents = {"0": "low", "1": "low", "2": "high", "3": "high", "low": "all", "high": "all"}
    pipeline = CellTypeAnnotationPipeline(config={**SHORT, "hierarchy": {"parents": parents}}).fit(data, label_fields=["cluster"])
    assert set(pipeline.predict(query)) <= {0, 1, 2, 3, "low", "high", "all"}


def test_a_head_with_a_hidden_layer_learns_as_well(training, query):
    pipeline = CellTypeAnnotationPipeline(config={**RECIPE, "model": {**RECIPE["model"], "head_width": 16}}).fit(training)
    assert "head.inner.weight" in pipeline.folder_.weights
    assert pipeline.score(query)["macro_f1"] > 0.9


@pytest.mark.parametrize("context", ["own", "self"])
def test_cells_are_read_in_the_context_asked_for(fitted, query, context):
    proba = fitted.predict_proba(query, context=context)
    assert proba.shape == (query.n_obs, 4)
    assert fitted.score(query, context=context)["macro_f1"] > 0.8


def test_a_section_needs_coordinates_and_another_context_is_none(fitted, query):
    with pytest.raises(ConfigError, match="needs to know where cells lie"):
        fitted.predict(query, context="section")
    with pytest.raises(ConfigError, match="no context 'slide'"):
        fitted.predict_proba(query, context="slide")


def test_alone_a_cell_is_answered_whatever_comes_with_it(fitted, query):
    everybody = fitted.predict_proba(query, context="self")
    np.testing.assert_allclose(fitted.predict_proba(query[:7].copy(), context="self"), everybody[:7], atol=1e-5)


def test_another_data_set_may_keep_the_cells_company(unsure, query, training):
    few = query[:7].copy()
    beside = unsure.predict_proba(few, context=training)
    assert beside.shape == (7, 4)
    assert np.abs(beside - unsure.predict_proba(few)).max() > 1e-5
    unsure.predict(few, key_added="cellplm", context=training)
    assert "200 read-only cells" in few.uns["cellplm"]["context"]


def test_scikit_learns_conventions_hold(fitted, query):
    pipeline = CellTypeAnnotationPipeline(config={**SHORT, "unknown": {"reject": True}})
    assert set(pipeline.get_params(deep=False)) == {"model", "config", "pretrain_prefix", "pretrain_directory"}
    copy = clone(pipeline)
    assert copy.config == pipeline.config
    assert copy.set_params(config=AnnotationConfig()).config == AnnotationConfig()
    for ask in (clone(fitted).predict, clone(fitted).predict_proba, clone(fitted).unknown_scores, clone(fitted).score):
        with pytest.raises(NotFittedError):
            ask(query)
