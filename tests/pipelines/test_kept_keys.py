"""A saved pipeline that is loaded answers as it did, wherever counts, batches and coordinates lay in the cells that it learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone

from cellplane.artifact.folder import load_model, save_model
from cellplane.batch import PredictConfig, answer_task, predict_file, predict_with, refuse_if_none_answerable
from cellplane.data.config import DataKeys, KnockoutConfig, SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData, read_h5ad, write_h5ad
from cellplane.errors import DataError, FileFormatError
from cellplane.inference import keys_of, reading_keys
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.config import DenoiseEvaluation, EvaluateConfig
from cellplane.pipelines.denoising import DenoisingPipeline
from cellplane.pipelines.embedding import CellEmbeddingPipeline
from cellplane.pipelines.evaluation import evaluate_annotation, run_evaluate, run_evaluate_denoising
from cellplane.pipelines.imputation import SpatialImputationPipeline
from cellplane.pipelines.perturbation import PerturbationPipeline

KEYS = {"layer": "umi", "batch_key": "slide", "spatial_key": "place"}
LOCAL = {"width": 16, "n_heads": 2, "n_blocks": 0, "local_blocks": 1, "latent": "ae", "latent_width": 8, "gene_init_sd": 0.5}
SMALL = {"width": 16, "n_heads": 2, "n_blocks": 1, "latent_width": 8, "decoder_width": 16, "decoder_bottleneck": 8, "gene_init_sd": 0.5}
FIT = {"optimizer": {"steps": 20, "lr": 1e-2, "warmup_steps": 1}, "validate_every": 10, "device": "cpu"}
RECIPES: dict[str, dict[str, Any]] = {
    "annotate": {"model": {**LOCAL, "decoder": "none"}, "max_cells": 40, "keys": {**KEYS, "labels_key": "kind"}},
    "denoise": {"model": {**LOCAL, **SMALL, "n_blocks": 0}, "max_cells": 40, "keys": KEYS, "smoothing": {"share": [0.0]}},
    "impute": {"model": SMALL, "folds": 2, "query_cells": 20, "reference_cells": 20, "neighbours": 0, "ridges": [], "keys": KEYS},
    "perturb": {"model": SMALL, "folds": 0, "control_cells": 16, "perturbed_cells": 16, "keys": {"layer": "umi", "batch_key": "slide"}},
}
LEARNERS: dict[str, type[Any]] = {
    "annotate": CellTypeAnnotationPipeline,
    "denoise": DenoisingPipeline,
    "impute": SpatialImputationPipeline,
    "perturb": PerturbationPipeline,
}
MATTERS = [(task, key) for task in ("annotate", "denoise", "impute") for key in KEYS] + [("perturb", "layer")]


def elsewhere(cells: AnnData) -> AnnData:
    """The cells, everything under names of its own; what lies under the usual names is something else."""
    cells = cells.copy()
    cells.layers["umi"], rng = cells.X.copy(), np.random.default_rng(0)
    cells.X = cells.X[:, rng.permutation(cells.n_vars)]
    cells.obs = cells.obs.rename(columns={"batch": "slide", "cell_type": "kind"})
    if "spatial" in cells.obsm:
        del cells.obsm["spatial"]
        cells.obsm["place"] = rng.uniform(0, 500, (cells.n_obs, 2))  # of all slides, so that these lie upon one another
    return cells


@pytest.fixture(scope="module")
def tissue() -> AnnData:
    """Cells of two slides."""
    torch.set_num_threads(1)
    return elsewhere(simulate(SimulateConfig(n_cells=160, n_genes=40, spatial=True, n_batches=2, mean_counts=300)))


@pytest.fixture(scope="module")
def screen() -> AnnData:
    """Controls and perturbed cells of one type."""
    knockouts = KnockoutConfig(n_genes=3, n_pairs=0, effect_sigma=1.0)
    return elsewhere(simulate(SimulateConfig(n_cells=300, n_genes=40, n_types=1, n_batches=2, knockouts=knockouts, mean_counts=400)))


@pytest.fixture(scope="module")
def learned(tissue: AnnData, screen: AnnData) -> dict[str, Any]:
    """Every pipeline, fitted where things lie; treat as read-only."""
    pipelines = {task: LEARNERS[task](config={**FIT, **RECIPES[task]}) for task in LEARNERS}
    reference = tissue.copy()
    reference.X = reference.layers["umi"].copy()
    pipelines["impute"].fit(tissue[:, :-8].copy(), reference)
    for task in ("annotate", "denoise"):
        pipelines[task].fit(tissue)
    pipelines["perturb"].fit(screen)
    return pipelines


@pytest.fixture(scope="module")
def folders(learned: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("kept")
    return {task: pipeline.save(home / task) for task, pipeline in learned.items()}


@pytest.fixture(scope="module")
def answer(tissue: AnnData, screen: AnnData) -> Callable[[str, Any], np.ndarray[Any, Any]]:
    """The numbers that a pipeline of this task gives for its cells."""
    asked: dict[str, Callable[[Any], Any]] = {
        "annotate": lambda pipeline: pipeline.predict_proba(tissue),
        "denoise": lambda pipeline: pipeline.predict(tissue),
        "impute": lambda pipeline: pipeline.predict(tissue[:, :-8].copy(), {"min_correlation": -1}).X,
        "perturb": lambda pipeline: pipeline.predict(screen).X,
        "embed": lambda pipeline: pipeline.predict(tissue),
    }
    return lambda task, pipeline: np.asarray(asked[task](pipeline))


@pytest.mark.parametrize("task", LEARNERS)
def test_a_loaded_pipeline_answers_bit_for_bit_as_the_one_that_was_saved(learned, folders, answer, task):
    np.testing.assert_array_equal(answer(task, LEARNERS[task].load(folders[task])), answer(task, learned[task]))


@pytest.mark.parametrize(("task", "key"), MATTERS)
def test_every_key_that_was_kept_matters_to_the_answer(folders, answer, task, key):
    pipeline = LEARNERS[task].load(folders[task])
    expected = answer(task, pipeline)
    assert not np.array_equal(answer(task, pipeline.set_params(config={"keys": {key: None}})), expected)


@pytest.mark.parametrize("task", LEARNERS)
def test_the_folder_itself_says_how_its_cells_lay_without_a_job(learned, folders, task):
    kept = keys_of(load_model(folders[task]).lineage)
    assert kept == learned[task].config.keys
    assert LEARNERS[task].load(folders[task]).config.keys == kept
    assert clone(LEARNERS[task].load(folders[task])).config.keys == kept


def test_the_label_column_of_one_fit_is_kept_too(tissue, tmp_path):
    recipe = {**FIT, **RECIPES["annotate"], "keys": KEYS}
    pipeline = CellTypeAnnotationPipeline(config=recipe).fit(tissue, label_fields=["kind"])
    assert CellTypeAnnotationPipeline.load(pipeline.save(tmp_path / "model")).score(tissue) == pipeline.score(tissue)


@pytest.mark.parametrize("task", ["annotate", "denoise"])
def test_a_folder_of_an_early_version_is_read_by_default(folders, answer, tissue, tmp_path, task):
    folder = load_model(folders[task])
    early = {name: value for name, value in folder.lineage.items() if name != "keys"}
    pipeline = LEARNERS[task].load(save_model(replace(folder, lineage=early), tmp_path / "early"))
    assert pipeline.config.keys == LEARNERS[task]().config.keys
    cells = tissue.copy()
    cells.X = cells.layers["umi"].copy()
    told = LEARNERS[task].load(folders[task]).set_params(config={"keys": dict.fromkeys(KEYS)})
    np.testing.assert_array_equal(pipeline.predict(cells), told.predict(cells))


def test_keys_that_nobody_can_read_are_an_error(folders, tmp_path):
    folder = load_model(folders["annotate"])
    for broken in ("{", '{"no_such_key": 1}'):
        path = save_model(replace(folder, lineage={**folder.lineage, "keys": broken}), tmp_path / "broken")
        with pytest.raises(FileFormatError, match="how its cells were read"):
            CellTypeAnnotationPipeline.load(path)


def test_an_embedder_reads_as_the_model_learned_and_keeps_what_it_was_told(folders, learned, answer, base_model, tissue, tmp_path):
    told = CellEmbeddingPipeline(folders["annotate"], DataKeys(**KEYS))
    np.testing.assert_array_equal(answer("embed", CellEmbeddingPipeline(folders["annotate"])), answer("embed", told))
    by_slide = CellEmbeddingPipeline(folders["annotate"], {"spatial_key": None})
    assert not np.array_equal(answer("embed", by_slide), answer("embed", told))
    again = CellEmbeddingPipeline.load(by_slide.save(tmp_path / "model"))
    np.testing.assert_array_equal(answer("embed", again), answer("embed", by_slide))
    assert keys_of(base_model.lineage) is None


def test_zero_shot_a_denoiser_reads_as_it_learned(folders, learned, answer):
    np.testing.assert_array_equal(answer("denoise", DenoisingPipeline(folders["denoise"])), answer("denoise", learned["denoise"]))
    other = DenoisingPipeline(folders["denoise"], {"keys": {"layer": "umi"}})
    assert not np.array_equal(answer("denoise", other), answer("denoise", learned["denoise"]))


@pytest.mark.parametrize("task", ["annotate", "denoise", "embed"])
def test_files_are_answered_as_the_loaded_pipeline_answers_cells(folders, learned, answer, tissue, tmp_path, task):
    write_h5ad(tissue, tmp_path / "cells.h5ad")
    model = folders["annotate" if task == "embed" else task]
    config = PredictConfig(task=task, model=str(model), inputs=(str(tmp_path / "cells.h5ad"),), out=str(tmp_path / "out"))
    refuse_if_none_answerable(config)
    report = predict_with(config, lambda tasks: [answer_task(one) for one in tasks])
    assert not report.failed
    found = read_h5ad(tmp_path / "out" / "cells.h5ad")
    pipeline = CellEmbeddingPipeline(model) if task == "embed" else learned[task]
    rows = {"annotate": "cellplm_cell_type_proba", "embed": "X_cellplm"}
    given = found.layers["cellplm_denoised"] if task == "denoise" else found.obsm[rows[task]]
    np.testing.assert_allclose(given, answer(task, pipeline), rtol=1e-4, atol=1e-5)
    predict_file(task, model, DataKeys(layer="umi"), (tmp_path / "cells.h5ad", tmp_path / "other.h5ad"))
    other = read_h5ad(tmp_path / "other.h5ad")
    assert not np.allclose(other.layers["cellplm_denoised"] if task == "denoise" else other.obsm[rows[task]], given, rtol=1e-3, atol=1e-4)


def test_a_key_that_is_named_goes_over_the_models_own_and_the_others_stay():
    own = DataKeys(**KEYS, recover_counts=True)
    assert reading_keys(own, DataKeys()) == own
    assert reading_keys(own, DataKeys(batch_key="donor")) == own.model_copy(update={"batch_key": "donor"})
    assert reading_keys(own, DataKeys(batch_key=None)).batch_key is None
    assert reading_keys(None, DataKeys(batch_key="donor")) == DataKeys(batch_key="donor")


def test_an_evaluation_reads_its_cells_as_the_model_does(folders, learned, tissue, tmp_path):
    write_h5ad(tissue, tmp_path / "cells.h5ad")
    cells = str(tmp_path / "cells.h5ad")
    files = {"train": cells, "test": cells, "out": str(tmp_path / "a")}
    scores, _ = run_evaluate(EvaluateConfig(model=str(folders["annotate"]), keys=DataKeys(labels_key="kind"), **files))
    assert scores["cellplm"] == evaluate_annotation(learned["annotate"], tissue, tissue, 0)["cellplm"]
    denoised, _ = run_evaluate_denoising(DenoiseEvaluation(model=str(folders["denoise"]), data=cells, out=str(tmp_path / "d")))
    expected = learned["denoise"].score_as_it_is(tissue)
    assert denoised["cellplm"] == pytest.approx(expected["cellplm"])


def test_counts_that_the_model_learned_from_must_be_there_to_be_read(folders, tissue):
    cells = tissue.copy()
    del cells.layers["umi"]
    with pytest.raises(DataError, match="umi"):
        CellTypeAnnotationPipeline.load(folders["annotate"]).predict(cells)
