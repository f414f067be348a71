"""A run may begin where its cells vary: the same place on every rank, told by cells that are trained on alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

from cellplane.data.loader import ShardStore
from cellplane.errors import CheckpointError, DataError
from cellplane.model.cellplm import new_model
from cellplane.model.config import ModelConfig
from cellplane.train import worker
from cellplane.train.checks import origin_of
from cellplane.train.components import Sample, begin_at_directions, samples_of, variable_together
from cellplane.train.identity import run_identity
from cellplane.train.launch import newest_state
from cellplane.train.run_folder import RunFolder
from cellplane.train.worker import run_worker

GENES, CELLS = 30, 400


def sample(seed: int = 0, shift: float = 0.0, measured: int = GENES) -> Sample:
    """Two directions of very different strength, and little else."""
    generator = np.random.default_rng(seed)
    logs = generator.normal(scale=0.01, size=(CELLS, GENES))
    logs[:, :5] += 4 * generator.normal(size=(CELLS, 1))
    logs[:, 5:10] += generator.normal(size=(CELLS, 1))
    logs[:, measured:] = 0
    return Sample(sparse.csr_matrix(logs + shift * (np.arange(GENES) < measured)), np.arange(GENES) < measured)


def network():
    return new_model(ModelConfig(n_genes=GENES, width=16, n_heads=2, n_blocks=1, latent="ae"), 0)


def spread(begun, one: Sample, size: int) -> np.ndarray:
    return (one.logs_CG @ begun.embedder.genes_GD.detach().numpy().astype(np.float64))[:, :size].std(axis=0)


@pytest.mark.parametrize(("whitening", "expected"), [(0.0, 4.0), (0.5, 2.0), (1.0, 1.0)])
def test_whitening_says_how_far_strong_directions_drown_weak_ones(whitening, expected):
    begun, one = network(), sample()
    assert begin_at_directions(begun, [one], 2, whitening) == 2
    first, second = spread(begun, one, 2)
    assert first / second == pytest.approx(expected, rel=0.15)
    assert (first**2 + second**2) / 2 == pytest.approx(1, rel=1e-2)


def test_the_mean_cell_enters_as_nothing():
    begun, one = network(), sample(shift=3.0)
    begin_at_directions(begun, [one], 4)
    entered = begun.embedder.linear(torch.from_numpy(one.logs_CG @ begun.embedder.genes_GD.detach().double().numpy()).float())
    torch.testing.assert_close(entered.mean(0), torch.zeros(16), atol=1e-4, rtol=0)


def test_what_sets_two_studies_apart_is_no_direction():
    begun, studies = network(), [sample(0), sample(1, shift=50.0)]
    begin_at_directions(begun, studies, 2)
    genes = begun.embedder.genes_GD.detach().numpy()[:, :2]
    assert np.abs(genes[10:]).max() < 0.01 * np.abs(genes).max(), "a shift of all genes reached the gene vectors"


def test_a_gene_counts_by_the_studies_that_measured_it(monkeypatch):
    monkeypatch.setattr("cellplane.train.components.VARIABLE_GENES", 10)
    assert variable_together([sample(0), sample(1, measured=5)]).tolist() == list(range(10))


def test_too_few_cells_have_no_directions():
    few = Sample(sample().logs_CG[:2], np.ones(GENES, dtype=bool))
    with pytest.raises(DataError, match="3 cells"):
        begin_at_directions(network(), [few], 2)


def test_only_sentences_that_are_trained_on_are_looked_at(shards: Path):
    store = ShardStore(shards)
    asked = np.arange(3)
    seen = sum(one.logs_CG.shape[0] for one in samples_of(store, asked, 0.0, 0))
    assert seen == store.sizes[asked].sum()


def test_a_run_begins_there_and_a_resumed_one_goes_on(run_config, tmp_path, monkeypatch):
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path))
    begun: list[float] = []
    real = worker.begin_at_directions

    def counted(net, samples, most):
        size = real(net, samples, most)
        begun.append(float(net.embedder.genes_GD.detach().norm()))
        return size

    monkeypatch.setattr(worker, "begin_at_directions", counted)
    changes = {"gene_start": "components", "engine": {"name": "torch"}, "workers": {"count": 1}, "validation": {"share": 0.2}}
    config = run_config("there", {**changes, "optimizer": {"steps": 2}})
    RunFolder.of(config.run).remember(config, origin_of(config))
    run_worker(config, 1, 0, lambda _: None)
    run_worker(config, 1, 0, lambda _: None)
    assert len(begun) == 1
    assert begun[0] > 0.1
    assert newest_state(config).step == 2
    with pytest.raises(CheckpointError, match="gene_start"):
        newest_state(config.model_copy(update={"gene_start": "random"}))


def test_runs_of_earlier_versions_keep_their_identity(run_config):
    plain = run_config("r")
    assert run_identity(plain) == run_identity(plain.model_copy(update={"components": 7}))
    assert run_identity(plain) != run_identity(plain.model_copy(update={"gene_start": "components"}))
