"""Several networks answer as one: by the mean of their probabilities, wherever the model is opened, and under another identity."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cellplane.artifact.folder import load_model, pack_tensors, save_model
from cellplane.artifact.members import MEMBERS, agreed, members_of, pack_members
from cellplane.errors import FileFormatError
from cellplane.inference import Predictor
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from tests.pipelines.conftest import RECIPE

THREE = {**RECIPE, "optimizer": {"steps": 40, "lr": 1e-2, "warmup_steps": 5}, "members": 3, "calibrate": False}


@pytest.fixture(scope="module")
def together(training):
    torch.set_num_threads(1)
    return CellTypeAnnotationPipeline(config=THREE).fit(training)


def test_the_answer_is_the_mean_of_the_members(together, query):
    folder = together.folder_
    alone = [replace(folder, weights=weights, attachments={}) for weights in (folder.weights, *members_of(folder.attachments))]
    assert len(alone) == 3
    answers = []
    for one in alone:
        pipeline = CellTypeAnnotationPipeline()
        pipeline.adopt(one)
        answers.append(pipeline.predict_proba(query))
    assert not np.allclose(answers[0], answers[1], atol=1e-3), "other seeds learn otherwise"
    assert together.predict_proba(query) == pytest.approx(np.mean(answers, axis=0), abs=1e-5)


def test_the_first_member_is_the_model_that_is_fitted_alone(together, training):
    single = CellTypeAnnotationPipeline(config={**THREE, "members": 1}).fit(training)
    for name, tensor in single.folder_.weights.items():
        torch.testing.assert_close(together.folder_.weights[name], tensor, rtol=0, atol=0)
    kept = {name: data for name, data in together.folder_.attachments.items() if name != MEMBERS}
    assert kept == single.folder_.attachments, "the judgement is the first member's, by cells that it has not learned from"


def test_what_refuses_cells_is_learned_from_the_mean_by_cells_that_no_member_knows(training, query, monkeypatch):
    asked: list[tuple[int, bytes]] = []
    known, logits = set(), Predictor.logits
    learn = CellTypeAnnotationPipeline._learn

    def watched(self, network, stores, course):
        known.update(part.table.value.tobytes() for part in stores[:1])
        return learn(self, network, stores, course)

    def told(self, store):
        asked.append((len(self.others), store.table.value.tobytes()))
        return logits(self, store)

    monkeypatch.setattr(CellTypeAnnotationPipeline, "_learn", watched)
    monkeypatch.setattr(Predictor, "logits", told)
    pipeline = CellTypeAnnotationPipeline(config={**THREE, "calibrate": True, "unknown": {"reject": True}}).fit(training)
    assert len(known) == 1, "all members learn from the same cells"
    assert [members for members, _ in asked] == [2]
    assert asked[0][1] not in known, "training cells are not asked about"
    assert len(Predictor(pipeline.folder_).others) == 2
    assert pipeline.predict(query).shape == (query.n_obs,)


def test_members_are_saved_and_change_what_the_model_is(together, query, tmp_path):
    path = together.save(tmp_path / "three")
    assert np.array_equal(CellTypeAnnotationPipeline.load(path).predict_proba(query), together.predict_proba(query))
    kept = load_model(path)
    fewer = {**kept.attachments, **pack_members(members_of(kept.attachments)[:1])}
    other = load_model(save_model(replace(kept, attachments=fewer), tmp_path / "two"))
    assert other.model_sha256 != kept.model_sha256
    assert len(Predictor(other).others) == 1


def test_the_mean_is_one_of_probabilities():
    first, second = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[30.0, 31.0, 0.0]])
    expected = (F.softmax(first, 1) + F.softmax(second, 1)) / 2
    torch.testing.assert_close(agreed([first, second]).exp(), expected)


def test_an_attachment_that_is_none_is_refused():
    with pytest.raises(FileFormatError, match="no tensor of a member"):
        members_of({MEMBERS: pack_tensors({"weights": torch.zeros(1)})})
    assert members_of({}) == []
    assert pack_members([]) == {}
