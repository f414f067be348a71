"""Reading AnnData: every bad file is refused with one clear sentence, every place for counts is found."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cellplane.data.config import DataKeys
from cellplane.data.sources import CellReader, cell_table, column, find_counts, read_h5ad, write_h5ad
from cellplane.errors import ColumnError, DataError, FileFormatError, IntegrityError, StorageError, VocabularyError
from cellplane.genes import GeneVocabulary

KEYS = DataKeys()


def test_a_file_reads_back_as_it_was_written(cells, h5ad):
    again = read_h5ad(h5ad)
    assert (again.X != cells.X).nnz == 0
    assert again.obs.equals(cells.obs)
    np.testing.assert_array_equal(again.obsm["spatial"], cells.obsm["spatial"])
    backed = read_h5ad(h5ad, backed=True)
    assert backed.isbacked
    assert (find_counts(backed, KEYS).matrix != cells.X).nnz == 0
    backed.file.close()


def test_writing_changes_nothing_in_the_callers_object(cells, tmp_path):
    cells.obs["text"] = ["a", "b"] * 60
    cells.obs["unique"] = [f"\u00e9{n}" for n in range(120)]
    cells.raw = cells.copy()
    cells.uns["note"] = {"deep": [1, 2]}
    before = cells.obs.dtypes.to_dict()
    write_h5ad(cells, tmp_path / "x.h5ad")
    assert cells.obs.dtypes.to_dict() == before
    again = read_h5ad(tmp_path / "x.h5ad")
    assert again.obs["text"].astype(str).tolist() == cells.obs["text"].tolist()
    assert again.obs["unique"].tolist() == cells.obs["unique"].tolist()
    assert (again.raw.X != cells.raw.X).nnz == 0


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.h5ad: no such file"):
        read_h5ad(tmp_path / "nothing.h5ad")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"cell,gene,count\n1,2,3\n", "text"),
        (b"PK\x03\x04rest", "zip archive"),
        (b"\x89PNG\r\n\x1a\n", "PNG image"),
        (b"\x1f\x8b\x08rest", "gzip"),
        (b"ARROW1\0\0", "Arrow"),
        (b"\x00\x01\x02\xff", "unknown data"),
    ],
)
def test_another_kind_of_file_is_recognised(tmp_path, content, said):
    path = tmp_path / "cells.h5ad"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=said) as caught:
        read_h5ad(path)
    assert str(path) in str(caught.value)
    assert f"{len(content)} bytes" in str(caught.value)


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(FileFormatError, match="folder"):
        read_h5ad(tmp_path)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.99, 0.9999])
def test_a_truncated_file_is_refused(h5ad, share):
    content = h5ad.read_bytes()
    h5ad.write_bytes(content[: int(share * len(content))])
    with pytest.raises(FileFormatError) as caught:
        read_h5ad(h5ad)
    assert str(h5ad) in str(caught.value)


def test_hdf5_that_is_not_anndata_is_refused(tmp_path):
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["a"] = np.arange(3)
    with pytest.raises(FileFormatError, match="HDF5 but not AnnData"):
        read_h5ad(tmp_path / "other.h5ad")


def _external_link(file, folder):
    file["layers/other"] = h5py.ExternalLink("other.h5", "/data")


def _soft_link(file, folder):
    file["layers/other"] = h5py.SoftLink("/layers")


def _external_storage(file, folder):
    (folder / "secret").write_bytes(b"x" * 80)
    file.create_dataset("layers/other", shape=(10,), dtype="f8", external=[(str(folder / "secret"), 0, 80)])


def _virtual(file, folder):
    layout = h5py.VirtualLayout(shape=(4,), dtype="f8")
    layout[:] = h5py.VirtualSource("other.h5", "data", shape=(4,))
    file.create_virtual_dataset("layers/other", layout)


def _bomb(file, folder):
    file.create_dataset("layers/other", shape=(50_000, 80_000), dtype="f4", chunks=(1000, 1000), compression="gzip")


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (_external_link, "ExternalLink"),
        (_soft_link, "SoftLink"),
        (_external_storage, "other files"),
        (_virtual, "other files"),
        (_bomb, "declares"),
    ],
)
def test_files_that_reach_out_or_blow_up_are_refused_before_reading(h5ad, tmp_path, attack, said):
    with h5py.File(h5ad, "a") as file:
        attack(file, tmp_path)
    for read in (read_h5ad, CellReader):
        with pytest.raises(FileFormatError, match=said):
            read(h5ad)


def test_a_loop_of_groups_ends(h5ad):
    with h5py.File(h5ad, "a") as file:
        file["uns/loop"] = file["/"]
    with pytest.raises(FileFormatError):  # anndata cannot read it, but the look at its structure must end
        read_h5ad(h5ad)


def _dense(matrix):
    return matrix.toarray()


@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csc_matrix, sp.csr_array, sp.csc_array, _dense])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint16])
def test_every_storage_and_type_gives_equal_counts(cells, kind, dtype):
    expected = cells.X.copy()
    found = find_counts(ad.AnnData(X=kind(expected.astype(dtype))), KEYS).matrix
    assert found.dtype == np.float32
    assert (found != expected).nnz == 0
    np.testing.assert_array_equal(found.indices, expected.indices)


def test_counts_are_looked_for_in_order_and_the_place_is_told(cells):
    cells.layers["counts"] = cells.X * 2
    cells.raw = ad.AnnData(X=cells.X * 3, var=cells.var)
    assert find_counts(cells, KEYS).place == "layers['counts']"
    del cells.layers["counts"]
    assert find_counts(cells, KEYS).place == "raw.X"
    assert find_counts(cells, KEYS).matrix.sum() == 3 * cells.X.sum()
    cells.raw = None
    assert find_counts(cells, KEYS).place == "X"
    cells.layers["other"] = cells.X * 5
    assert find_counts(cells, DataKeys(layer="other")).matrix.sum() == 5 * cells.X.sum()
    with pytest.raises(ColumnError, match=r"no layers\['nowhere'\].*layers\['other'\]"):
        find_counts(cells, DataKeys(layer="nowhere"))


def test_raw_counts_come_with_raw_genes(cells):
    cells.raw = cells.copy()
    few = cells[:, :5].copy()
    few.X = np.log1p(few.X.toarray()) - 1
    source = find_counts(few, KEYS)
    assert source.place == "raw.X"
    assert len(source.gene_ids) == source.matrix.shape[1] == 40


def _normalised(cells, decimals=None):
    dense = cells.X.toarray().astype(np.float64)
    dense[:, 0] = 1  # at least one single count in every cell
    logged = np.log1p(dense / dense.sum(axis=1, keepdims=True) * 1e4)
    logged = logged if decimals is None else np.round(logged, decimals)
    return dense, ad.AnnData(X=sp.csr_matrix(logged.astype(np.float32)), var=cells.var)


def test_without_counts_the_error_lists_what_each_place_holds(cells):
    scaled = ad.AnnData(X=cells.X.toarray() - 0.5)
    with pytest.raises(DataError, match=r"layers\['counts'\]: absent, raw\.X: absent, X: \d+ negative values.*scaled"):
        find_counts(scaled, KEYS)
    with pytest.raises(DataError, match="--recover-counts"):
        find_counts(_normalised(cells)[1], KEYS)
    no_x = ad.AnnData(obs=cells.obs, var=cells.var)
    with pytest.raises(DataError, match="X: absent"):
        find_counts(no_x, KEYS)


@pytest.mark.parametrize("decimals", [None, 4, 5])
def test_log_values_give_their_counts_back(cells, decimals):
    expected, logged = _normalised(cells, decimals)
    source = find_counts(logged, DataKeys(recover_counts=True))
    assert source.recovered
    assert 0 <= source.deviation <= 0.25
    np.testing.assert_array_equal(source.matrix.toarray(), expected)


def test_values_that_only_look_like_logs_are_not_recovered(cells):
    dense = np.random.default_rng(0).uniform(0.1, 5, (20, 30)).astype(np.float32)
    with pytest.raises(DataError, match="log1p") as caught:
        find_counts(ad.AnnData(X=dense), DataKeys(recover_counts=True))
    assert "come back exactly" not in str(caught.value)
    expected, logged = _normalised(cells)
    logged.obs["n_counts"] = expected.sum(axis=1) - 1  # the file says that the cells had fewer
    with pytest.raises(DataError, match="no raw counts"):
        find_counts(logged, DataKeys(recover_counts=True))


def test_all_700_cells_of_scanpys_file_come_back(pbmc68k):
    adata = read_h5ad(pbmc68k)
    source = find_counts(adata, DataKeys(recover_counts=True))
    assert (source.place, source.recovered, source.matrix.shape) == ("raw.X", True, (700, 765))
    assert source.deviation == pytest.approx(0.112, abs=1e-3)
    totals = np.asarray(source.matrix.sum(axis=1)).ravel()
    assert (totals <= adata.obs["n_counts"].to_numpy()).all()  # n_counts are over all genes, of which 765 are left
    logged = adata.raw.X.tocsr()
    factor = np.expm1(logged.max(axis=1).toarray().ravel()) / source.matrix.max(axis=1).toarray().ravel()
    np.testing.assert_allclose(factor * adata.obs["n_counts"].to_numpy(), 1e4, rtol=2e-3)  # they were scaled to 10,000
    with pytest.raises(DataError, match="--recover-counts"):
        find_counts(adata, KEYS)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.nan, r"1 NaN values.*cell 3, gene 7"),
        (np.inf, r"1 infinite.*cell 3, gene 7"),
        (-2.0, r"1 negative.*cell 3, gene 7"),
        (2.0**25, "16777216"),
    ],
)
def test_impossible_values_are_refused_with_their_place(cells, value, said):
    dense = cells.X.toarray()
    dense[3, 7] = value
    with pytest.raises(DataError, match=said):
        find_counts(ad.AnnData(X=sp.csr_matrix(dense)), KEYS)


def test_bools_and_masked_arrays_are_refused(cells):
    with pytest.raises(DataError, match="binarised"):
        find_counts(ad.AnnData(X=cells.X > 0), KEYS)
    masked = ad.AnnData(X=np.ones((3, 4), dtype=np.float32))
    masked.layers["counts"] = np.ma.masked_array(np.ones((3, 4)), mask=np.eye(3, 4))
    with pytest.raises(DataError, match="masked"):
        find_counts(masked, KEYS)


@pytest.mark.parametrize("damage", ["indices", "negative", "indptr", "length"])
def test_a_corrupt_sparse_matrix_is_refused_before_it_is_used(cells, h5ad, damage):
    with h5py.File(h5ad, "a") as file:
        x = file["X"]
        if damage == "indices":
            x["indices"][5] = 40
        elif damage == "negative":
            x["indices"][5] = -1
        elif damage == "indptr":
            x["indptr"][7] = x["indptr"][20]
        else:
            x["indptr"][-1] = x["indptr"][-1] + 3
    with pytest.raises(DataError, match=r"corrupt sparse matrix|cannot be read"):
        find_counts(read_h5ad(h5ad), KEYS)
    with pytest.raises(IntegrityError, match="corrupt sparse matrix"), CellReader(h5ad) as reader:
        reader.rows("X", 0, reader.n_cells)


def test_unsorted_and_repeated_entries_are_summed_without_touching_the_callers(cells):
    matrix = sp.csr_matrix((np.array([1.0, 2, 3, 0]), np.array([2, 0, 2, 1]), np.array([0, 3, 4])), shape=(2, 3))
    adata = ad.AnnData(X=matrix)
    before = (adata.X.data.copy(), adata.X.indices.copy())
    np.testing.assert_array_equal(find_counts(adata, KEYS).matrix.toarray(), [[2, 0, 4], [0, 0, 0]])
    np.testing.assert_array_equal(adata.X.data, before[0])
    np.testing.assert_array_equal(adata.X.indices, before[1])


def test_the_callers_object_is_never_changed(cells):
    def state(adata):
        parts = (adata.X.data, adata.X.indices, adata.X.indptr, adata.obsm["spatial"])
        tables = (adata.obs.to_csv().encode(), adata.var.to_csv().encode())
        return hashlib.sha256(b"".join([*(part.tobytes() for part in parts), *tables])).hexdigest()

    before = state(cells)
    keys = DataKeys(batch_key="batch", labels_key="cell_type", spatial_key="spatial")
    cell_table(cells, GeneVocabulary.from_ids(cells.var_names), keys, classes=["type_0"])
    cell_table(cells[:10], GeneVocabulary.from_ids(cells.var_names), keys)  # a view too
    assert state(cells) == before


def test_repeated_genes_are_refused_by_name(cells):
    cells.var_names = ["A", "A", "B", "B", *cells.var_names[4:]]
    with pytest.raises(DataError, match=r"2 genes stand in var_names more than once.*'A', 'B'"):
        find_counts(cells, KEYS)


@pytest.mark.parametrize("key", ["ensembl_id", "feature_id", "gene_ids"])
def test_ensembl_ids_are_preferred_over_symbols(cells, key):
    cells.var[key] = [f"ENSG{number:011d}.{number}" for number in range(40)]
    assert find_counts(cells, KEYS).gene_ids[:2] == ["ENSG00000000000", "ENSG00000000001"]


def test_the_naming_the_vocabulary_knows_is_taken(cells):
    cells.var["ensembl_id"] = [f"ENSG{number:011d}" for number in range(40)]
    symbols, ids = GeneVocabulary.from_ids(list(cells.var_names)[::-1]), GeneVocabulary.from_ids(cells.var["ensembl_id"])
    table, report = cell_table(cells, symbols, KEYS)
    assert report["gene_naming"] == "var_names"
    np.testing.assert_array_equal(table.rows(np.arange(1)).gene, 39 - cells.X[0].indices)
    assert cell_table(cells, ids, KEYS)[1]["gene_naming"] == "ensembl_id"
    with pytest.raises(VocabularyError, match="tried ensembl_id, var_names"):
        cell_table(cells, GeneVocabulary.from_ids([f"OTHER{n}" for n in range(50)]), KEYS)


def test_genes_outside_the_vocabulary_are_left_out_and_reported(cells):
    vocabulary = GeneVocabulary.from_ids([*cells.var_names[::2], "UNSEEN"])
    table, report = cell_table(cells, vocabulary, KEYS)
    assert report["n_dropped"] == 20
    assert table.panel.sum() == 20
    assert not table.panel[-1]
    dense = sp.csr_matrix((table.value, table.gene, table.crow), shape=(120, 21)).toarray()
    np.testing.assert_array_equal(dense[:, :20], cells.X.toarray()[:, ::2])


def test_a_table_carries_samples_positions_and_labels(cells):
    keys = DataKeys(batch_key="batch", labels_key="cell_type", spatial_key="spatial")
    table, _ = cell_table(cells, GeneVocabulary.from_ids(cells.var_names), keys, classes=["type_2", "type_0"])
    assert list(table.batch) == list(cells.obs["batch"])
    np.testing.assert_array_equal(table.coordinates, cells.obsm["spatial"])
    expected = cells.obs["cell_type"].astype(str).map({"type_2": 0, "type_0": 1}).fillna(-1).astype(int)
    np.testing.assert_array_equal(table.labels, expected)


def test_columns_become_text_and_missing_ones_none(cells):
    cells.obs["number"] = np.arange(120) % 3
    cells.obs["gap"] = pd.Categorical([None, *["x"] * 119])
    assert column(cells, "number")[:3].tolist() == ["0", "1", "2"]
    assert column(cells, "gap")[:2].tolist() == [None, "x"]
    with pytest.raises(ColumnError, match="did you mean 'cell_type'"):
        column(cells, "celltype")
    with pytest.raises(DataError, match="1 of 120 cells have no value"):
        cell_table(cells, GeneVocabulary.from_ids(cells.var_names), DataKeys(batch_key="gap"))


@pytest.mark.parametrize(
    ("values", "said"),
    [(np.zeros((120, 3)), r"shape \(120, 3\)"), (np.full((120, 2), np.nan), "120 cells with NaN"), (None, "no 'spatial' in obsm")],
)
def test_unusable_coordinates_are_refused(cells, values, said):
    del cells.obsm["spatial"]
    if values is not None:
        cells.obsm["spatial"] = values
    with pytest.raises(DataError, match=said):
        cell_table(cells, GeneVocabulary.from_ids(cells.var_names), DataKeys(spatial_key="spatial"))


@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csc_matrix, _dense])
def test_row_ranges_of_a_file_equal_the_matrix(cells, tmp_path, kind):
    expected, path = cells.X.toarray(), tmp_path / "x.h5ad"
    cells.layers["counts"] = kind(cells.X)
    write_h5ad(cells, path)
    with CellReader(path) as reader:
        assert reader.n_cells == 120
        assert set(reader.places) == {"X", "layers['counts']"}
        for start, stop in ((0, 120), (7, 30), (5, 5)):
            np.testing.assert_array_equal(reader.rows("layers['counts']", start, stop).toarray(), expected[start:stop])
        assert list(reader.obs("batch")) == list(cells.obs["batch"])
        with pytest.raises(ColumnError, match="did you mean 'batch'"):
            reader.obs("btch")


def test_a_matrix_with_other_rows_than_cells_is_refused(h5ad):
    with h5py.File(h5ad, "a") as file:
        file["X"].attrs["shape"] = [119, 40]
        file["X/indptr"][-1:] = file["X/indptr"][-2]
    with pytest.raises(IntegrityError), CellReader(h5ad) as reader:
        reader.rows("X", 0, 1)


def test_a_full_disk_leaves_the_old_file_and_no_scraps(cells, tmp_path):
    path = tmp_path / "cells.h5ad"
    write_h5ad(cells, path)
    before = path.read_bytes()
    with pytest.raises(StorageError, match="bytes free"):
        raise_in_child(tmp_path, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["cells.h5ad"]


def raise_in_child(folder: Path, path: Path) -> None:
    """Write in a process whose files may not grow; its StorageError appears here."""
    code = """if True:
        import resource, sys
        from pathlib import Path
        from cellplane.data.config import SimulateConfig
        from cellplane.data.simulate import simulate
        from cellplane.data.sources import write_h5ad
        from cellplane.errors import StorageError
        cells = simulate(SimulateConfig(n_cells=500))
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            write_h5ad(cells, Path(sys.argv[1]))
        except StorageError as error:
            print(error)
        """
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=120, check=True)
    if done.stdout:
        raise StorageError(done.stdout)
