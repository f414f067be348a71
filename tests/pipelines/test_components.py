"""A network that begins at components says at its first layer what PCA says, of training cells alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from cellplane.data.config import DataKeys
from cellplane.data.sentences import memory_store
from cellplane.data.sources import cell_table
from cellplane.errors import DataError
from cellplane.genes import GeneVocabulary
from cellplane.model.cellplm import new_model
from cellplane.model.config import ModelConfig
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.baselines import log_counts, log_cp10k
from cellplane.pipelines.components import begin_at_components, main_directions
from tests.pipelines.conftest import RECIPE


def network(**changes):
    return new_model(
        ModelConfig(**{"n_genes": 150, "width": 32, "n_heads": 2, "n_blocks": 1, "latent": "ae", "decoder": "none", **changes}), 0
    )


@pytest.fixture(scope="module")
def table(training):
    return cell_table(training, GeneVocabulary.from_ids(training.var_names), DataKeys())[0]


@pytest.mark.parametrize(("total", "scaling"), [(0.0, log_counts), (10_000.0, log_cp10k)])
def test_the_first_layer_sees_whitened_components(table, training, total, scaling):
    begun = network(input_total=total)
    assert begin_at_components(begun, table, 10) == 10
    batch = memory_store(table, 1000).read([0])
    seen = begun.embedder.gene_sum(batch, None).detach().numpy()
    logs = scaling(training.X).toarray()
    expected = PCA(10, svd_solver="full").fit_transform(logs)
    assert np.abs(np.corrcoef(seen[:, :10].T, expected.T)[:10, 10:]).max(axis=1) == pytest.approx(1, abs=1e-3)
    assert seen[:, :10].std(axis=0, ddof=1) == pytest.approx(1, abs=1e-3)
    assert not seen[:, 10:].any()


def test_the_mean_cell_enters_as_nothing(table):
    begun = network()
    begin_at_components(begun, table, 10)
    batch = memory_store(table, 1000).read([0])
    entered = begun.embedder.linear(begun.embedder.gene_sum(batch, None))
    torch.testing.assert_close(entered.mean(0), torch.zeros(32), atol=1e-4, rtol=0)


def test_there_are_no_more_components_than_cells_genes_or_width_allow(table):
    assert begin_at_components(network(), table, 100) == 32
    assert begin_at_components(network(), table.rows(np.arange(8)), 100) == 7
    with pytest.raises(DataError, match="3 training cells"):
        begin_at_components(network(), table.rows(np.arange(2)), 100)


def test_an_annotator_begins_there_when_it_is_asked_to_and_has_no_base(training, query, base_model):
    one = {**RECIPE, "optimizer": {"steps": 1, "lr": 1e-4}, "gene_start": "components", "components": 20}
    begun = CellTypeAnnotationPipeline(config=one).fit(training).folder_.weights["embedder.genes_GD"]
    assert begun[:, 20:].abs().max() < 1e-3 < begun[:, :20].abs().mean()
    same = [CellTypeAnnotationPipeline(base_model, {**one, "gene_start": start}).fit(training) for start in ("components", "random")]
    assert np.array_equal(*(pipeline.predict_proba(query) for pipeline in same)), "a base brings its own gene vectors"


def test_main_directions_are_orthogonal_and_as_long_as_the_cells_are_spread(table, training):
    found = main_directions(table, 10)
    totals = np.asarray(training.X.sum(1))
    logs = np.log1p(training.X.toarray() * np.median(totals[totals > 0]) / np.maximum(totals, 1))
    expected = PCA(10, svd_solver="full").fit(logs)
    lengths = np.linalg.norm(found, axis=0)
    assert lengths == pytest.approx(np.sqrt(expected.explained_variance_), rel=1e-4)
    assert np.abs((found / lengths).T @ expected.components_.T).max(axis=1)[:4] == pytest.approx(1, abs=1e-3)
    np.testing.assert_array_equal(found, main_directions(table, 10))


def test_cells_too_few_or_all_alike_have_no_directions(table):
    assert main_directions(table, 100).shape == (150, 100)
    assert main_directions(table.rows(np.arange(8)), 100).shape == (150, 7)
    assert main_directions(table.rows(np.arange(1)), 100).shape == (150, 0)
    assert main_directions(table.rows(np.zeros(5, dtype=np.int64)), 100).shape == (150, 0)
    silent = replace(table, crow=np.zeros_like(table.crow), gene=table.gene[:0], value=table.value[:0])
    assert main_directions(silent, 100).shape == (150, 0)
