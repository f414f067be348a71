"""A finished model is scored beside its baselines on the same cells, whatever genes these have."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cellplane.artifact.folder import save_model
from cellplane.errors import ConfigError, DataError
from cellplane.pipelines.config import DenoiseEvaluation, EvaluateConfig
from cellplane.pipelines.evaluation import evaluate_annotation, run_evaluate, run_evaluate_denoising


def test_held_out_cells_may_have_other_genes(fitted, training, query):
    other = query[:, ::-1][:, :100].copy()
    scores = evaluate_annotation(fitted, training, other, 0)
    assert scores["pca_knn"]["macro_f1"] > scores["majority"]["macro_f1"]
    stranger = query.copy()
    stranger.var_names = [f"x{n}" for n in range(stranger.n_vars)]
    with pytest.raises(DataError):
        evaluate_annotation(fitted, training, stranger, 0)


def test_cells_whose_types_nobody_can_tell_are_not_a_contest(fitted, training, query, caplog):
    evaluate_annotation(fitted, training, query, 0)
    assert "no method does much better" not in caplog.text
    foreign = query.copy()
    foreign.obs["cell_type"] = np.random.default_rng(0).permutation(foreign.obs["cell_type"].astype(str))
    evaluate_annotation(fitted, training, foreign, 0)
    assert "no method does much better" in caplog.text


def test_what_to_evaluate_must_be_named():
    with pytest.raises(ConfigError, match="model is empty"):
        run_evaluate(EvaluateConfig())
    with pytest.raises(ConfigError, match="data is empty"):
        run_evaluate_denoising(DenoiseEvaluation(model="somewhere"))


def test_a_base_model_denoises_without_having_learned_the_cells(alone, base_model):
    path = save_model(base_model, alone.home / "base")
    scores, out = run_evaluate_denoising(DenoiseEvaluation(model=str(path), data=str(alone.train)))
    assert list(scores) == ["cellplm", "gene_frequency", "knn15", "nonzero_mean"]
    assert json.loads((out / "scores.json").read_text())["scores"] == scores
    assert scores["gene_frequency"]["split_nll"] < scores["cellplm"]["split_nll"]  # its weights are random
