"""The denoising protocol writes every row once, tells over-smoothing from noise, and goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import scipy.sparse as sp

from cellplane.data.sentences import CellTable
from cellplane.errors import ConfigError
from cellplane.pipelines.denoising_baselines import Answers, gene_frequency, split_counts
from cellplane.pipelines.denoising_protocol import NETWORK_ROW, own_counts, run_denoising_protocol, smoothness, splitting_scores
from cellplane.pipelines.task_protocols import DenoisingProtocol
from tests.pipelines.test_denoising import RATES

CELLS, GENES = 600, 40


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    """Shares of cells of five kinds."""
    rng = np.random.default_rng(0)
    rates = rng.gamma(1.0, 1.0, (5, GENES))[rng.integers(5, size=CELLS)]
    return rates / rates.sum(1, keepdims=True)


@pytest.fixture(scope="module")
def table(truth) -> CellTable:
    counts = sp.csr_matrix(np.random.default_rng(1).poisson(500 * truth).astype(np.float32))
    return CellTable(counts.indptr.astype(np.int64), counts.indices.astype(np.int64), counts.data, np.ones(GENES, dtype=bool))


def said(shares: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    yield np.arange(len(shares)), shares


def test_the_truth_is_as_smooth_as_the_truth(table, truth):
    kept, rest = split_counts(table, 0)
    found = splitting_scores(said(truth), kept, rest)
    assert found["variance_ratio"] == pytest.approx(1, abs=0.1)
    assert found["coexpression_slope"] == pytest.approx(1, abs=0.1)


def test_averages_are_told_as_too_smooth_and_raw_counts_as_too_noisy(table, truth):
    kept, rest = split_counts(table, 0)
    blurred = 0.5 * truth + 0.5 * truth.mean(0)
    assert splitting_scores(said(blurred), kept, rest)["variance_ratio"] == pytest.approx(0.25, abs=0.05)
    assert splitting_scores(said(blurred), kept, rest)["coexpression_slope"] > 2
    assert splitting_scores(own_counts(kept), kept, rest)["variance_ratio"] > 1.1
    assert splitting_scores(gene_frequency(kept), kept, rest)["variance_ratio"] == pytest.approx(0, abs=1e-6)


def test_invented_co_expression_lowers_the_slope(table, truth):
    kept, rest = split_counts(table, 0)
    wave = 1 + 0.6 * np.sin(np.arange(CELLS))[:, None] * np.where(np.arange(GENES) < GENES / 2, 1, -1)
    genes = np.arange(GENES)
    honest, invented = (smoothness(shares, kept, rest, genes)["coexpression_slope"] for shares in (truth, truth * wave))
    assert invented < 0.8 * honest


def test_a_protocol_scores_every_method_under_both_and_is_not_run_twice(alone):
    small = {**RATES, "optimizer": {"steps": 30, "lr": 1e-2}}
    plain = {"data": {"simulated": {"path": str(alone.train), "keys": {"batch_key": None, "labels_key": "cell_type"}}}, "seeds": [0]}
    config = DenoisingProtocol.model_validate({**plain, "recipe": small})
    lines: list[str] = []
    finished = run_denoising_protocol(config, lines.append)
    evaluation = finished.evaluation
    assert evaluation.tables() == [("simulated", "masking"), ("simulated", "splitting")]
    names = {"cellplm", NETWORK_ROW, "diffusion", "low_rank", "gene_frequency", "knn15", "nonzero_mean", "own_counts"}
    rows = {row.method.name: row for row in evaluation.rows("simulated", "splitting")}
    assert rows.keys() == names
    assert rows["cellplm"].mean("nats_per_1000") < rows["gene_frequency"].mean("nats_per_1000") < rows["nonzero_mean"].mean("nats_per_1000")
    text = finished.report.markdown.read_text()
    assert "variance_ratio (1 is best)" in text
    assert "lead in mask_pearson" in text
    assert json.loads(finished.report.json.read_text())["tables"][1]["metric"] == "nats_per_1000"
    assert len(lines) == 2 * len(names)
    again: list[str] = []
    assert str(run_denoising_protocol(config, again.append).evaluation.entries) == str(evaluation.entries)  # as text: NaN is NaN
    assert again == []


def test_bases_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match="--refit"):
        DenoisingProtocol.model_validate({"bases": {"one": "models:/one@champion"}})
    with pytest.raises(ConfigError, match="no data set"):
        run_denoising_protocol(DenoisingProtocol())


def test_an_answer_is_watched_without_being_changed(table):
    kept, rest = split_counts(table, 0)
    shown: list[Answers] = []

    def counted() -> Answers:
        for piece in gene_frequency(kept):
            shown.append(piece)
            yield piece

    splitting_scores(counted(), kept, rest)
    assert sum(len(rows) for rows, _ in shown) == CELLS
