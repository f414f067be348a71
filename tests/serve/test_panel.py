"""A lone cell over the wire: itself, or in the company of the model's panel, as offline, alone and in a crowd."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cellplane.artifact.folder import load_model, save_model
from cellplane.client import JSON_TYPE
from cellplane.data.config import DataKeys, SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData
from cellplane.errors import ServiceError
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.config import PanelConfig
from cellplane.pipelines.embedding import CellEmbeddingPipeline
from cellplane.pipelines.panel import with_panel
from serve.codec import Cells, decode
from serve.deployment import ServeConfig
from serve.limits import Limits
from serve.options import Options
from serve.replica import ModelReplica
from serve.routes import Version
from serve.tasks import Question

BATCHES = DataKeys(batch_key="batch")


@pytest.fixture(scope="module")
def carrying(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny annotator, with five reference cells of its own in sentences of sixteen."""
    training = simulate(SimulateConfig(n_cells=60, n_genes=60, n_types=3, seed=3))
    folder = with_panel(load_model(model_path), training, DataKeys(), PanelConfig(cells=5))
    return save_model(folder, tmp_path_factory.mktemp("model") / "carrying")


@pytest.fixture(scope="module")
def replica(carrying: Path) -> ModelReplica:
    return ModelReplica(ServeConfig(name="carrying", model=str(carrying)), Version("1", str(carrying)))


def cells_of(cells: AnnData) -> Cells:
    body = {"gene_ids": list(cells.var_names), "counts": cells.X.toarray().tolist(), "batch": list(map(str, cells.obs["batch"]))}
    return decode(json.dumps(body).encode(), JSON_TYPE, Limits())


def ask(replica: ModelReplica, *questions: Question) -> list[Any]:
    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(replica.predict(question) for question in questions))

    return asyncio.run(all_at_once())


@pytest.mark.parametrize("n", [1, 40])
def test_the_served_answer_is_the_offline_one(replica: ModelReplica, carrying: Path, cells: AnnData, n: int) -> None:
    annotator, some = CellTypeAnnotationPipeline.load(carrying), cells[:n].copy()
    annotator.config = annotator.config.model_copy(update={"keys": BATCHES})
    (annotated, embedded) = ask(
        replica,
        Question("annotate", cells_of(some), Options(context="panel")),
        Question("embed", cells_of(some), Options(context="panel")),
    )
    np.testing.assert_allclose(annotated.columns["proba"], annotator.predict_proba(some, context="panel"), atol=1e-5)
    embedder = CellEmbeddingPipeline(carrying, keys=BATCHES)
    np.testing.assert_allclose(embedded.columns["embedding"], embedder.predict(some, context="panel"), atol=1e-5)
    assert "panel" in annotated.about["context"]["policy"]
    assert len(annotated.columns["proba"]) == n


def test_contexts_meet_in_one_forward_and_keep_apart(replica: ModelReplica, cells: AnnData) -> None:
    parts = [cells[row : row + size].copy() for row, size in ((0, 1), (1, 1), (2, 9), (11, 3))]
    questions = [Question("embed", cells_of(part), Options(context=name)) for part in parts for name in ("own", "self", "panel")]
    before = replica._packer.forwards
    together = ask(replica, *questions, *questions)
    assert replica._packer.forwards - before < len(questions)
    for question, first, second in zip(questions, together, together[len(questions) :], strict=False):
        (alone,) = ask(replica, question)
        for answer in (first, second):
            np.testing.assert_allclose(answer.columns["embedding"], alone.columns["embedding"], atol=1e-5)
            assert answer.about["context"]["choice"] == question.options.context


def test_itself_is_the_default_and_a_lone_cells_own_context(replica: ModelReplica, cells: AnnData) -> None:
    one = cells_of(cells[[7]].copy())
    plain, own, alone, panel = ask(
        replica, Question("embed", one), *(Question("embed", one, Options(context=name)) for name in ("own", "self", "panel"))
    )
    for answer in (own, alone):
        np.testing.assert_allclose(answer.columns["embedding"], plain.columns["embedding"], atol=1e-6)
    assert np.abs(panel.columns["embedding"] - plain.columns["embedding"]).max() > 1e-4


def test_a_model_without_a_panel_says_so(served: ModelReplica, cells: AnnData) -> None:
    with pytest.raises(ServiceError, match="carries no reference panel") as refused:
        ask(served, Question("embed", cells_of(cells), Options(context="panel")))
    assert refused.value.status == 422


def test_discovery_tells_of_the_panel(replica: ModelReplica, served: ModelReplica) -> None:
    described = [asyncio.run(one.describe()) for one in (replica, served)]
    assert [(one["panel_cells"], one["panel_origin"]) for one in described] == [(5, "centroids"), (0, None)]
