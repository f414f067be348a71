"""One number makes confidence honest, changes no label, and stays sensible where there is little to learn from."""

from __future__ import annotations

import numpy as np
import pytest

from cellplane.errors import DataError
from cellplane.pipelines.calibration import fit_temperature, negative_log_likelihood
from cellplane.pipelines.metrics import expected_calibration_error


def drawn(temperature: float, cells: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a network that is ``temperature`` times too sure, and labels drawn from what it should have said."""
    rng = np.random.default_rng(0)
    honest = 2 * rng.normal(size=(cells, 4))
    shares = np.exp(honest) / np.exp(honest).sum(1, keepdims=True)
    truth = (shares.cumsum(1) > rng.random((cells, 1))).argmax(1)
    return (temperature * honest).astype(np.float32), truth


def proba(logits: np.ndarray, temperature: float) -> np.ndarray:
    scaled = np.exp((logits - logits.max(1, keepdims=True)) / temperature)
    return scaled / scaled.sum(1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_was_planted_is_found(temperature):
    assert fit_temperature(*drawn(temperature)) == pytest.approx(temperature, rel=0.1)


def test_confidence_becomes_honest_and_no_label_changes():
    logits, truth = drawn(3.0)
    found = fit_temperature(logits[:2000], truth[:2000])
    before, after = proba(logits[2000:], 1.0), proba(logits[2000:], found)
    right = before.argmax(1) == truth[2000:]
    assert expected_calibration_error(after.max(1), right) < 0.03 < 0.1 < expected_calibration_error(before.max(1), right)
    np.testing.assert_array_equal(before.argmax(1), after.argmax(1))


def test_the_likelihood_of_other_cells_rises():
    logits, truth = drawn(3.0)
    found = fit_temperature(logits[:2000], truth[:2000])
    assert negative_log_likelihood(logits[2000:], truth[2000:], found) < negative_log_likelihood(logits[2000:], truth[2000:])


def test_cells_that_are_all_right_do_not_make_the_model_certain():
    logits = np.eye(3, dtype=np.float32)[[0, 1, 2] * 4] * 6
    assert 0.1 < fit_temperature(logits, np.array([0, 1, 2] * 4)) <= 1.0


def test_nothing_can_be_learned_from_no_cells_or_other_shapes():
    with pytest.raises(DataError, match="one true class a cell"):
        fit_temperature(np.zeros((0, 3), dtype=np.float32), np.zeros(0, dtype=np.int64))
    with pytest.raises(DataError, match="one true class a cell"):
        fit_temperature(np.zeros((4, 3), dtype=np.float32), np.zeros(3, dtype=np.int64))
