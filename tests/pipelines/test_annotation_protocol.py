"""The protocol asks every cell by splits that hide its label, names each row for what it is, and measures nothing twice."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from cellplane.data.config import SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import write_h5ad
from cellplane.errors import ConfigError, DataError
from cellplane.pipelines.annotation_evaluation import run_annotation_protocol
from cellplane.pipelines.annotation_protocol import Trial, _fitted, _shuffled, arms_of, random_weights, splits_of, study_of
from cellplane.pipelines.config import AnnotationConfig
from cellplane.pipelines.protocol_config import AnnotationProtocol, EvaluatedData
from tests.pipelines.conftest import NOBODY, RECIPE

QUICK = {**RECIPE, "optimizer": {"steps": 12, "lr": 1e-2, "warmup_steps": 2}, "validate_every": 6}
TISSUE = {"path": "none", "keys": {"labels_key": "cell_type", "spatial_key": "spatial"}, "um_per_unit": 2.0, "guard": 10.0}


@pytest.fixture(scope="module")
def tissue():
    torch.set_num_threads(1)
    return simulate(SimulateConfig(n_cells=200, n_genes=60, n_types=3, n_batches=1, spatial=True))


def protocol(**changes) -> AnnotationProtocol:
    plain = {
        "recipe": QUICK,
        "finetune": QUICK,
        "probe": {**QUICK, "transfer": {"learn": "head"}},
        "data": {"tissue": TISSUE},
        "seeds": (0,),
    }
    return AnnotationProtocol.model_validate({**plain, **changes})


def study(data, asked=TISSUE, bases=None):
    return study_of("tissue", EvaluatedData.model_validate(asked), data, bases or {}, 10)


def trial(data, **asked) -> Trial:
    one = study(data, **asked)
    return Trial(one, next(splits_of(one, 0, 0)), 0)


def rows(arms) -> dict[str, str]:
    return {method.name: method.kind for arm in arms for method in arm.methods}


def test_tissue_is_split_at_random_and_in_blocks_and_samples_are_left_out(tissue, cells):
    assert [split.protocol for split in splits_of(study(tissue), 0, 0)] == ["random"] * 5 + ["blocks"] * 5
    dissociated = {"path": "none", "keys": {"labels_key": "cell_type", "batch_key": "batch"}}
    assert [split.protocol for split in splits_of(study(cells, dissociated), 0, 0)] == ["batch"] * 2


def test_seeds_with_fewer_splits_each_take_other_ones_in_turn(tissue, cells):
    few = study(tissue, {**TISSUE, "most_splits": 2})
    numbers = [[(split.protocol, split.number) for split in splits_of(few, turn, turn)] for turn in range(3)]
    assert numbers[0] == [("random", 0), ("random", 1), ("blocks", 0), ("blocks", 1)]
    assert [number for protocol, number in numbers[1] if protocol == "blocks"] == [2, 3]
    assert [number for protocol, number in numbers[2] if protocol == "random"] == [4, 0]
    two = study(cells, {"path": "none", "keys": {"labels_key": "cell_type", "batch_key": "batch"}, "most_splits": 9})
    assert len(list(splits_of(two, 0, 0))) == 2


def test_every_row_says_what_it_is(tissue, base_model):
    config = protocol()
    found = rows(arms_of(config, study(tissue, bases={"mouse": base_model}), "random"))
    assert {name for name, kind in found.items() if kind == "model"} == {
        *("cellplm", "cellplm, own context", "cellplm from mouse", "cellplm from mouse, own context"),
        *("linear probe of mouse", "linear probe of mouse, own context", "cellplm, neighbours in the tissue"),
    }
    assert {name for name, kind in found.items() if kind == "control"} == {
        *("linear probe of random weights (mouse)", "cellplm, one-cell context", "positions only (kNN15)"),
        "cellplm, neighbours in the tissue, shuffled coordinates",
    }
    assert {"tuned baseline", "majority"} < {name for name, kind in found.items() if kind == "baseline"}
    assert "cellplm, own context" not in rows(arms_of(config, study(tissue), "blocks")), "blocks are read alone anyway"


def test_controls_run_on_their_seeds_only_and_can_be_left_out(tissue):
    config = protocol(seeds=(0, 1, 2), control_seeds=(1, 7), controls=("one cell",), local_blocks=0)
    arms = arms_of(config, study(tissue), "random")
    assert {arm.methods[0].name: arm.seeds for arm in arms} == {
        "cellplm": (0, 1, 2),
        "tuned baseline": (0, 1, 2),
        "majority": (0, 1, 2),
        "cellplm, one-cell context": (1,),
    }


def test_labels_of_asked_cells_reach_no_answer(tissue):
    honest = trial(tissue)
    lied = tissue.copy()
    lied.obs["cell_type"] = lied.obs["cell_type"].astype(str)
    lied.obs.iloc[honest.split.test, lied.obs.columns.get_loc("cell_type")] = "type 0"
    other = Trial(study(lied), honest.split, 0)
    for arm in arms_of(protocol(), honest.study, "random"):
        mine, its = arm.work(honest), arm.work(other)
        assert set(mine) == {method.name for method in arm.methods}
        assert all(mine[name].details["answers"] == its[name].details["answers"] for name in mine), arm.methods


def test_the_one_cell_control_reads_no_company(tissue):
    whole = trial(tissue)
    few = replace(whole, split=replace(whole.split, test=whole.split.test[:7]))
    (arm,) = [one for one in arms_of(protocol(), whole.study, "random") if "one-cell" in one.methods[0].name]
    (name,) = (method.name for method in arm.methods)
    confidence = [arm.work(one)[name].details["confidence"] for one in (whole, few)]
    assert confidence[0][:7] == pytest.approx(confidence[1], abs=2e-4)


def test_a_data_set_may_have_smaller_sentences_than_the_recipe(tissue):
    one = trial(tissue, asked={**TISSUE, "max_cells": 33})
    sizes = [_fitted(of, of.train, protocol().recipe, None).folder_.max_cells for of in (one, trial(tissue))]
    assert sizes == [33, QUICK["max_cells"]]


def test_validation_in_blocks_knows_places_where_there_is_tissue_and_is_random_elsewhere(tissue, cells):
    recipe = AnnotationConfig.model_validate({**QUICK, "validation": "blocks"})
    flat = trial(cells, asked={"path": "none", "keys": {"labels_key": "cell_type", "batch_key": "batch"}})
    told = [_fitted(of, of.train, recipe, None).config for of in (trial(tissue), flat)]
    assert [(one.validation, one.keys.spatial_key) for one in told] == [("blocks", "spatial"), ("random", None)]


def test_shuffled_cells_take_one_anothers_places(tissue):
    one = trial(tissue)
    moved = _shuffled(one, one.test)
    before, after = one.test.obsm["spatial"], moved.obsm["spatial"]
    assert not np.array_equal(before, after)
    assert sorted(map(tuple, before.tolist())) == sorted(map(tuple, after.tolist()))
    assert (moved.X != one.test.X).nnz == 0


def test_random_weights_have_the_size_of_the_base_and_nothing_of_its_training(base_model):
    first, again, other = (random_weights(base_model, seed).weights for seed in (5, 5, 6))
    assert all(tensor.shape == base_model.weights[name].shape for name, tensor in first.items())
    assert torch.equal(first["embedder.genes_GD"], again["embedder.genes_GD"])
    for weights in (other, base_model.weights):
        assert not torch.equal(first["embedder.genes_GD"], weights["embedder.genes_GD"])


def test_tissue_without_a_known_unit_needs_a_guard_band():
    keys = {"labels_key": "cell_type", "spatial_key": "spatial"}
    with pytest.raises(ValueError, match="guard"):
        EvaluatedData(path="a.h5ad", keys=keys)
    assert EvaluatedData(path="a.h5ad", keys=keys, um_per_unit=0.5).guard_units == 200
    assert EvaluatedData(path="a.h5ad", keys=keys, guard=7).guard_units == 7


def test_a_data_set_of_one_type_is_refused(tissue):
    with pytest.raises(DataError, match="fewer than two types"):
        study_of("tissue", EvaluatedData.model_validate(TISSUE), tissue[tissue.obs["cell_type"] == "type_0"].copy(), {}, 1000)


@pytest.fixture(scope="module")
def done(tmp_path_factory, cells):
    """A finished run on two samples, what it said, and how to run it again."""
    folder = tmp_path_factory.mktemp("protocol")
    write_h5ad(cells[:, :40].copy(), folder / "cells.h5ad")
    data = {"two": {"path": str(folder / "cells.h5ad"), "keys": {"labels_key": "cell_type", "batch_key": "batch"}}}

    def run(**changes):
        said: list[str] = []
        given = {"data": data, "controls": (), "out": str(folder / "out"), "tracking_uri": NOBODY, **changes}
        return run_annotation_protocol(protocol(**given), said.append), said

    return *run(), run


def test_the_report_has_tables_pictures_and_notes(done):
    finished, said, _ = done
    text = finished.report.markdown.read_text()
    assert "## two, batch" in text
    assert "tuned baseline" in text
    assert finished.report.html.read_text().count("data:image/png") == 3
    assert "families chosen by inner cross-validation" in text
    assert finished.run_id is None
    assert len(said) == 6, "two splits of three arms"
    assert "[1/6] two batch 0 seed 0: cellplm  macro-F1 " in said[0]
    plain = json.loads(finished.report.json.read_text())
    assert (
        plain["entries"][0]["details"]["per_class_f1"].keys() == {f"type_{n}" for n in range(4)}
        or plain["entries"][0]["details"]["per_class_f1"]
    )


def test_an_evaluation_goes_on_behind_what_it_knows(done):
    finished, _, run = done
    again, nothing = run()
    assert nothing == []
    assert again.evaluation.entries == finished.evaluation.entries
    _, two = run(recipe={**QUICK, "optimizer": {"steps": 6, "lr": 1e-2}})
    assert len(two) == 2, "only our own arm has another recipe"
    lines = (finished.report.json.parent / "entries.jsonl").read_text().splitlines()
    assert len(lines) == len(finished.evaluation.entries) + 2
    assert run()[1] == [], "what the first recipe gave is still known"


def test_a_file_that_is_not_there_is_named_before_any_work():
    with pytest.raises(ConfigError, match=r"data\.tissue\.path"):
        run_annotation_protocol(protocol())
    with pytest.raises(ConfigError, match="no data set"):
        run_annotation_protocol(protocol(data={}))
