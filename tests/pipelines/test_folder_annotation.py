"""A folder is annotated file by file: copies and one report, nothing lost to a bad file or a kill, inputs left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cellplane.data.files import file_sha256
from cellplane.data.sources import AnnData, read_h5ad, write_h5ad
from cellplane.errors import ConfigError, DataError
from cellplane.pipelines import annotation_baselines
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from cellplane.pipelines.config import AnnotationConfig
from cellplane.pipelines.folder_annotation import AnnotateConfig, annotate_folder, learn_reference, read_atlas
from cellplane.pipelines.folder_report import write_folder_report
from cellplane.pipelines.job import JobReport
from tests.pipelines.conftest import NOBODY, RECIPE
from tests.pipelines.test_plots import assert_picture


def config_of(folder: Path, reference: Path, **changes: Any) -> AnnotateConfig:
    steps = {"steps": 60, "lr": 1e-2, "warmup_steps": 5}
    recipe = {**RECIPE, "optimizer": steps, "unknown": {"reject": True}, "device": "cpu"}
    plain = {"folder": str(folder), "reference": str(reference), "recipe": recipe, "keys": {"batch_key": "batch"}}
    return AnnotateConfig.model_validate({**plain, "out": str(folder.parent / "answers"), "tracking_uri": NOBODY, **changes})


@pytest.fixture(scope="module", autouse=True)
def few_trees() -> Iterator[None]:
    """A second opinion that is tuned in a moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(annotation_baselines, "TREES", 10)
        patch.setattr(annotation_baselines, "STRENGTHS", (0.3,))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, training: AnnData, query: AnnData) -> Path:
    """A folder with two files of cells, a broken one and one of other genes, and a reference beside it."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("place")
    write_h5ad(training, home / "atlas.h5ad")
    unlabelled = query.copy()
    del unlabelled.obs["cell_type"]
    (home / "files").mkdir()
    write_h5ad(unlabelled[:60].copy(), home / "files" / "a.h5ad")
    write_h5ad(unlabelled[60:].copy(), home / "files" / "b.h5ad")
    (home / "files" / "broken.h5ad").write_bytes((home / "files" / "a.h5ad").read_bytes()[:5000])
    foreign = unlabelled[:9].copy()
    foreign.var_names = [f"OTHER{gene}" for gene in range(foreign.n_vars)]
    write_h5ad(foreign, home / "files" / "foreign.h5ad")
    return home


@pytest.fixture(scope="module")
def learned(place: Path) -> JobReport:
    """The annotator, learned once for all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELLPLANE_HOME", str(place / "home"))
        return learn_reference(config_of(place / "files", place / "atlas.h5ad"))


@pytest.fixture(scope="module")
def report(place: Path, learned: JobReport) -> Any:
    """The folder annotated once."""
    return annotate_folder(config_of(place / "files", place / "atlas.h5ad"), learned)


def test_good_files_are_annotated_and_bad_ones_named(place, report, query):
    assert [path.name for path in report.written] == ["a.h5ad", "b.h5ad"]
    assert set(report.failed) == {"broken.h5ad", "foreign.h5ad"}
    answer = read_h5ad(place / "answers" / "b.h5ad")
    assert list(answer.obs_names) == list(query.obs_names[60:])
    truth = query.obs["cell_type"].astype(str).to_numpy()[60:]
    known = (answer.obs["cellplm_cell_type"] != "unknown").to_numpy()
    assert np.mean(answer.obs["cellplm_cell_type"].astype(str).to_numpy()[known] == truth[known]) > 0.7
    assert np.mean(answer.obs["baseline_cell_type"].astype(str).to_numpy() == truth) > 0.7
    assert set(answer.obs) >= {"cellplm_confidence", "cellplm_agrees", "cellplm_unknown_score", "batch"}


def test_the_inputs_stay_as_they_were(place, report, query):
    data = read_h5ad(place / "files" / "a.h5ad")
    assert not [key for key in data.obs if key.startswith("cellplm")]
    assert not (place / "files" / "answers").exists()


def test_the_numbers_of_the_report_are_those_of_the_files(place, report):
    samples = report.summaries["a.h5ad"].samples
    answer = read_h5ad(place / "answers" / "a.h5ad")
    assert set(samples) == {"batch_0", "batch_1"}
    for name, sample in samples.items():
        own = answer.obs[answer.obs["batch"] == name]
        assert sample["cells"] == len(own)
        assert sample["unknown"] == (own["cellplm_cell_type"] == "unknown").sum()
        assert sample["agree"] == own["cellplm_agrees"].sum()
        assert sample["confidence"][1] == pytest.approx(own["cellplm_confidence"].median())


