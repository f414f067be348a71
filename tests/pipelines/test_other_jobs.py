"""Imputation and perturbation are jobs like any other: checked before work, kept, reused, asked about files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cellplane.artifact.folder import load_model, save_model
from cellplane.config import to_plain
from cellplane.data.config import KnockoutConfig, SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import read_h5ad, write_h5ad
from cellplane.errors import ColumnError, ConfigError, DataError
from cellplane.pipelines.finetuning import identity_of, recipe_of, run_finetune
from cellplane.pipelines.imputation_job import ImputeJobConfig
from cellplane.pipelines.perturbation_job import PerturbJobConfig
from cellplane.pipelines.prediction import predict_new
from tests.pipelines.conftest import NOBODY

SMALL = {"width": 16, "n_heads": 2, "n_blocks": 1, "latent": "ae", "latent_width": 8, "decoder_width": 16, "decoder_bottleneck": 8}
QUICK = {"model": SMALL, "optimizer": {"steps": 4}, "validate_every": 2, "folds": 2, "tracking_uri": NOBODY}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Spatial cells that lack ten genes, the same with all of them, a reference, and a screen."""
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)
    spatial = simulate(SimulateConfig(n_cells=90, n_genes=40, spatial=True))
    write_h5ad(spatial, tmp_path / "truth.h5ad")
    write_h5ad(spatial[:, :30].copy(), tmp_path / "spatial.h5ad")
    write_h5ad(simulate(SimulateConfig(n_cells=90, n_genes=40, seed=0)), tmp_path / "reference.h5ad")
    write_h5ad(simulate(SimulateConfig(n_cells=200, n_genes=40, knockouts=KnockoutConfig())), tmp_path / "screen.h5ad")
    return tmp_path


def impute(files: Path, **changes: Any) -> ImputeJobConfig:
    plain = {**QUICK, "data": str(files / "spatial.h5ad"), "reference": str(files / "reference.h5ad"), "query_cells": 30}
    return ImputeJobConfig.model_validate({**plain, "reference_cells": 30, "neighbours": 10, **changes})


def perturb(files: Path, **changes: Any) -> PerturbJobConfig:
    return PerturbJobConfig.model_validate({**QUICK, "data": str(files / "screen.h5ad"), **changes})


def test_an_imputation_is_learned_scored_reused_and_asked(files):
    report = run_finetune(impute(files, test=str(files / "truth.h5ad")))
    assert {"cellplm", "knn", "ridge"} == report.scores.keys()
    assert load_model(report.model).task == "impute"
    again = run_finetune(impute(files, test=str(files / "truth.h5ad")))
    assert again.reused
    assert again.scores == report.scores
    found = predict_new("impute", str(report.model), ([files / "spatial.h5ad"], files / "out"))
    answer = read_h5ad(found.written[0])
    assert answer.shape == (90, 10)
    kept = predict_new("impute", str(report.model), ([files / "spatial.h5ad"], files / "out"))
    assert (kept.written, kept.reused) == ((), found.written)


def test_another_reference_is_another_imputation(files):
    identity = identity_of(impute(files))
    assert identity == identity_of(impute(files, test="anything", tracking_uri=None))
    assert identity != identity_of(impute(files, reference=str(files / "truth.h5ad")))


def test_a_perturbation_model_is_learned_scored_reused_and_asked(files):
    report = run_finetune(perturb(files, test=str(files / "screen.h5ad")))
    assert {"cellplm", "no_change", "target_only", "mean_of_others"} == report.scores.keys()
    assert all(np.isfinite(list(row.values())).all() for row in report.scores.values())
    assert run_finetune(perturb(files)).reused
    names = read_h5ad(predict_new("perturb", str(report.model), ([files / "screen.h5ad"], files / "out")).written[0]).obs_names
    one = predict_new("perturb", str(report.model), ([files / "screen.h5ad"], files / "one"), [names[0]])
    assert list(read_h5ad(one.written[0]).obs_names) == [names[0]]


def test_what_a_perturbation_is_has_a_name_of_its_own_in_a_job(files):
    config = perturb(files, perturbed_by="crispra")
    assert (config.kind, recipe_of(config).kind) == ("finetune", "crispra")
    assert identity_of(config) != identity_of(perturb(files))
    assert to_plain(config)["kind"] == "finetune"


def test_files_and_columns_are_checked_before_any_work(files):
    with pytest.raises(ConfigError, match="reference is empty"):
        run_finetune(impute(files, reference=""))
    with pytest.raises(DataError, match="no such file"):
        run_finetune(impute(files, test=str(files / "nowhere.h5ad")))
    with pytest.raises(ColumnError, match="did you mean 'perturbation'"):
        run_finetune(perturb(files, perturbation_key="perturbations"))
    assert not (files / "home" / "runs").exists()


def test_what_cannot_be_asked_is_said(files, base_model):
    path = save_model(base_model, files / "base")
    with pytest.raises(ConfigError, match="is a pretrain model, not one to impute with"):
        predict_new("impute", str(path), ([files / "spatial.h5ad"], files / "out"))
