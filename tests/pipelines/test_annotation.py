"""Cell types are learned from the training cells alone, answered in the caller's order, and survive saving."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cellplane import inference
from cellplane.artifact.folder import load_model, save_model
from cellplane.data.sources import AnnData
from cellplane.errors import ColumnError, ConfigError, CountsNotFoundError, DataError, IntegrityError
from cellplane.pipelines import annotation
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.config import AnnotationConfig
from tests.pipelines.conftest import RECIPE, saved_base

TYPES = ("type_0", "type_1", "type_2", "type_3")
SHORT = {**RECIPE, "optimizer": {"steps": 5}}


def fit_briefly(data: AnnData, **changes: object) -> CellTypeAnnotationPipeline:
    return CellTypeAnnotationPipeline(config={**SHORT, **changes}).fit(data)


def digest(data: AnnData) -> str:
    """sha256 of everything in an AnnData."""
    content = [data.X.data, data.X.indices, data.X.indptr, *(np.asarray(data.obsm[key]) for key in sorted(data.obsm))]
    text = data.obs.to_csv() + data.var.to_csv() + json.dumps(sorted(data.uns)) + json.dumps(sorted(data.layers))
    return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in content) + text.encode()).hexdigest()


def weights_equal(one: CellTypeAnnotationPipeline, other: CellTypeAnnotationPipeline) -> bool:
    assert one.folder_.weights.keys() == other.folder_.weights.keys()
    return all(torch.equal(tensor, other.folder_.weights[name]) for name, tensor in one.folder_.weights.items())


def test_it_learns_types_that_can_be_told_apart(fitted, query):
    scores = fitted.score(query)
    assert scores["macro_f1"] > 0.9
    assert scores["support"] == query.obs["cell_type"].value_counts().to_dict()
    assert fitted.classes_ == TYPES


def test_probabilities_sum_to_one_and_name_the_label(fitted, query):
    proba = fitted.predict_proba(query)
    assert proba.shape == (query.n_obs, len(TYPES))
    np.testing.assert_allclose(proba.sum(1), 1, atol=1e-6)
    assert fitted.predict(query).tolist() == [TYPES[index] for index in proba.argmax(1)]


def test_answers_come_in_the_order_of_the_cells(fitted, query):
    order = np.random.default_rng(0).permutation(query.n_obs)
    shuffled = query[order].copy()
    np.testing.assert_allclose(fitted.predict_proba(shuffled), fitted.predict_proba(query)[order], atol=1e-5)


def test_the_callers_data_is_not_changed(training, query):
    before = digest(training), digest(query)
    pipeline = fit_briefly(training)
    pipeline.predict(query)
    pipeline.predict_proba(query)
    pipeline.score(query)
    assert (digest(training), digest(query)) == before


def test_a_key_adds_the_answer_to_the_data(fitted, query):
    data = query.copy()
    labels = fitted.predict(data, key_added="cellplm")
    assert data.obs["cellplm_cell_type"].tolist() == labels.tolist()
    assert list(data.obs["cellplm_cell_type"].cat.categories) == list(TYPES)
    proba = data.obsm["cellplm_cell_type_proba"]
    np.testing.assert_array_equal(data.obs["cellplm_confidence"], proba.max(1))
    assert data.uns["cellplm"]["count_source"] == "X"
    assert data.uns["cellplm"]["lineage"]["labels_key"] == "cell_type"
    assert set(data.obs) - set(query.obs) == {"cellplm_cell_type", "cellplm_confidence", "cellplm_unknown_score"}


def test_query_cells_and_labels_never_enter(training, query, monkeypatch):
    """Predicting needs no label column, reads none, and fitting reads the training cells alone."""
    read: list[int] = []
    original = annotation.cell_table

    def watched(data: AnnData, *rest: object):
        read.append(data.n_obs)
        return original(data, *rest)

    monkeypatch.setattr(annotation, "cell_table", watched)
    pipeline = fit_briefly(training)
    assert read == [training.n_obs]
    unlabelled, mislabelled = query.copy(), query.copy()
    del unlabelled.obs["cell_type"]
    mislabelled.obs["cell_type"] = "type_0"
    expected = pipeline.predict_proba(query)
    np.testing.assert_array_equal(pipeline.predict_proba(unlabelled), expected)
    np.testing.assert_array_equal(pipeline.predict_proba(mislabelled), expected)


def test_validation_cells_are_no_training_cells_and_choose_the_step(training, monkeypatch):
    stores = []
    original = annotation.memory_store
    monkeypatch.setattr(annotation, "memory_store", lambda table, size: stores.append(table) or original(table, size))
    pipeline = fit_briefly(training, optimizer={"steps": 30}, validate_every=10)
    assert sum(table.n_cells for table in stores) == training.n_obs
    assert 25 <= stores[1].n_cells <= 35
    assert set(np.bincount(stores[1].labels)) <= {7, 8}
    looks = [row for row in pipeline.history_ if "val/macro_f1" in row]
    assert [row["step"] for row in looks] == [10, 20, 30]
    best = max(looks, key=lambda row: (round(row["val/macro_f1"], 6), -row["val/loss"]))
    assert pipeline.folder_.lineage["best_step"] == str(int(best["step"]))


def test_training_ends_when_nothing_gets_better(training):
    pipeline = fit_briefly(training, optimizer={"steps": 100, "lr": 1e-9}, validate_every=1, patience=3)
    assert len(pipeline.history_) < 100


@pytest.mark.parametrize("missing", [None, np.nan, "", "nan", "NA"])
def test_cells_without_a_label_are_left_out(training, missing):
    data = training.copy()
    labels = data.obs["cell_type"].astype(object)
    labels.iloc[:20] = missing
    data.obs["cell_type"] = labels
    pipeline = fit_briefly(data)
    assert pipeline.classes_ == TYPES
    assert pipeline.folder_.lineage["training_cells"] == "180"
    assert weights_equal(pipeline, fit_briefly(data[20:].copy()))
    assert sum(pipeline.score(data)["support"].values()) == 180


def test_labels_never_learned_count_as_wrong(fitted, query):
    data = query.copy()
    labels = data.obs["cell_type"].astype(str)
    labels[labels == "type_3"] = "never seen"
    data.obs["cell_type"] = labels
    scores = fitted.score(data)
    assert scores["per_class_f1"]["never seen"] == 0
    assert scores["accuracy"] <= 1 - (labels == "never seen").mean()


def test_numbers_as_labels_come_back_as_numbers_and_stay_text_in_the_model(training):
    data = training.copy()
    data.obs["cluster"] = data.obs["cell_type"].cat.codes + 5
    pipeline = CellTypeAnnotationPipeline(config=SHORT).fit(data, label_fields=["cluster"])
    assert pipeline.classes_ == (5, 6, 7, 8)
    assert pipeline.folder_.classes == ("5", "6", "7", "8")
    assert set(pipeline.predict(data)) <= {5, 6, 7, 8}
    assert "label_type" not in fit_briefly(training).folder_.lineage


def test_unused_categories_are_no_classes(training):
    assert fit_briefly(training[(training.obs["cell_type"] != "type_1").to_numpy()].copy()).classes_ == ("type_0", "type_2", "type_3")


def test_one_cell_type_is_nothing_to_learn(training):
    with pytest.raises(DataError, match=r"1 cell types \(type_2\)"):
        fit_briefly(training[(training.obs["cell_type"] == "type_2").to_numpy()].copy())


def test_too_few_cells_to_validate_with_are_an_error_that_says_so(training):
    few = training[np.unique(training.obs["cell_type"], return_index=True)[1]].copy()
    with pytest.raises(DataError, match="validation_share"):
        fit_briefly(few)


def test_a_class_of_one_cell_is_learned_from_that_cell(training):
    labels = training.obs["cell_type"].astype(str)
    labels.iloc[0] = "rare"
    data = training.copy()
    data.obs["cell_type"] = labels
    assert "rare" in fit_briefly(data).classes_


def test_an_unknown_label_column_names_the_nearest(training):
    with pytest.raises(ColumnError, match=r"no 'cell_typ' in obs; did you mean 'cell_type'"):
        CellTypeAnnotationPipeline(config=SHORT).fit(training, label_fields=["cell_typ"])


def test_data_without_counts_is_refused_with_a_list_of_places(training):
    data = training.copy()
    data.X = data.X * 0.3
    with pytest.raises(CountsNotFoundError, match=r"raw\.X: absent.*X: non-integer"):
        fit_briefly(data)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(training):
    one = fit_briefly(training)
    first = {name: tensor.clone() for name, tensor in one.folder_.weights.items()}
    assert weights_equal(one, fit_briefly(training))
    one.fit(training)
    assert all(torch.equal(tensor, one.folder_.weights[name]) for name, tensor in first.items())
    assert not weights_equal(one, fit_briefly(training, seed=1))


def test_a_saved_pipeline_predicts_the_same_bits(fitted, query, tmp_path):
    fitted.save(tmp_path / "model")
    loaded = CellTypeAnnotationPipeline.load(tmp_path / "model")
    assert loaded.classes_ == fitted.classes_
    np.testing.assert_array_equal(loaded.predict_proba(query), fitted.predict_proba(query))
    loaded.save(tmp_path / "again")
    again = CellTypeAnnotationPipeline.load(tmp_path / "again")
    assert again.folder_.model_sha256 == loaded.folder_.model_sha256


def test_a_damaged_or_another_model_does_not_load(fitted, base_model, tmp_path):
    path = fitted.save(tmp_path / "model")
    content = bytearray((path / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "weights.safetensors").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"weights\.safetensors"):
        CellTypeAnnotationPipeline.load(path)
    with pytest.raises(DataError, match="not one to annotate with"):
        CellTypeAnnotationPipeline.load(save_model(base_model, tmp_path / "base"))


def test_nothing_can_be_asked_before_fit(query):
    with pytest.raises(DataError, match="call fit"):
        CellTypeAnnotationPipeline().predict(query)
    with pytest.raises(DataError, match="call fit"):
        _ = CellTypeAnnotationPipeline().classes_


def test_configuration_may_be_a_dictionary_as_in_the_released_code(training, query):
    data = training.copy()
    data.obs["celltype"] = data.obs["cell_type"]
    pipeline = CellTypeAnnotationPipeline(config=RECIPE)
    assert pipeline.fit(data, {"optimizer": {"steps": 5}}, label_fields=["celltype"]) is pipeline
    assert (pipeline.config_.optimizer.steps, pipeline.config.optimizer.steps) == (5, RECIPE["optimizer"]["steps"])
    assert pipeline.config.optimizer.lr == RECIPE["optimizer"]["lr"]
    assert pipeline.config_.keys.labels_key == "celltype"
    assert pipeline.predict(query).shape == (query.n_obs,)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optimiser": {"steps": 5}}, "did you mean 'optimizer'"),
        ({"optimizer": {"step": 5}}, "did you mean 'optimizer.steps'"),
        ({"model": {"widht": 8}}, "did you mean 'model.width'"),
        ({"optimizer": {"steps": 0}}, r"optimizer\.steps"),
        ({"model": {"width": 30, "n_heads": 4}}, "multiple"),
    ],
)
def test_a_wrong_configuration_is_refused_at_once(training, config, message):
    with pytest.raises(ConfigError, match=message):
        CellTypeAnnotationPipeline(config=config)
    with pytest.raises(ConfigError, match=message):
        CellTypeAnnotationPipeline().fit(training, config)


def test_one_label_field_at_a_time(training):
    with pytest.raises(ConfigError, match="one label field"):
        CellTypeAnnotationPipeline().fit(training, label_fields=["cell_type", "batch"])
    with pytest.raises(ConfigError, match="no label column"):
        CellTypeAnnotationPipeline(config={"keys": {"labels_key": None}}).fit(training)
    with pytest.raises(ConfigError, match="expected a AnnotationConfig or a dictionary"):
        CellTypeAnnotationPipeline(config=3)  # type: ignore[arg-type]


def test_cells_of_two_samples_never_share_a_context(training, query, monkeypatch):
    pipeline = fit_briefly(training, keys={"batch_key": "batch"})
    sample = query.obs["batch"].to_numpy() == "batch_0"
    together = pipeline.predict_proba(query)
    alone = pipeline.predict_proba(query[sample].copy())
    np.testing.assert_allclose(together[sample], alone, atol=1e-6)
    mixed = query.copy()
    del mixed.obs["batch"]  # a column the query does not have is not asked for
    assert np.abs(pipeline.predict_proba(mixed)[sample] - alone).max() > 1e-6


def test_sentences_hold_at_most_the_models_cells(fitted, cells, monkeypatch):
    sizes = []
    original = inference.packs
    monkeypatch.setattr(inference, "packs", lambda found, budget: sizes.extend(found) or original(found, budget))
    fitted.predict(cells)
    assert sum(sizes) == cells.n_obs
    assert max(sizes) <= RECIPE["max_cells"] < cells.n_obs


def test_it_starts_from_a_model_and_keeps_its_vocabulary(training, query, base_model, tmp_path):
    path = save_model(base_model, tmp_path / "base")
    pipeline = CellTypeAnnotationPipeline(path, config={**SHORT, "optimizer": {"steps": 1, "lr": 1e-12}}).fit(training)
    assert pipeline.folder_.vocabulary == base_model.vocabulary
    for name, tensor in base_model.weights.items():
        if name.startswith(("embedder.", "encoder.")):
            torch.testing.assert_close(pipeline.folder_.weights[name], tensor, rtol=0, atol=1e-6)
    data = query.copy()
    pipeline.predict(data, key_added="cellplm")
    assert data.uns["cellplm"]["lineage"]["base_model"] == CellTypeAnnotationPipeline(path).base.model_sha256


def test_it_starts_from_an_official_checkpoint(training, query, official):
    pipeline = CellTypeAnnotationPipeline(pretrain_prefix="tiny", pretrain_directory=official)
    pipeline.fit(training, {"optimizer": {"steps": 5}, "max_cells": 100}, label_fields=["cell_type"])
    assert pipeline.folder_.config.width == 16
    assert pipeline.folder_.lineage["base_model"] == "official checkpoint tiny"
    assert set(pipeline.predict(query)) <= set(TYPES)


def test_a_prefix_may_also_name_a_model_folder(base_model, tmp_path):
    save_model(base_model, tmp_path / "ours")
    pipeline = CellTypeAnnotationPipeline(pretrain_prefix="ours", pretrain_directory=tmp_path)
    assert pipeline.base.vocabulary == base_model.vocabulary


def test_a_model_is_named_in_one_way_only(official, base_model, tmp_path):
    with pytest.raises(ConfigError, match="belong together"):
        CellTypeAnnotationPipeline(pretrain_prefix="tiny")
    with pytest.raises(ConfigError, match="not both"):
        CellTypeAnnotationPipeline(base_model, pretrain_prefix="tiny", pretrain_directory=official)
    with pytest.raises(DataError, match="no official checkpoint 'other'"):
        CellTypeAnnotationPipeline(pretrain_prefix="other", pretrain_directory=official)
    with pytest.raises(ConfigError, match="no model folder"):
        CellTypeAnnotationPipeline(tmp_path / "nowhere")


def test_progress_is_told_of_every_step(training):
    seen = []
    pipeline = CellTypeAnnotationPipeline(config=SHORT)
    pipeline.fit(training, progress=lambda done, metrics: seen.append((done, metrics["train/loss"])))
    assert [done for done, _ in seen] == [1, 2, 3, 4, 5]
    assert [loss for _, loss in seen] == [row["train/loss"] for row in pipeline.history_]


def test_no_cells_get_no_answers_and_cannot_be_learned_from(fitted, query):
    nobody = query[:0].copy()
    assert fitted.predict(nobody).shape == (0,)
    assert fitted.predict_proba(nobody).shape == (0, len(TYPES))
    with pytest.raises(DataError):
        fit_briefly(nobody)


def test_one_cell_can_be_asked_about(fitted, query):
    assert fitted.predict(query[:1].copy())[0] in TYPES


def test_a_view_is_as_good_as_a_copy(fitted, cells, query):
    np.testing.assert_array_equal(fitted.predict(cells[::3]), fitted.predict(query))


def test_the_default_recipe_is_the_released_one():
    config = AnnotationConfig()
    assert (config.optimizer.lr, config.optimizer.embedder_lr_scale, config.head_dropout) == (5e-3, 0.1, 0.5)
    assert pd.Series(config.model_dump()["optimizer"])["weight_decay"] == 1e-7


def called_unknown(cells):
    """The cells, one type of which is called what strangers are called."""
    other = cells.copy()
    other.obs["cell_type"] = other.obs["cell_type"].astype(str).replace({"type_0": "unknown"})
    return other


def test_a_type_that_strangers_are_called_by_is_refused_where_strangers_are(training):
    pipeline = CellTypeAnnotationPipeline(config={**RECIPE, "unknown": {"reject": True}})
    with pytest.raises(DataError, match=r"obs\['cell_type'\] has a cell type 'unknown'.*rename"):
        pipeline.fit(called_unknown(training))


def test_elsewhere_it_is_learned_with_a_warning_and_nothing_can_be_refused(training, query, caplog):
    pipeline = CellTypeAnnotationPipeline(config=RECIPE).fit(called_unknown(training))
    assert "has a cell type 'unknown'" in caplog.text
    assert "unknown" in pipeline.classes_
    assert (pipeline.predict(query) == "unknown").any()
    with pytest.raises(ConfigError, match="refused cells could not be told from it"):
        pipeline.predict(query, {"unknown": {"reject": True}})
    pipeline.predict(query, {"unknown": {"refusal_rate": 0.1}})


def test_a_base_that_knows_few_of_the_counts_is_warned_of(training, tmp_path, caplog):
    few = load_model(Path(saved_base([str(gene) for gene in training.var_names[:12]], tmp_path / "few")))
    recipe = {**SHORT, "keys": {"labels_key": "cell_type"}}
    CellTypeAnnotationPipeline(few, recipe).fit(training)
    assert "of the counts; the others are left out: new_genes add" in caplog.text
    caplog.clear()
    CellTypeAnnotationPipeline(few, {**recipe, "new_genes": "add"}).fit(training)
    assert "left out" not in caplog.text


def partly(training, hidden: int, **obs):
    """The training cells, the first of whom have no label."""
    data = training.copy()
    data.obs["cell_type"] = [None if row < hidden else label for row, label in enumerate(map(str, training.obs["cell_type"]))]
    return data


def test_cells_without_a_label_may_be_company_in_the_training_sentences(training, query, monkeypatch):
    seen = []
    learn = CellTypeAnnotationPipeline._learn

    def watched(self, network, stores, course):
        seen.append(stores)
        return learn(self, network, stores, course)

    monkeypatch.setattr(CellTypeAnnotationPipeline, "_learn", watched)
    data, told = partly(training, 60), {**RECIPE, "unlabelled": "company", "linear": True, "unknown": {"space": "z"}}
    pipeline = CellTypeAnnotationPipeline(config=told).fit(data)
    ((store, validation),) = seen
    labels = store.table.labels
    assert (labels < 0).sum() == 60
    assert (validation.table.labels >= 0).all()
    assert store.table.n_cells + validation.table.n_cells == training.n_obs
    assert pipeline.folder_.lineage["mode"] == "transductive: 60 cells without a label in the training sentences"
    assert pipeline.folder_.lineage["training_cells"] == str(training.n_obs - 60)
    assert pipeline.score(query)["accuracy"] > 0.5
    assert pipeline.predict(data).shape == (training.n_obs,)
    alone = CellTypeAnnotationPipeline(config=RECIPE).fit(data)
    assert "mode" not in alone.folder_.lineage
    assert (seen[-1][0].table.labels >= 0).all()


def test_labels_that_nobody_has_change_nothing_when_they_are_company(training):
    """What a cell without a label is called reaches no weight: neither the loss nor the validation cells know it."""
    told = {**RECIPE, "optimizer": {"steps": 3, "warmup_steps": 1}, "unlabelled": "company"}
    one = CellTypeAnnotationPipeline(config=told).fit(partly(training, 60)).folder_.weights
    again = partly(training, 60)
    again.obs["truth"] = np.random.default_rng(0).permutation(training.obs["cell_type"].to_numpy())
    other = CellTypeAnnotationPipeline(config=told).fit(again).folder_.weights
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_a_sample_without_any_label_is_no_company(training):
    data = partly(training, 60)
    data.obs["sample"] = ["new" if row < 60 else "old" for row in range(training.n_obs)]
    keys = {"labels_key": "cell_type", "batch_key": "sample"}
    told = {**RECIPE, "optimizer": {"steps": 3, "warmup_steps": 1}, "keys": keys, "gene_start": "components", "components": 8}
    one, other = (CellTypeAnnotationPipeline(config={**told, "unlabelled": mode}).fit(data).folder_ for mode in ("leave_out", "company"))
    assert all(torch.equal(weight, other.weights[name]) for name, weight in one.weights.items())
    assert "mode" not in other.lineage
    assert other.lineage["training_cells"] == str(training.n_obs - 60)


def test_a_probe_reads_unlabelled_cells_as_company_too(training, base_model, query):
    told = {**RECIPE, "optimizer": {"steps": 5, "warmup_steps": 1}, "transfer": {"learn": "head"}, "unlabelled": "company"}
    pipeline = CellTypeAnnotationPipeline(base_model, told).fit(partly(training, 60))
    assert pipeline.folder_.lineage["mode"].startswith("transductive: 60 ")
    assert np.isfinite(pipeline.predict_proba(query)).all()
