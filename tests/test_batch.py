"""Files are answered once each, whole or not at all, as the same model answers in this process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from cellplane.artifact.folder import ModelFolder, save_model
from cellplane.batch import ANSWERS, PredictConfig, answer_task, check_predict, predict_file, predict_files, predict_with
from cellplane.data.answer_tables import read_answers
from cellplane.data.config import DataKeys, SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData, read_h5ad, write_h5ad
from cellplane.errors import ConfigError, DataError, ServiceError
from cellplane.genes import GeneVocabulary
from cellplane.model.cellplm import new_model
from cellplane.model.config import ModelConfig
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.denoising import DenoisingPipeline
from cellplane.pipelines.embedding import CellEmbeddingPipeline
from tests.tiny import TINY, tiny_folder

KEYS = DataKeys(batch_key="batch")


def make_model(path: Path, seed: int) -> Path:
    """An annotator of random weights."""
    genes = [f"GENE{gene:04d}" for gene in range(1, 41)]
    config = ModelConfig(
        n_genes=40, width=16, n_heads=2, n_blocks=1, latent="ae", latent_width=8, decoder="none", n_classes=3, gene_init_sd=0.5
    )
    vocabulary = GeneVocabulary.from_ids(genes)
    weights = new_model(config, seed).state_dict()
    folder = ModelFolder(config=config, weights=weights, vocabulary=vocabulary, task="annotate", max_cells=16, classes=("a", "b", "c"))
    return save_model(folder, path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("batch") / "model", 0)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files of cells with a damaged one between them."""
    folder = tmp_path_factory.mktemp("inputs")
    for number, name in enumerate(("one", "two")):
        write_h5ad(simulate(SimulateConfig(n_cells=50 + 10 * number, n_genes=40, n_types=3, seed=number)), folder / f"{name}.h5ad")
    (folder / "broken.h5ad").write_bytes((folder / "one.h5ad").read_bytes()[:9000])
    return [folder / "one.h5ad", folder / "broken.h5ad", folder / "two.h5ad"]


def config_for(model: Path, inputs: list[Path], out: Path, changes: Mapping[str, object] | None = None) -> PredictConfig:
    plain = {"model": str(model), "inputs": [str(path) for path in inputs], "out": str(out), "keys": KEYS.model_dump()}
    return PredictConfig.model_validate({**plain, **(changes or {})})


def expected_of(model: Path, path: Path) -> AnnData:
    """The file with the answer of the estimator in it."""
    torch.set_num_threads(1)
    data = read_h5ad(path)
    pipeline = CellTypeAnnotationPipeline.load(model)
    pipeline.config = pipeline.config.model_copy(update={"keys": KEYS})
    pipeline.predict(data, key_added="cellplm")
    return data


@pytest.mark.cluster
def test_files_are_annotated_in_tasks_and_a_broken_one_is_named(ray_cluster, model, inputs, tmp_path):
    report = predict_files(config_for(model, inputs, tmp_path / "out"))
    assert report.written == (tmp_path / "out" / "one.h5ad", tmp_path / "out" / "two.h5ad")
    assert report.cells == 110
    assert list(report.failed) == [str(inputs[1])]
    assert "broken.h5ad" in report.failed[str(inputs[1])]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one.h5ad", "two.h5ad"]
    for path in (inputs[0], inputs[2]):
        found, expected = read_h5ad(tmp_path / "out" / path.name), expected_of(model, path)
        assert found.obs_names.tolist() == expected.obs_names.tolist()
        assert found.obs["cellplm_cell_type"].tolist() == expected.obs["cellplm_cell_type"].tolist()
        np.testing.assert_allclose(found.obsm["cellplm_cell_type_proba"], expected.obsm["cellplm_cell_type_proba"], atol=1e-6)
        np.testing.assert_array_equal(found.X.toarray(), expected.X.toarray())
        assert found.uns["cellplm"]["model_sha256"] == expected.uns["cellplm"]["model_sha256"]


@pytest.mark.cluster
def test_a_second_run_does_only_what_is_missing(ray_cluster, model, inputs, tmp_path):
    good = [inputs[0], inputs[2]]
    config = config_for(model, good, tmp_path / "out")
    predict_files(config_for(model, good[:1], tmp_path / "out"))
    before = (tmp_path / "out" / "one.h5ad").stat().st_mtime_ns
    report = predict_files(config)
    assert (report.written, report.reused) == ((tmp_path / "out" / "two.h5ad",), (tmp_path / "out" / "one.h5ad",))
    assert (tmp_path / "out" / "one.h5ad").stat().st_mtime_ns == before
    assert predict_files(config).reused == (tmp_path / "out" / "one.h5ad", tmp_path / "out" / "two.h5ad")


@pytest.mark.cluster
def test_cells_are_embedded_in_tasks(ray_cluster, model, inputs, tmp_path):
    predict_files(config_for(model, inputs[:1], tmp_path, {"task": "embed"}))
    latent = CellEmbeddingPipeline(model, KEYS).predict(read_h5ad(inputs[0]))
    np.testing.assert_allclose(read_h5ad(tmp_path / "one.h5ad").obsm["X_cellplm"], latent, atol=1e-5)


