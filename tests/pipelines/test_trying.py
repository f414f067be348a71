"""A trial hides a part of the user's data, says who finds it again, and writes the winner's answer: real fits on tiny cells."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cellplane.data.config import SimulateConfig
from cellplane.data.files import file_sha256
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData, read_h5ad, write_h5ad
from cellplane.errors import ColumnError, ConfigError, DataError, FileFormatError, VocabularyError
from cellplane.pipelines import annotation_baselines, try_annotation, trying
from cellplane.pipelines.job import MODEL_ROW
from cellplane.pipelines.try_config import TryAnnotation, TryConfig, TryDenoising, TryImputation
from cellplane.pipelines.try_parts import how_long, still_to_go
from cellplane.pipelines.trying import TryReport, run_try
from tests.pipelines.conftest import RECIPE
from tests.pipelines.test_plots import assert_picture

ANNOTATE = {**RECIPE, "optimizer": {"steps": 40, "lr": 1e-2, "warmup_steps": 5}, "device": "cpu"}
SMALL = {"width": 32, "n_heads": 2, "latent_width": 16, "decoder_width": 32, "decoder_bottleneck": 16}
IMPUTE = {"model": SMALL, "optimizer": {"steps": 10, "lr": 1e-2, "warmup_steps": 5}, "query_cells": 64, "reference_cells": 64}
IMPUTE |= {"folds": 2, "neighbours": 20, "validate_every": 10, "device": "cpu"}
DENOISE = {"model": SMALL, "optimizer": {"steps": 20, "lr": 1e-2, "warmup_steps": 5}, "max_cells": 100, "device": "cpu"}
UNLABELLED = 15


@pytest.fixture(scope="module", autouse=True)
def few_trees() -> Iterator[None]:
    """A random forest and a regression that are tuned in a moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(annotation_baselines, "TREES", 10)
        patch.setattr(annotation_baselines, "STRENGTHS", (0.3,))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled cells of which some have no label, tissue that lacks genes, and a reference for both."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("try")
    cells = simulate(SimulateConfig(n_cells=150, n_genes=60, mean_counts=300))
    labels = cells.obs["cell_type"].astype(str).to_numpy().astype(object)
    cells.obs["true_type"] = labels.astype(str)
    labels[:UNLABELLED] = "NA"
    cells.obs["cell_type"] = labels.astype(str)
    write_h5ad(cells, home / "cells.h5ad")
    tissue = simulate(SimulateConfig(n_cells=200, n_genes=60, spatial=True, n_batches=1, mean_counts=300, batch_sigma=0.0))
    write_h5ad(tissue[::2, :-10].copy(), home / "tissue.h5ad")
    reference = tissue[1::2].copy()
    del reference.obsm["spatial"]
    write_h5ad(reference, home / "reference.h5ad")
    return home


def annotation(place: Path, **changes: Any) -> TryAnnotation:
    plain = {"data": str(place / "cells.h5ad"), "recipe": ANNOTATE, "folds": 2, "out": str(place / "annotate")}
    return TryAnnotation.model_validate({**plain, **changes})


def imputation(place: Path, **changes: Any) -> TryImputation:
    plain = {"data": str(place / "tissue.h5ad"), "reference": str(place / "reference.h5ad"), "recipe": IMPUTE, "folds": 2}
    return TryImputation.model_validate({**plain, "out": str(place / "impute"), **changes})


def denoising(place: Path, **changes: Any) -> TryDenoising:
    return TryDenoising.model_validate({"data": str(place / "cells.h5ad"), "recipe": DENOISE, "out": str(place / "denoise"), **changes})


@pytest.fixture(scope="module")
def tried(place: Path) -> dict[str, TryReport]:
    """Every task tried once, with the answer of whoever won."""
    configs = {"annotate": annotation(place, auto=True), "impute": imputation(place, auto=True), "denoise": denoising(place, auto=True)}
    return {task: run_try(config) for task, config in configs.items()}


def test_how_long_it_takes_is_guessed_at_the_start_and_told_from_what_was_measured(place, tmp_path):
    said: list[str] = []
    run_try(annotation(place, out=str(tmp_path / "timed")), said.append)
    assert re.fullmatch(r"\[1/2\] .* cells to learn from, about \d+ (s|min) in all", said[0])
    assert re.fullmatch(r"\[2/2\] .* cells to learn from, about \d+ (s|min) to go", said[1])
    assert (how_long(3), how_long(44), how_long(200)) == ("about 10 s", "about 40 s", "about 3 min")
    assert still_to_go([100.0, 140.0], 4) == ", about 4 min to go"
    assert still_to_go([], 4) == ""


