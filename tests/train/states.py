"""Training states that differ in every tensor, and how to compare them."""

from __future__ import annotations

from dataclasses import replace

import torch

from cellplane.train.checkpoint import TrainingState

IDENTITY = "this run"


def state_of(step: int, identity: str = IDENTITY) -> TrainingState:
    """A state whose every tensor depends on the step; weights are stored transposed to be not contiguous."""
    generator = torch.Generator().manual_seed(step)
    weights = {"linear.weight": torch.randn(5, 3, generator=generator).T, "linear.bias": torch.randn(3, generator=generator)}
    names = [f"{moment}:{name}" for moment in ("exp_avg", "exp_avg_sq") for name in weights]
    moments = {name: torch.randn(weights[name.partition(":")[2]].shape, generator=generator) for name in names}
    return TrainingState(step, weights, moments, identity)


def large_state(step: int, megabytes: int = 8) -> TrainingState:
    """A state that takes a while to write."""
    state = state_of(step)
    return replace(state, weights={**state.weights, "large": torch.full((megabytes * 250_000,), float(step))})


def assert_same(found: TrainingState | None, expected: TrainingState) -> None:
    """Equal in every field, tensors to the bit."""
    assert found is not None
    assert (found.step, found.identity, dict(found.extra)) == (expected.step, expected.identity, dict(expected.extra))
    assert found.weights.keys() == expected.weights.keys()
    assert found.optimizer.keys() == expected.optimizer.keys()
    for name, tensor in {**expected.weights, **expected.optimizer}.items():
        torch.testing.assert_close({**found.weights, **found.optimizer}[name], tensor, rtol=0, atol=0)
