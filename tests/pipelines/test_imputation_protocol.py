"""The imputation protocol hides every shared gene once, beside baselines and ceilings, and knows honest intervals from others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cellplane.data.config import SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData, write_h5ad
from cellplane.errors import DataError
from cellplane.pipelines import imputation_protocol
from cellplane.pipelines.imputation_config import ImputationConfig
from cellplane.pipelines.imputation_protocol import CEILING, WITHIN, Round, coverage, opened, run_imputation_protocol
from cellplane.pipelines.task_pictures import COVERED, COVERED_GENES, LEVELS, MAPS
from cellplane.pipelines.task_protocols import ImputationProtocol, ImputedData
from tests.pipelines.conftest import NOBODY, saved_base
from tests.pipelines.test_imputation import SHORT


@pytest.fixture(scope="module")
def tissue() -> AnnData:
    """240 cells with positions."""
    return simulate(SimulateConfig(n_cells=240, n_genes=40, spatial=True, n_batches=1, mean_counts=300, batch_sigma=0.0))


@pytest.fixture(scope="module")
def path(tissue: AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tissue") / "tissue.h5ad"
    write_h5ad(tissue, found)
    return found


def test_every_shared_gene_is_hidden_once_a_seed_and_nothing_is_measured_twice(path, tissue, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOBODY)
    base = saved_base([*map(str, tissue.var_names[:30]), "somebody else's"], tmp_path / "base")
    data = {"tissue": {"path": str(path), "strip_um": 5, "bases": {"other": base}}}
    plain = {"data": data, "gene_folds": 2, "seeds": [0], "recipe": SHORT, "out": str(tmp_path)}
    config = ImputationProtocol.model_validate(plain)
    lines: list[str] = []
    evaluation = run_imputation_protocol(config, lines.append).evaluation
    rows = {row.method.name: row.method.kind for row in evaluation.rows(*evaluation.tables()[0])}
    assert rows.pop("cellplm from other") == "model"
    assert rows == {"cellplm": "model", "knn": "baseline", "ridge": "baseline", WITHIN: "ceiling", CEILING: "ceiling"}
    genes = [gene for entry in evaluation.entries if entry.method.name == "knn" for gene in entry.details["per_gene"]]
    assert sorted(genes) == sorted(tissue.var_names)
    by_name = {row.method.name: row for row in evaluation.rows(*evaluation.tables()[0])}
    assert by_name[CEILING].mean("pearson") > by_name["knn"].mean("pearson")
    assert 0 < by_name["cellplm"].mean("coverage_90") < 1
    assert "coverage_90 (0.9 is best)" in (tmp_path / "report.md").read_text()
    assert len(lines) == 2 * (len(rows) + 1)
    again: list[str] = []
    finished = run_imputation_protocol(config, again.append)
    assert again == []
    assert [picture.path.read_bytes()[1:4] for picture in finished.evaluation.pictures] == [b"PNG"] * 5
    assert "(pictures/tissue-tissue.png)" in finished.report.markdown.read_text()


def test_what_is_kept_for_the_pictures_is_what_was_scored_and_small(path, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOBODY)
    monkeypatch.setattr(imputation_protocol, "short", lambda values, digits=4: np.asarray(values).tolist())  # a short fit hardly varies
    data = {"tissue": {"path": str(path), "strip_um": 5}}
    plain = {"data": data, "gene_folds": 2, "seeds": [3, 4], "recipe": SHORT, "out": str(tmp_path)}
    config = ImputationProtocol.model_validate(plain)
    evaluation = run_imputation_protocol(config).evaluation
    ours = [entry for entry in evaluation.entries if entry.method.name == "cellplm"]
    assert {entry.place.seed for entry in ours if MAPS in entry.details} == {3}
    for entry in ours:
        assert entry.details[COVERED][LEVELS.index(0.9)] == pytest.approx(entry.metrics["coverage_90"], abs=1e-3)
        assert np.mean(list(entry.details[COVERED_GENES].values())) == pytest.approx(entry.metrics["coverage_90"], abs=1e-3)
        for gene, kept in entry.details.get(MAPS, {}).get("genes", {}).items():
            r = np.corrcoef(kept["truth"], kept["predicted"])[0, 1]
            assert r == pytest.approx(entry.details["per_gene"][gene], abs=1e-3)
    ledger = tmp_path / "entries.jsonl"
    without = [json.loads(line) for line in ledger.read_text().splitlines()]
    for line in without:
        line["details"] = {key: value for key, value in line["details"].items() if key not in (COVERED, COVERED_GENES, MAPS)}
    ledger.write_text("".join(json.dumps(line) + "\n" for line in without))
    again: list[str] = []
    earlier = run_imputation_protocol(config, again.append)
    assert again == []
    assert len(earlier.evaluation.pictures) == 3
    assert "tissue.png" not in earlier.report.markdown.read_text().replace("tissue-", "")


def test_a_part_of_many_cells_is_kept_and_nothing_without_coordinates(path, monkeypatch):
    monkeypatch.setattr(imputation_protocol, "MAPPED_CELLS", 30)
    query, reference = opened(ImputedData(path=str(path), strip_um=5))
    gene = str(query.var_names[0])
    one = Round(query, reference, ImputationConfig.model_validate({**SHORT, "genes": [gene], "keys": {"spatial_key": "spatial"}}))
    answer = AnnData(X=np.ones((query.n_obs, 1)), var=pd.DataFrame(index=[gene]))
    kept = one.maps(answer, {gene: 0.5})
    assert len(kept["places"]) == len(kept["genes"][gene]["truth"]) == len(kept["genes"][gene]["predicted"]) == 30
    del query.obsm["spatial"]
    assert one.maps(answer, {gene: 0.5}) == {}


def test_halves_lie_on_two_sides_of_a_strip(path, tissue):
    right, left = opened(ImputedData(path=str(path), strip_um=20))
    assert left.obsm["spatial"][:, 0].max() + 19 < right.obsm["spatial"][:, 0].min()
    assert right.n_obs + left.n_obs < tissue.n_obs
    with pytest.raises(DataError, match="leaves no cell"):
        opened(ImputedData(path=str(path), strip_um=1e9))


def test_intervals_of_the_true_distribution_cover_what_they_say_and_narrow_ones_less():
    rng = np.random.default_rng(0)
    mean = rng.gamma(2.0, 1.0, (400, 5))
    counts = rng.poisson(rng.gamma(3.0, mean / 3.0))
    truth = {f"g{n}": counts[:, n].astype(float) for n in range(5)}
    var = pd.DataFrame(index=list(truth))
    honest, narrow = (AnnData(X=mean, var=var, layers={"sd": np.sqrt(mean + spread * mean**2)}) for spread in (1 / 3, 0.0))
    assert coverage(honest, truth, 0) == pytest.approx(0.9, abs=0.03)
    assert coverage(narrow, truth, 0) < 0.85


def test_too_few_genes_for_the_folds_are_told(path, tmp_path):
    plain = {"data": {"tissue": {"path": str(path), "strip_um": 5}}, "gene_folds": 30, "recipe": SHORT, "out": str(tmp_path)}
    with pytest.raises(DataError, match="too few to hide"):
        run_imputation_protocol(ImputationProtocol.model_validate(plain))
