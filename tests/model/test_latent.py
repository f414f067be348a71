"""Which mixture component speaks for a cell when nothing is random."""

from __future__ import annotations

import pytest
import torch

from cellplane.model.latent import UNDECIDED, _most_probable

LOGITS = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0001, -3.0], [1.0, 1.0, 1.0]])


def test_in_float32_the_largest_logit_decides_alone():
    assert UNDECIDED["float32"] == 0.0
    assert _most_probable(LOGITS[:2], 0.0).tolist() == [[0, 1, 0], [0, 1, 0]]


def test_in_half_precision_a_tie_is_shared_and_a_clear_case_is_not():
    y = _most_probable(LOGITS, 0.03)
    assert y[0].tolist() == [0, 1, 0]
    torch.testing.assert_close(y[1], torch.tensor([0.5, 0.5, 0.0]), rtol=0, atol=1e-3)
    torch.testing.assert_close(y.sum(1), torch.ones(3))
    assert bool(y.isfinite().all())


@pytest.mark.parametrize("gap", [0.0, 1e-4, 1e-3, 1e-2])
def test_crossing_a_tie_does_not_jump(gap):
    near, beyond = torch.tensor([[1.0, 1.0 - gap, -1.0]]), torch.tensor([[1.0 - gap, 1.0, -1.0]])
    jump = (_most_probable(near, 0.03) - _most_probable(beyond, 0.03)).abs().max()
    assert float(jump) <= gap / (0.03 * float(near.std())) + 1e-5


def test_a_single_component_is_certain():
    assert _most_probable(torch.randn(4, 1), 0.03).tolist() == [[1]] * 4
