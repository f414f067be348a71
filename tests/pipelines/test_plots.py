"""Every picture is written, readable as PNG, larger than a blank page and free of global side effects."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from cellplane.errors import DataError
from cellplane.pipelines import drawing, plots
from cellplane.pipelines.metrics import annotation_scores, confusion

CLASSES = [f"type {index} of many" for index in range(31)]


def journal(steps: int) -> list[dict]:
    rows = [
        {"step": step, "metrics": {"train/loss": 3 - step / 50, "train/nb": 2 - step / 50, "train/kl": 1.0, "train/cells_per_s": 900.0}}
        for step in range(1, steps + 1)
    ]
    return [*rows, {"step": steps, "metrics": {"val/loss": 2.5}}]


def labelled(classes: int, cells: int = 400) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    names = np.array(CLASSES[:classes], dtype=object)
    truth = generator.integers(0, classes, cells)
    truth[:classes] = np.arange(classes)
    guess = np.where(generator.random(cells) < 0.8, truth, generator.integers(0, classes, cells))
    return names[truth], names[guess]


def assert_picture(path: Path) -> None:
    pixels = imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 300
    assert pixels.std() > 0.02, "the picture is blank"
    borders = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
    assert min(border.min() for border in borders) > 0.99, "something touches the edge of the picture: text is cut off"


@pytest.mark.parametrize("steps", [1, 20, 200])
def test_losses_are_drawn_with_their_components(tmp_path, steps):
    assert_picture(plots.loss_plot(journal(steps), tmp_path / "new" / "loss.png"))


@pytest.mark.parametrize("steps", [1, 20, 200])
def test_the_course_of_a_run_has_a_panel_for_what_was_journalled(tmp_path, steps):
    plain = plots.course_plot(journal(steps), tmp_path / "plain.png")
    assert_picture(plain)
    more = [{**row, "metrics": {**row["metrics"], "train/lr": 1e-3, "train/grad_norm": 2.0, "train/mfu": 0.3}} for row in journal(steps)]
    assert_picture(plots.course_plot(more, tmp_path / "more.png"))
    assert imread(tmp_path / "more.png").shape[0] > imread(plain).shape[0]


def test_gradients_that_are_not_finite_do_not_spoil_the_course(tmp_path):
    rows = [{"step": step, "metrics": {"train/grad_norm": float("nan") if step == 3 else 2.0}} for step in range(1, 9)]
    assert_picture(plots.course_plot(rows, tmp_path / "course.png"))


def test_every_metric_of_a_validation_is_drawn(tmp_path):
    rows = [{"step": step, "metrics": {"val/loss": 3.0 - step / 10, "val/$odd_name": 1.0}} for step in (5, 10)]
    assert_picture(plots.validation_plot([*journal(10), *rows], tmp_path / "validation.png"))


@pytest.mark.parametrize("draw", [plots.course_plot, plots.validation_plot])
def test_a_journal_without_anything_to_draw_is_refused(tmp_path, draw):
    with pytest.raises(DataError, match="none of the 1 journal rows holds"):
        draw([{"step": 1, "metrics": {"train/other": 1.0}}], tmp_path / "x.png")


def test_a_total_without_components_is_enough(tmp_path):
    assert_picture(plots.loss_plot([{"step": 1, "metrics": {"train/loss": 1.0}}], tmp_path / "loss.png", "one step"))


def test_speed_is_no_loss(tmp_path):
    with pytest.raises(DataError, match="none of the 1 journal rows holds a loss"):
        plots.loss_plot([{"step": 1, "metrics": {"train/cells_per_s": 1.0}}], tmp_path / "loss.png")


def test_a_step_that_was_written_twice_counts_once_with_its_last_value():
    rows = [{"step": step, "metrics": {"train/loss": loss}} for step, loss in ((2, 9.0), (1, 5.0), (2, 4.0))]
    assert plots._curve(rows, "train/loss") == [(1, 5.0), (2, 4.0)]


@pytest.mark.parametrize("classes", [2, 10, 31])
def test_confusion_and_f1_fit_on_the_page_for_few_and_many_classes(tmp_path, classes):
    truth, predicted = labelled(classes)
    names = CLASSES[:classes]
    assert_picture(plots.confusion_plot(confusion(truth, predicted, names), names, tmp_path / "confusion.png"))
    scores = {"model": annotation_scores(truth, predicted), "baseline": annotation_scores(truth, truth)}
    assert_picture(plots.per_class_f1_plot(scores, tmp_path / "f1.png"))


def test_a_confusion_matrix_of_another_size_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"shape \[K, K\]"):
        plots.confusion_plot(np.zeros((2, 3)), ["a", "b"], tmp_path / "confusion.png")


@pytest.mark.parametrize("classes", [10, 31])
def test_the_umap_legend_fits_on_the_page(tmp_path, monkeypatch, classes):
    monkeypatch.setattr(plots, "umap_layout", lambda points, seed: points[:, :2])
    truth, _ = labelled(classes)
    truth[-3:] = None
    points = np.random.default_rng(0).normal(size=(len(truth), 8))
    assert_picture(plots.umap_plot(points, truth, tmp_path / "umap.png", "cells", seed=1))


def test_the_same_seed_gives_the_same_umap_and_distinct_groups_stay_apart():
    generator = np.random.default_rng(0)
    points = np.concatenate([generator.normal(0, 1, (30, 6)), generator.normal(12, 1, (30, 6))])
    first, again = plots.umap_layout(points, seed=4), plots.umap_layout(points, seed=4)
    np.testing.assert_array_equal(first, again)
    centres = first[:30].mean(axis=0), first[30:].mean(axis=0)
    spread = max(first[:30].std(), first[30:].std())
    assert np.linalg.norm(centres[0] - centres[1]) > 2 * spread


@pytest.mark.parametrize("cells", [1, 4, 6])
def test_a_handful_of_cells_still_has_a_layout(cells):
    layout = plots.umap_layout(np.random.default_rng(0).normal(size=(cells, 3)), seed=0)
    assert layout.shape == (cells, 2)
    assert np.isfinite(layout).all()


@pytest.mark.parametrize("points", [np.full((8, 2), np.nan), np.zeros((0, 2)), np.zeros(5)])
def test_an_embedding_that_is_no_table_of_numbers_is_refused(points):
    with pytest.raises(DataError, match="finite numbers"):
        plots.umap_layout(points)


def test_labels_of_other_length_are_refused(tmp_path):
    with pytest.raises(DataError, match="one label a cell"):
        plots.umap_plot(np.zeros((3, 2)), ["a"], tmp_path / "umap.png")


def test_reliability_is_drawn(tmp_path):
    confidence = np.random.default_rng(0).uniform(0.3, 1, 200)
    assert_picture(plots.reliability_plot(confidence, confidence > 0.5, tmp_path / "reliability.png"))


def test_names_with_dollars_or_of_great_length_do_not_break_a_figure(tmp_path):
    names = ["$\\frac{", "x" * 200, "_hidden"]
    assert_picture(plots.confusion_plot(np.eye(3, dtype=int), names, tmp_path / "confusion.png", "costs $5 and $6"))


def test_forty_classes_can_be_told_apart():
    assert len({drawing.look(index) for index in range(40)}) == 40


def test_drawing_leaves_pyplot_and_the_backend_alone(tmp_path):
    code = (
        "import sys, pathlib, numpy as np; from cellplane.pipelines import plots\n"
        "plots.confusion_plot(np.eye(2, dtype=int), ['a', 'b'], pathlib.Path(sys.argv[1]))\n"
        "print('matplotlib.pyplot' in sys.modules, 'umap' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "c.png")], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
