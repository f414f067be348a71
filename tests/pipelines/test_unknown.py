"""Strangers are told by what known cells alone have taught."""

from __future__ import annotations

import numpy as np
import pytest

from cellplane.artifact.judgement import stranger_features
from cellplane.data.sentences import CellTable, memory_store
from cellplane.pipelines.config import UnknownConfig
from cellplane.pipelines.unknown import Seen, auroc, best_share, false_alarms, fit_rule, fit_space, reference_of

CENTRES = np.array([[0, 0], [6, 0], [0, 6], [6, 6]], np.float64)


def seen(cells: int, seed: int) -> Seen:
    """Cells around four places, named with little doubt."""
    rng = np.random.default_rng(seed)
    label = np.arange(cells) % 4
    z = CENTRES[label] + rng.normal(size=(cells, 2))
    logits = 8.0 * np.eye(4)[label] + rng.normal(size=(cells, 4))
    return Seen(logits.astype(np.float32), z.astype(np.float32), label)


def table(cells: int, n_genes: int, measured: int | None = None) -> CellTable:
    rng = np.random.default_rng(0)
    panel = np.arange(n_genes) < (measured or n_genes)
    counts = rng.poisson(2, (cells, n_genes)) * panel
    rows, gene = counts.nonzero()
    crow = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=cells))]).astype(np.int64)
    return CellTable(crow, gene.astype(np.int64), counts[rows, gene].astype(np.float32), panel)


def test_a_reference_holds_no_more_of_each_class_than_asked_and_the_same_for_a_seed():
    cells = seen(400, 0)
    reference = reference_of(cells, 15, 30, 0)
    assert np.bincount(reference.label).tolist() == [30] * 4
    np.testing.assert_array_equal(reference.z, reference_of(cells, 15, 30, 0).z)
    assert not np.array_equal(reference.z, reference_of(cells, 15, 30, 1).z)


def test_a_class_of_one_cell_takes_the_scale_of_the_others():
    cells = seen(41, 0)
    label = cells.label.copy()
    label[:] = np.arange(41) % 3
    label[0] = 3
    reference = reference_of(Seen(cells.logits, cells.z, label), 5, 100, 0)
    assert reference.scale[3] == pytest.approx(np.median(reference.scale[:3]))
    assert (reference.scale > 0).all()
    lonely = reference_of(Seen(cells.logits[:4], cells.z[:4], np.arange(4)), 5, 100, 0)
    np.testing.assert_array_equal(lonely.scale, 1)


def test_strangers_score_above_known_cells_and_the_asked_share_of_these_is_refused():
    reference = reference_of(seen(800, 0), 15, 200, 0)
    rule = fit_rule(seen(2000, 1), reference, 1.0, UnknownConfig())
    known, strangers = seen(4000, 2), seen(400, 3)
    away = Seen(strangers.logits, (strangers.z + 20).astype(np.float32), strangers.label)
    scores = [rule.scores(stranger_features(_softmax(cells.logits), cells.z, reference)) for cells in (known, away)]
    assert auroc(np.repeat([False, True], [4000, 400]), np.concatenate(scores)) > 0.99
    for rate in (0.05, 0.1, 0.2):
        assert np.mean(scores[0] > rule.threshold(rate)) == pytest.approx(rate, abs=0.015)


def test_the_sign_that_tells_types_apart_gets_the_weight():
    """Types at the corners of a square lie far from one another; between two others, a type is told by doubt alone."""
    corners = best_share(seen(600, 1), reference_of(seen(800, 0), 15, 200, 0))
    rng = np.random.default_rng(0)
    line = [Seen(np.zeros((600, 3), np.float32), _on_a_line(rng), np.arange(600) % 3) for _ in range(2)]
    assert corners < best_share(line[1], reference_of(line[0], 15, 200, 0))


def _on_a_line(rng: np.random.Generator) -> np.ndarray:
    """Three wide types in a row."""
    return np.stack([2.0 * (np.arange(600) % 3) + rng.normal(size=600), rng.normal(size=600)], 1).astype(np.float32)


def test_two_classes_cannot_play_the_stranger_and_an_asked_share_is_taken():
    cells = seen(100, 0)
    two = Seen(cells.logits[:, :2], cells.z, cells.label % 2)
    reference = reference_of(two, 15, 200, 0)
    assert fit_rule(two, reference, 1.0, UnknownConfig()).weights.tolist() == [0.5, 0.5]
    assert fit_rule(two, reference, 1.0, UnknownConfig(entropy_share=0.2)).weights.tolist() == [0.2, 0.8]


def test_a_space_needs_no_labels_and_scales_only_whole_transcriptomes():
    panel = fit_space(table(60, 50), 0)
    assert (panel.axes.shape, panel.total) == ((50, 20), 0.0)
    assert fit_space(table(30, 1200), 0).total == 1e4
    assert fit_space(table(30, 1200, measured=40), 0).total == 0.0
    np.testing.assert_array_equal(fit_space(table(60, 50), 0).axes, panel.axes)
    np.testing.assert_allclose(panel.axes.T @ panel.axes, np.eye(20), atol=5e-3)
    np.testing.assert_allclose(panel.places(memory_store(table(60, 50), 100).read([0])).mean(0), 0, atol=1e-2)


def test_too_few_cells_or_genes_make_no_space():
    assert fit_space(table(1, 50), 0) is None
    assert fit_space(table(20, 1), 0) is None
    assert fit_space(table(3, 50), 0).axes.shape == (50, 2)


def test_areas_and_false_alarms_of_known_cases():
    strange = np.array([False] * 20 + [True] * 20)
    assert auroc(strange, np.arange(40)) == 1
    assert false_alarms(strange, np.arange(40)) == 0
    assert auroc(strange, -np.arange(40)) == 0
    assert false_alarms(strange, -np.arange(40)) == 1
    assert np.isnan(auroc(strange[:20], np.arange(20)))
    assert np.isnan(false_alarms(strange[:20], np.arange(20)))


def _softmax(logits: np.ndarray) -> np.ndarray:
    scaled = np.exp(logits - logits.max(1, keepdims=True))
    return (scaled / scaled.sum(1, keepdims=True)).astype(np.float32)