@pytest.mark.cluster
@pytest.mark.parametrize("change", ["model", "task", "input", "damage"])
def test_an_answer_of_another_kind_is_not_taken_for_done(ray_cluster, model, inputs, tmp_path, change):
    out = tmp_path / "out"
    out.mkdir()
    source = tmp_path / "one.h5ad"
    source.write_bytes(inputs[0].read_bytes())
    predict_file("annotate", model, KEYS, (source, out / "one.h5ad"))
    other = {"model": str(make_model(tmp_path / "other", 1))} if change == "model" else {"task": "embed"} if change == "task" else {}
    if change == "input":
        later = (out / "one.h5ad").stat().st_mtime_ns + 1_000_000_000
        os.utime(source, ns=(later, later))
    if change == "damage":
        (out / "one.h5ad").write_bytes(b"half")
    report = predict_files(config_for(model, [source], out, other))
    assert [path.name for path in report.written] == ["one.h5ad"]
    assert not report.reused


@pytest.mark.parametrize("context", ["own", "self", "section"])
def test_the_context_that_is_asked_for_is_the_estimators(model, tmp_path, context):
    write_h5ad(simulate(SimulateConfig(n_cells=50, n_genes=40, n_types=3, spatial=True)), tmp_path / "in.h5ad")
    keys = KEYS.model_copy(update={"spatial_key": "spatial"})
    predict_file("annotate", model, keys, (tmp_path / "in.h5ad", tmp_path / "out.h5ad"), context)
    pipeline = CellTypeAnnotationPipeline.load(model)
    pipeline.config = pipeline.config.model_copy(update={"keys": keys})
    found = read_h5ad(tmp_path / "out.h5ad")
    assert found.uns["cellplm"]["context"].startswith(context)
    expected = pipeline.predict_proba(read_h5ad(tmp_path / "in.h5ad"), context=context)
    np.testing.assert_allclose(found.obsm["cellplm_cell_type_proba"], expected, atol=1e-6)


@pytest.mark.parametrize("learned", [True, False], ids=["a model that tells strangers", "one that does not"])
def test_a_file_gets_what_the_estimator_writes_and_nothing_of_an_earlier_model_stays(model, tmp_path, learned):
    cells = simulate(SimulateConfig(n_cells=80, n_genes=40, n_types=3))
    if learned:
        config = {"model": {"width": 16, "n_heads": 2, "n_blocks": 1}, "optimizer": {"steps": 3}, "keys": {"labels_key": "cell_type"}}
        model = CellTypeAnnotationPipeline(config=config).fit(cells).save(tmp_path / "learned")
    cells.X = cells.X.multiply(np.arange(80)[:, None] > 0).tocsr()  # the first one shows the model nothing
    cells.obs["cellplm_unknown_score"], cells.obs["cellplm_flag"] = 7.0, "old"
    write_h5ad(cells, tmp_path / "in.h5ad")
    predict_file("annotate", model, KEYS, (tmp_path / "in.h5ad", tmp_path / "out.h5ad"))
    found, expected = read_h5ad(tmp_path / "out.h5ad"), expected_of(model, tmp_path / "in.h5ad")
    assert sorted(found.obs.columns) == sorted(expected.obs.columns)
    assert ("cellplm_unknown_score" in found.obs) == learned
    pd.testing.assert_frame_equal(found.obs[expected.obs.columns], expected.obs, check_dtype=False, check_categorical=False, atol=1e-5)
    assert found.uns["cellplm"].keys() == expected.uns["cellplm"].keys()


@pytest.mark.parametrize("task", ["annotate", "embed", "denoise"])
def test_parquet_holds_the_answers_of_the_h5ad(model, tmp_path, task):
    cells = simulate(SimulateConfig(n_cells=80, n_genes=40, n_types=3))
    cells.X = cells.X.multiply(np.arange(80)[:, None] > 0).tocsr()  # the first one shows the model nothing
    write_h5ad(cells, tmp_path / "in.h5ad")
    folder = DenoisingPipeline(config={"optimizer": {"steps": 2}}).fit(cells).save(tmp_path / "denoiser") if task == "denoise" else model
    for target in ("out.h5ad", "out.parquet"):
        assert predict_file(task, folder, KEYS, (tmp_path / "in.h5ad", tmp_path / target)) == 80
    whole, table = read_h5ad(tmp_path / "out.h5ad"), read_answers(tmp_path / "out.parquet")
    columns = [name for name in whole.obs if name.startswith("cellplm_")]
    assert list(table.obs.columns) == columns
    found, expected = (
        frame.astype(str).replace("None", "nan") for frame in (table.obs, whole.obs[columns])
    )  # None and NaN are both missing
    pd.testing.assert_frame_equal(found, expected)
    place, name = ANSWERS[task]
    np.testing.assert_array_equal(getattr(table, place)[name], getattr(whole, place)[name])
    assert table.uns["cellplm"].keys() == whole.uns["cellplm"].keys()
    assert list(table.var_names) == (list(whole.var_names) if task == "denoise" else [])


