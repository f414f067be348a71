"""Answers are worded alike wherever they are asked for, and what words them survives saving to the bit."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cellplane.artifact.folder import JUDGEMENT, JUDGEMENT_CELLS
from cellplane.artifact.judgement import Judgement, Reference, StrangerRule, Tree, mean_distance, stranger_features
from cellplane.artifact.space import Space, rounded
from cellplane.cells import CellBatch
from cellplane.data.sentences import CellTable, memory_store
from cellplane.errors import DataError, FileFormatError

CLASSES = ("B", "CD4 T", "CD8 T")
TREE = Tree({"B": "lymphocyte", "CD4 T": "T", "CD8 T": "T", "T": "lymphocyte"}, 0.8)
RNG = np.random.default_rng(0)


def reference() -> Reference:
    """Ten cells of each class around (10 x class, 0)."""
    label = np.repeat(np.arange(3), 10)
    z = rounded(RNG.normal(size=(30, 2)) + np.stack([10.0 * label, np.zeros(30)], 1))
    return Reference(z, label, np.ones(3, np.float32), 5)


def rule() -> StrangerRule:
    return StrangerRule(np.zeros(2), np.ones(2), np.array([0.25, 0.75]), np.linspace(0, 1, 99))


def batch(n_genes: int = 6, cells: int = 4, panel: list[bool] | None = None) -> CellBatch:
    """Every cell shows all measured genes, more of the later ones."""
    measured = np.array(panel or [True] * n_genes)
    gene = np.flatnonzero(measured)
    table = CellTable(
        crow=np.arange(cells + 1) * len(gene),
        gene=np.tile(gene, cells),
        value=(np.tile(gene, cells) + np.repeat(np.arange(cells), len(gene)) + 1).astype(np.float32),
        panel=measured,
    )
    return memory_store(table, cells).read([0])


def proba(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


def test_a_model_without_a_judgement_answers_as_before():
    logits = RNG.normal(size=(5, 3)).astype(np.float32)
    plain = Judgement.of({})
    z = np.zeros((5, 2), np.float32)
    np.testing.assert_array_equal(plain.probabilities(logits, z), torch.from_numpy(logits).softmax(-1).numpy())
    assert plain.unknown_scores(plain.probabilities(logits, z), z, batch(cells=5)) is None
    labels, confidence = plain.words(plain.probabilities(logits, z), None, CLASSES)
    assert labels.tolist() == [CLASSES[index] for index in logits.argmax(1)]
    np.testing.assert_array_equal(confidence, plain.probabilities(logits, z).max(1))
    assert plain.attachments() == {}


def test_what_was_saved_answers_to_the_bit():
    space = Space(rounded(RNG.normal(size=(6, 2))), RNG.random(6).astype(np.float32), 1e4)
    own = Judgement(1.7, reference(), rule(), space, reference(), TREE, reject=True, refusal_rate=0.1)
    again = Judgement.of(own.attachments())
    z, cells = RNG.normal(size=(4, 2)).astype(np.float32), batch()
    expected = own.probabilities(None, z)
    np.testing.assert_array_equal(again.probabilities(None, z), expected)
    np.testing.assert_array_equal(again.unknown_scores(expected, z, cells), own.unknown_scores(expected, z, cells))
    assert (again.tree, again.reject, again.refusal_rate, again.temperature) == (TREE, True, 0.1, 1.7)
    assert again.attachments() == own.attachments()


def test_a_damaged_judgement_says_so():
    files = Judgement(1.7, reference(), rule()).attachments()
    for broken in (
        {**files, JUDGEMENT: b"{"},
        {**files, JUDGEMENT: json.dumps({"temperature": 1}).encode()},
        {JUDGEMENT: files[JUDGEMENT]},
    ):
        with pytest.raises(FileFormatError, match=r"judgement\.json is not readable"):
            Judgement.of(broken)
    with pytest.raises(FileFormatError, match="attachment of tensors"):
        Judgement.of({**files, JUDGEMENT_CELLS: b"nothing"})


def test_a_temperature_changes_confidence_and_no_label():
    logits = RNG.normal(size=(50, 3)).astype(np.float32)
    z = np.zeros((50, 2), np.float32)
    plain, calm = Judgement().probabilities(logits, z), Judgement(4.0).probabilities(logits, z)
    np.testing.assert_array_equal(plain.argmax(1), calm.argmax(1))
    assert (calm.max(1) < plain.max(1)).all()


def test_without_head_and_voters_nothing_can_be_named():
    with pytest.raises(DataError, match="cannot name cell types"):
        Judgement().probabilities(None, np.zeros((1, 2), np.float32))


def test_neighbours_vote_for_the_class_they_are_of():
    votes = reference().votes(np.array([[0, 0], [10, 0], [20, 0]], np.float32))
    assert votes.argmax(1).tolist() == [0, 1, 2]
    np.testing.assert_allclose(np.exp(votes).sum(1), 1, atol=1e-6)
    assert np.isfinite(votes).all()


def test_distance_is_measured_in_the_scale_of_the_predicted_class():
    cells = replace(reference(), scale=np.array([1, 2, 4], np.float32))
    far = np.array([[1000, 0]] * 3, np.float32)
    ratios = cells.distance_ratios(far, np.array([0, 1, 2]))
    assert ratios[0] > 1.9 * ratios[1] > 3.5 * ratios[2]


def test_a_cell_is_not_its_own_neighbour():
    line = np.array([[0.0], [1.0], [3.0]], np.float32)
    np.testing.assert_allclose(mean_distance(line, line, 1, itself=True), [1, 1, 2])
    np.testing.assert_allclose(mean_distance(line, line, 15, itself=True), [2, 1.5, 2.5])
    assert np.isnan(mean_distance(line[:1], line[:1], 1, itself=True)).all()


def test_undecided_and_distant_cells_are_strange():
    near, far = np.array([[0, 0]], np.float32), np.array([[50, 0]], np.float32)
    sure, torn = proba([0.98, 0.01, 0.01]), proba([0.34, 0.33, 0.33])
    score = {
        (a, b): rule().scores(stranger_features(p, z, reference()))[0]
        for (a, p), (b, z) in [((a, p), (b, z)) for a, p in (("sure", sure), ("torn", torn)) for b, z in (("near", near), ("far", far))]
    }
    assert score["sure", "near"] < score["torn", "near"]
    assert score["sure", "near"] < score["sure", "far"] < score["torn", "far"]


@pytest.mark.parametrize("rate", [0.02, 0.05, 0.25, 0.9])
def test_the_asked_share_of_known_cells_lies_above_the_threshold(rate):
    assert np.mean(rule().known > rule().threshold(rate)) == pytest.approx(rate, abs=0.011)


def test_too_few_known_cells_refuse_nobody():
    few = replace(rule(), known=np.arange(5.0))
    assert few.threshold(0.05) == math.inf
    assert few.threshold(0.5) < math.inf


def test_strangers_are_refused_when_asked_and_all_may_be():
    scores = np.array([0.2, 5.0], np.float32)
    judgement = Judgement(reference=reference(), rule=rule(), reject=True)
    p = proba([0.9, 0.1, 0], [0.9, 0.1, 0])
    assert judgement.words(p, scores, CLASSES)[0].tolist() == ["B", "unknown"]
    assert judgement.words(p, scores + 9, CLASSES)[0].tolist() == ["unknown", "unknown"]
    assert replace(judgement, reject=False).words(p, scores, CLASSES)[0].tolist() == ["B", "B"]
    with pytest.raises(DataError, match="fit it again"):
        Judgement(reject=True).words(p, None, CLASSES)


def test_an_unsure_cell_gets_the_deepest_name_that_passes():
    p = proba([0.9, 0.05, 0.05], [0.1, 0.45, 0.45], [0.4, 0.3, 0.3], [0.0, 0.8, 0.2])
    labels, confidence = Judgement(tree=TREE).words(p, None, CLASSES)
    assert labels.tolist() == ["B", "T", "lymphocyte", "CD4 T"]
    np.testing.assert_allclose(confidence, [0.9, 0.9, 1, 0.8], atol=1e-6)


def test_a_class_may_itself_be_above_others():
    tree = Tree({"CD4 T": "T", "B": "cell", "T": "cell"}, 0.8)
    labels, _ = Judgement(tree=tree).words(proba([0.0, 0.5, 0.5], [0.0, 0.1, 0.9], [0.4, 0.3, 0.3]), None, ("B", "CD4 T", "T"))
    assert labels.tolist() == ["T", "T", "cell"]


def test_no_cells_get_no_words():
    nobody = np.zeros((0, 3), np.float32)
    for judgement in (Judgement(), Judgement(tree=TREE), Judgement(reference=reference(), rule=rule(), reject=True)):
        labels, confidence = judgement.words(nobody, np.zeros(0, np.float32), CLASSES)
        assert (labels.shape, confidence.shape) == ((0,), (0,))


def test_a_gene_that_was_not_measured_counts_as_average():
    mean = np.log1p(np.arange(1, 7)).astype(np.float32)
    space = Space(np.eye(6, dtype=np.float32), mean, 0.0)
    everything, some = space.places(batch(cells=1)), space.places(batch(cells=1, panel=[True, False] * 3))
    np.testing.assert_allclose(some[0, [1, 3, 5]], 0, atol=1e-6)
    np.testing.assert_allclose(some[0, [0, 2, 4]], everything[0, [0, 2, 4]], atol=1e-6)


def test_scaled_counts_forget_the_depth_of_a_cell():
    space = Space(np.eye(6, dtype=np.float32), np.zeros(6, np.float32), 1e4)
    cells = batch(cells=2)
    deeper = replace(cells, value=cells.value * 7)
    np.testing.assert_allclose(space.places(deeper), space.places(cells), atol=1e-4)
    plain = replace(space, total=0.0)
    assert np.abs(plain.places(deeper) - plain.places(cells)).max() > 1


def test_numbers_too_large_for_16_bits_stay_as_they_are():
    large = np.array([[1e6, 1.0]], np.float32)
    np.testing.assert_array_equal(rounded(large), large)
    own = Judgement(1.0, replace(reference(), z=np.vstack([reference().z[:29], large])), rule())
    again = Judgement.of(own.attachments())
    np.testing.assert_array_equal(again.reference.z, own.reference.z)
