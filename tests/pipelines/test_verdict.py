"""A verdict says in words who is better, and only when the choice of cells or genes cannot explain it."""

from __future__ import annotations

import numpy as np
import pytest

from cellplane.errors import DataError
from cellplane.pipelines.metrics import annotation_scores
from cellplane.pipelines.verdict import Lead, Measure, Verdict, few_lead, halves_lead, macro_f1_lead, mean_lead

F1 = Measure("macro-F1", "hidden cells")


def verdict(lead: Lead, **changes: object) -> Verdict:
    return Verdict(**{"measure": F1, "n": 100, "model": 0.8, "baseline": "ridge", "other": 0.7, "lead": lead, **changes})


def answers(cells: int, right: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    truth = generator.choice(["a", "b", "c"], cells, p=[0.6, 0.3, 0.1])
    return truth, np.where(generator.random(cells) < right, truth, generator.choice(["a", "b", "c"], cells))


def test_the_lead_is_the_difference_of_the_scores():
    truth, mine = answers(300, 0.9, 0)
    _, theirs = answers(300, 0.6, 1)
    lead = macro_f1_lead(truth, mine, theirs)
    expected = [annotation_scores(truth.astype(object), one.astype(object))["macro_f1"] for one in (mine, theirs)]
    assert lead.mean == pytest.approx(expected[0] - expected[1])
    assert lead.low < lead.mean < lead.high


def test_the_interval_is_that_of_resampled_cells():
    truth, mine = answers(200, 0.9, 0)
    _, theirs = answers(200, 0.7, 1)
    generator, found = np.random.default_rng(5), []
    for _ in range(400):
        rows = generator.integers(0, 200, 200)
        scores = [annotation_scores(truth[rows].astype(object), one[rows].astype(object))["macro_f1"] for one in (mine, theirs)]
        found.append(scores[0] - scores[1])
    lead = macro_f1_lead(truth, mine, theirs)
    np.testing.assert_allclose([lead.low, lead.high], np.quantile(found, (0.025, 0.975)), atol=0.03)


def test_more_cells_make_a_narrower_interval():
    few, many = (macro_f1_lead(*answers(cells, 0.9, 0), answers(cells, 0.8, 1)[1]) for cells in (100, 4000))
    assert many.high - many.low < (few.high - few.low) / 3


def test_equal_answers_have_no_lead():
    truth, mine = answers(50, 0.9, 0)
    assert macro_f1_lead(truth, mine, mine.copy()) == Lead(0.0, 0.0, 0.0)


def test_a_type_with_one_cell_does_not_break_a_resampling():
    truth = np.array(["a"] * 9 + ["b"])
    lead = macro_f1_lead(truth, truth.copy(), np.array(["a"] * 10))
    assert np.isfinite([lead.mean, lead.low, lead.high]).all()


def test_nothing_is_told_of_no_cells():
    none = np.zeros(0, dtype=object)
    with pytest.raises(DataError):
        macro_f1_lead(none, none, none)


def test_genes_that_do_not_vary_do_not_count():
    lead = mean_lead(np.array([0.1, np.nan, 0.3]))
    assert lead.mean == pytest.approx(0.2)
    assert 0.1 <= lead.low <= lead.high <= 0.3


@pytest.mark.parametrize(
    ("lead", "decision", "winner", "words"),
    [
        (Lead(0.1, 0.02, 0.2), "model", "cellplm", "Use cellplm."),
        (Lead(-0.1, -0.2, -0.02), "baseline", "ridge", "Use ridge, the simple method"),
        (Lead(0.01, -0.02, 0.04), "undecided", "cellplm", "Too close to tell"),
        (Lead(0.0, 0.0, 0.0), "undecided", "ridge", "Too close to tell"),
    ],
)
def test_a_verdict_is_told_in_plain_words(lead, decision, winner, words):
    found = verdict(lead)
    assert (found.decision, found.winner) == (decision, winner)
    assert found.text.startswith(words)
    assert "100 hidden cells" in found.text
    assert f"{lead.low:+.3f} to {lead.high:+.3f}" in found.text


@pytest.mark.parametrize(
    ("lead", "named"), [(Lead(0.01, -0.02, 0.04), "cellplm"), (Lead(-0.01, -0.04, 0.02), "ridge"), (Lead(0, 0, 0), "ridge")]
)
def test_a_verdict_that_is_too_close_names_one_method_and_one_interval(lead, named):
    found = verdict(lead)
    advice, _, why = found.text.partition(". ")
    assert [name for name in ("cellplm", "ridge") if name in advice] == [named] == [found.winner]
    assert why.count("interval") == found.text.count("interval") == 1


def test_small_leads_are_told_with_more_digits():
    text = verdict(Lead(0.00012, 0.00004, 0.0002), measure=Measure("error", "cells", digits=5)).text
    assert "+0.00004 to +0.00020" in text


def test_errors_are_better_small():
    assert "(smaller is better)" in verdict(Lead(0, 0, 0), measure=Measure("error", "cells", lower_is_better=True)).text


def test_below_the_fewest_units_nothing_follows_and_the_simple_method_answers():
    found = verdict(Lead(0.1, 0.05, 0.15), n=2, least=3, remark="More cells would help.")
    assert (found.decision, found.winner) == ("too few", "ridge")
    assert found.text.startswith("Too few to tell: 2 hidden cells, at least 3 are needed. Over 2 hidden cells, ")
    assert found.text.endswith("More cells would help.")
    assert "Over" not in verdict(Lead(0.1, 0.05, 0.15), n=0, least=3).text
    assert verdict(Lead(0.1, 0.05, 0.15), n=3, least=3).decision == "model"


def test_the_row_of_the_model_that_was_chosen_is_the_one_to_use():
    found = verdict(Lead(0.1, 0.05, 0.15), ours="cellplm, evened")
    assert found.text.startswith("Use cellplm, evened. ")
    assert found.winner == "cellplm, evened"


def test_three_leads_of_one_sign_may_be_chance():
    """A coin gives them once in four times: no unit drawn again has the other sign, so the bootstrap alone would be sure."""
    leads = [0.1, 0.5, 0.9]
    assert mean_lead(np.array(leads)).low > 0
    assert few_lead(leads).low < 0 < few_lead(leads).mean == pytest.approx(0.5)
    assert few_lead([0.49, 0.5, 0.51]).low > 0
    assert few_lead([0.2]) == mean_lead(np.array([0.2]))
    many = np.random.default_rng(0).normal(0.1, 1.0, 300).tolist()
    assert few_lead(many).low == pytest.approx(mean_lead(np.array(many)).low, abs=0.01)


def test_more_halves_do_not_make_the_interval_of_the_halves_narrower():
    """Halves of 400 numbers: the interval is that of the mean of all 400, however often they are halved."""
    generator = np.random.default_rng(0)
    numbers = generator.normal(size=400)
    widths = {}
    for halvings in (20, 200):
        dealt = [np.array_split(generator.permutation(numbers), 2) for _ in range(halvings)]
        lead = halves_lead([float(half.mean()) for pair in dealt for half in pair])
        assert lead.mean == pytest.approx(numbers.mean())
        widths[halvings] = lead.high - lead.low
    assert widths[20] == pytest.approx(2 * 1.96 * numbers.std() / 20, rel=0.4)
    assert widths[200] == pytest.approx(2 * 1.96 * numbers.std() / 20, rel=0.15)
