"""Simulated cells have the structure their name promises, and the truth stored with them is the one they were drawn from."""

from __future__ import annotations

import subprocess
import sys

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.spatial import cKDTree

from cellplane.config import find_config, load_config, read_yaml
from cellplane.data.config import KnockoutConfig, NicheConfig, SimulateConfig
from cellplane.data.gene_tables import make_table, write_table
from cellplane.data.simulate import fields, gene_names, simulate, simulate_to
from cellplane.data.sources import AnnData, CellReader, read_h5ad
from cellplane.data.writing import write_in_parts
from cellplane.errors import ConfigError, DataError, StorageError

RICH = SimulateConfig(
    n_cells=700, n_genes=60, n_donors=3, spatial=True, knockouts=KnockoutConfig(n_pairs=3), true_rates=True, field_cells=150
)


def test_the_same_seed_gives_the_same_cells_and_another_gives_others():
    first, again, other = (simulate(SimulateConfig(seed=seed)) for seed in (1, 1, 2))
    assert (first.X != again.X).nnz == 0
    assert first.obs.equals(again.obs)
    assert (first.X != other.X).nnz > 0


def test_counts_are_whole_float32_csr_over_named_genes():
    cells = simulate(SimulateConfig(n_cells=50, n_genes=30))
    assert sp.issparse(cells.X)
    assert cells.X.format == "csr"
    assert cells.X.dtype == np.float32
    assert cells.X.has_canonical_format
    assert (cells.X.data == np.rint(cells.X.data)).all()
    assert cells.X.data.min() >= 1
    assert list(cells.var_names[:2]) == ["GENE0001", "GENE0002"]
    assert cells.shape == (50, 30)


def test_every_type_and_batch_is_there_and_markers_tell_types_apart():
    cells = simulate(SimulateConfig())
    assert set(cells.obs["cell_type"]) == {f"type_{t}" for t in range(4)}
    assert set(cells.obs["batch"]) == {"batch_0", "batch_1"}
    logged = np.log1p(cells.X.toarray())
    means = np.stack([logged[(cells.obs["cell_type"] == f"type_{t}").to_numpy()].mean(axis=0) for t in range(4)])
    nearest = ((logged[:, None] - means[None]) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == cells.obs["cell_type"].cat.codes.to_numpy()).mean() > 0.9
    for t in range(4):
        marked = (cells.var["marker_of"] == f"type_{t}").to_numpy()
        assert marked.sum() == 20
        assert means[t, marked].mean() > 1.5 * np.delete(means, t, axis=0)[:, marked].mean()


def test_counts_vary_more_than_poisson_and_depths_differ():
    cells = simulate(SimulateConfig(n_cells=2000, n_types=1, n_batches=1))
    dense = cells.X.toarray()
    assert (dense.var(axis=0) > dense.mean(axis=0)).mean() > 0.9
    totals = dense.sum(axis=1)
    assert np.percentile(totals, 95) > 2 * np.percentile(totals, 5)


@pytest.mark.parametrize("dispersion", [0.5, 2.0, 50.0])
def test_counts_have_the_mean_and_variance_of_the_negative_binomial(dispersion):
    """50,000 draws of each gene at one rate: mean m (1 - dropout) and, without dropout, variance m + m^2 / theta."""
    plain = {"n_cells": 50_000, "n_genes": 8, "n_types": 1, "n_batches": 1, "depth_sigma": 0.0, "batch_sigma": 0.0, "field_cells": 50_000}
    cells = simulate(SimulateConfig(**plain, dispersion=dispersion, dropout_rate=0.0))
    rate = cells.varm["type_rate"][:, 0]
    dense = cells.X.toarray()
    variance = rate + rate**2 / dispersion
    assert np.abs((dense.mean(axis=0) - rate) / np.sqrt(variance / len(dense))).max() < 4
    np.testing.assert_allclose(dense.var(axis=0), variance, rtol=0.1)
    np.testing.assert_allclose((dense == 0).mean(axis=0), (1 + rate / dispersion) ** -dispersion, atol=0.01)
    lossy = simulate(SimulateConfig(**plain, dispersion=dispersion, dropout_rate=0.3)).X.toarray()
    np.testing.assert_allclose(lossy.mean(axis=0), 0.7 * rate, rtol=0.06)


def test_the_size_of_cells_can_be_asked_for():
    cells = simulate(SimulateConfig(n_cells=500, n_genes=2000, mean_counts=400, gene_shape=0.3, depth_sigma=0.0, dropout_rate=0.0))
    assert cells.X.sum() / 500 == pytest.approx(400, rel=0.05)


def test_donors_lie_within_batches():
    cells = simulate(SimulateConfig(n_cells=100, n_batches=2, n_donors=5))
    table = cells.obs.groupby(["donor", "batch"], observed=True).size()
    assert len(table) == 5
    assert set(table) == {20}


