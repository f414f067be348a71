"""Conversion: every cell once, the same bytes however often it is interrupted, nothing half-done to be seen."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from cellplane.config import load_config
from cellplane.data import work
from cellplane.data.config import ConvertConfig, DataKeys, SimulateConfig
from cellplane.data.convert import ConvertReport, _locked, convert_with, write_part
from cellplane.data.loader import ShardStore
from cellplane.data.planning import make_plan, task_json
from cellplane.data.shards import read_manifest, verify_shards
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData, write_h5ad
from cellplane.errors import ColumnError, ConfigError, CountsNotFoundError, DataError, FileFormatError, StorageError, VocabularyError

KEYS = DataKeys(batch_key="batch", labels_key="cell_type")


def run(config: ConvertConfig) -> ConvertReport:
    """Conversion in this process: everything but the way tasks travel."""
    return convert_with(config, lambda tasks: map(write_part, tasks), lambda _: None)


def config_for(tmp_path: Path, *inputs: Path, **options: object) -> ConvertConfig:
    """Small shards and sentences, so that a few cells make many of both."""
    plain = {"inputs": tuple(map(str, inputs)), "out": str(tmp_path / "shards"), "keys": KEYS, "max_cells": 16, "shard_bytes": 4000}
    return ConvertConfig.model_validate({**plain, **options})


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every visible file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if not path.name.startswith(".")}


def matrix_of(folder: Path) -> np.ndarray:
    store = ShardStore(folder)
    batch = store.read(range(len(store.sizes)))
    assert sorted(batch.row.tolist()) == list(range(batch.n_cells))
    dense = np.zeros((batch.n_cells, batch.n_genes), dtype=np.float32)
    rows = sp.csr_matrix((batch.value.numpy(), batch.gene.numpy(), batch.crow.numpy()), shape=dense.shape)
    dense[batch.row.numpy()] = rows.toarray()
    return dense


def test_every_cell_arrives_once_with_its_counts(cells, h5ad, tmp_path):
    report = run(config_for(tmp_path, h5ad))
    np.testing.assert_array_equal(matrix_of(tmp_path / "shards"), cells.X.toarray())
    assert (report.cells, report.genes, report.nnz) == (120, 40, cells.X.nnz)
    assert report.shards_reused == 0
    assert report.shards_new > 2
    assert report.count_source == {"cells": "X"}
    assert report.gene_report["cells"]["overlap"] == 1
    assert not (tmp_path / "shards" / ".staging").exists()


@pytest.mark.parametrize("kind", [sp.csc_matrix, lambda matrix: matrix.toarray()])
def test_column_compressed_and_dense_files_give_the_same_cells(cells, tmp_path, kind):
    cells.X = kind(cells.X)
    write_h5ad(cells, tmp_path / "x.h5ad")
    run(config_for(tmp_path, tmp_path / "x.h5ad"))
    expected = cells.X if isinstance(cells.X, np.ndarray) else cells.X.toarray()
    np.testing.assert_array_equal(matrix_of(tmp_path / "shards"), expected)


def test_a_second_run_reuses_every_shard_and_changes_no_byte(h5ad, tmp_path):
    first = run(config_for(tmp_path, h5ad))
    before = contents(tmp_path / "shards")
    said: list[str] = []
    again = convert_with(config_for(tmp_path, h5ad), lambda tasks: map(write_part, tasks), said.append)
    assert (again.shards_new, again.shards_reused) == (0, first.shards_new)
    assert contents(tmp_path / "shards") == before
    assert said[-1] == f"0 new, {first.shards_new} reused"


def test_adding_a_file_writes_its_shards_and_no_other(cells, h5ad, tmp_path):
    first = run(config_for(tmp_path, h5ad))
    before = contents(tmp_path / "shards")
    more = simulate(SimulateConfig(n_cells=40, n_genes=60, n_types=5, seed=3))  # new genes, a new type
    write_h5ad(more, tmp_path / "more.h5ad")
    both = run(config_for(tmp_path, h5ad, tmp_path / "more.h5ad"))
    assert both.shards_reused == first.shards_new
    after = contents(tmp_path / "shards")
    assert all(after[name] == sha for name, sha in before.items() if name.endswith(".arrow"))
    verify_shards(tmp_path / "shards")
    assert matrix_of(tmp_path / "shards").shape == (160, 60)
    assert read_manifest(tmp_path / "shards").label_names[-1] == "type_4"


def test_inputs_that_leave_out_what_the_folder_holds_are_refused_and_nothing_is_lost(cells, h5ad, tmp_path):
    run(config_for(tmp_path, h5ad))
    before = contents(tmp_path / "shards")
    write_h5ad(cells[:20].copy(), tmp_path / "more.h5ad")
    with pytest.raises(ConfigError, match=r"would lose cells, .*replace=true"):
        run(config_for(tmp_path, tmp_path / "more.h5ad"))
    assert contents(tmp_path / "shards") == before
    assert run(config_for(tmp_path, tmp_path / "more.h5ad", replace=True)).cells == 20
    assert [dataset.name for dataset in read_manifest(tmp_path / "shards").datasets] == ["more"]


def test_another_setting_replaces_the_shards(h5ad, tmp_path):
    run(config_for(tmp_path, h5ad))
    before = contents(tmp_path / "shards")
    run(config_for(tmp_path, h5ad, max_cells=10))
    assert not {name for name in contents(tmp_path / "shards") if name.endswith(".arrow")} & set(before)
    verify_shards(tmp_path / "shards")


def test_a_damaged_shard_is_written_again(h5ad, tmp_path):
    run(config_for(tmp_path, h5ad))
    before = contents(tmp_path / "shards")
    victim = sorted((tmp_path / "shards").glob("*.arrow"))[0]
    victim.write_bytes(victim.read_bytes()[:-7])
    assert run(config_for(tmp_path, h5ad)).shards_new == 1
    assert contents(tmp_path / "shards") == before


CHILD = """if True:
    import resource, sys
    from cellplane.config import validate
    from cellplane.data.config import ConvertConfig
    from cellplane.data.convert import convert_with, write_part
    from cellplane.errors import CellplaneError
    import json
    if len(sys.argv) > 3:
        from cellplane.data import planning, work
        planning.RANGE_BYTES = work.SPAN_BYTES = int(sys.argv[3])
    if len(sys.argv) > 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
    try:
        convert_with(validate(ConvertConfig, json.loads(sys.argv[1]), ""), lambda tasks: map(write_part, tasks), lambda _: None)
    except CellplaneError as error:
        print(type(error).__name__, error)
    """


def in_child(config: ConvertConfig, *arguments: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, config.model_dump_json(), *arguments]
    return subprocess.run(command, env={**os.environ, "FAULT_AT": fault}, capture_output=True, text=True, timeout=120, check=False)


def test_a_full_disk_is_one_clear_error_and_leaves_the_folder_as_it_was(cells, h5ad, tmp_path):
    run(config_for(tmp_path, h5ad))
    before = contents(tmp_path / "shards")
    write_h5ad(simulate(SimulateConfig(n_cells=500, n_genes=100)), tmp_path / "big.h5ad")
    config = config_for(tmp_path, tmp_path / "big.h5ad", max_cells=500, shard_bytes=10**6, replace=True)
    done = in_child(config, "30000")
    assert done.stdout.startswith("StorageError no room to write"), done.stderr
    assert "bytes free" in done.stdout
    assert contents(tmp_path / "shards") == before
    assert not list((tmp_path / "shards").rglob("*.tmp"))


@pytest.mark.parametrize("limit", [200, 3000, 6000, 12_000, 20_000])
def test_wherever_the_disk_fills_up_the_same_error_and_nothing_to_see(tmp_path, limit):
    """Runs, shards, tables and plans of all sizes meet the limit at different files."""
    write_h5ad(simulate(SimulateConfig(n_cells=500, n_genes=100)), tmp_path / "big.h5ad")
    config = config_for(tmp_path, tmp_path / "big.h5ad", max_cells=50, shard_bytes=30_000)
    done = in_child(config, str(limit), "4000")
    assert done.stdout.startswith("StorageError no room to write"), done.stdout + done.stderr
    assert contents(tmp_path / "shards") == {}
    assert not list((tmp_path / "shards").rglob("*.tmp"))
    assert run(config).cells == 500


def test_too_little_room_is_noticed_before_anything_is_written(h5ad, tmp_path, monkeypatch):
    monkeypatch.setattr("cellplane.data.convert.free_bytes", lambda path: 1000)
    with pytest.raises(StorageError, match=r"about \d+ bytes needed, 1000 free"):
        run(config_for(tmp_path, h5ad))
    assert contents(tmp_path / "shards") == {}


def test_a_source_that_changes_meanwhile_is_an_error(cells, h5ad, tmp_path):
    config = config_for(tmp_path, h5ad)
    plan = make_plan(config, tmp_path / "staging", lambda _: None)
    os.utime(h5ad, ns=(1, 1))
    answer = json.loads(write_part(task_json(plan.tasks[0])))
    assert answer["error"] == "DataError"
    assert "changed while it was converted" in answer["message"]
    assert str(h5ad) in answer["message"]


def test_a_source_that_changes_while_it_is_read_is_an_error(cells, h5ad, tmp_path, monkeypatch):
    encoded = work._encoded

    def growing(*arguments):
        yield from encoded(*arguments)
        with h5ad.open("ab") as file:
            file.write(b"more")

    monkeypatch.setattr(work, "_encoded", growing)
    with pytest.raises(DataError, match="changed while it was converted"):
        run(config_for(tmp_path, h5ad))
    assert contents(tmp_path / "shards") == {}


def test_two_conversions_into_one_folder_do_not_mix(h5ad, tmp_path):
    config = config_for(tmp_path, h5ad)
    refused: list[str] = []

    def meanwhile(tasks):
        refused.append(in_child(config).stdout)
        return map(write_part, tasks)

    convert_with(config, meanwhile, lambda _: None)
    assert refused[0].startswith("StorageError")
    assert "in use by another conversion" in refused[0]
    verify_shards(tmp_path / "shards")


def bad_file(tmp_path: Path, change) -> Path:
    adata = simulate(SimulateConfig(n_cells=1000, n_genes=20))
    changed = change(adata)
    write_h5ad(adata if changed is None else changed, tmp_path / "bad.h5ad")
    return tmp_path / "bad.h5ad"


def _late_fraction(adata: AnnData) -> None:
    adata.X.data[adata.X.indptr[400]] = 0.5  # a cell that the first look does not see


def _late_nan(adata: AnnData) -> None:
    adata.X.data[adata.X.indptr[400]] = np.nan


def _no_counts(adata: AnnData) -> None:
    adata.X = adata.X.toarray() - 0.5


def _no_cells(adata: AnnData) -> AnnData:
    return adata[:0].copy()


def _twice_the_gene(adata: AnnData) -> None:
    adata.var_names = ["A", "A", *adata.var_names[2:]]


def _no_genes(adata: AnnData) -> AnnData:
    return adata[:, :0].copy()


def _no_batch(adata: AnnData) -> None:
    adata.obs["batch"] = [None, *["x"] * 999]


def _other_column(adata: AnnData) -> None:
    adata.obs = adata.obs.rename(columns={"cell_type": "cell_typ"})


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (_late_fraction, DataError, "looked like counts.*non-integer"),
        (_late_nan, DataError, "1 NaN"),
        (_no_counts, CountsNotFoundError, "scaled"),
        (_no_cells, DataError, "no cells"),
        (_no_genes, DataError, "no genes at all"),
        (_twice_the_gene, DataError, "more than once"),
        (_no_batch, DataError, "no value in obs"),
        (_other_column, ColumnError, "did you mean 'cell_typ'"),
    ],
)
def test_a_bad_file_among_good_ones_is_named_and_nothing_is_published(h5ad, tmp_path, change, error, said):
    run(config_for(tmp_path, h5ad))
    before = contents(tmp_path / "shards")
    with pytest.raises(error, match=said) as caught:
        run(config_for(tmp_path, h5ad, bad_file(tmp_path, change)))
    assert str(caught.value).count("bad.h5ad") == 1
    assert contents(tmp_path / "shards") == before
    assert run(config_for(tmp_path, h5ad)).shards_new == 0


def test_missing_and_broken_inputs_are_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.h5ad: no such file"):
        run(config_for(tmp_path, tmp_path / "none.h5ad"))
    (tmp_path / "text.h5ad").write_text("hello")
    with pytest.raises(FileFormatError, match=r"text\.h5ad.*text"):
        run(config_for(tmp_path, tmp_path / "text.h5ad"))
    assert [path.name for path in tmp_path.iterdir()] == ["text.h5ad"]


def test_a_given_vocabulary_fixes_genes_and_order(cells, h5ad, tmp_path):
    wanted = [*cells.var_names[10:0:-1], "UNSEEN"]
    (tmp_path / "genes.txt").write_text("\n".join(wanted))
    report = run(config_for(tmp_path, h5ad, vocabulary=str(tmp_path / "genes.txt")))
    assert report.genes == 11
    assert report.gene_report["cells"]["n_dropped"] == 30
    np.testing.assert_array_equal(matrix_of(tmp_path / "shards")[:, :10], cells.X.toarray()[:, 10:0:-1])
    with pytest.raises(DataError, match="no readable vocabulary"):
        run(config_for(tmp_path, h5ad, vocabulary=str(tmp_path / "none.txt")))


def test_symbols_and_ensembl_ids_are_not_mixed(cells, h5ad, tmp_path):
    cells.var_names = [f"ENSG{n:011d}" for n in range(40)]
    write_h5ad(cells, tmp_path / "ids.h5ad")
    with pytest.raises(VocabularyError, match="name their genes differently"):
        run(config_for(tmp_path, h5ad, tmp_path / "ids.h5ad"))


def test_two_inputs_of_one_name_need_names(cells, h5ad, tmp_path):
    (tmp_path / "other").mkdir()
    write_h5ad(cells, tmp_path / "other" / "cells.h5ad")
    with pytest.raises(ConfigError, match="two data sets are called 'cells'"):
        run(config_for(tmp_path, h5ad, tmp_path / "other" / "cells.h5ad"))
    report = run(config_for(tmp_path, h5ad, tmp_path / "other" / "cells.h5ad", datasets=("first", "second, with /")))
    assert set(report.count_source) == {"first", "second, with /"}
    verify_shards(tmp_path / "shards")


def test_scanpys_cells_convert_with_their_counts_recovered(pbmc68k, tmp_path):
    overrides = [f"inputs=[{pbmc68k}]", f"out={tmp_path / 'shards'}"]
    report = run(load_config(ConvertConfig, "pbmc68k", "data", overrides))
    assert (report.cells, report.genes, report.recovered) == (700, 765, True)
    assert report.count_source == {"10x_pbmc68k_reduced": "raw.X"}
    assert report.largest_deviation == pytest.approx(0.112, abs=1e-3)
    store = ShardStore(tmp_path / "shards")
    assert len(store.class_names) == 10
    assert store.sizes.max() <= 64
    assert len(store.sizes) == 11


def test_spatial_positions_stay_with_their_cells(cells, h5ad, tmp_path):
    run(config_for(tmp_path, h5ad, keys=DataKeys(spatial_key="spatial")))
    store = ShardStore(tmp_path / "shards")
    batch = store.read(range(len(store.sizes)))
    np.testing.assert_array_equal(batch.coordinates.numpy(), cells.obsm["spatial"][batch.row.numpy()])
    assert batch.labels is None
    assert store.n_batches == 1


def test_real_files_convert_under_their_ensembl_ids(shared, tmp_path):
    inputs = [shared / "data" / name for name in ("pbmc3k.h5ad", "kang_pbmc_ifnb.h5ad")]
    report = run(config_for(tmp_path, *inputs, max_cells=500, shard_bytes=10**6))
    expected = [ad.read_h5ad(path) for path in inputs]
    assert report.cells == sum(adata.n_obs for adata in expected)
    assert report.nnz == sum(adata.X.nnz for adata in expected)
    dense = matrix_of(tmp_path / "shards")
    assert dense.sum() == sum(float(adata.X.sum()) for adata in expected)


def test_sentences_of_spatial_cells_are_patches(tmp_path):
    """Neighbours stay together: the cells of a sentence fill a small part of the slide, and lie near on the curve."""
    side = np.arange(64, dtype=np.float32)
    adata = simulate(SimulateConfig(n_cells=64 * 64, n_genes=12))
    order = np.random.default_rng(0).permutation(64 * 64)
    adata.obsm["spatial"] = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)[order]
    write_h5ad(adata, tmp_path / "slide.h5ad")
    run(config_for(tmp_path, tmp_path / "slide.h5ad", keys=DataKeys(spatial_key="spatial"), max_cells=256, shard_bytes=10**5))
    store = ShardStore(tmp_path / "shards")
    for sentence in range(len(store.sizes)):
        where = store.read([sentence]).coordinates.numpy()
        assert np.ptp(where, axis=0).max() <= 32  # 256 of 4,096 cells: 16 x 16 at best
        assert np.abs(np.diff(where, axis=0)).sum(axis=1).max() == 1


def test_sentences_do_not_cross_a_field_of_view(cells, tmp_path):
    cells.obs["fov"] = [f"f{row % 3}" for row in range(120)]
    write_h5ad(cells, tmp_path / "fov.h5ad")
    run(config_for(tmp_path, tmp_path / "fov.h5ad", fov_key="fov"))
    store = ShardStore(tmp_path / "shards")
    for sentence in range(len(store.sizes)):
        rows = store.read([sentence]).row.numpy()
        assert len(set(cells.obs["fov"].to_numpy()[rows])) == len(set(cells.obs["batch"].to_numpy()[rows])) == 1
    assert set(store.manifest.batch_names) == {"fov/batch_0", "fov/batch_1"}


def test_the_order_of_the_file_can_be_kept(cells, h5ad, tmp_path):
    run(config_for(tmp_path, h5ad, keys=DataKeys(), order="file"))
    store = ShardStore(tmp_path / "shards")
    assert store.read(range(len(store.sizes))).row.tolist() == list(range(120))


def test_a_model_or_other_shards_can_give_the_vocabulary(cells, h5ad, tmp_path):
    run(config_for(tmp_path, h5ad))
    genes = list(read_manifest(tmp_path / "shards").datasets[0].genes)
    assert genes
    report = run(config_for(tmp_path, h5ad, out=str(tmp_path / "again"), vocabulary=str(tmp_path / "shards")))
    assert report.genes == 40
    model = Path(__file__).parents[1] / "compat" / "v1" / "model"
    cells.var_names = [f"GENE{gene:02d}" for gene in range(40)]
    write_h5ad(cells, tmp_path / "named.h5ad")
    assert run(config_for(tmp_path, tmp_path / "named.h5ad", out=str(tmp_path / "third"), vocabulary=str(model))).genes == 12


def test_progress_tells_the_rate_and_what_is_left(h5ad, tmp_path):
    said: list[str] = []
    convert_with(config_for(tmp_path, h5ad), lambda tasks: map(write_part, tasks), said.append)
    assert re.search(r"1 of \d+ shards, \d+ % done, [\d,]+ cells/s, \d+ s left", "\n".join(said))
    assert "100 % done" in said[-2]


def test_a_worker_needs_neither_torch_nor_ray():
    """What a task imports is what every worker holds in memory."""
    code = "import sys; import cellplane.data.work; print(sorted({'torch', 'ray', 'mlflow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_blank_and_padded_gene_names_keep_every_gene_in_its_place(cells, tmp_path):
    """The vocabulary is a text file: a blank line in it is a gene, not a gap that moves all others."""
    names = [*cells.var_names]
    names[3], names[5], names[7] = "", " padded ", "two\rlines"
    cells.var_names = names
    write_h5ad(cells, tmp_path / "blank.h5ad")
    run(config_for(tmp_path, tmp_path / "blank.h5ad"))
    assert ShardStore(tmp_path / "shards").vocabulary.gene_ids == tuple(names)


def test_files_of_others_in_the_folder_stay(h5ad, tmp_path):
    others = ("vocabulary-mine.txt", ".mine.tmp", "notes.parquet", "cells.arrow", ".cells.h5ad.12.tmp")
    (tmp_path / "shards").mkdir()
    for name in others:
        (tmp_path / "shards" / name).write_text("mine")
    (tmp_path / "shards" / ".obs-x.parquet.123.tmp").write_text("left by a killed run")
    run(config_for(tmp_path, h5ad))
    run(config_for(tmp_path, h5ad, max_cells=10))
    assert {name for name in others if (tmp_path / "shards" / name).exists()} == set(others)
    assert not (tmp_path / "shards" / ".obs-x.parquet.123.tmp").exists()


@pytest.mark.parametrize("out", ["taken", "taken/shards"])
def test_a_file_where_the_folder_should_be_is_a_usage_error(h5ad, tmp_path, out):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(ConfigError, match=r"taken is a file.*name a folder"):
        run(config_for(tmp_path, h5ad, out=str(tmp_path / out)))


def test_a_refused_conversion_leaves_no_staging_folder_behind(h5ad, tmp_path):
    config = config_for(tmp_path, h5ad)
    with _locked(tmp_path / "shards"):
        (tmp_path / "shards" / ".staging").rmdir()
        with pytest.raises(StorageError, match="in use by another conversion"):
            run(config)
        assert not (tmp_path / "shards" / ".staging").exists()


def test_texts_that_mean_no_label_are_no_class(cells, tmp_path):
    cells.obs["cell_type"] = ["nan", "", "None", "T cell"] * 30
    write_h5ad(cells, tmp_path / "text.h5ad")
    run(config_for(tmp_path, tmp_path / "text.h5ad"))
    store = ShardStore(tmp_path / "shards")
    batch = store.read(range(len(store.sizes)))
    assert store.class_names == ("T cell",)
    assert {int(label) for row, label in zip(batch.row, batch.labels, strict=True) if row % 4 == 3} == {0}
    assert (batch.labels == -1).sum() == 90
