"""The gene-mean baseline is a negative binomial fitted as well as one can: rates by group, a dispersion for each gene."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from scipy.stats import nbinom

from cellplane.cells import CellBatch
from cellplane.model.masking import mask_of
from cellplane.train.baselines import DISPERSIONS, PSEUDO_COUNT, GeneMeans, HiddenNB, hidden_nb
from tests.tiny import dense, dense_batch, random_batch

GENES, CELLS = 12, 400
THETA = np.array([0.2, 1.0, 5.0, 200.0] * 3)
RATE = np.linspace(1, 12, GENES) / 78


def drawn(cells: int = CELLS, seed: int = 0, rate: np.ndarray = RATE) -> CellBatch:
    """Counts of known rates and dispersions in cells of very different depth."""
    rng = np.random.default_rng(seed)
    mean = rate * rng.lognormal(5, 0.7, (cells, 1))
    counts = nbinom.rvs(THETA, THETA / (THETA + mean), random_state=rng)
    return replace(dense_batch(torch.from_numpy(counts).float(), [cells]), dataset_index=torch.zeros(cells, dtype=torch.int64))


def fitted(*batches: CellBatch, groups: int = 1) -> GeneMeans:
    return GeneMeans.fit(lambda: batches, lambda: batches, (groups, batches[0].n_genes))


def expected_nats(batch: CellBatch, hidden: np.ndarray, means: np.ndarray, theta: np.ndarray, visible: bool) -> np.ndarray:
    """What scipy says of the hidden counts, the means scaled by the hidden or the visible total."""
    counts = dense(batch).numpy().astype(np.float64)
    known = ~hidden if visible else hidden
    scale = (counts * known).sum(1) / (means * known).sum(1)
    scaled = means * scale[:, None]
    return -(nbinom.logpmf(counts, theta, theta / (theta + scaled)) * hidden).sum(1)


def test_likelihoods_are_those_of_a_negative_binomial_scaled_by_either_total():
    batch = random_batch([5, 7])
    hidden = np.random.default_rng(0).random((12, batch.n_genes)) < 0.4
    means = np.random.default_rng(1).gamma(1.0, 1.0, (12, batch.n_genes)) + 0.1
    theta = np.random.default_rng(2).gamma(2.0, 1.0, batch.n_genes) + 0.1
    found = hidden_nb(
        batch,
        mask_of(batch, torch.from_numpy(hidden)),
        lambda cells: (torch.from_numpy(means)[cells].float(), torch.from_numpy(theta).float()),
    )
    for nats, visible in ((found.own_total, False), (found.visible_total, True)):
        np.testing.assert_allclose(nats, expected_nats(batch, hidden, means, theta, visible), rtol=1e-4)


def test_pieces_of_cells_give_what_the_whole_gives(monkeypatch):
    batch, means = drawn(50), fitted(drawn())
    mask = mask_of(batch, torch.rand(50, GENES, generator=torch.Generator().manual_seed(0)) < 0.5)
    whole = hidden_nb(batch, mask, means.predict(batch))
    monkeypatch.setattr("cellplane.train.baselines.VALUES_AT_ONCE", 3 * GENES)
    pieces = hidden_nb(batch, mask, means.predict(batch))
    torch.testing.assert_close(pieces.own_total, whole.own_total)
    torch.testing.assert_close(pieces.visible_total, whole.visible_total)


def test_cells_that_hide_nothing_cost_nothing():
    batch, means = drawn(6), fitted(drawn())
    hidden = torch.zeros(6, GENES, dtype=torch.bool)
    hidden[2] = True
    found = hidden_nb(batch, mask_of(batch, hidden), means.predict(batch))
    assert (found.own_total != 0).nonzero()[:, 0].tolist() == [2]
    assert (found.visible_total != 0).nonzero()[:, 0].tolist() == [2]


def test_genes_that_were_not_measured_are_in_no_total():
    counts = dense(drawn(20))
    panel = torch.arange(GENES) < 8
    narrow = replace(dense_batch(counts * panel, [20], panel), dataset_index=torch.zeros(20, dtype=torch.int64))
    small = replace(dense_batch(counts[:, :8], [20]), dataset_index=torch.zeros(20, dtype=torch.int64))
    hidden = torch.rand(20, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    wide = torch.cat([hidden, torch.ones(20, 4, dtype=torch.bool)], 1)
    rates = torch.rand(20, GENES) + 0.1
    theta = torch.ones(GENES)
    one = hidden_nb(narrow, mask_of(narrow, wide), lambda cells: (rates[cells], theta))
    other = hidden_nb(small, mask_of(small, hidden), lambda cells: (rates[cells, :8], theta[:8]))
    torch.testing.assert_close(one.own_total, other.own_total)
    torch.testing.assert_close(one.visible_total, other.visible_total)


def test_rates_are_each_gene_s_share_with_a_pseudo_count():
    batch = drawn()
    counts = dense(batch).sum(0).double() + PSEUDO_COUNT
    torch.testing.assert_close(fitted(batch).rates[1].double(), counts / counts.sum(), rtol=1e-5, atol=0)
    assert (fitted(batch).rates > 0).all()


def test_dispersions_are_found_to_a_step_of_the_grid():
    found = fitted(*(drawn(2000, seed) for seed in range(2))).dispersion.double().numpy()
    steps = np.abs(np.log(found / THETA)) / float(torch.log(DISPERSIONS[1] / DISPERSIONS[0]))
    assert (steps[THETA < 100] <= 1.01).all()


def test_counts_without_bursts_are_found_nearly_poisson(monkeypatch):
    monkeypatch.setattr(f"{__name__}.THETA", np.full(GENES, 1e4))
    assert (fitted(drawn(2000)).dispersion > 100).all()


def test_the_fitted_dispersion_beats_any_other_on_the_cells_it_was_fitted_to():
    batch = drawn()
    means = fitted(batch)
    mask = mask_of(batch, torch.ones(CELLS, GENES, dtype=torch.bool))
    nats = {
        theta: float(hidden_nb(batch, mask, GeneMeans(means.rates, torch.full((GENES,), theta)).predict(batch)).own_total.sum())
        for theta in (0.1, 1.0, 10.0)
    }
    assert float(hidden_nb(batch, mask, means.predict(batch)).own_total.sum()) < min(nats.values())


def two_groups() -> tuple[CellBatch, CellBatch]:
    first, second = drawn(200, 0), drawn(200, 1, RATE[::-1].copy())
    return first, replace(second, dataset_index=torch.ones(200, dtype=torch.int64), batch_index=torch.ones(200, dtype=torch.int64) * 2)


def test_every_data_set_has_rates_of_its_own_and_an_unknown_one_those_of_all():
    means = fitted(*two_groups(), groups=3)
    np.testing.assert_allclose(means.rates[1], RATE, rtol=0.25)
    np.testing.assert_allclose(means.rates[2], RATE[::-1], rtol=0.25)
    torch.testing.assert_close(means.rates[3], means.rates[0])  # a data set of which no cell was seen
    stranger = replace(drawn(2), dataset_index=torch.tensor([-1, 7]))
    predicted, _ = means.predict(stranger)(torch.arange(2))
    torch.testing.assert_close(predicted, means.rates[[0, 0]])


def test_samples_can_be_told_apart_instead_of_data_sets():
    first, second = two_groups()
    first = replace(first, batch_index=torch.zeros(200, dtype=torch.int64))
    both = [first, replace(second, dataset_index=first.dataset_index)]
    means = GeneMeans.fit(lambda: both, lambda: both, (3, GENES), "batch_index")
    predicted, _ = means.predict(both[1])(torch.arange(1))
    np.testing.assert_allclose(predicted[0], RATE[::-1], rtol=0.25)


def test_workers_that_share_the_cells_find_what_one_finds():
    parts = two_groups()
    sums: list[list[torch.Tensor]] = [[], []]

    def keeping(worker: int) -> GeneMeans:
        def reduce(values: torch.Tensor) -> torch.Tensor:
            sums[worker].append(values)
            others = [kept[len(sums[worker]) - 1] for kept in sums[:worker]]
            return values + sum(others) if others else values

        return GeneMeans.fit(lambda: parts[worker : worker + 1], lambda: parts[worker : worker + 1], (2, GENES), reduce=reduce)

    alone = fitted(*parts, groups=2)
    keeping(0)
    together = keeping(1)
    torch.testing.assert_close(together.rates, alone.rates)
    counts_of_both = sums[0][0] + sums[1][0]
    assert counts_of_both.sum() == sum(float(part.value.sum()) for part in parts)


def test_depth_bins_hardly_change_the_likelihood(monkeypatch):
    batch = drawn()
    coarse = fitted(batch).dispersion
    monkeypatch.setattr("cellplane.train.baselines.DEPTHS_PER_OCTAVE", 64)
    assert (fitted(batch).dispersion == coarse).float().mean() >= 0.9


def test_a_cell_without_visible_counts_still_gets_a_finite_answer():
    batch = replace(dense_batch(torch.zeros(1, GENES), [1]), dataset_index=torch.zeros(1, dtype=torch.int64))
    found = hidden_nb(batch, mask_of(batch, torch.ones(1, GENES, dtype=torch.bool)), fitted(drawn()).predict(batch))
    assert isinstance(found, HiddenNB)
    assert found.own_total.isfinite().all()
    assert found.visible_total.isfinite().all()


def test_large_and_fractional_counts_are_computed_and_give_what_listed_ones_give(monkeypatch):
    batch = drawn()
    listed = fitted(batch).dispersion
    monkeypatch.setattr("cellplane.train.baselines.LISTED", 3)
    torch.testing.assert_close(fitted(batch).dispersion, listed)
    halves = replace(batch, value=batch.value + 0.5)
    assert fitted(halves).dispersion.isfinite().all()