def test_positions_lie_on_the_slide_only_when_asked_for():
    assert "spatial" not in simulate(SimulateConfig()).obsm
    cells = simulate(SimulateConfig(spatial=True))
    spatial = cells.obsm["spatial"]
    assert spatial.shape == (300, 2)
    assert spatial.min() >= 0
    assert spatial.max() <= 1000
    first = spatial[(cells.obs["field_of_view"] == 0).to_numpy()]
    nearest = cKDTree(first).query(first, k=2)[0][:, 1]
    assert 8 < np.median(nearest) < 15  # spaced by 15 micrometres, jittered
    assert cells.obs.groupby("field_of_view")["donor"].nunique().max() == 1


def test_fields_lie_out_of_each_others_reach():
    cells = simulate(SimulateConfig(n_cells=600, n_genes=20, spatial=True, field_cells=100, niche=NicheConfig(radius_um=80.0)))
    space, field = cells.obsm["spatial"], cells.obs["field_of_view"].to_numpy()
    gaps = [cKDTree(space[field == number]).query(space[field != number])[0].min() for number in range(6)]
    assert min(gaps) > 80.0


def test_types_gather_in_niches():
    cells = simulate(SimulateConfig(n_cells=1000, spatial=True, n_batches=1))
    own = (cells.obs["niche"].cat.codes == cells.obs["cell_type"].cat.codes).mean()
    assert own == pytest.approx(0.6 + 0.4 / 4, abs=0.05)
    neighbour = cKDTree(cells.obsm["spatial"]).query(cells.obsm["spatial"], k=2)[1][:, 1]
    types = cells.obs["cell_type"].cat.codes.to_numpy()
    assert (types == types[neighbour]).mean() > 0.4  # 0.25 by chance


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (2, 8)])
@pytest.mark.parametrize("spatial", [False, True])
def test_the_smallest_sizes_work(shape, spatial):
    config = SimulateConfig(n_cells=shape[0], n_genes=shape[1], n_types=3, n_batches=5, spatial=spatial)
    assert simulate(config).shape == shape


def explained(cells: AnnData, coordinates: np.ndarray) -> float:
    """Share of the programme's variance that a line through the neighbours' LIGAND COUNTS explains (within 30 micrometres)."""
    field = cells.obs["field_of_view"].to_numpy()
    depth = np.asarray(cells.X.sum(axis=1)).ravel()
    programme = np.asarray(cells.X[:, cells.var["is_programme"].to_numpy()].sum(axis=1)).ravel() / depth
    ligand = cells.X[:, cells.var["is_ligand"].to_numpy()].toarray().ravel() / depth
    heard = np.zeros(cells.n_obs)
    for number in np.unique(field):
        own = np.flatnonzero(field == number)
        near = cKDTree(coordinates[own]).query_ball_point(coordinates[own], 30.0)
        heard[own] = [ligand[own[others]].sum() - ligand[cell] for cell, others in zip(own, near, strict=True)]
    return float(np.corrcoef(heard, programme)[0, 1] ** 2)


def test_context_matters_and_vanishes_when_coordinates_are_shuffled_or_nothing_is_planted():
    options = {"n_cells": 3000, "n_genes": 200, "spatial": True, "batch_sigma": 0.0}
    cells = simulate(SimulateConfig(**options))
    true, shuffled = cells.obsm["spatial"], cells.obsm["spatial"].copy()
    rng = np.random.default_rng(0)
    for number in cells.obs["field_of_view"].unique():
        own = np.flatnonzero((cells.obs["field_of_view"] == number).to_numpy())
        shuffled[own] = true[rng.permutation(own)]
    assert explained(cells, true) > 0.3
    assert explained(cells, shuffled) < 0.02
    stronger = simulate(SimulateConfig(**options, niche=NicheConfig(strength=2.0)))
    assert explained(stronger, stronger.obsm["spatial"]) > explained(cells, true)
    nothing = simulate(SimulateConfig(**options, niche=NicheConfig(strength=0.0)))
    assert explained(nothing, nothing.obsm["spatial"]) < 0.02


def test_the_signal_stored_is_the_sum_of_ligand_levels_within_the_radius():
    cells = simulate(SimulateConfig(n_cells=200, n_genes=40, spatial=True, n_batches=1, niche=NicheConfig(radius_um=25.0)))
    space = cells.obsm["spatial"].astype(np.float64)
    distance = np.linalg.norm(space[:, None] - space[None], axis=2)
    level = cells.obs["ligand_level"].to_numpy()
    np.testing.assert_allclose(cells.obs["signal"], ((distance <= 25.0) & (distance > 0)) @ level, rtol=1e-5)
    assert ((level > 0) == (cells.obs["cell_type"] == "type_0")).all()


