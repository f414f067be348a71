"""The measurement of predictions measures whole files and the network alone, in the same unit."""

from __future__ import annotations

import pytest

from cellplane.benchmark import predict
from cellplane.benchmark.predict import PredictBenchmark
from cellplane.benchmark.predict_ours import Prediction, make
from cellplane.benchmark.predict_ours import predict as predict_whole
from cellplane.config import find_config, read_yaml
from cellplane.data.sources import read_h5ad
from cellplane.inference import Predictor


def test_both_sides_ask_the_same_network(tmp_path):
    source, weights, out = (str(tmp_path / name) for name in ("in.h5ad", "model", "out.h5ad"))
    make(source, 60, 400, 20)
    prediction = Prediction()
    prediction.model(weights, read_yaml(find_config("tiny", "model")), 400)
    prediction.ready(weights, source)
    assert sum(batch.n_cells for batch in prediction.packs) == 60
    assert prediction.bare(3)["cpu_s_per_cell"] > 0
    found = predict_whole(weights, source, out, 60)
    assert 0 < found["without_loading"] < found["s_per_cell"]
    answer = read_h5ad(tmp_path / "out.h5ad")
    assert answer.obsm["cellplm_cell_type_proba"].shape == (60, len(Predictor.load(tmp_path / "model").folder.classes))


def test_parts_that_are_not_asked_for_are_not_measured(monkeypatch: pytest.MonkeyPatch):
    asked = []
    for name in predict.PARTS:
        monkeypatch.setitem(predict.PARTS, name, lambda plan, name=name: asked.append(name) or iter(()))
    assert not list(PredictBenchmark(only=("memory",)).run())
    assert asked == ["memory"]
