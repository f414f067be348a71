"""Each type is truly never seen when it is the stranger, and is reported by itself beside the simple scores."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cellplane.errors import ConfigError, DataError
from cellplane.pipelines import unknown_evaluation
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.config import AnnotationConfig
from cellplane.pipelines.unknown_evaluation import UnknownEvaluation, evaluate_unknown
from tests.pipelines.conftest import RECIPE

BRIEF = AnnotationConfig.model_validate({**RECIPE, "optimizer": {"steps": 40, "lr": 1e-2}})
SCORES = {"cellplm", "max_probability", "entropy", "knn_distance", "pca_distance"}


@pytest.fixture(scope="module")
def found(cells):
    """Two types left out, one after the other."""
    return evaluate_unknown(cells, BRIEF, UnknownEvaluation(types=("type_0", "type_2")))


def test_every_score_is_there_for_every_type_and_context_and_can_be_written(found):
    assert json.loads(json.dumps(found)) == found
    assert set(found["types"]) == {"type_0", "type_2"}
    for row in found["types"].values():
        assert set(row["contexts"]) == {"own", "self"}
        for scored in row["contexts"].values():
            assert set(scored["auroc"]) == set(scored["fpr_at_95_tpr"]) == SCORES
            assert all(0 <= value <= 1 for value in (*scored["auroc"].values(), *scored["fpr_at_95_tpr"].values()))
        assert row["has_sister"] == (row["nearest_correlation"] >= 0.95)


def test_types_that_differ_are_told_as_strangers(found):
    assert np.mean([row["contexts"]["own"]["auroc"]["cellplm"] for row in found["types"].values()]) > 0.7


def test_the_summary_is_the_mean_of_its_rows(found):
    rows = [row["contexts"]["self"]["auroc"]["entropy"] for row in found["types"].values()]
    assert found["summary"]["self"]["mean_auroc"]["entropy"] == pytest.approx(np.mean(rows), abs=1e-3)
    assert found["summary"]["own"]["types"] == 2


def test_the_stranger_is_in_no_cell_that_is_learned_from(cells, monkeypatch):
    seen = []
    original = CellTypeAnnotationPipeline.fit

    def watched(self, data, *rest):
        seen.append(set(data.obs["cell_type"].astype(str)))
        return original(self, data, *rest)

    monkeypatch.setattr(CellTypeAnnotationPipeline, "fit", watched)
    heard = []
    options = UnknownEvaluation(types=("type_1",), contexts=("self",))
    short = BRIEF.model_copy(update={"optimizer": BRIEF.optimizer.model_copy(update={"steps": 2})})
    evaluate_unknown(cells, short, options, progress=lambda *told: heard.append(told))
    assert seen == [{"type_0", "type_2", "type_3"}]
    assert heard == [("type_1", 0, 1)]


def test_a_rare_stranger_is_asked_about_with_all_its_cells(cells):
    labels = cells.obs["cell_type"].astype(str).to_numpy().astype(object)
    labels[np.flatnonzero(labels == "type_3")[12:]] = "type_2"
    split = unknown_evaluation._split(labels, np.arange(len(labels)), "type_3", UnknownEvaluation())
    assert split.strange.sum() == 12
    assert not np.intersect1d(split.train, split.test).size


def test_what_cannot_be_evaluated_says_so(cells):
    with pytest.raises(ConfigError, match="no cells of type 'type_9'"):
        evaluate_unknown(cells, BRIEF, UnknownEvaluation(types=("type_9",)))
    two = cells[cells.obs["cell_type"].isin(["type_0", "type_1"]).to_numpy()].copy()
    with pytest.raises(DataError, match="three are needed"):
        evaluate_unknown(two, BRIEF)
