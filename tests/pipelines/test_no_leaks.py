"""Every scored value replaced by noise: the prediction keeps every bit (PROTOCOLS 1).

Imputation's and perturbation's own tests do the same (`test_imputation`, `test_perturbation_leaks`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp

from cellplane.data.config import DataKeys
from cellplane.data.sources import cell_table
from cellplane.genes import GeneVocabulary
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.config import DenoisingConfig
from cellplane.pipelines.denoising import Cells
from cellplane.pipelines.denoising_baselines import split_counts, stored
from cellplane.pipelines.denoising_protocol import Arm, plain_methods, tasks_of
from cellplane.pipelines.denoising_scores import flip
from tests.pipelines.conftest import RECIPE
from tests.pipelines.test_denoising import SHORT


def test_the_labels_of_the_cells_asked_about_change_no_probability(fitted, query):
    expected, noisy, nameless = (query.copy() for _ in range(3))
    noisy.obs["cell_type"] = np.random.default_rng(0).permutation(noisy.obs["cell_type"].to_numpy())
    del nameless.obs["cell_type"]
    found = [fitted.predict_proba(data) for data in (expected, noisy, nameless)]
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_cells_without_a_label_teach_an_annotator_nothing(training):
    some = training.copy()
    some.obs["cell_type"] = some.obs["cell_type"].astype(object)
    hidden = np.arange(some.n_obs) % 5 == 0
    some.obs.loc[some.obs_names[hidden], "cell_type"] = None
    noisy = some.copy()
    counts = noisy.X.toarray()
    counts[hidden] = np.random.default_rng(0).integers(0, 50, counts[hidden].shape)
    noisy.X = sp.csr_matrix(counts)
    recipe = {**RECIPE, "optimizer": {"steps": 3}}
    one, other = (CellTypeAnnotationPipeline(config=recipe).fit(data) for data in (some, noisy))
    assert all(np.array_equal(weight, other.folder_.weights[name]) for name, weight in one.folder_.weights.items())


@pytest.fixture(scope="module")
def recipe() -> DenoisingConfig:
    return DenoisingConfig.model_validate({**SHORT, "optimizer": {"steps": 3}})


@pytest.mark.parametrize("protocol", ["masking", "splitting"])
def test_counts_that_a_denoiser_is_scored_on_change_no_rate_of_any_method(training, recipe, protocol):
    genes = GeneVocabulary.from_ids(dict.fromkeys(map(str, training.var_names)))
    truth, _ = cell_table(training, genes, DataKeys())
    rng = np.random.default_rng(5)
    if protocol == "masking":
        _, entries = flip(truth, 0)
        value = truth.value.copy()
        value[entries] = rng.integers(1, 500, len(entries))
        hidden = np.zeros(len(value), dtype=bool)
        hidden[entries] = True
        noise, thinned = replace(truth, value=value), stored(truth, value, ~hidden)
    else:
        thinned, rest = split_counts(truth, 0)
        noise = replace(rest, value=rng.permutation(rest.value))
    task = next(task for task in tasks_of(truth, 0) if task.protocol == protocol)
    for column in ("crow", "gene", "value"):
        np.testing.assert_array_equal(getattr(task.thinned, column), getattr(thinned, column))
    cells = Cells.of(training, None, recipe)
    answers = []
    for whole in (cells, replace(cells, table=noise)):
        methods = Arm.from_scratch(recipe, whole).methods(thinned, 0) | plain_methods(thinned, 0)
        answers.append({method.name: [shares for _, shares in work()[0]] for method, work in methods.items()})
    for name, pieces in answers[0].items():
        assert all(np.array_equal(one, other) for one, other in zip(pieces, answers[1][name], strict=True)), name
