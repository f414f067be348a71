"""A trial leaves perturbations out, says whether a network foretells them, and where it cannot tell names the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cellplane.artifact.folder import load_model
from cellplane.data.config import KnockoutConfig, SimulateConfig
from cellplane.data.files import file_sha256
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData, read_h5ad, write_h5ad
from cellplane.errors import ColumnError, CountsNotFoundError, DataError
from cellplane.pipelines import perturbation_evaluation, try_perturbation, trying
from cellplane.pipelines.job import MODEL_ROW
from cellplane.pipelines.perturbation import PerturbationPipeline
from cellplane.pipelines.perturbation_evaluation import evaluate_perturbation
from cellplane.pipelines.perturbation_scores import Case
from cellplane.pipelines.try_config import TryPerturbation
from cellplane.pipelines.trying import TryReport, run_try
from tests.pipelines.test_perturbation import SHORT
from tests.pipelines.test_plots import assert_picture

RECIPE = {**SHORT, "optimizer": {"steps": 6, "lr": 5e-3, "warmup_steps": 1}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A screen of four knock-outs in two samples and two cell types."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("try")
    knockouts = KnockoutConfig(n_genes=4, n_pairs=0, effect_sigma=1.0)
    size = {"n_cells": 600, "n_genes": 40, "mean_counts": 400}
    write_h5ad(simulate(SimulateConfig(n_types=2, n_batches=2, knockouts=knockouts, dropout_rate=0.0, **size)), home / "screen.h5ad")
    return home


def perturbation(place: Path, **changes: Any) -> TryPerturbation:
    plain = {"data": str(place / "screen.h5ad"), "recipe": RECIPE, "out": str(place / "out")}
    return TryPerturbation.model_validate({**plain, **changes})


@pytest.fixture(scope="module")
def tried(place: Path) -> TryReport:
    """The screen tried once, with whatever is the answer."""
    return run_try(perturbation(place, auto=True))


def names_of(data: AnnData) -> list[str]:
    return sorted(set(map(str, data.obs["perturbation"])) - {"control"})


def spoilt(place: Path, tmp_path: Path, change: Any) -> str:
    data = read_h5ad(place / "screen.h5ad")
    write_h5ad(change(data), tmp_path / "spoilt.h5ad")
    return str(tmp_path / "spoilt.h5ad")


def test_a_verdict_rests_on_every_perturbation_left_out(place, tried):
    verdict = tried.verdict
    assert verdict.n == len(names_of(read_h5ad(place / "screen.h5ad"))) == 4
    assert verdict.decision in ("model", "baseline", "undecided")
    assert verdict.lead.low <= verdict.lead.mean <= verdict.lead.high
    assert verdict.lead.mean == pytest.approx(verdict.model - verdict.other, abs=1e-9)
    assert verdict.baseline in ("target_only", "mean_of_others", "no_change")


def test_the_scores_are_those_of_the_evaluation(place, tried):
    found = evaluate_perturbation(read_h5ad(place / "screen.h5ad"), perturbation(place).recipe)["pearson"]
    assert tried.verdict.model == pytest.approx(found["model"]["mean"], abs=1e-4)
    assert tried.verdict.other == pytest.approx(found[tried.verdict.baseline]["mean"], abs=1e-4)


def test_the_page_says_it_first_and_shows_every_method_and_the_ceiling(tried):
    text = tried.page.read_text(encoding="utf-8")
    assert text.index('class="verdict"') < text.index("<table>")
    markdown = tried.page.with_suffix(".md").read_text(encoding="utf-8")
    assert markdown.index(f"**{tried.verdict.text}**") < markdown.index("| method |")
    for told in (text, markdown):
        assert all(
            name in told for name in (MODEL_ROW, "target_only", "mean_of_others", "no_change", "split-half ceiling", "discrimination")
        )
    assert_picture(tried.page.parent / "pictures" / "perturbations.png")


def test_a_second_run_measures_nothing_and_changes_no_file(place, tried, monkeypatch):
    files = (place / "screen.h5ad", *(path for path in (place / "out").rglob("*") if path.suffix in (".h5ad", ".safetensors")))
    before = {path: file_sha256(path) for path in files}
    monkeypatch.setattr(try_perturbation, "cases_of", lambda *_: iter([]))
    monkeypatch.setattr(PerturbationPipeline, "fit", lambda *_: pytest.fail("fitted again"))
    again = run_try(perturbation(place, auto=True))
    assert again.verdict == tried.verdict
    assert {path: file_sha256(path) for path in files} == before


def test_an_interrupted_trial_goes_on_behind_what_it_measured(place, tried, tmp_path, monkeypatch):
    def interrupt(text: str) -> None:
        if text.startswith("[3/"):
            raise KeyboardInterrupt

    config = perturbation(place, out=str(tmp_path / "out"))
    with pytest.raises(KeyboardInterrupt):
        run_try(config, interrupt)
    lines = (tmp_path / "out" / "measured.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    learn, fits = perturbation_evaluation.learn, []
    monkeypatch.setattr(perturbation_evaluation, "learn", lambda *given: (fits.append(1), learn(*given))[1])
    assert run_try(config).verdict == tried.verdict
    assert len(fits) == 2
    again = (tmp_path / "out" / "measured.jsonl").read_text(encoding="utf-8").splitlines()
    assert again[:2] == lines
    assert [json.loads(line)["place"]["split"] for line in again] == [0, 1, 2, 3]


def test_below_three_perturbations_cell_types_are_left_out(place, tmp_path):
    data = read_h5ad(place / "screen.h5ad")
    first = names_of(data)[0]
    path = spoilt(place, tmp_path, lambda data: data[data.obs["perturbation"].isin([first, "control"]).to_numpy()].copy())
    keys = {"labels_key": "cell_type"}
    study = try_perturbation.read_study(perturbation(place, data=path, recipe={**RECIPE, "keys": keys}))
    assert (study.leave_out, len(study.names)) == ("cell_type", 2)
    assert all(name == f"{first} in {cell_type}" for name, cell_type in study.names.items())
    report = run_try(perturbation(place, data=path, recipe={**RECIPE, "keys": keys}, out=str(tmp_path / "out"), auto=True))
    assert report.verdict.decision == "too few"
    assert report.verdict.text.startswith("Too few to tell: ")
    assert "at least 3 are needed" in report.verdict.text
    assert report.answer is None
    assert "nothing was written" in report.told


@pytest.mark.parametrize(
    ("reliabilities", "decision"), [((0.9, 0.9, 0.9, 0.1), "model"), ((0.9, 0.9, 0.1, 0.1), "too few"), ((0.1,) * 4, "too few")]
)
def test_perturbations_too_noisy_to_be_measured_do_not_count(reliabilities, decision):
    rng = np.random.default_rng(0)
    cases = []
    for number, reliability in enumerate(reliabilities):
        truth = rng.normal(size=50)
        answers = {"model": truth + rng.normal(size=50) * 0.1, "target_only": rng.normal(size=50)}
        answers |= {"mean_of_others": rng.normal(size=50), "no_change": np.zeros(50)}
        cases.append(Case(f"G{number}", truth, answers, np.arange(20), (number,), reliability, tuple(map(str, range(50)))))
    verdict = try_perturbation._verdict(try_perturbation.summary(cases), "perturbation", 0)
    assert verdict.decision == decision
    assert verdict.n == sum(value >= 0.3 for value in reliabilities)
    assert "too noisy" in verdict.text
    assert verdict.winner == (MODEL_ROW if decision == "model" else verdict.baseline)


def test_a_model_that_won_is_kept_and_can_be_asked(place, tmp_path):
    fitted, told = try_perturbation.answer_perturbation(perturbation(place), MODEL_ROW)
    assert "4 perturbations" in told
    calls: list[str] = []
    task = trying.Task(TryPerturbation, trying.TASKS["perturb"].measure, lambda *_: (calls.append("fit"), (fitted, told))[1])
    config = perturbation(place, out=str(tmp_path / "out"))
    path, _ = trying._answer(config, task, MODEL_ROW, "this trial")
    again, words = trying._answer(config, task, MODEL_ROW, "this trial")
    assert again == path == tmp_path / "out" / "model"
    assert (calls, "written before" in words) == (["fit"], True)
    trying._answer(config, task, MODEL_ROW, "another trial")
    assert len(calls) == 2
    assert load_model(path).lineage["winner"] == MODEL_ROW
    data = read_h5ad(place / "screen.h5ad")
    assert len(PerturbationPipeline.load(path).predict(data[(data.obs["perturbation"] == "control").to_numpy()].copy())) == 4


@pytest.mark.parametrize("winner", ["target_only", "mean_of_others", "no_change"])
def test_a_simple_method_leaves_nothing_to_write_and_says_what_to_expect(place, winner):
    found, told = trying.TASKS["perturb"].answer(perturbation(place), winner)
    assert found is None
    assert f"nothing was written: {winner} needs no model" in told


def without_column(data: AnnData) -> AnnData:
    data.obs["guide"] = data.obs["perturbation"].astype(str).str.replace("control", "non-targeting")
    data.obs["depth_of_cell"] = np.arange(data.n_obs, dtype=float)
    data.obs["barcode"] = list(data.obs_names)
    del data.obs["perturbation"]
    return data


def renamed(old: str, new: str) -> Any:
    def change(data: AnnData) -> AnnData:
        data.obs["perturbation"] = [new if name == old else str(name) for name in data.obs["perturbation"]]
        return data

    return change


def without_counts(data: AnnData) -> AnnData:
    data.X = data.X * 0.37
    return data


def test_a_missing_column_is_answered_by_those_that_could_be_meant(place, tmp_path):
    with pytest.raises(ColumnError, match="no 'perturbation' in obs") as caught:
        run_try(perturbation(place, data=spoilt(place, tmp_path, without_column), out=str(tmp_path / "out")))
    text = str(caught.value)
    assert text.index("guide (non-targeting, ") < text.index("batch (")
    assert "-o recipe.perturbation_key=" in text
    assert "-o recipe.control=" in text
    assert "barcode" not in text
    assert "depth_of_cell" not in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (renamed("control", "ctrl"), DataError, r"it says ctrl, .*-o recipe\.control=NAME"),
        (without_counts, CountsNotFoundError, "counts"),
        (lambda data: data[(data.obs["perturbation"] == "control").to_numpy()].copy(), DataError, "-o recipe.KEY=VALUE"),
    ],
)
def test_what_a_screen_lacks_is_said_before_any_fit(place, tmp_path, change, error, words):
    path = spoilt(place, tmp_path, change)
    with pytest.raises(error, match=words):
        run_try(perturbation(place, data=path, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_no_gene_ends_with_the_keys_that_explain_it(place, tmp_path):
    first = names_of(read_h5ad(place / "screen.h5ad"))[0]
    path = spoilt(place, tmp_path, renamed(first, "aspirin"))
    with pytest.raises(DataError, match=r"aspirin.*-o recipe\.KEY=VALUE: perturbation_key, control, kind"):
        run_try(perturbation(place, data=path, out=str(tmp_path / "out")))
    study = try_perturbation.read_study(perturbation(place, data=path, recipe={**RECIPE, "ignore": ["aspirin"]}))
    assert len(study.names) == 3


def test_two_perturbations_without_cell_types_are_too_few(place, tmp_path):
    two = [*names_of(read_h5ad(place / "screen.h5ad"))[:2], "control"]
    path = spoilt(place, tmp_path, lambda data: data[data.obs["perturbation"].isin(two).to_numpy()].copy())
    with pytest.raises(DataError, match=r"too few to leave one out: 2 perturbations .*--labels-key"):
        run_try(perturbation(place, data=path, out=str(tmp_path / "out")))
    asked = perturbation(place, data=path, leave_out="perturbation")
    assert try_perturbation.read_study(asked).leave_out == "perturbation"
