"""The neighbours of a denoiser: a walk that stays among similar cells, kept with the model, answering one cell like many."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp

from cellplane.artifact.folder import SMOOTHING
from cellplane.artifact.smoothing import Smoothing, nearest
from cellplane.cells import CellBatch
from cellplane.data.config import DataKeys
from cellplane.data.sentences import CellTable, memory_store
from cellplane.data.sources import AnnData, cell_table
from cellplane.errors import FileFormatError
from cellplane.genes import GeneVocabulary
from cellplane.pipelines.config import DenoisingConfig
from cellplane.pipelines.denoising_smoothing import Setting, smoothing_of


def two_kinds() -> AnnData:
    """80 cells of two kinds that share no gene."""
    rng = np.random.default_rng(0)
    kind = np.repeat([0, 1], 40)
    rates = np.where((np.arange(30) < 15)[None, :] == (kind == 0)[:, None], 5.0, 0.0)
    data = AnnData(X=sp.csr_matrix(rng.poisson(rates).astype(np.float32)))
    data.obs_names, data.var_names = [f"cell{n}" for n in range(80)], [f"GENE{n}" for n in range(30)]
    return data


@pytest.fixture(scope="module")
def table() -> CellTable:
    data = two_kinds()
    return cell_table(data, GeneVocabulary.from_ids(data.var_names), DataKeys())[0]


@pytest.fixture(scope="module")
def smoothing(table) -> Smoothing:
    found = smoothing_of(table, DenoisingConfig.model_validate({"smoothing": {"components": 5}}), Setting(10, 3, 0.5))
    assert found is not None
    return found


def batch_of(table: CellTable) -> CellBatch:
    return memory_store(table, table.n_cells).read([0])


def test_a_walk_ends_among_cells_of_its_own_kind(smoothing, table):
    ends = smoothing.arrivals(smoothing.space.places(batch_of(table)), 3)
    np.testing.assert_allclose(ends.sum(1), 1, rtol=1e-6)
    assert ends[:40, 40:].max() == ends[40:, :40].max() == 0


def test_the_average_is_of_shares_and_smoother_than_the_cells(smoothing, table):
    shares = smoothing.averages(batch_of(table))
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-5)
    own = sp.csr_matrix((table.value, table.gene, table.crow), shape=shares.shape).toarray() / table.totals()[:, None]
    assert shares[:40].std(0).sum() < 0.5 * own[:40].std(0).sum()


def test_the_share_weighs_network_and_neighbours_and_leaves_unmeasured_genes_alone(smoothing, table):
    batch = batch_of(table)
    network = np.full((80, 30), 1 / 30, dtype=np.float32)
    whole, half, none = (replace(smoothing, share=share).mixed(batch, network) for share in (1.0, 0.5, 0.0))
    np.testing.assert_allclose(none, network)
    np.testing.assert_allclose(half, (whole + network) / 2, rtol=1e-5)
    np.testing.assert_allclose(half.sum(1), 1, rtol=1e-5)
    unknown = replace(smoothing, panel=np.arange(30) >= 3)
    np.testing.assert_allclose(unknown.mixed(batch, network)[:, :3], 1 / 30)
    unmeasured = network.copy()
    unmeasured[:, 5] = 0
    assert (smoothing.mixed(batch, unmeasured)[:, 5] == 0).all()


def test_one_cell_alone_is_answered_like_among_others(smoothing, table):
    together = smoothing.averages(batch_of(table))
    alone = smoothing.averages(batch_of(table.rows(np.array([7]))))
    np.testing.assert_allclose(alone[0], together[7], rtol=1e-5)


def test_it_survives_its_files_and_a_torn_one_is_told(smoothing, table):
    files = smoothing.attachments()
    again = Smoothing.of(files)
    assert again is not None
    np.testing.assert_array_equal(again.averages(batch_of(table)), smoothing.averages(batch_of(table)))
    assert (again.neighbours, again.steps, again.share) == (10, 3, 0.5)
    assert Smoothing.of({}) is None
    with pytest.raises(FileFormatError, match=r"smoothing\.json"):
        Smoothing.of({**files, SMOOTHING: b"{"})


def test_nearest_weighs_by_distance_and_takes_all_where_there_are_few():
    place = np.array([[0.0], [1.0], [10.0]], dtype=np.float32)
    graph = nearest(place, place, 5).toarray()
    np.testing.assert_allclose(graph.sum(1), 1)
    assert graph[0, 0] > graph[0, 1] > graph[0, 2]
    assert nearest(place[:0], place, 5).shape == (0, 3)
