"""A home of its own for every command, files to give to it, and a tracker with a registered model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cellplane.artifact.folder import save_model
from cellplane.cli.main import main
from cellplane.data.sources import AnnData, read_h5ad, write_h5ad
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.tracking.registry import register
from cellplane.tracking.runs import RunSpec, TrackedRun, local_uri
from tests.pipelines.conftest import RECIPE, base_model, cells, fitted, official, query, training

__all__ = ["base_model", "cells", "fitted", "official", "query", "training"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CELLPLANE_HOME of this command, in an empty working folder."""
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "CELLPLANE_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


class Said:
    """What a command answered."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        """Standard output as the one JSON object it must be."""
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs a command in this process."""

    def command(*arguments: object) -> Said:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return command


@pytest.fixture
def h5ad(tmp_path: Path, training: AnnData) -> Path:
    """Labelled cells."""
    write_h5ad(training, tmp_path / "train.h5ad")
    return tmp_path / "train.h5ad"


@pytest.fixture
def heldout(tmp_path: Path, query: AnnData) -> Path:
    """Other labelled cells."""
    write_h5ad(query, tmp_path / "heldout.h5ad")
    return tmp_path / "heldout.h5ad"


@pytest.fixture(scope="session")
def recipe() -> list[str]:
    """Overrides for a fine-tuning of seconds."""
    torch.set_num_threads(1)
    options = {f"model.{key}": value for key, value in RECIPE["model"].items()} | {"max_cells": 100, "optimizer.steps": 20}
    return [part for key, value in options.items() for part in ("-o", f"{key}={value}")]


@pytest.fixture(scope="session")
def registered(tmp_path_factory: pytest.TempPathFactory, fitted: CellTypeAnnotationPipeline) -> tuple[str, Path]:
    """A tracker's address with versions 1 and 2 of the model `types`, and the folder of version 1."""
    folder = tmp_path_factory.mktemp("registry")
    uri = local_uri(folder)
    for version, max_cells in ((1, 100), (2, 50)):
        path = save_model(replace(fitted.folder_, max_cells=max_cells, manifest={}), folder / f"model-{version}")
        tracked = TrackedRun.open(RunSpec(run_key=f"run-{version}", experiment="cellplane/finetune/annotate", name="run"), uri)
        tracked.log_artifacts(path, "model")
        assert register(path, tracked.run_id, "types", uri) == version
    return uri, folder / "model-1"


@pytest.fixture
def bad_files(tmp_path: Path, h5ad: Path) -> Path:
    """Files that are not what they seem, in the working folder."""
    (tmp_path / "text.h5ad").write_text("cell,gene\n")
    (tmp_path / "truncated.h5ad").write_bytes(h5ad.read_bytes()[:-4000])
    (tmp_path / "empty.h5ad").touch()
    (tmp_path / "folder.h5ad").mkdir()
    scaled = read_h5ad(h5ad)
    scaled.X = scaled.X * 0.37
    write_h5ad(scaled, tmp_path / "scaled.h5ad")
    return tmp_path
