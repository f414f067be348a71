"""What a pipeline is told: parameters are the caller's, a fit keeps what it used beside them, and an answer follows both."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.base import clone

from cellplane.errors import ColumnError, ConfigError, DataError
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.denoising import DenoisingPipeline
from cellplane.pipelines.embedding import CellEmbeddingPipeline
from tests.pipelines.all_calls import LEARNERS, Calls
from tests.pipelines.conftest import RECIPE


@pytest.fixture(scope="module")
def calls() -> Calls:
    """The five pipelines over cells whose counts lie in X."""
    return Calls()


def fit(pipeline: Any, calls: Calls, task: str, changes: dict[str, Any] | None = None) -> Any:
    return pipeline.fit(calls.good(), *([calls.good()] if task == "impute" else []), changes)


@pytest.mark.parametrize("task", LEARNERS)
def test_a_fit_changes_no_parameter_and_keeps_what_it_used(calls, task):
    pipeline = LEARNERS[task](calls.base, calls.recipe(task))
    before = dict(pipeline.get_params(deep=False))
    fit(pipeline, calls, task, {"seed": 7, "optimizer": {"lr": 2e-3}})
    assert all(value is before[name] for name, value in pipeline.get_params(deep=False).items())
    assert (pipeline.config_.seed, pipeline.config_.optimizer.lr) == (7, 2e-3)
    assert pipeline.config_.optimizer.steps == 1, "what the call did not name is the parameter's"
    copy = clone(pipeline)
    assert copy.config.seed == before["config"].seed != 7
    assert copy.config_ is None
    assert fit(pipeline, calls, task).config_.seed == before["config"].seed, "the next fit knows nothing of the call before"


@pytest.mark.parametrize("task", LEARNERS)
def test_what_a_fit_sets_is_private_or_ends_in_an_underscore(calls, task):
    pipeline = LEARNERS[task](calls.base, calls.recipe(task))
    before = dict(vars(pipeline))
    fit(pipeline, calls, task)
    changed = {name for name, value in vars(pipeline).items() if name not in before or value is not before[name]}
    assert {name for name in changed if not name.startswith("_") and not name.endswith("_")} == set()
    assert {"config_", "folder_"} <= changed


@pytest.mark.parametrize("task", ["annotate", "denoise"])
def test_the_keys_of_one_fit_are_those_of_its_answers(calls, task):
    cells = calls.good()
    cells.layers["umi"] = cells.X.copy()
    cells.X = cells.X[:, ::-1].copy()
    recipe = calls.recipe(task)
    named = {"keys": {"layer": "umi"}}
    pipeline = LEARNERS[task](calls.base, recipe).fit(cells, named)
    told = LEARNERS[task](calls.base, {**recipe, "keys": {**recipe["keys"], "layer": "umi"}}).fit(cells)
    ask = "predict_proba" if task == "annotate" else "predict"
    np.testing.assert_array_equal(getattr(pipeline, ask)(cells), getattr(told, ask)(cells))
    assert pipeline.score(cells) == told.score(cells)


def test_a_dictionary_set_after_the_fit_changes_what_it_names(fitted, query):
    pipeline = CellTypeAnnotationPipeline()
    pipeline.adopt(fitted.folder_)
    expected = fitted.predict_proba(query, {"keys": {"batch_key": "batch"}})
    assert not np.array_equal(expected, fitted.predict_proba(query))
    np.testing.assert_array_equal(pipeline.set_params(config={"keys": {"batch_key": "batch"}}).predict_proba(query), expected)
    assert pipeline.settings().keys.labels_key == "cell_type"
    np.testing.assert_array_equal(pipeline.set_params(config={"seed": 3}).predict_proba(query), fitted.predict_proba(query))


def test_a_call_goes_over_what_was_set_and_what_was_set_over_the_fit(fitted, query):
    pipeline = CellTypeAnnotationPipeline()
    pipeline.adopt(fitted.folder_)
    strict, loose = ({"unknown": {"reject": True, "refusal_rate": rate}} for rate in (0.5, 0.01))
    pipeline.set_params(config=strict)
    np.testing.assert_array_equal(pipeline.predict(query), fitted.predict(query, strict))
    assert (pipeline.predict(query) == "unknown").any()
    np.testing.assert_array_equal(pipeline.predict(query, {"unknown": {"refusal_rate": 0.01}}), fitted.predict(query, loose))


def test_wrong_settings_are_told_where_they_are_used(fitted, base_model, query):
    pipeline = CellTypeAnnotationPipeline()
    pipeline.adopt(fitted.folder_)
    with pytest.raises(ConfigError, match="did you mean 'keys'"):
        pipeline.set_params(config={"kesy": {}}).predict(query)
    with pytest.raises(ConfigError, match="expected a AnnotationConfig"):
        pipeline.set_params(config=3).predict(query)
    with pytest.raises(ConfigError, match="batch_key"):
        CellEmbeddingPipeline(base_model).set_params(keys={"batch_kye": "batch"}).predict(query)


def test_an_embedders_keys_may_be_set_as_a_dictionary(base_model, query):
    expected = CellEmbeddingPipeline(base_model, {"batch_key": "batch"}).predict(query)
    pipeline = CellEmbeddingPipeline(base_model)
    np.testing.assert_array_equal(pipeline.set_params(keys={"batch_key": "batch"}).predict(query), expected)
    assert clone(pipeline).get_params()["keys"] == {"batch_key": "batch"}


def test_a_fit_that_fails_leaves_the_earlier_answers(training, query):
    pipeline = CellTypeAnnotationPipeline(config={**RECIPE, "optimizer": {"steps": 2, "warmup_steps": 1}}).fit(training)
    before, told = pipeline.predict_proba(query), pipeline.config_
    with pytest.raises(ColumnError):
        pipeline.fit(training, {"keys": {"batch_key": "no_such_column"}})
    assert pipeline.config_ is told
    np.testing.assert_array_equal(pipeline.predict_proba(query), before)


def test_zero_shot_what_is_set_counts_at_once(base_model, query):
    pipeline = DenoisingPipeline(base_model)
    with pytest.raises(DataError, match="nowhere"):
        pipeline.set_params(config={"keys": {"layer": "nowhere"}}).predict(query)