def test_only_receivers_answer():
    config = SimulateConfig(n_cells=600, n_genes=80, spatial=True, true_rates=True, niche=NicheConfig(receiver_type=2, strength=3.0))
    cells = simulate(config)
    programme, kinds = cells.var["is_programme"].to_numpy(), cells.obs["cell_type"]
    rates = cells.layers["true_rate"][:, programme] / cells.obs["depth"].to_numpy()[:, None]
    effect = cells.varm["donor_effect"][programme].T[cells.obs["donor"].cat.codes]
    response = (rates / effect).mean(axis=1)
    np.testing.assert_allclose(response[(kinds != "type_2").to_numpy()], 1.0, rtol=1e-4)
    heard = (kinds == "type_2").to_numpy()
    np.testing.assert_allclose(response[heard], 1 + 3 * cells.obs["signal"][heard], rtol=1e-4)


def test_true_rates_follow_from_what_is_stored():
    """Type rate x donor x depth x (1 + strength x signal) x knock-outs, from obs and varm alone; and counts follow them."""
    cells = simulate(RICH)
    rates = cells.varm["type_rate"].T[cells.obs["cell_type"].cat.codes] * cells.varm["donor_effect"].T[cells.obs["donor"].cat.codes]
    rates *= cells.obs["depth"].to_numpy()[:, None]
    rates[:, cells.var["is_programme"].to_numpy()] *= 1 + 0.5 * cells.obs["signal"].to_numpy()[:, None]
    level = cells.obs["ligand_level"].to_numpy()
    rates[:, cells.var["is_ligand"].to_numpy()] *= np.where(level > 0, level, 1)[:, None]
    knocked = list(cells.uns["simulation"]["knockouts"])
    for row, name in enumerate(cells.obs["perturbation"]):
        for gene in [] if name == "control" else name.split("+"):
            rates[row] *= cells.varm["knockout_fold"][:, knocked.index(gene)]
    np.testing.assert_allclose(cells.layers["true_rate"], rates, rtol=1e-4)
    assert cells.X.sum() == pytest.approx(0.9 * rates.sum(), rel=0.05)


def test_knock_outs_lower_their_gene_and_act_on_their_targets():
    plan = KnockoutConfig(n_genes=3, n_pairs=1, n_targets=5, control_share=0.25, efficiency=1.0, effect_sigma=1.5)
    cells = simulate(SimulateConfig(n_cells=4000, n_genes=100, n_types=1, n_batches=1, knockouts=plan))
    share = cells.obs["perturbation"].value_counts(normalize=True)
    assert len(share) == 5
    assert share["control"] == pytest.approx(0.25, abs=0.03)
    (pair,) = [name for name in share.index if "+" in name]
    mean = {name: cells.X[(cells.obs["perturbation"] == name).to_numpy()].mean(axis=0).A1 for name in share.index}
    folds = dict(zip(cells.uns["simulation"]["knockouts"], cells.varm["knockout_fold"].T, strict=True))
    for name, fold in folds.items():
        changed = np.flatnonzero(fold != 1)
        assert len(changed) == 6
        assert mean[name][cells.var_names.get_loc(name)] == 0
        np.testing.assert_allclose(mean[name][changed], fold[changed] * mean["control"][changed], rtol=0.4, atol=0.15)
    both = folds[pair.split("+")[0]] * folds[pair.split("+")[1]]
    np.testing.assert_allclose(mean[pair], both * mean["control"], rtol=0.4, atol=0.2)


@pytest.mark.parametrize("chunk", [1, 64, 150, 10_000])
@pytest.mark.parametrize("gzip", [False, True])
def test_a_streamed_file_holds_the_same_cells_whatever_the_chunk(tmp_path, chunk, gzip):
    expected, said = simulate(RICH), []
    simulate_to(tmp_path / "cells.h5ad", RICH, said.append, chunk_cells=chunk, gzip=gzip)
    again = read_h5ad(tmp_path / "cells.h5ad")
    assert (again.X != expected.X).nnz == 0
    assert again.obs.equals(expected.obs)
    assert again.var.equals(expected.var)
    np.testing.assert_array_equal(again.obsm["spatial"], expected.obsm["spatial"])
    np.testing.assert_array_equal(again.layers["true_rate"], expected.layers["true_rate"])
    assert again.uns["simulation"]["config"] == expected.uns["simulation"]["config"]
    assert list(again.uns["simulation"]["programme"]) == list(expected.uns["simulation"]["programme"])
    assert said[-1] == 700
    assert [path.name for path in tmp_path.iterdir()] == ["cells.h5ad"]


