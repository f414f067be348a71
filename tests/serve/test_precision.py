"""Models served in bfloat16: they load, give their golden answers, and say nearly what they say in float32."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cellplane.artifact.folder import load_model, save_model
from cellplane.client import JSON_TYPE
from cellplane.data.sources import AnnData
from cellplane.errors import IntegrityError
from cellplane.pipelines.golden import with_golden
from serve.codec import Cells, decode
from serve.deployment import ServeConfig
from serve.limits import Limits
from serve.replica import ModelReplica
from serve.routes import Version
from serve.tasks import Question
from tests.serve.specialists import Specialist, imputer, perturber

__all__ = ["imputer", "perturber"]


@pytest.fixture(scope="module")
def golden_path(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(with_golden(load_model(model_path)), tmp_path_factory.mktemp("model") / "golden")


def replica(path: Path, dtype: str) -> ModelReplica:
    config = ServeConfig.model_validate({"name": "m", "model": str(path), "dtype": dtype})
    return ModelReplica(config, Version("1", str(path)))


def cells_of(cells: AnnData) -> Cells:
    return decode(json.dumps({"gene_ids": list(cells.var_names), "counts": cells.X.toarray().tolist()}).encode(), JSON_TYPE, Limits())


def answers(path: Path, task: str, cells: AnnData, column: str) -> tuple[list[np.ndarray], list[Any]]:
    """In float32 and in bfloat16, and what the answers say of themselves."""
    both = [replica(path, dtype) for dtype in ("float32", "bfloat16")]
    for one in both:
        asyncio.run(one.check())
    found = [asyncio.run(one.predict(Question(task, cells_of(cells)))) for one in both]
    return [answer.columns[column] for answer in found], [answer.about["precision"] for answer in found]


@pytest.mark.parametrize(("task", "column"), [("embed", "embedding"), ("annotate", "proba")])
def test_an_annotator(golden_path: Path, cells: AnnData, task: str, column: str) -> None:
    (exact, rough), said = answers(golden_path, task, cells, column)
    assert said == ["float32", "bfloat16"]
    assert rough.dtype == np.float32
    assert 0 < np.abs(exact - rough).max() < 0.05 * np.abs(exact).max()


def test_an_imputation_and_a_perturbation(imputer: Specialist, perturber: Specialist) -> None:
    for specialist, task, column in ((imputer, "impute", "rate"), (perturber, "perturb", "log_fold_change")):
        (exact, rough), _ = answers(specialist.path, task, specialist.cells, column)
        assert np.isfinite(rough).all()
        assert np.abs(exact - rough).max() < 0.05 * np.abs(exact).max()


def test_another_model_is_still_found_out(golden_path: Path, tmp_path: Path) -> None:
    good = load_model(golden_path)
    torch.manual_seed(5)
    noise = {name: 0.3 * torch.randn_like(tensor) for name, tensor in good.weights.items() if tensor.is_floating_point()}
    weights = {name: tensor + noise.get(name, 0) for name, tensor in good.weights.items()}
    other = replica(save_model(replace(good, weights=weights), tmp_path / "other"), "bfloat16")
    with pytest.raises(IntegrityError, match="golden"):
        asyncio.run(other.check())