@pytest.mark.parametrize("task", ["annotate", "impute", "denoise"])
def test_a_verdict_rests_on_all_that_was_hidden(tried, task):
    verdict = tried[task].verdict
    assert verdict.n == {"annotate": 150 - UNLABELLED, "impute": 50, "denoise": 150}[task]
    assert verdict.lead.low <= verdict.lead.mean <= verdict.lead.high
    sign = -1 if task == "denoise" else 1
    assert verdict.lead.mean == pytest.approx(sign * (verdict.model - verdict.other), abs=1e-6)
    assert verdict.winner in (MODEL_ROW, verdict.baseline)


@pytest.mark.parametrize(
    ("task", "pictures"), [("annotate", ["confusion", "f1", "reliability"]), ("impute", ["genes"]), ("denoise", ["cells"])]
)
def test_one_page_says_it_first_and_shows_every_method(tried, task, pictures):
    page = tried[task].page
    text = page.read_text(encoding="utf-8")
    assert text.index('class="verdict"') < text.index("<table>")
    assert MODEL_ROW in text
    assert {"annotate": "random forest", "impute": "ridge", "denoise": "diffusion"}[task] in text
    assert text.count("data:image/png;base64,") == len(pictures)
    for name in pictures:
        assert_picture(page.parent / "pictures" / f"{name}.png")


def test_unlabelled_cells_are_named_and_labelled_ones_keep_their_name(place, tried):
    cells, answer = read_h5ad(place / "cells.h5ad"), read_h5ad(tried["annotate"].answer)
    assert list(answer.obs_names) == list(cells.obs_names)
    predicted = (answer.obs["auto_source"] == "predicted").to_numpy()
    assert predicted.tolist() == [row < UNLABELLED for row in range(150)]
    names, truth = answer.obs["auto_cell_type"].astype(str).to_numpy(), cells.obs["true_type"].astype(str).to_numpy()
    assert (names[~predicted] == truth[~predicted]).all()
    assert (names[predicted] == truth[predicted]).mean() > 0.7
    assert answer.uns["auto"]["winner"] == tried["annotate"].verdict.winner


def test_the_genes_that_the_file_lacks_are_imputed(place, tried):
    answer = read_h5ad(tried["impute"].answer)
    reference = read_h5ad(place / "reference.h5ad")
    assert list(answer.var_names) == list(reference.var_names[-10:])
    assert "spatial" in answer.obsm
    assert np.nanmin(answer.X) >= 0


def test_all_cells_are_denoised_to_the_same_depth(tried):
    rates = read_h5ad(tried["denoise"].answer).layers["auto_denoised"]
    np.testing.assert_allclose(rates.sum(1), 10_000, rtol=1e-3)


@pytest.mark.parametrize("winner", [MODEL_ROW, "ridge", "knn"])
def test_whoever_wins_imputes_the_same_genes(place, winner):
    found, told = trying.TASKS["impute"].answer(imputation(place), winner)
    assert found.shape == (100, 10)
    assert winner in told
    counts = read_h5ad(place / "tissue.h5ad").X.toarray().sum(1)
    assert np.corrcoef(counts, np.nansum(found.X, axis=1))[0, 1] > 0.3, "counts are told at each cell's own depth"


@pytest.mark.parametrize("winner", [MODEL_ROW, "knn15", "diffusion", "low_rank", "gene_frequency"])
def test_whoever_wins_denoises_every_cell(place, winner):
    found, _ = trying.TASKS["denoise"].answer(denoising(place), winner)
    assert found.layers["auto_denoised"].shape == (150, 60)
    assert np.isfinite(found.layers["auto_denoised"]).all()


@pytest.mark.parametrize("winner", [MODEL_ROW, "logistic regression"])
def test_whoever_wins_names_the_unlabelled(place, winner):
    found, told = trying.TASKS["annotate"].answer(annotation(place), winner)
    assert f"{UNLABELLED} unlabelled cells" in told
    assert np.isfinite(found.obs["auto_confidence"][:UNLABELLED]).all() == (winner == MODEL_ROW)


