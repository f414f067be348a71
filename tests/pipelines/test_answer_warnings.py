"""What an answer rests on too little of, or what a model could not tell apart, is told with the answer (PROTOCOLS 4 and 5)."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from cellplane.artifact.folder import ModelFolder, save_model
from cellplane.batch import predict_file
from cellplane.data.config import DataKeys, SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData, read_h5ad, write_h5ad
from cellplane.genes import FEW_SHARED_GENES, GeneVocabulary
from cellplane.model.cellplm import new_model
from cellplane.model.config import ModelConfig
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.denoising import DenoisingPipeline
from cellplane.pipelines.embedding import CellEmbeddingPipeline

GENES = 240
WIDTHS = {"width": 8, "n_heads": 2, "latent_width": 4, "cluster_width": 4, "decoder_width": 4, "decoder_bottleneck": 3}


@pytest.fixture(scope="module")
def cells() -> AnnData:
    return simulate(SimulateConfig(n_cells=40, n_genes=GENES, n_types=2))


def knowing(genes: list[str]) -> ModelFolder:
    """An untrained model of these genes."""
    config = ModelConfig(n_genes=len(genes), n_blocks=1, n_clusters=2, **WIDTHS)
    vocabulary = GeneVocabulary.from_ids(genes)
    return ModelFolder(config=config, weights=new_model(config, 0).state_dict(), vocabulary=vocabulary, task="pretrain", max_cells=64)


def beside(cells: AnnData, share: float) -> AnnData:
    """The cells with a further gene that no model knows, holding the rest of the counts beside this share."""
    more = sp.csr_matrix(np.rint(np.asarray(cells.X.sum(1)) * (1 / share - 1)).astype(np.float32))
    wide = ad.AnnData(X=sp.hstack([cells.X, more], format="csr"), obs=cells.obs.copy())
    wide.var_names = [*cells.var_names, "NOBODYS"]
    return wide


def said_of(cells: AnnData, model: ModelFolder) -> list[str]:
    cells = cells.copy()
    CellEmbeddingPipeline(model).predict(cells, key_added="cellplm")
    return list(cells.uns["cellplm"].get("warnings", []))


def test_a_panel_of_few_of_the_models_genes_is_told_with_the_answer_and_in_the_log(cells, caplog):
    model = knowing([*cells.var_names, "MORE"])
    (said,) = said_of(cells[:, : FEW_SHARED_GENES - 1].copy(), model)
    assert said == "199 of the model's 241 genes were measured here: answers rest on few genes"
    assert said in caplog.messages
    caplog.clear()
    assert said_of(cells[:, :FEW_SHARED_GENES].copy(), model) == []
    assert not caplog.messages


def test_all_genes_that_a_model_was_trained_on_are_enough(cells):
    panel = cells[:, :30].copy()
    assert said_of(panel, knowing(list(panel.var_names))) == []
    assert said_of(beside(panel, 0.05), knowing(list(panel.var_names))) == []


def test_a_small_share_of_the_counts_in_known_genes_is_told(cells):
    model = knowing([*cells.var_names, "MORE"])
    (said,) = said_of(beside(cells, 0.1), model)
    assert said == "genes that the model knows carry 10.0% of the counts: answers rest on a small part of what was measured"
    assert said_of(beside(cells, 0.25), model) == []
    assert len(said_of(beside(cells[:, :50].copy(), 0.1), model)) == 2


def test_cells_without_counts_say_nothing_of_shares(cells):
    empty = cells.copy()
    empty.X = sp.csr_matrix(empty.shape, dtype=np.float32)
    assert said_of(empty, knowing([*cells.var_names, "MORE"])) == []


FIT = {"optimizer": {"steps": 1, "warmup_steps": 0}, "validate_every": 1, "max_cells": 40}


@pytest.mark.parametrize("task", ["annotate", "denoise"])
def test_what_is_fitted_tells_it_and_the_file_keeps_it(task, cells, tmp_path):
    learners = {"annotate": CellTypeAnnotationPipeline, "denoise": DenoisingPipeline}
    smoothing = {} if task == "annotate" else {"smoothing": {"share": [0.0]}}
    pipeline = learners[task](config={**FIT, **smoothing}).fit(cells)
    pipeline.predict(whole := cells.copy(), key_added="cellplm")
    assert "warnings" not in whole.uns["cellplm"]
    pipeline.predict(part := cells[:, :20].copy(), key_added="cellplm")
    write_h5ad(part, tmp_path / "part.h5ad")
    part.write_h5ad(tmp_path / "plain.h5ad")
    for name in ("part", "plain"):
        kept = list(read_h5ad(tmp_path / f"{name}.h5ad").uns["cellplm"]["warnings"])
        assert kept == list(part.uns["cellplm"]["warnings"])
        assert kept == [f"20 of the model's {GENES} genes were measured here: answers rest on few genes"]


def test_a_file_that_is_answered_a_part_at_a_time_is_told_the_same(cells, tmp_path):
    wide = beside(cells[:, :50].copy(), 0.1)
    write_h5ad(wide, tmp_path / "in.h5ad")
    model = knowing([*cells.var_names, "MORE"])
    predict_file("embed", save_model(model, tmp_path / "model"), DataKeys(), (tmp_path / "in.h5ad", tmp_path / "out.h5ad"))
    assert list(read_h5ad(tmp_path / "out.h5ad").uns["cellplm"]["warnings"]) == said_of(wide, model)


def test_the_share_of_the_counts_is_recorded(cells):
    wide = beside(cells, 0.25)
    CellEmbeddingPipeline(knowing(list(cells.var_names))).predict(wide, key_added="cellplm")
    assert wide.uns["cellplm"]["count_share"] == pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize("task", ["annotate", "denoise"])
def test_a_model_fitted_where_type_and_batch_coincide_carries_that(task, cells, tmp_path):
    coinciding = cells.copy()
    coinciding.obs["batch"] = coinciding.obs["cell_type"].astype(str)
    learner = {"annotate": CellTypeAnnotationPipeline, "denoise": DenoisingPipeline}[task]
    smoothing = {} if task == "annotate" else {"smoothing": {"share": [0.0]}}
    pipeline = learner(config={**FIT, **smoothing, "keys": {"batch_key": "batch", "labels_key": "cell_type"}}).fit(coinciding)
    learner.load(pipeline.save(tmp_path / "model")).predict(answered := cells.copy(), key_added="cellplm")
    assert "2 of 2 cell types lie in one of 2 batches alone" in answered.uns["cellplm"]["lineage"]["warnings"]
    assert "warnings" not in pipeline.fit(cells).folder_.lineage
