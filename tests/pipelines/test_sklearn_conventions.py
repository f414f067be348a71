"""The estimators behave as scikit-learn's tools expect, as far as an AnnData in place of X allows.

What applies: parameters are what the constructor was given, set_params and clone carry them, nothing is learned before fit,
what is asked too early raises NotFittedError, inputs are not changed, two fits give the same, a pickled pipeline answers alike.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted

import cellplane
from cellplane.data.sources import AnnData

NAMES = ("CellTypeAnnotationPipeline", "CellEmbeddingPipeline", "SpatialImputationPipeline", "DenoisingPipeline", "PerturbationPipeline")
LEARNERS = tuple(name for name in NAMES if name != "CellEmbeddingPipeline")


@pytest.fixture(params=NAMES)
def made(request, base_model) -> BaseEstimator:
    """A pipeline that has learned nothing."""
    kind = getattr(cellplane, request.param)
    return kind(base_model) if request.param == "CellEmbeddingPipeline" else kind()


def test_parameters_are_the_constructors(made):
    names = [name for name in inspect.signature(type(made).__init__).parameters if name != "self"]
    assert sorted(made.get_params(deep=False)) == sorted(names)
    for name, value in made.get_params(deep=False).items():
        assert getattr(made, name) is value


def test_a_clone_has_the_same_parameters_and_shares_nothing_learned(made):
    copy = clone(made)
    assert copy is not made
    assert type(copy) is type(made)
    assert copy.get_params(deep=False).keys() == made.get_params(deep=False).keys()
    assert repr(copy) == repr(made)


def test_set_params_returns_itself_and_refuses_what_is_none(made):
    assert made.set_params(pretrain_prefix=None) is made
    with pytest.raises(ValueError, match="no_such_parameter"):
        made.set_params(no_such_parameter=1)


@pytest.mark.parametrize("name", LEARNERS)
def test_nothing_is_answered_before_fit(name, query):
    pipeline = getattr(cellplane, name)()
    with pytest.raises(NotFittedError):
        check_is_fitted(pipeline)
    with pytest.raises(NotFittedError):
        pipeline.predict(query)
    with pytest.raises(NotFittedError):
        pipeline.save("nowhere")


def test_an_embedder_is_ready(base_model):
    check_is_fitted(cellplane.CellEmbeddingPipeline(base_model))


def same(before: AnnData, after: AnnData) -> bool:
    return (
        before.obs.equals(after.obs)
        and before.var.equals(after.var)
        and (before.X != after.X).nnz == 0
        and set(before.obsm) == set(after.obsm)
        and set(before.layers) == set(after.layers)
        and set(before.uns) == set(after.uns)
    )


SHORT: dict[str, Any] = {
    "model": {"width": 16, "n_heads": 2, "n_blocks": 1, "latent_width": 8},
    "optimizer": {"steps": 3, "lr": 1e-2, "warmup_steps": 1},
    "max_cells": 100,
}


@pytest.fixture(params=[("CellTypeAnnotationPipeline", "predict_proba"), ("DenoisingPipeline", "predict")], ids=lambda pair: pair[0])
def learner(request) -> tuple[Callable[[], Any], str]:
    name, ask = request.param
    config = SHORT if name == "CellTypeAnnotationPipeline" else {key: value for key, value in SHORT.items() if key != "model"}
    return lambda: getattr(cellplane, name)(config=config), ask


def test_fit_returns_itself_changes_no_input_and_repeats(learner, training, query):
    make, ask = learner
    before, asked = training.copy(), query.copy()
    first = make()
    assert first.fit(training) is first
    answer = getattr(first, ask)(query)
    assert same(before, training)
    assert same(asked, query)
    np.testing.assert_array_equal(getattr(clone(first).fit(training), ask)(query), answer)
    np.testing.assert_array_equal(getattr(first.fit(training), ask)(query), answer)  # as if it had not been fitted before
    np.testing.assert_array_equal(getattr(pickle.loads(pickle.dumps(first)), ask)(query), answer)
    check_is_fitted(first)
