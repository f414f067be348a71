"""A linear classifier beside the network: pooled by logarithms, kept to the bit, and blind to what was not measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cellplane.artifact.folder import JUDGEMENT_CELLS
from cellplane.artifact.judgement import Judgement
from cellplane.artifact.linear import Linear, pooled
from cellplane.artifact.space import Space, rounded
from cellplane.errors import DataError, FileFormatError
from tests.artifact.test_judgement import batch, reference, rule

RNG = np.random.default_rng(1)
Z = np.zeros((4, 2), np.float32)


def linear(share: float = 0.5, total: float = 0.0) -> Linear:
    axes = rounded(RNG.normal(size=(6, 3)))
    mean = RNG.uniform(0.5, 2, 6).astype(np.float32)
    return Linear(Space(axes, mean, total), RNG.normal(size=3).astype(np.float32), share)


def logits() -> np.ndarray:
    return RNG.normal(size=(4, 3)).astype(np.float32)


def softmax(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).softmax(-1).numpy()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_whole_share_is_one_answer_alone(share):
    network, other = logits(), logits()
    np.testing.assert_allclose(softmax(pooled(network, other, share)), softmax(other if share else network), rtol=1e-5)


def test_where_one_doubts_the_other_decides():
    network, other = np.array([[0, 0, 0], [4, 0, 0]], np.float32), np.array([[0, 3, 0], [0, 0, 0]], np.float32)
    assert pooled(network, other, 0.5).argmax(1).tolist() == [1, 0]


@pytest.mark.parametrize("total", [0.0, 1e4])
def test_a_saved_member_answers_to_the_bit(total):
    own = Judgement(1.3, reference(), rule(), linear=linear(0.25, total))
    again = Judgement.of(own.attachments())
    network = logits()
    np.testing.assert_array_equal(again.probabilities(network, Z, batch()), own.probabilities(network, Z, batch()))
    assert again.linear is not None
    assert again.linear.share == 0.25
    assert again.attachments() == own.attachments()


def test_the_temperature_is_that_of_the_mixture():
    member, network = linear(), logits()
    expected = softmax(member.mixed(network, batch()) / np.float32(2))
    np.testing.assert_array_equal(Judgement(2.0, linear=member).probabilities(network, Z, batch()), expected)


def test_a_judgement_without_one_is_written_as_before():
    files = Judgement(1.7, reference(), rule()).attachments()
    assert not any(b"linear" in data for data in files.values())
    assert Judgement.of(files).linear is None


def test_a_gene_that_was_not_measured_counts_as_average():
    member = linear()
    seen = [True, True, False, True, True, True]
    without = batch(panel=seen)
    dense = np.zeros((4, 6), np.float32)
    dense[np.repeat(np.arange(4), 5), without.gene.numpy()] = np.log1p(without.value.numpy())
    dense[:, 2] = member.space.mean[2]
    expected = (dense - member.space.mean) @ member.space.axes + member.bias
    np.testing.assert_allclose(member.logits(without), expected, rtol=1e-4, atol=1e-5)


def test_an_average_cell_gets_the_bias():
    member = linear()
    np.testing.assert_allclose(member.logits(batch(panel=[False] * 6)), np.tile(member.bias, (4, 1)), rtol=1e-6)


def test_it_cannot_answer_without_counts_and_says_so():
    with pytest.raises(DataError, match="pass the batch"):
        Judgement(linear=linear()).probabilities(logits(), Z)


def test_a_folder_that_lost_its_axes_is_refused():
    files = Judgement(1.0, reference(), rule(), linear=linear()).attachments()
    damaged = {**files, JUDGEMENT_CELLS: Judgement(1.0, reference(), rule()).attachments()[JUDGEMENT_CELLS]}
    with pytest.raises(FileFormatError, match="not readable"):
        Judgement.of(damaged)
