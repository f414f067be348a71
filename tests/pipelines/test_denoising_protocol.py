"""The denoising protocol writes every row once, tells over-smoothing from noise, and goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from cellplane.artifact.folder import load_model
from cellplane.data.sentences import CellTable
from cellplane.data.sources import read_h5ad
from cellplane.errors import ConfigError, DataError
from cellplane.pipelines.config import DenoisingConfig
from cellplane.pipelines.denoising import Cells
from cellplane.pipelines.denoising_baselines import Answers, gene_frequency, split_counts
from cellplane.pipelines.denoising_protocol import (
    NETWORK_ROW,
    Arm,
    own_counts,
    renumbered,
    run_denoising_protocol,
    smoothness,
    splitting_scores,
)
from cellplane.pipelines.task_protocols import DenoisingProtocol
from tests.pipelines.conftest import saved_base
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
    alike = splitting_scores(gene_frequency(kept), kept, rest)
    assert alike["variance_ratio"] == pytest.approx(0, abs=1e-6)
    assert np.isnan(alike["coexpression_slope"])
    rounded = np.full((CELLS, GENES), 1 / GENES) * np.linspace(1, 1 + 1e-14, CELLS)[:, None]
    assert np.isnan(splitting_scores(said(rounded), kept, rest)["coexpression_slope"])


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
    assert text.count("](pictures/simulated-") == 3
    assert finished.report.html.read_text().count("data:image/png;base64") == 3
    assert len(lines) == 2 * len(names)
    again: list[str] = []
    assert str(run_denoising_protocol(config, again.append).evaluation.entries) == str(evaluation.entries)  # as text: NaN is NaN
    assert again == []


def test_a_base_of_other_genes_has_rows_of_its_own_over_the_same_counts(alone, tmp_path):
    genes = [str(gene) for gene in read_h5ad(Path(alone.train)).var_names]
    base = saved_base(["somebody else's", *genes[::-2]], tmp_path / "base")
    data = {"path": str(alone.train), "keys": {"batch_key": None, "labels_key": "cell_type"}, "bases": {"other": base}}
    small = {**RATES, "optimizer": {"steps": 2}}
    plain = {"data": {"simulated": data}, "seeds": [0], "recipe": small, "out": str(tmp_path / "out")}
    with pytest.raises(DataError, match="new_genes=add"):
        run_denoising_protocol(DenoisingProtocol.model_validate(plain))
    config = DenoisingProtocol.model_validate({**plain, "finetune": {**small, "new_genes": "add"}})
    evaluation = run_denoising_protocol(config).evaluation
    rows = {row.method.name: row for row in evaluation.rows("simulated", "splitting")}
    assert rows.keys() > {"cellplm", "cellplm from other", f"{NETWORK_ROW} from other"}
    nothing_known = rows["own_counts"].mean("nats_per_1000")
    assert rows["gene_frequency"].mean("nats_per_1000") / 2 < rows["cellplm from other"].mean("nats_per_1000") < nothing_known
    assert any("the model does not say which files" in note for note in evaluation.notes)


def test_genes_named_otherwise_than_the_bases_are_scored_too(alone, tmp_path):
    data = read_h5ad(Path(alone.train))
    known = [f"ENSG{number:011d}" for number in range(data.n_vars)]
    data.var_names = [f"RP11-{number}.2" if number % 3 == 0 else gene for number, gene in enumerate(known)]  # a third has no Ensembl id
    base = load_model(Path(saved_base(known, tmp_path / "base")))
    recipe = DenoisingConfig.model_validate({**RATES, "optimizer": {"steps": 2}, "new_genes": "add"})
    whole = Cells.of(data, None, recipe)
    arm = Arm.from_base(("known", base), recipe, data, whole.vocabulary)
    assert len(set(arm.places.tolist())) == data.n_vars
    assert (arm.places >= 0).all()
    assert arm.cells.table.totals().sum() == whole.table.totals().sum()


def test_renumbered_cells_hold_the_same_counts_and_leave_the_table_alone(table):
    places = np.random.default_rng(0).permutation(GENES + 5)[:GENES]
    before = table.value.copy()
    moved = renumbered(table, places, GENES + 5)
    there, here = (sp.csr_matrix((one.value, one.gene, one.crow), shape=(CELLS, GENES + 5)).toarray() for one in (moved, table))
    np.testing.assert_array_equal(there[:, places], here[:, :GENES])
    np.testing.assert_array_equal(moved.panel[places], table.panel)
    assert moved.panel.sum() == table.panel.sum()
    np.testing.assert_array_equal(table.value, before)


def test_no_data_set_is_told():
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
