"""An annotator that reads where cells lie learns, is validated and answers in tissue as dense as the one it is asked about."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from scipy.spatial import cKDTree

from cellplane.data.config import DataKeys
from cellplane.errors import DataError
from cellplane.model.config import ModelConfig
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.train.config import OptimizerConfig
from cellplane.wire import sentences_for

CELLS, MOST, NEIGHBOURS = 600, 100, 6
LOCAL = {
    "keys": DataKeys(labels_key="cell_type", spatial_key="spatial").model_dump(),
    "model": ModelConfig(width=16, n_heads=2, n_blocks=0, local_blocks=1, latent="ae", decoder="none", latent_width=8).as_dict(),
    "optimizer": OptimizerConfig(steps=6, lr=5e-3, warmup_steps=1).model_dump(),
    "max_cells": MOST,
}


@pytest.fixture(scope="module")
def tissue():
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 2, CELLS)
    counts = rng.poisson(1 + 4 * (np.arange(20)[None, :] % 2 == kind[:, None])).astype(np.float32)
    data = ad.AnnData(counts)
    data.var_names = [f"ENSG{index:011d}" for index in range(20)]
    data.obs_names = [f"cell{index}" for index in range(CELLS)]
    data.obs["cell_type"] = np.array(["round", "long"])[kind]
    data.obsm["spatial"] = rng.uniform(0, 1000, (CELLS, 2))
    return data


@pytest.fixture(scope="module")
def fitted(tissue):
    return CellTypeAnnotationPipeline(config=LOCAL).fit(tissue)


def reach(places) -> float:
    """Median distance to the sixth neighbour."""
    return float(np.median(cKDTree(places).query(places, NEIGHBOURS + 1)[0][:, -1]))


def test_it_learns_and_is_validated_at_the_density_of_the_tissue(tissue, monkeypatch):
    seen = []
    learn = CellTypeAnnotationPipeline._learn

    def watched(self, network, stores, course):
        seen.extend(stores)
        return learn(self, network, stores, course)

    monkeypatch.setattr(CellTypeAnnotationPipeline, "_learn", watched)
    CellTypeAnnotationPipeline(config=LOCAL).fit(tissue)
    whole = reach(tissue.obsm["spatial"])
    for store in seen:
        assert len(store.sizes) > 1
        dense = [reach(store.read([index]).coordinates.numpy()) for index in range(len(store.sizes)) if store.sizes[index] > 2 * NEIGHBOURS]
        assert float(np.median(dense)) < 1.4 * whole  # dealt at random: 2.4 times


def test_only_validation_cells_are_judged_though_others_are_there(tissue, monkeypatch):
    judged = []
    from cellplane.pipelines import annotation

    begin = annotation.ValidationCells.__init__

    def watched(self, network, batch):
        begin(self, network, batch)
        judged.append((len(self.truth), batch.n_cells))

    monkeypatch.setattr(annotation.ValidationCells, "__init__", watched)
    CellTypeAnnotationPipeline(config=LOCAL).fit(tissue)
    assert judged == [(90, CELLS)]


def test_it_answers_in_patches_and_says_so(tissue, fitted):
    data = tissue.copy()
    fitted.predict(data, key_added="cellplm")
    assert data.uns["cellplm"]["context"].startswith("own: patches of at most 100 neighbouring cells")
    np.testing.assert_array_equal(fitted.predict_proba(data), fitted.predict_proba(data, context="section"))


def test_cells_for_an_endpoint_are_sent_in_the_same_patches(tissue, fitted):
    from cellplane.data.sources import cell_table

    table, _ = cell_table(tissue, fitted.folder_.vocabulary, fitted.config.keys)
    served = {"max_cells": MOST, "task": "annotate", "reads_places": True}
    sent, told = sentences_for(served, table, "own")
    store, recorded = fitted._fitted().store(table, "own")
    assert [part.tolist() for part in sent] == [part.tolist() for part in store.sentences]
    assert told == recorded


@pytest.mark.parametrize("local_blocks", [0, 1])
def test_validation_cells_may_be_whole_tiles_of_the_tissue(tissue, monkeypatch, local_blocks):
    seen = []
    learn = CellTypeAnnotationPipeline._learn

    def watched(self, network, stores, course):
        seen.extend(store.table.coordinates for store in stores)
        return learn(self, network, stores, course)

    monkeypatch.setattr(CellTypeAnnotationPipeline, "_learn", watched)
    told = {**LOCAL, "model": {**LOCAL["model"], "local_blocks": local_blocks}, "validation": "blocks"}
    CellTypeAnnotationPipeline(config=told).fit(tissue)
    training, validation = seen
    nearest = cKDTree(np.concatenate([training, validation])).query(validation, 2)[1][:, 1]
    assert len(training) + len(validation) == CELLS
    assert (nearest >= len(training)).mean() > 0.6  # at random .15 of them


def test_validation_in_blocks_without_places_is_refused(tissue):
    told = {**LOCAL, "keys": {"labels_key": "cell_type"}, "model": {**LOCAL["model"], "local_blocks": 0}, "validation": "blocks"}
    with pytest.raises(DataError, match=r"set keys\.spatial_key"):
        CellTypeAnnotationPipeline(config=told).fit(tissue)