@pytest.mark.cluster
def test_parquet_answers_are_done_once_too(ray_cluster, model, inputs, tmp_path):
    good = [inputs[0], inputs[2]]
    config = config_for(model, good, tmp_path / "out", {"format": "parquet"})
    assert [path.name for path in predict_files(config).written] == ["one.parquet", "two.parquet"]
    assert len(predict_files(config).reused) == 2
    assert len(predict_files(config_for(model, good, tmp_path / "out", {"format": "parquet", "task": "embed"})).written) == 2
    one = config_for(model, good[:1], tmp_path / "answers" / "one.parquet")
    assert predict_files(one).written == (tmp_path / "answers" / "one.parquet",)
    assert predict_files(one).reused == (tmp_path / "answers" / "one.parquet",)


def test_one_file_cannot_be_the_answer_to_several(model, inputs, tmp_path):
    with pytest.raises(ConfigError, match="2 inputs"):
        check_predict(config_for(model, [inputs[0], inputs[2]], tmp_path / "out.parquet"))


def test_counts_in_raw_alone_are_denoised_for_the_genes_of_the_file(tmp_path):
    base = simulate(SimulateConfig(n_cells=40, n_genes=40, n_types=3))
    folder = DenoisingPipeline(config={"optimizer": {"steps": 2}}).fit(base).save(tmp_path / "denoiser")
    cells = AnnData(X=None, obs=base.obs.copy(), var=base.var.iloc[::-2].copy())
    cells.raw = base
    write_h5ad(cells, tmp_path / "in.h5ad")
    assert predict_file("denoise", folder, DataKeys(), (tmp_path / "in.h5ad", tmp_path / "out.h5ad")) == 40
    rates = read_h5ad(tmp_path / "out.h5ad").layers["cellplm_denoised"]
    predict_file("denoise", folder, DataKeys(), (_whole(base, tmp_path), tmp_path / "all.h5ad"))
    np.testing.assert_allclose(rates, read_h5ad(tmp_path / "all.h5ad").layers["cellplm_denoised"][:, ::-2], rtol=1e-4)


def _whole(cells: AnnData, folder: Path) -> Path:
    write_h5ad(cells, folder / "whole.h5ad")
    return folder / "whole.h5ad"


def test_a_file_of_an_old_version_is_answered_in_the_present_form(model, tmp_path):
    adata = simulate(SimulateConfig(n_cells=30, n_genes=40, n_types=3))
    with h5py.File(tmp_path / "old.h5ad", "w") as file:  # as anndata 0.6 wrote: tables of compound type, no encodings
        file["X"] = adata.X.toarray()
        for name, names in (("obs", adata.obs_names), ("var", adata.var_names)):
            file[name] = np.array(list(zip(names, range(len(names)), strict=True)), [("index", h5py.string_dtype()), ("n", "i4")])
    assert predict_file("embed", model, KEYS, (tmp_path / "old.h5ad", tmp_path / "out.h5ad")) == 30
    latent = CellEmbeddingPipeline(model, KEYS).predict(adata)
    found = read_h5ad(tmp_path / "out.h5ad")
    assert found.obsm["X_cellplm"].shape == latent.shape
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.h5ad", "out.h5ad"]


def test_the_input_is_never_overwritten(model, inputs, tmp_path):
    with pytest.raises(ConfigError, match="would overwrite it"):
        check_predict(config_for(model, inputs[:1], inputs[0].parent))


def test_what_is_missing_is_named_before_any_work(model, inputs, tmp_path):
    for name in ("model", "inputs", "out"):
        empty: object = [] if name == "inputs" else ""
        with pytest.raises(ConfigError, match=f"{name} is empty"):
            check_predict(config_for(model, inputs, tmp_path, {name: empty}))
    with pytest.raises(DataError, match=r"nowhere\.h5ad: no such file"):
        check_predict(config_for(model, [tmp_path / "nowhere.h5ad"], tmp_path))
    with pytest.raises(ConfigError, match="same file name"):
        check_predict(config_for(model, [inputs[0], tmp_path / "one.h5ad"], tmp_path))


def test_a_model_that_cannot_do_the_task_is_refused_before_any_work(inputs, tmp_path):
    path = save_model(tiny_folder(TINY), tmp_path / "pretrained")  # it embeds, it does not annotate
    with pytest.raises(ConfigError, match="cannot annotate, it can embed"):
        check_predict(PredictConfig(model=str(path), inputs=tuple(map(str, inputs)), out=str(tmp_path / "out")))


def test_without_ray_the_error_says_how_to_start_it(model, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(ServiceError, match="cellplane up"):
        predict_files(config_for(model, inputs[:1], tmp_path))


def test_where_no_file_can_be_answered_no_folder_is_left(model, tmp_path):
    (tmp_path / "broken.h5ad").write_bytes(b"nothing")
    config = config_for(model, [tmp_path / "broken.h5ad"], tmp_path / "a" / "b")
    report = predict_with(config, lambda tasks: map(answer_task, tasks))
    assert "broken.h5ad" in str(report.failed)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.h5ad"]
