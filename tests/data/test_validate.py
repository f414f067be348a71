"""A look at a file says what a conversion would do with it, and never fails itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cellplane.cli.main import main
from cellplane.data.config import ConvertConfig, DataKeys, SimulateConfig
from cellplane.data.convert import convert_with, write_part
from cellplane.data.gene_tables import make_table, write_table
from cellplane.data.quality import few_genes, high_totals, spacing
from cellplane.data.simulate import simulate, simulate_to
from cellplane.data.sources import AnnData, read_h5ad, write_h5ad
from cellplane.data.validate import Validation, validate
from cellplane.errors import CellplaneError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """No gene table but those a test installs."""
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / "home"))


def look(path: Path, vocabulary: Path | None = None, **keys: object) -> Validation:
    file = None if vocabulary is None else str(vocabulary)
    found = validate(ConvertConfig(inputs=(str(path),), out=".", keys=DataKeys(**keys), vocabulary=file))
    json.dumps(found.plain(), allow_nan=False)
    return found


def written(tmp_path: Path, cells: AnnData) -> Path:
    write_h5ad(cells, tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def test_a_good_file_is_described_and_gives_no_reason_to_worry(tmp_path):
    cells = simulate(SimulateConfig(n_cells=600, n_genes=80, spatial=True, n_donors=4))
    found = look(written(tmp_path, cells), batch_key="donor", labels_key="cell_type", spatial_key="spatial")
    assert (found.ok, found.errors, found.warnings, found.cells) == (True, [], [], 600)
    assert found.places["X"] == {
        "layout": "csr", "dtype": "float32", "genes": 80, "holds": "counts", "integer_share": 1.0, "smallest": 1.0, "largest": cells.X.max()
    }  # fmt: skip
    totals = np.asarray(cells.X.sum(axis=1)).ravel()
    assert found.counts["library_size"]["50"] == np.median(totals)
    assert found.counts["genes_per_cell"]["100"] == np.diff(cells.X.indptr).max()
    assert (found.counts["entries"], found.counts["largest"], found.counts["empty_cells"]) == (cells.X.nnz, cells.X.max(), 0)
    assert found.genes["namespace"] == "symbol"
    assert found.columns["batch"]["sizes"] == cells.obs["donor"].value_counts().to_dict()
    assert found.columns["labels"]["groups"] == 4
    assert 8 < found.spatial["nearest_neighbour"] < 15
    assert found.estimate["bytes"] == 3 * cells.X.nnz + 40 * 600
    assert found.estimate["shards"] == 1


def test_columns_nobody_named_are_found_under_their_usual_names(tmp_path):
    found = look(written(tmp_path, simulate(SimulateConfig(spatial=True))))
    assert {role: (column["key"], column["chosen"]) for role, column in found.columns.items()} == {
        "batch": ("batch", False), "labels": ("cell_type", False)
    }  # fmt: skip
    assert found.spatial["key"] == "spatial"


def test_every_place_is_judged_and_the_used_one_named(tmp_path):
    cells = simulate(SimulateConfig(n_cells=100, n_genes=30))
    cells.layers["counts"] = cells.X.copy()
    cells.layers["flags"] = (cells.X > 0).astype(bool)
    cells.X = sp.csr_matrix(np.log1p(cells.X.toarray() * 0.7))
    cells.raw = ad.AnnData(X=cells.X.toarray() - 1, var=cells.var)
    found = look(written(tmp_path, cells))
    assert found.counts["place"] == "layers['counts']"
    held = {place: one["holds"] for place, one in found.places.items()}
    assert held["layers['flags']"] == "binarised (bool)"
    assert "log1p" in held["X"]
    assert "negative" in held["raw.X"]
    assert found.places["raw.X"]["layout"] == "dense"
    assert found.places["X"]["integer_share"] < 0.1


def without_counts(cells: AnnData) -> None:
    cells.X = cells.X * 0.37


def nan(cells: AnnData) -> None:
    cells.X.data[1000] = np.nan


def late_fraction(cells: AnnData) -> None:
    dense = cells.X.toarray()
    dense[350, 3] = 0.5  # between the rows that are sampled
    cells.X = sp.csr_matrix(dense)


def late_negative(cells: AnnData) -> None:
    dense = cells.X.toarray()
    dense[301, 3] = -1
    cells.X = sp.csr_matrix(dense)


def repeated_genes(cells: AnnData) -> None:
    cells.var_names = ["A", "A", *cells.var_names[2:]]


def missing_batch(cells: AnnData) -> None:
    cells.obs["batch"] = [None, *cells.obs["batch"][1:]]


def no_batch(cells: AnnData) -> None:
    del cells.obs["batch"]


def no_position(cells: AnnData) -> None:
    cells.obsm["spatial"][5] = np.nan


def deep_position(cells: AnnData) -> None:
    cells.obsm["spatial"] = np.zeros((cells.n_obs, 3))


def nothing(cells: AnnData) -> None:
    del cells.obsm["spatial"]


BROKEN = [
    (without_counts, "no raw counts found"),
    (nan, "NaN"),
    (late_fraction, "begins like counts, but cells"),
    (late_negative, "begins like counts, but cells"),
    (repeated_genes, "1 genes stand in var_names more than once"),
    (missing_batch, "1 of 1000 cells have no value in obs['batch']"),
    (no_batch, "no 'batch' in obs"),
    (no_position, "1 cells with NaN"),
    (deep_position, "shape (1000, 3)"),
    (nothing, "no 'spatial' in obsm"),
]


@pytest.mark.parametrize(("spoil", "said"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_what_a_conversion_would_fail_on_is_an_error_and_it_does_fail(tmp_path, spoil, said):
    cells = simulate(SimulateConfig(n_cells=1000, n_genes=30, spatial=True))
    spoil(cells)
    path, keys = written(tmp_path, cells), {"batch_key": "batch", "spatial_key": "spatial"}
    found = look(path, **keys)
    assert not found.ok
    (error,) = found.errors
    assert said in error
    assert str(path) not in error
    config = ConvertConfig(inputs=(str(path),), out=str(tmp_path / "shards"), keys=DataKeys(**keys))
    with pytest.raises(CellplaneError):
        convert_with(config, lambda tasks: map(write_part, tasks), lambda text: None)


@pytest.mark.parametrize("spoil", [missing_batch, no_position, deep_position, no_batch, nothing], ids=lambda spoil: spoil.__name__)
def test_what_is_wrong_with_columns_nobody_asked_for_is_a_warning_at_most(tmp_path, spoil):
    cells = simulate(SimulateConfig(n_cells=100, n_genes=30, spatial=True))
    spoil(cells)
    found = look(written(tmp_path, cells))
    assert found.ok
    assert bool(found.warnings) == (spoil in (missing_batch, no_position, deep_position))


def test_unusual_cells_are_hinted_at(tmp_path):
    cells = simulate(SimulateConfig(n_cells=400, n_genes=100, depth_sigma=0.1))
    dense = cells.X.toarray()
    dense[:40] = 0
    dense[40:80, 4:] = 0
    dense[80:120] *= 20
    cells.X = sp.csr_matrix(dense)
    cells.obs["cell_type"] = ["rare"] * 3 + [None] * 7 + ["usual"] * 390
    cells.obs_names = ["same"] * 5 + list(cells.obs_names[5:])
    found = look(written(tmp_path, cells), labels_key="cell_type")
    assert found.ok
    assert found.counts["empty_cells"] == (dense.sum(axis=1) == 0).sum() >= 40
    said = "\n".join(found.warnings)
    for text in (
        " cells have no counts at all",
        "far more counts than the others",
        "20.0% of the cells show fewer than 5 genes",
        "7 of 400 cells have no value in obs['cell_type']",
        "1 of 2 groups of obs['cell_type'] have fewer than 10 cells, e.g. ['rare']",
        "4 cells have the name of another one",
    ):
        assert text in said


def test_equal_library_sizes_are_suspicious(tmp_path):
    cells = ad.AnnData(X=sp.csr_matrix(np.random.default_rng(0).permuted(np.tile(np.arange(30.0), (50, 1)), axis=1)))
    assert "have the same total" in "\n".join(look(written(tmp_path, cells)).warnings)


@pytest.mark.parametrize(("factor", "scale"), [(1.0, None), (0.001, 1000.0), (1 / 0.1, 0.1), (5000.0, None)])
def test_the_unit_of_positions_is_told_by_the_distance_of_neighbours(tmp_path, factor, scale):
    cells = simulate(SimulateConfig(n_cells=400, n_genes=20, spatial=True))
    cells.obsm["spatial"] = cells.obsm["spatial"] * factor
    found = look(written(tmp_path, cells), spatial_key="spatial", batch_key="batch")
    assert found.ok
    assert bool(found.warnings) == (factor != 1)
    if scale is not None:
        assert found.spatial["suggested_scale"] == pytest.approx(scale, rel=0.15)


def test_cells_at_one_place_have_no_distance():
    groups = [np.arange(3), np.arange(3, 5)]
    assert np.isnan(spacing(np.zeros((5, 2), dtype=np.float32), groups)[0])
    places = np.array([[0, 0], [0, 0], [3, 4], [1, 1], [2, 1]], dtype=np.float32)
    distance, doubled = spacing(places, groups)
    assert (distance, doubled) == (3.0, 0.2)  # 5, 5 on the first slide, 1, 1 on the second


def test_hints_survive_degenerate_cells():
    assert high_totals(np.zeros(5)) == 0
    assert high_totals(np.ones(5)) == 0
    assert few_genes(np.array([199, 200]), 20_000) == (200, 0.5)
    assert few_genes(np.array([0, 1]), 5) == (1, 0.5)


def test_genes_are_looked_up_in_a_vocabulary_with_their_share_of_counts(tmp_path):
    cells = simulate(SimulateConfig(n_cells=100, n_genes=40))
    path = written(tmp_path, cells)
    (tmp_path / "genes.txt").write_text("\n".join([*cells.var_names[:30], "OTHER"]))
    found = look(path, vocabulary=tmp_path / "genes.txt")
    share = cells.X[:, :30].sum() / cells.X.sum()
    assert (found.ok, found.genes["n_shared"], found.genes["n_dropped"]) == (True, 30, 10)
    assert found.genes["count_shares"]["mapped"] == pytest.approx(share)
    assert "of all counts are of genes without a place" in found.warnings[0]
    (tmp_path / "genes.txt").write_text("\n".join(f"ENSG{number:011d}" for number in range(100)))
    assert "0 of 40 genes" in look(path, vocabulary=tmp_path / "genes.txt").errors[0]
    assert "nowhere.txt" in look(path, vocabulary=tmp_path / "nowhere.txt").errors[0]


def test_genes_are_looked_up_in_the_installed_table_of_their_species(tmp_path):
    ids = [f"ENSG{number:011d}" for number in range(30)]
    symbols = [f"S{number}" for number in range(29)] + ["S28"]  # the last two share a symbol
    table = pd.DataFrame({"id": ids, "symbol": symbols, "coding": [True] * 30})
    write_table(make_table("human", table, pd.DataFrame({"alias": ["OLD"], "approved": ["S3"]}), "f" * 64), [])
    cells = simulate(SimulateConfig(n_cells=50, n_genes=24))
    cells.var_names = [*symbols[:3], "OLD", *symbols[4:22], "S28", "UNKNOWN"]
    found = look(written(tmp_path, cells))
    assert found.ok
    wanted = {"n_shared": 22, "n_renamed": 22, "n_ambiguous": 1, "n_dropped": 2, "n_genes": 24}
    assert {key: found.genes[key] for key in wanted} == wanted
    assert found.genes["vocabulary"] == "the installed human table"


def test_versions_and_repeated_names_are_counted(tmp_path):
    cells = simulate(SimulateConfig(n_cells=20, n_genes=12))
    cells.var["ensembl_id"] = [f"ENSG{number:011d}.{number}" for number in range(12)]
    cells.var_names = ["A", "A", *cells.var_names[2:]]
    found = look(written(tmp_path, cells))
    assert found.ok
    assert (found.genes["naming"], found.genes["versions_stripped"], found.genes["repeated_names"]) == ("ensembl_id", 12, 1)
    assert "1 genes have the name of another one" in "\n".join(found.warnings)


def test_recovering_is_tried_when_asked_for(pbmc68k):
    refused = look(pbmc68k)
    assert "--recover-counts" in refused.errors[0]
    found = look(pbmc68k, recover_counts=True)
    assert found.ok
    assert (found.counts["place"], found.counts["recovered"]) == ("raw.X", True)
    assert found.counts["largest_deviation"] == pytest.approx(0.112, abs=1e-3)


def test_files_that_are_none_give_a_verdict_too(tmp_path, h5ad):
    (tmp_path / "text.h5ad").write_text("cell,gene\n")
    (tmp_path / "cut.h5ad").write_bytes(h5ad.read_bytes()[:-4000])
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["a"] = 1
    write_h5ad(simulate(SimulateConfig(n_cells=5))[:0].copy(), tmp_path / "none.h5ad")
    for name, said in (
        ("text.h5ad", "not an HDF5 file"),
        ("cut.h5ad", "bytes"),
        ("other.h5ad", "HDF5 but not AnnData"),
        ("nowhere.h5ad", "no such file"),
        ("none.h5ad", "no cells"),
    ):
        found = look(tmp_path / name)
        assert not found.ok
        assert said in found.errors[0]


@pytest.mark.parametrize("damage", ["indices", "indptr"])
def test_a_corrupt_matrix_is_an_error(h5ad, damage):
    with h5py.File(h5ad, "a") as file:
        file[f"X/{damage}"][7] = 10_000_000
    found = look(h5ad)
    assert not found.ok
    assert "corrupt sparse matrix" in found.errors[0]


DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.parametrize("name", sorted(path.name for path in DATA.glob("*.h5ad")) or ["absent"])
def test_every_real_file_gets_a_verdict(shared, name):
    found = look(shared / "data" / name)
    assert found.ok, found.errors
    assert found.counts["place"] == "X"
    whole = read_h5ad(shared / "data" / name)
    assert found.counts["library_size"]["50"] == np.median(np.asarray(whole.X.sum(axis=1)).ravel())
    assert bool(found.spatial) == ("spatial" in whole.obsm)


def test_memory_is_bounded(tmp_path):
    """A file of 300 MB is looked at by a process that may not hold a third of it beside its libraries."""
    path = tmp_path / "big.h5ad"
    simulate_to(path, SimulateConfig(n_cells=50_000, n_genes=1500, mean_counts=2500, gene_shape=3.0, field_cells=2000))
    assert path.stat().st_size > 250e6
    code = """if True:
        import resource, sys
        from cellplane.data.config import ConvertConfig
        from cellplane.data.validate import validate
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert validate(ConvertConfig(inputs=(sys.argv[1],), out=".")).ok
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        """
    grown = int(subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout)
    assert grown < 120_000  # kB


@pytest.fixture
def run(capsys):
    def command(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out

    return command


def test_the_verb_ends_with_0_or_3_and_speaks_to_people_and_programs(run, tmp_path):
    code, out = run("data", "simulate", "--out", tmp_path / "x.h5ad", "--cells", 120, "--genes", 60, "--json")
    assert code == 0
    assert json.loads(out)["cells"] == 120
    code, out = run(
        "data", "validate", tmp_path / "x.h5ad", "--batch-key", "donor", "--labels-key", "cell_type", "--spatial-key", "spatial"
    )
    assert code == 0
    for text in ("X       csr     float32  100.0%    counts", "donor: 4 groups", "counts per cell", "neighbours 1", "can be converted"):
        assert text in out
    code, out = run("data", "validate", tmp_path / "x.h5ad", "--json")
    assert (code, json.loads(out)["ok"]) == (0, True)
    code, out = run("data", "validate", tmp_path / "x.h5ad", "--batch-key", "donr")
    assert code == 3
    assert "did you mean 'donor'" in out
    assert "CANNOT be converted" in out
    code, out = run("data", "validate", tmp_path / "nowhere.h5ad", "--json")
    assert (code, json.loads(out)["ok"]) == (3, False)
    assert run("data", "validate", tmp_path / "x.h5ad", "-o", "keys.bath_key=a")[0] == 2


def test_the_verb_takes_what_convert_takes_and_judges_each_and_all(run, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b"):
        write_h5ad(simulate(SimulateConfig(n_cells=60, n_genes=30)), folder / f"{name}.h5ad")
    for arguments in ((folder,), (folder / "a.h5ad", folder / "b.h5ad"), (f"{folder}/*.h5ad",)):
        code, out = run("data", "validate", *arguments, "--batch-key", "batch")
        assert code == 0
        assert out.count("batch: 2 groups") == 2
        assert out.endswith("2 of 2 files can be converted\n")
    cells = simulate(SimulateConfig(n_cells=60, n_genes=30))
    cells.var_names = [f"ENSG{gene:011d}" for gene in range(30)]
    write_h5ad(cells, folder / "c.h5ad")
    code, out = run("data", "validate", folder, "--json")
    found = json.loads(out)
    assert (code, found["ok"], [file["ok"] for file in found["files"]]) == (3, False, [True] * 3)
    assert "name their genes differently" in found["errors"][0]
    assert run("data", "validate", folder)[1].endswith("3 of 3 files can be converted, but NOT together\n")
    (folder / "d.h5ad").write_text("text")
    assert f"CANNOT be read: {folder}/d.h5ad (4 bytes)" in run("data", "validate", folder)[1]
    assert run("data", "validate", f"{folder}/none*")[0] == 3
    assert run("data", "validate", folder / "a.h5ad", "--layer", "nowhere")[0] == 3
    assert run("data", "validate", folder / "a.h5ad", "--fov-key", "batch")[0] == 0


def test_files_that_cannot_be_read_are_named_and_not_counted_as_files_of_no_cells(run, tmp_path):
    good = written(tmp_path, simulate(SimulateConfig(n_cells=70, n_genes=30)))
    (tmp_path / "text.h5ad").write_text("text")
    code, out = run("data", "validate", good, tmp_path / "text.h5ad", tmp_path / "gone.h5ad")
    assert code == 3
    assert "0 cells" not in out.replace("70 cells", "")
    for name, reason in (("gone", ": no such file"), ("text", r" \(4 bytes\) is not an HDF5 file but text")):
        assert len(re.findall(rf"CANNOT be read: \S*/{name}\.h5ad{reason}", out)) == 2  # where its turn is, and at the end
    assert out.endswith("70 cells in 1 readable file\n1 of 3 files can be converted\n")
    found = json.loads(run("data", "validate", tmp_path / "gone.h5ad", "--json")[1])
    assert (found["ok"], found["readable"], found["cells"]) == (False, False, None)


def test_texts_that_mean_no_label_are_missing_ones(tmp_path):
    cells = simulate(SimulateConfig(n_cells=100, n_genes=30))
    cells.obs["cell_type"] = ["nan", *cells.obs["cell_type"].astype(str)[1:]]
    found = look(written(tmp_path, cells), labels_key="cell_type")
    assert (found.columns["labels"]["missing"], "nan" in found.columns["labels"]["sizes"]) == (1, False)


def test_the_simulating_verb_refuses_what_it_cannot_do(run, tmp_path):
    (tmp_path / "folder").mkdir()
    assert run("data", "simulate", "--out", tmp_path / "folder")[0] == 2
    assert run("data", "simulate", "--out", tmp_path / "x.h5ad", "--cells", 0)[0] == 2
    assert run("data", "simulate", "--out", tmp_path / "x.h5ad", "-o", "niche.radius=3")[0] == 2
    assert run("data", "simulate", "--out", tmp_path / "x.h5ad", "--config", "nowhere")[0] == 2
    assert not (tmp_path / "x.h5ad").exists()


def test_a_zarr_folder_is_looked_at_like_a_file(tmp_path):
    cells = simulate(SimulateConfig(n_cells=100, n_genes=30, spatial=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the format of zarr
        cells.write_zarr(tmp_path / "cells.zarr")
    found, other = look(tmp_path / "cells.zarr"), look(written(tmp_path, cells))
    assert found.ok
    for section in ("counts", "genes", "columns", "spatial", "places"):
        assert getattr(found, section) == getattr(other, section)


def test_what_the_conversion_is_told_to_accept_is_no_error(tmp_path):
    cells = simulate(SimulateConfig(n_cells=100, n_genes=30, spatial=True))
    cells.var_names = ["A", "A", *cells.var_names[2:]]
    found = look(written(tmp_path, cells), repeated_genes="sum")
    assert (found.ok, found.genes["summed"]) == (True, 1)
    without_counts(cells)
    plain = ConvertConfig(inputs=(str(written(tmp_path, cells)),), out=".", values="any")
    assert validate(plain).ok
    assert "stored as it stands" in validate(plain).warnings[-1]
    assert not validate(plain.model_copy(update={"keys": DataKeys(layer="nowhere")})).ok


def test_fields_of_view_are_checked_like_samples(tmp_path):
    cells = simulate(SimulateConfig(n_cells=100, n_genes=30, spatial=True))
    config = ConvertConfig(inputs=(str(written(tmp_path, cells)),), out=".", fov_key="field_of_view")
    assert validate(config).columns["fov"]["groups"] == 2
    assert "no 'fov' in obs" in validate(config.model_copy(update={"fov_key": "fov"})).errors[0]
