"""A model's reference panel: nobody's cells unless asked otherwise, and company for cells that are asked about alone."""

from __future__ import annotations

import numpy as np
import pytest

from cellplane.artifact.panel import Panel
from cellplane.data.config import DataKeys
from cellplane.data.sources import cell_table
from cellplane.errors import ConfigError
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.config import PanelConfig
from cellplane.pipelines.embedding import CellEmbeddingPipeline
from cellplane.pipelines.panel import with_panel


def rows_of(panel: Panel) -> set[tuple[tuple[int, float], ...]]:
    edges = list(zip(panel.crow[:-1], panel.crow[1:], strict=True))
    return {tuple(zip(panel.gene[a:b].tolist(), panel.value[a:b].tolist(), strict=True)) for a, b in edges}


@pytest.fixture(scope="module")
def carrying(fitted: CellTypeAnnotationPipeline, training, tmp_path_factory) -> CellTypeAnnotationPipeline:
    """The fitted annotator with a panel of twenty centroids."""
    folder = with_panel(fitted.folder_, training, DataKeys(batch_key="batch"), PanelConfig(cells=20))
    pipeline = CellTypeAnnotationPipeline()
    pipeline.adopt(folder)
    return CellTypeAnnotationPipeline.load(pipeline.save(tmp_path_factory.mktemp("model") / "carrying"))


def test_centroids_are_no_training_cells_and_as_deep_as_these(fitted, training):
    drawn = Panel.of(with_panel(fitted.folder_, training, DataKeys(), PanelConfig(cells=20)).attachments)
    assert 10 <= drawn.n_cells <= 20
    totals = np.add.reduceat(drawn.value, drawn.crow[:-1])
    median = np.median(np.asarray(training.X.sum(1)))
    assert 0.5 * median < np.median(totals) < 2 * median
    assert (drawn.value == np.rint(drawn.value)).all()
    assert (drawn.value > 0).all()


def test_real_cells_are_an_opt_in_that_the_card_tells(fitted, training):
    found = with_panel(fitted.folder_, training, DataKeys(), PanelConfig(cells=20, origin="cells"))
    assert "20 REAL training cells" in found.card
    assert found.card.count("## Reference panel") == 1
    again = with_panel(found, training, DataKeys(), PanelConfig(cells=10))
    assert again.card.count("## Reference panel") == 1
    assert "REAL" not in again.card
    table, _ = cell_table(training, fitted.folder_.vocabulary, DataKeys())
    everybody = rows_of(Panel(table.crow, table.gene, table.value, table.panel, "cells"))
    real, drawn = (rows_of(Panel.of(folder.attachments)) for folder in (found, again))
    assert real <= everybody
    assert not drawn & everybody


def test_a_lone_cell_is_answered_alike_whoever_else_is_asked_about(carrying, query):
    alone, many = query[[0]].copy(), query[:30].copy()
    assert carrying.predict_proba(alone, context="panel").shape == (1, len(carrying.classes_))
    by_one = np.concatenate([carrying.predict_proba(many[[row]].copy(), context="panel") for row in range(3)])
    carrying.config = carrying.config.model_copy(update={"keys": DataKeys(batch_key="cell")})
    many.obs["cell"] = [f"cell {row}" for row in range(many.n_obs)]  # each a sample of its own
    np.testing.assert_allclose(carrying.predict_proba(many, context="panel")[:3], by_one, atol=1e-5)
    carrying.config = carrying.config.model_copy(update={"keys": DataKeys()})
    own = carrying.predict_proba(alone)
    change = np.log(own) - np.log(carrying.predict_proba(alone, context="panel"))  # a sure annotator's shares hardly move, their ratios do
    assert np.abs(change).max() > 1e-3, "company matters"


def test_the_context_is_written_down(carrying, query):
    data = query.copy()
    carrying.predict(data, key_added="cellplm", context="panel")
    assert data.uns["cellplm"]["context"].startswith("panel: sentences of at most")


def test_a_model_without_one_and_one_that_cannot_have_one_say_so(fitted, training, query):
    with pytest.raises(ConfigError, match="carries no reference panel"):
        fitted.predict(query, context="panel")
    with pytest.raises(ConfigError, match="half a sentence"):
        with_panel(fitted.folder_, training, DataKeys(), PanelConfig(cells=51))
    assert with_panel(fitted.folder_, training, DataKeys(), PanelConfig()) is fitted.folder_


def test_embeddings_too(carrying, query):
    embedder = CellEmbeddingPipeline(carrying.folder_)
    one = query[[4]].copy()
    assert np.abs(embedder.predict(one) - embedder.predict(one, context="panel")).max() > 1e-4