def test_the_users_files_stay_as_they_were_and_a_second_run_measures_nothing(place, tried, monkeypatch):
    before = {path: file_sha256(path) for path in (*place.glob("*.h5ad"), tried["annotate"].answer)}
    monkeypatch.setattr(try_annotation, "_measured", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(try_annotation, "fitted_annotator", lambda *_: pytest.fail("fitted again"))
    again = run_try(annotation(place, auto=True))
    assert again.verdict == tried["annotate"].verdict
    assert "written before" in again.told
    assert {path: file_sha256(path) for path in before} == before


def test_hidden_labels_cannot_reach_the_answers(place, tried, tmp_path):
    """Labels of the hidden cells of a split are replaced by others: the answers for them stay the same."""
    config = annotation(place)
    study = try_annotation.read_study(config)
    split = study.splits[0]
    honest = try_annotation._measured(config, study, split)
    spoilt = study.asked.copy()
    column = spoilt.obs["cell_type"].astype(str).to_numpy().astype(object)
    column[split.test] = np.random.default_rng(0).permutation(column[split.test])
    spoilt.obs["cell_type"] = column.astype(str)
    other = try_annotation.Study(spoilt, spoilt, study.labels, study.truth, study.splits, ())
    assert try_annotation._measured(config, other, split) == honest


def test_a_killed_trial_goes_on_behind_the_last_split(place, tried, tmp_path):
    config = annotation(place, out=str(tmp_path / "out"))
    (tmp_path / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
    code = (
        "import os, pathlib, sys, torch; torch.set_num_threads(1)\n"
        "from cellplane.pipelines import annotation_baselines\n"
        "annotation_baselines.TREES, annotation_baselines.STRENGTHS = 10, (0.3,)\n"
        "from cellplane.pipelines.trying import run_try\n"
        "from cellplane.pipelines.try_config import TryAnnotation\n"
        "def say(text):\n"
        "    if text.startswith('[2/'): os.kill(os.getpid(), 9)\n"
        "run_try(TryAnnotation.model_validate_json(pathlib.Path(sys.argv[1]).read_text()), say)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "config.json")], env=environment, timeout=120, check=False)
    assert killed.returncode == -9
    lines = (tmp_path / "out" / "measured.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1
    assert not (tmp_path / "out" / "report.html").exists()
    verdict = run_try(config).verdict
    assert verdict == tried["annotate"].verdict
    again = (tmp_path / "out" / "measured.jsonl").read_text(encoding="utf-8").splitlines()
    assert again[:1] == lines
    assert [json.loads(line)["place"]["split"] for line in again] == [0, 1]


def test_samples_are_hidden_whole_where_they_are_named(place):
    config = annotation(place, recipe={**ANNOTATE, "keys": {"labels_key": "cell_type", "batch_key": "batch"}})
    study = try_annotation.read_study(config)
    batches = study.asked.obs["batch"].astype(str).to_numpy()
    assert [set(batches[split.test]) for split in study.splits] == [{"batch_0"}, {"batch_1"}]
    assert all(not set(batches[split.test]) & set(batches[split.train]) for split in study.splits)


def test_a_sample_column_with_a_single_sample_is_told(place, tmp_path):
    def alike(cells: Any) -> Any:
        cells.obs["batch"] = "one"
        return cells

    recipe = {**ANNOTATE, "keys": {"labels_key": "cell_type", "batch_key": "batch"}}
    study = try_annotation.read_study(annotation(place, data=spoilt(place, tmp_path, alike), recipe=recipe))
    assert any("names a single sample" in note for note in study.notes)
    assert not any("--batch-key" in note for note in study.notes)


def test_with_a_reference_all_labels_are_hidden(place, tmp_path):
    config = annotation(place, reference=str(place / "reference.h5ad"), out=str(tmp_path))
    study = try_annotation.read_study(config)
    assert [len(split.test) for split in study.splits] == [150 - UNLABELLED]
    assert len(study.splits[0].train) == 100
    assert run_try(config).verdict.n == 150 - UNLABELLED


def spoilt(place: Path, tmp_path: Path, change: Any) -> str:
    cells = read_h5ad(place / "cells.h5ad")
    write_h5ad(change(cells), tmp_path / "spoilt.h5ad")
    return str(tmp_path / "spoilt.h5ad")


def labelled(name: str) -> Any:
    def change(cells: AnnData) -> AnnData:
        cells.obs["cell_type"] = name
        return cells

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (labelled("NA"), "no cell has a label"),
        (labelled("B"), "1 types with 4 labelled cells or more"),
        (lambda cells: cells[: UNLABELLED + 4].copy(), "types with 4 labelled cells"),
    ],
)
def test_too_few_labels_are_said_before_any_fit(place, tmp_path, change, words):
    with pytest.raises(DataError, match=words):
        run_try(annotation(place, data=spoilt(place, tmp_path, change), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_reference_of_other_names_is_refused(place, tmp_path):
    with pytest.raises(DataError, match="share no label"):
        run_try(annotation(place, reference=spoilt(place, tmp_path, labelled("B")), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_three_shared_genes_are_too_few(place, tmp_path):
    tissue = read_h5ad(place / "tissue.h5ad")
    tissue.var_names = [name if place < 3 else f"OTHER{place}" for place, name in enumerate(tissue.var_names)]
    write_h5ad(tissue, tmp_path / "other.h5ad")
    with pytest.raises(VocabularyError, match="share too few genes"):
        run_try(imputation(place, data=str(tmp_path / "other.h5ad"), out=str(tmp_path / "out")))
    with pytest.raises(VocabularyError, match="3 of 60 genes"):
        run_try(annotation(place, reference=str(tmp_path / "other.h5ad"), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (lambda place: annotation(place, data=""), ConfigError, "data is empty"),
        (lambda place: annotation(place, data=str(place / "nowhere.h5ad")), DataError, "no such file"),
        (lambda place: annotation(place, recipe={"keys": {"labels_key": "cell_typ"}}), ColumnError, "did you mean 'cell_type'"),
        (lambda place: annotation(place, split="blocks"), ConfigError, "spatial_key"),
        (lambda place: imputation(place, reference=None), ConfigError, "needs a reference"),
    ],
)
def test_what_is_missing_is_named(place, config, error, words):
    with pytest.raises(error, match=words):
        run_try(config(place))


@pytest.mark.parametrize("make", [annotation, denoising])
def test_a_broken_file_is_said_to_be_broken(place, tmp_path, make):
    whole = (place / "cells.h5ad").read_bytes()
    (tmp_path / "broken.h5ad").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileFormatError):
        run_try(make(place, data=str(tmp_path / "broken.h5ad"), out=str(tmp_path / "out")))


def test_nothing_is_written_where_nothing_is_asked(place, tmp_path):
    full = spoilt(place, tmp_path, lambda cells: cells[UNLABELLED:].copy())
    found, told = trying.TASKS["annotate"].answer(annotation(place, data=full), MODEL_ROW)
    assert found is None
    assert "nothing to answer" in told
    whole, told = trying.TASKS["impute"].answer(imputation(place, data=str(place / "reference.h5ad")), "ridge")
    assert whole is None
    assert "nothing to answer" in told


def test_two_files_of_one_name_have_folders_of_their_own(place, tmp_path, monkeypatch):
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / "home"))
    for name in ("one", "other"):
        write_h5ad(read_h5ad(place / "cells.h5ad"), tmp_path / name / "cells.h5ad")
    configs = {name: denoising(place, data=str(tmp_path / name / "cells.h5ad"), out=None) for name in ("one", "other")}
    folders = {name: config.folder for name, config in configs.items()}
    assert folders["one"] != folders["other"]
    assert all(folder.name.startswith("denoise-cells-") and folder.parent == tmp_path / "home" / "tried" for folder in folders.values())
    monkeypatch.chdir(tmp_path / "one")
    assert denoising(place, data="cells.h5ad", out=None).folder == folders["one"], "however the file is named"
    assert annotation(place, data="cells.h5ad", out=None).folder != folders["one"], "another task"
    pages = {name: run_try(config).page for name, config in configs.items()}
    assert len(set(pages.values())) == 2
    assert all(page.is_file() and page.with_suffix(".md").is_file() for page in pages.values())


def test_the_answer_never_has_the_name_of_the_file(place):
    config = TryConfig(data=str(place / "cells.h5ad"), out=str(place))
    assert config.answer != Path(config.data)