def test_more_cells_begin_with_the_same_field():
    options = {"n_genes": 30, "field_cells": 100, "seed": 4}
    few, many = (next(iter(fields(SimulateConfig(n_cells=cells, **options)))) for cells in (300, 900))
    assert (few.X != many.X).nnz == 0


def test_a_streamed_file_is_read_in_ranges_like_any_other(tmp_path):
    simulate_to(tmp_path / "cells.h5ad", RICH)
    with CellReader(tmp_path / "cells.h5ad") as reader:
        assert reader.n_cells == 700
        assert (reader.rows("X", 100, 300) != simulate(RICH).X[100:300]).nnz == 0
        assert reader.obs("batch").tolist() == simulate(RICH).obs["batch"].tolist()
    with h5py.File(tmp_path / "cells.h5ad") as file:
        assert file["X/data"].compression is None


def test_memory_does_not_grow_with_the_number_of_cells(tmp_path):
    """Two sizes in processes of their own: four times the cells, hardly more memory."""
    code = """if True:
        import resource, sys
        from pathlib import Path
        from cellplane.data.config import SimulateConfig
        from cellplane.data.simulate import simulate_to
        config = SimulateConfig(n_cells=int(sys.argv[2]), n_genes=2000, mean_counts=3000, field_cells=500)
        simulate_to(Path(sys.argv[1]), config, chunk_cells=500)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        """
    peak = [
        int(subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.h5ad"), str(cells)], capture_output=True, check=True).stdout)
        for cells in (2000, 8000)
    ]
    assert peak[1] - peak[0] < 30_000  # kB; the counts themselves would be 80,000


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    code = """if True:
        import resource, sys
        from pathlib import Path
        from cellplane.data.config import SimulateConfig
        from cellplane.data.simulate import simulate_to
        from cellplane.errors import StorageError
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            simulate_to(Path(sys.argv[1]), SimulateConfig(n_cells=2000))
        except StorageError as error:
            print(error)
        """
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.h5ad")], capture_output=True, text=True, check=True)
    assert "bytes free" in done.stdout
    assert not list(tmp_path.iterdir())


def test_parts_that_do_not_fit_together_are_refused(tmp_path):
    first = simulate(SimulateConfig(n_cells=10, n_genes=5))
    other = simulate(SimulateConfig(n_cells=10, n_genes=5, n_types=7))
    spatial = simulate(SimulateConfig(n_cells=10, n_genes=5, spatial=True))
    for parts, said in (([first, other], "categories of cell_type"), ([first, spatial], "obs columns"), ([], "no cells to write")):
        with pytest.raises(DataError, match=said):
            write_in_parts(tmp_path / "x.h5ad", parts, lambda done: None)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises((StorageError, OSError)):
        simulate_to(tmp_path / "file" / "x.h5ad", SimulateConfig(n_cells=10))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("n_cell=3", "did you mean 'n_cells'"),
        ("n_cells=0", "n_cells"),
        ("n_donors=1", "every batch needs a donor"),
        ("niche.sender_type=10", "there are 10 types"),
        ("niche.radius_um=0", "radius_um"),
        ("knockouts.n_pairs=20", "do not fit"),
        ("dropout_rate=1", "dropout_rate"),
        ("gene_ids=rat", "gene_ids"),
    ],
)
def test_a_wrong_value_is_named(override, said):
    with pytest.raises(ConfigError, match=said):
        load_config(SimulateConfig, "default", "simulate", [override])


def test_the_shipped_file_shows_every_key():
    assert load_config(SimulateConfig, "default", "simulate").spatial
    assert set(read_yaml(find_config("default", "simulate"))) == set(SimulateConfig.model_fields)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A gene table of five human genes, one of which codes for no protein, installed in a home of its own."""
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / "home"))
    ids = [f"ENSG{number:011d}" for number in range(5)]
    genes = pd.DataFrame({"id": ids, "symbol": list("ABCDE"), "coding": [True, False, True, True, True]})
    write_table(make_table("human", genes, pd.DataFrame({"alias": [], "approved": []}), "f" * 64), [])
    return ids


def test_genes_are_named_by_an_installed_table(table):
    def named(genes: int, ids: str) -> list[str]:
        return list(simulate(SimulateConfig(n_cells=3, n_genes=genes, gene_ids=ids)).var_names)

    assert named(5, "installed") == named(5, "human") == [table[gene] for gene in (0, 2, 3, 4, 1)]
    assert named(2, "plain") == ["GENE0001", "GENE0002"]
    for genes, ids, said in ((6, "human", "the human table has 5"), (3, "mouse", "no mouse gene table is installed")):
        with pytest.raises(ConfigError, match=said):
            named(genes, ids)


def test_without_a_table_genes_have_plain_names(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path))
    assert gene_names(SimulateConfig(n_genes=2, gene_ids="installed")) == ["GENE0001", "GENE0002"]