def test_markers_are_genes_that_the_reference_shows_in_one_type(place, report, training):
    assert report.genes
    means = {
        name: np.asarray(training[training.obs["cell_type"] == name].X.mean(axis=0)).ravel()
        for name in training.obs["cell_type"].cat.categories
    }
    table = np.stack(list(means.values()))[:, training.var_names.get_indexer(report.genes)]
    largest, second = np.sort(table, axis=0)[[-1, -2]]
    assert np.all(largest > 1.5 * second)


def test_one_page_tells_everything_and_needs_nothing_beside_it(report):
    text = write_folder_report(report).read_text(encoding="utf-8")
    assert "broken.h5ad" in text
    assert "a.h5ad: batch_0" in text
    assert "second opinion disagree" in text
    assert text.count("data:image/png;base64,") == 3
    assert "<script" not in text
    for picture in ("samples", "markers", "agreement"):
        assert_picture(report.out / "pictures" / f"{picture}.png")


def test_a_second_run_keeps_what_is_finished_and_does_what_changed(place, learned, report, query):
    config = config_of(place / "files", place / "atlas.h5ad")
    before = {path.name: file_sha256(path) for path in report.written}
    again = annotate_folder(config, learned)
    assert (again.written, [path.name for path in again.reused]) == ((), ["a.h5ad", "b.h5ad"])
    assert again.summaries == report.summaries
    (place / "answers" / "a.h5ad").write_bytes(b"cut")
    third = annotate_folder(config, learned)
    assert [path.name for path in third.written] == ["a.h5ad"]
    assert {path.name: file_sha256(path) for path in report.written} == before


def test_a_killed_run_keeps_its_finished_files_and_loses_none(place, learned, tmp_path):
    config = config_of(place / "files", place / "atlas.h5ad", out=str(tmp_path / "answers"))
    (tmp_path / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
    code = (
        "import pathlib, sys, torch; torch.set_num_threads(1)\n"
        "from cellplane.pipelines import annotation_baselines\n"
        "annotation_baselines.TREES, annotation_baselines.STRENGTHS = 10, (0.3,)\n"
        "from cellplane.pipelines.folder_annotation import AnnotateConfig, annotate_folder\n"
        "from cellplane.pipelines.job import JobReport\n"
        "config = AnnotateConfig.model_validate_json(pathlib.Path(sys.argv[1]).read_text())\n"
        "annotate_folder(config, JobReport(pathlib.Path(sys.argv[2]), True, 0, 0.0))\n"
    )
    environment = os.environ | {
        "FAULT_AT": "before_rename:2",
        "CELLPLANE_HOME": str(place / "home"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-c", code, str(tmp_path / "config.json"), str(learned.model)]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -9, killed.stderr
    assert (tmp_path / "answers" / "a.h5ad").is_file()
    assert not (tmp_path / "answers" / "b.h5ad").exists()
    again = annotate_folder(config, learned)
    assert [path.name for path in again.reused] == ["a.h5ad"]
    assert [path.name for path in again.written] == ["b.h5ad"]


@pytest.mark.parametrize("spoil", ["no labels", "one class", "no column"])
def test_a_reference_that_teaches_nothing_is_refused_before_any_file(place, training, tmp_path, monkeypatch, spoil):
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path))
    atlas = training[:40].copy()
    atlas.obs["cell_type"] = {"no labels": "NA", "one class": "B", "no column": "B"}[spoil]
    if spoil == "no column":
        del atlas.obs["cell_type"]
    write_h5ad(atlas, tmp_path / "atlas.h5ad")
    with pytest.raises(DataError, match=r"atlas\.h5ad.*cell_type"):
        annotate_folder(config_of(place / "files", tmp_path / "atlas.h5ad", out=str(tmp_path / "answers")))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_answers_may_not_fall_on_their_inputs(place, learned):
    with pytest.raises(ConfigError, match="would overwrite"):
        annotate_folder(config_of(place / "files", place / "atlas.h5ad", out=str(place / "files")), learned)


def test_a_folder_without_files_is_an_error(tmp_path, place):
    with pytest.raises(DataError, match=r"without \.h5ad files"):
        annotate_folder(config_of(tmp_path, place / "atlas.h5ad"))


def test_a_smaller_atlas_keeps_every_type(place, learned, training):
    pipeline = CellTypeAnnotationPipeline.load(learned.model)
    atlas = read_atlas(training, pipeline, AnnotationConfig().keys)
    small = atlas.thinned(40, seed=0)
    assert small.types == atlas.types
    assert 30 <= small.table.n_cells <= 50
