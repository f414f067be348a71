"""Evening an embedding is a turn and a stretch of these cells, no more: neighbours of strong directions stay, weak ones show."""

from __future__ import annotations

import numpy as np
import pytest

from cellplane.errors import DataError
from cellplane.pipelines.embedding import CellEmbeddingPipeline
from cellplane.pipelines.evening import evened


@pytest.fixture
def latent() -> np.ndarray:
    generator = np.random.default_rng(0)
    turn = np.linalg.qr(generator.normal(size=(6, 6)))[0]
    return (generator.normal(size=(500, 6)) * [16, 8, 4, 2, 1, 0.5] + 3) @ turn


@pytest.mark.parametrize(("power", "ratio"), [(0.0, 16.0), (0.5, 4.0), (1.0, 1.0)])
def test_power_says_how_much_of_the_strongest_directions_lead_is_left(latent, power, ratio):
    spread = evened(latent, power).std(axis=0)
    assert spread[0] / spread[4] == pytest.approx(ratio, rel=0.15)
    assert np.allclose(evened(latent, power).mean(axis=0), 0, atol=1e-4)


def test_power_zero_keeps_every_distance(latent):
    placed = evened(latent, 0.0)
    before, after = (np.linalg.norm(one[:50, None] - one[None, :50], axis=2) for one in (latent, placed))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


def test_a_sample_that_lies_apart_is_brought_back(latent):
    samples = np.repeat(["one", "two"], 250)
    shifted = latent + 100.0 * (samples == "two")[:, None]
    placed = evened(shifted, 0.5, samples)
    np.testing.assert_allclose(placed[:250].mean(axis=0), placed[250:].mean(axis=0), atol=1e-3)
    apart = evened(shifted)
    assert np.linalg.norm(apart[:250].mean(axis=0) - apart[250:].mean(axis=0)) > 1


def test_directions_without_spread_stay_finite(latent):
    flat = np.hstack([latent, latent[:, :1], np.zeros((500, 1))])
    assert np.isfinite(evened(flat, 1.0)).all()
    assert np.isfinite(evened(np.ones((5, 3)))).all()
    with pytest.raises(DataError, match="two cells"):
        evened(latent[:1])


def test_the_pipeline_evens_when_asked_and_never_by_itself(base_model, query):
    pipeline = CellEmbeddingPipeline(base_model)
    plain = pipeline.predict(query)
    np.testing.assert_array_equal(pipeline.predict(query, even=0.5), evened(plain))
    data = query.copy()
    pipeline.predict(data, key_added="cellplm", even=0.5)
    assert data.uns["cellplm"]["even"] == 0.5
