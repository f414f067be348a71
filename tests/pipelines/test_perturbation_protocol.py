"""The perturbation protocol shows ours beside what needs no network, a ceiling, and some perturbations apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cellplane.data.config import KnockoutConfig, SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import write_h5ad
from cellplane.errors import DataError
from cellplane.pipelines import perturbation_protocol
from cellplane.pipelines.perturbation_protocol import CEILING, run_perturbation_protocol
from cellplane.pipelines.task_pictures import CHANGES
from cellplane.pipelines.task_protocols import PerturbationProtocol
from tests.pipelines.conftest import NOBODY, saved_base
from tests.pipelines.test_perturbation import SHORT


@pytest.fixture(scope="module")
def names_and_path(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The perturbations of a screen, and its file."""
    knockouts = KnockoutConfig(n_genes=4, n_pairs=0, effect_sigma=1.0)
    screen = simulate(
        SimulateConfig(n_cells=500, n_genes=40, n_types=1, n_batches=2, knockouts=knockouts, mean_counts=400, dropout_rate=0.0)
    )
    path = tmp_path_factory.mktemp("screen") / "screen.h5ad"
    write_h5ad(screen, path)
    return sorted(set(map(str, screen.obs["perturbation"])) - {"control"}), path


def configured(path: Path, out: Path, apart: list[str]) -> PerturbationProtocol:
    data = {"screen": {"path": str(path), "apart": apart, "recipe": SHORT}}
    return PerturbationProtocol.model_validate({"data": data, "seeds": [0], "out": str(out)})


def test_every_perturbation_is_left_out_and_those_apart_have_their_own_table(names_and_path, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOBODY)
    names, path = names_and_path
    lines: list[str] = []
    config = configured(path, tmp_path, names[:1])
    evaluation = run_perturbation_protocol(config, lines.append).evaluation
    together, apart = evaluation.tables()
    assert (together[1], apart[1]) == ("perturbation left out", "perturbation left out, apart")
    rows = {row.method.name: row for row in evaluation.rows(*together)}
    assert rows.keys() == {"cellplm", "network alone", "target_only", "mean_of_others", "no_change", CEILING}
    assert rows["no_change"].mean("pearson") == 0
    assert rows[CEILING].mean("pearson") > rows["mean_of_others"].mean("pearson")
    ours = {entry.place.protocol: set(entry.details["by_perturbation"]) for entry in evaluation.entries if entry.method.name == "cellplm"}
    assert ours[apart[1]] == {names[0]}
    assert ours[together[1]] <= set(names[1:])
    assert len(lines) == 2 * len(rows)
    leads = [note for note in evaluation.notes if "by perturbation" in note]
    assert [note.split("lead over ")[1].split()[0] for note in leads] == ["target_only", "mean_of_others", "no_change"]
    again: list[str] = []
    finished = run_perturbation_protocol(config, again.append)
    assert again == []
    told = finished.report.markdown.read_text()
    for table in ("screen-perturbation-left-out", "screen-perturbation-left-out-apart"):
        assert f"(pictures/{table}-perturbations.png)" in told
        assert f"(pictures/{table}-changes.png)" in told


def test_the_changes_that_are_kept_are_those_that_were_scored(names_and_path, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOBODY)
    monkeypatch.setattr(perturbation_protocol, "DRAWN_GENES", 5)
    names, path = names_and_path
    config = configured(path, tmp_path, [])
    entries = run_perturbation_protocol(config).evaluation.entries
    (ours,) = [entry for entry in entries if entry.method.name == "cellplm"]
    kept, scores = ours.details[CHANGES], ours.details["by_perturbation"]
    assert len(kept["of"]) == 3
    assert {max(scores, key=scores.__getitem__), min(scores, key=scores.__getitem__)} < kept["of"].keys() <= set(names)
    assert len(kept["genes"]) <= 40
    for name, change in kept["of"].items():
        assert change["pearson"] == scores[name]
        assert len(change["truth"]) == len(change["predicted"]) == len(kept["genes"])
        assert [kept["genes"][gene] for gene in change["targets"]] == name.split("+")
        assert len({kept["genes"][gene] for gene in change["de"]}) == 20
    assert not any(CHANGES in entry.details for entry in entries if entry is not ours)
    ledger = tmp_path / "entries.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    ledger.write_text("".join(json.dumps({**one, "details": {**one["details"], CHANGES: None}}) + "\n" for one in lines))
    again: list[str] = []
    assert len(run_perturbation_protocol(config, again.append).evaluation.pictures) == 1
    assert again == []


def test_a_base_has_rows_of_its_own(names_and_path, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOBODY)
    _, path = names_and_path
    base = saved_base([f"GENE{number:04d}" for number in range(1, 21)], tmp_path / "base")
    config = configured(path, tmp_path, [])
    asked = config.data["screen"].model_copy(update={"bases": {"other": base}})
    evaluation = run_perturbation_protocol(config.model_copy(update={"data": {"screen": asked}})).evaluation
    rows = {row.method.name: row for row in evaluation.rows(*evaluation.tables()[0])}
    assert rows.keys() > {"cellplm", "cellplm from other", "network alone from other"}
    assert rows["network alone from other"].mean("mse") != rows["network alone"].mean("mse")
    known: list[str] = []
    run_perturbation_protocol(config, known.append)
    assert known == []  # rows from scratch do not hang on bases


def test_a_name_that_is_not_there_cannot_be_told_apart(names_and_path, tmp_path):
    with pytest.raises(DataError, match="name one that is there"):
        run_perturbation_protocol(configured(names_and_path[1], tmp_path, ["nobody"]))
