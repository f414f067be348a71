"""The simulated tissue asks a fair question: the truth can be found with neighbours, and cannot without."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cellplane.benchmark import neighbours
from cellplane.benchmark.neighbours import ALONE, SHUFFLED, WITH, Answer, NeighboursBenchmark, Tissue
from cellplane.train.baselines import hidden_nb

COMPANIES = (ALONE, WITH, SHUFFLED)


@pytest.fixture(scope="module")
def tissue() -> Tissue:
    """Six fields of 250 cells."""
    benchmark = NeighboursBenchmark(cells=1500, steps=2)
    return Tissue(benchmark.simulation(0), benchmark.recipe(0))


def test_the_same_cells_are_asked_the_same_in_any_company(tissue):
    found = []
    for company in COMPANIES:
        batch, mask, scored = tissue.question(tissue.store(company))
        order = batch.row.argsort()
        found.append((batch.row[order].tolist(), mask.hidden_CG[order].tolist(), scored.hidden_CG[order].tolist()))
    assert found[0] == found[1] == found[2]


def test_half_of_the_cells_of_unseen_fields_hide_the_whole_programme_and_it_alone_is_scored(tissue):
    batch, mask, scored = tissue.question(tissue.store(WITH))
    assert tissue.programme.sum() == tissue.simulation.niche.n_genes
    asked = scored.hidden_C > 0
    assert 0.4 < asked.float().mean() < 0.6
    assert set(tissue.fields[batch.row.numpy()]) == set(tissue.unseen)
    assert scored.hidden_CG[asked][:, tissue.programme].all()
    assert not scored.hidden_CG[:, ~tissue.programme].any()
    assert mask.hidden_CG[asked][:, tissue.programme].all()
    assert mask.hidden_C[~asked].sum() == 0
    others = mask.hidden_CG[asked][:, ~tissue.programme].float().mean()
    assert abs(others - tissue.recipe.masking.gene_mask_rate) < 0.03


def test_training_never_sees_a_field_that_is_asked_about(tissue, monkeypatch):
    drawn: set[int] = set()

    def recording(engine, objective, plan, steps):
        drawn.update(sentence for step in range(8) for part in plan.at(step) for sentence in part.sentences)

    monkeypatch.setattr(neighbours, "train", recording)
    for company in COMPANIES:
        drawn.clear()
        store = tissue.store(company)
        tissue.trained(store)
        seen = {int(tissue.fields[row]) for sentence in drawn for row in store.sentences[sentence]}
        assert seen == set(tissue.fields.tolist()) - set(tissue.unseen.tolist())


def test_shuffling_moves_the_cells_of_a_field_and_loses_their_neighbours(tissue):
    before, after = (tissue.store(company).table.coordinates for company in (WITH, SHUFFLED))
    for field in np.unique(tissue.fields):
        members = tissue.fields == field
        assert sorted(map(tuple, before[members])) == sorted(map(tuple, after[members]))
        assert (before[members] != after[members]).any(1).mean() > 0.9


def test_cells_alone_are_sentences_of_one(tissue):
    assert (tissue.store(ALONE).sizes == 1).all()
    assert tissue.store(WITH).sizes.tolist() == np.bincount(tissue.fields).tolist()


def test_the_truth_explains_the_hidden_programme_better_than_rates_without_neighbours(tissue):
    batch, _, mask = tissue.question(tissue.store(WITH))
    rates = np.array(tissue.cells.layers["true_rate"])
    rates[:, tissue.programme] /= tissue.response()[:, None]
    deaf = torch.from_numpy(rates[batch.row.numpy()]).float()
    truth = tissue.truth(batch)
    _, theta = truth(torch.arange(1))
    knowing, unknowing = (hidden_nb(batch, mask, one).visible_total.sum() for one in (truth, lambda cells: (deaf[cells], theta)))
    assert knowing < 0.95 * unknowing


def test_a_correlation_within_groups_ignores_what_groups_have_in_common():
    rng = np.random.default_rng(0)
    groups = np.repeat([0, 1, 3], 200)
    x, y = rng.normal(size=(2, 600)) + 10 * groups
    assert abs(neighbours._within(x, y, groups)) < 0.15
    assert np.corrcoef(x, y)[0, 1] > 0.9
    assert neighbours._within(x, 2 * x + groups, groups) == pytest.approx(1.0)
    assert neighbours._within(np.ones(600), y, groups) == 0.0


def test_a_share_goes_from_the_cells_alone_to_the_truth():
    alone = Answer(0.0, nats=100.0, nats_of_truth=80.0)
    assert alone.share(alone) == 0.0
    assert Answer(0.5, nats=90.0, nats_of_truth=80.0).share(alone) == 0.5
    assert Answer(1.0, nats=80.0, nats_of_truth=80.0).share(alone) == 1.0


def test_gates_hold_when_the_worst_tissue_holds():
    good = {f"{WITH}: correlation": [0.7, 0.8], f"{WITH}: share of the nats": [0.5, 0.6]}
    good |= {f"{ALONE}: correlation": [0.0, 0.1], f"{SHUFFLED}: correlation": [0.0, -0.1], f"{SHUFFLED}: share of the nats": [0.1, 0.0]}
    assert [figure.holds for figure in neighbours._gates(good)] == [True, True, True, True, None, None]
    bad = {**good, f"{WITH}: correlation": [0.7, 0.2], f"{ALONE}: correlation": [0.0, 0.6], f"{WITH}: share of the nats": [0.5, -0.1]}
    assert [figure.holds for figure in neighbours._gates(bad)] == [False, False, True, False, None, None]


@pytest.mark.chaos  # kills nothing, but trains three networks: a minute
def test_neighbours_are_recovered_with_context_and_lost_without_it_or_with_shuffled_coordinates():
    figures = list(NeighboursBenchmark(rounds=1).run())
    gates = [figure for figure in figures if figure.gate]
    assert len(gates) == 4
    assert all(figure.holds for figure in gates), [figure.line() for figure in gates]
