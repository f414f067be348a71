"""Data sets that name their genes differently become one folder of shards, and the report says what was lost on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cellplane.data.config import ConvertConfig, DataKeys, SimulateConfig
from cellplane.data.convert import ConvertReport, convert_with, write_part
from cellplane.data.gene_install import install_tables
from cellplane.data.loader import ShardStore
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData, cell_table, find_counts, write_h5ad
from cellplane.errors import DataError, VocabularyError
from cellplane.genes import GeneVocabulary
from cellplane.pipelines.annotation import CellTypeAnnotationPipeline
from tests.data.genes import PLAIN, alias_file, gene_file, human
from tests.pipelines.conftest import RECIPE

IDS = [human(number) for number in range(20)]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / "home"))


@pytest.fixture
def tables(tmp_path: Path) -> None:
    """The small human table, installed."""
    (tmp_path / "tables").mkdir()
    gene_file("human", tmp_path / "tables" / "human.csv")
    alias_file(tmp_path / "tables" / "symbols.tsv")
    install_tables(str(tmp_path / "tables"))


def named(names: list[str]) -> AnnData:
    """Simulated cells with these genes."""
    cells = simulate(SimulateConfig(n_cells=40, n_genes=len(names)))
    return AnnData(cells.X, obs=cells.obs, var=pd.DataFrame(index=pd.Index(names)))


def run(tmp_path: Path, files: dict[str, AnnData], **options: object) -> ConvertReport:
    for name, cells in files.items():
        write_h5ad(cells, tmp_path / f"{name}.h5ad")
    inputs = tuple(str(tmp_path / f"{name}.h5ad") for name in files)
    config = ConvertConfig(inputs=inputs, out=str(tmp_path / "shards"), **options)
    return convert_with(config, lambda tasks: map(write_part, tasks), lambda _: None)


def totals(tmp_path: Path, dataset: int) -> np.ndarray:
    """Counts of every gene of the folder in one data set."""
    store = ShardStore(tmp_path / "shards")
    found = np.zeros(len(store.vocabulary))
    batch = store.read(range(len(store.sizes)))
    own = batch.dataset_index[batch.cell_of_entry()] == dataset
    np.add.at(found, batch.gene[own].numpy(), batch.value[own].numpy())
    return found


def columns(cells: AnnData) -> np.ndarray:
    return np.asarray(cells.X.sum(0)).ravel()


@pytest.mark.usefixtures("tables")
def test_symbols_and_ids_meet_in_one_vocabulary(tmp_path):
    files = {"ids": named([*IDS, human(100)]), "symbols": named([*PLAIN, "PHB", "C1orf112", "1-Mar", "NONSENSE"])}
    report = run(tmp_path, files)
    vocabulary = ShardStore(tmp_path / "shards").vocabulary
    assert vocabulary.gene_ids == (*IDS, human(100), human(109))
    assert totals(tmp_path, 1).tolist() == columns(files["symbols"])[:22].tolist()
    wanted = {"n_genes": 24, "n_shared": 22, "n_renamed": 22, "n_ambiguous": 1, "n_dropped": 2}
    assert {key: report.gene_report["symbols"][key] for key in wanted} == wanted
    assert report.gene_report["ids"]["overlap"] == 1


@pytest.mark.usefixtures("tables")
def test_symbols_of_two_years_are_one_gene_and_adding_a_file_writes_no_other(tmp_path):
    first = {"older": named([*PLAIN, "PHB"])}
    assert run(tmp_path, first).genes == 21
    report = run(tmp_path, {**first, "newer": named([*PLAIN, "PHB1", "MARCHF1"])})
    assert ShardStore(tmp_path / "shards").vocabulary.gene_ids == (*PLAIN, "PHB", "MARCHF1")
    assert (report.shards_new, report.shards_reused) == (1, 1)


def test_a_table_installed_later_renews_what_it_changes(tmp_path, request):
    (tmp_path / "genes.txt").write_text("\n".join([*IDS, human(100)]))
    cells = named([*IDS, "PHB", "NONSENSE"])
    before = run(tmp_path, {"cells": cells}, vocabulary=str(tmp_path / "genes.txt"))
    assert before.gene_report["cells"]["n_shared"] == 20
    request.getfixturevalue("tables")
    after = run(tmp_path, {"cells": cells}, vocabulary=str(tmp_path / "genes.txt"))
    assert (after.gene_report["cells"]["n_shared"], after.shards_reused) == (21, 0)
    assert totals(tmp_path, 0)[20] == columns(cells)[20]


@pytest.mark.parametrize(("rule", "expected"), [("sum", [0, 20]), ("first", [0])])
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_repeated_genes_are_treated_as_chosen(tmp_path, rule, expected):
    cells = named([*PLAIN, "GEN0"])
    with pytest.raises(DataError, match="repeated_genes=sum"):
        run(tmp_path, {"cells": cells})
    keys = DataKeys(repeated_genes=rule)
    run(tmp_path, {"cells": cells}, keys=keys)
    assert totals(tmp_path, 0)[0] == columns(cells)[expected].sum()
    table, report = cell_table(cells, GeneVocabulary.from_ids(PLAIN), keys)
    assert table.value[table.gene == 0].sum() == columns(cells)[expected].sum()
    assert report["n_summed"] == len(expected) - 1


def test_versions_that_fall_together_are_summed_in_shards_in_memory_and_in_a_pipeline(tmp_path):
    names = [*(f"{gene}.1" for gene in IDS), f"{IDS[3]}.2"]
    cells = named(names)
    report = run(tmp_path, {"cells": cells})
    assert (report.genes, report.gene_report["cells"]["n_summed"]) == (20, 1)
    assert totals(tmp_path, 0)[3] == columns(cells)[[3, 20]].sum()
    assert find_counts(cells, DataKeys()).gene_ids[20] == IDS[3]
    recipe = {**RECIPE, "optimizer": {"steps": 2, "warmup_steps": 1}}
    pipeline = CellTypeAnnotationPipeline(config=recipe).fit(cells)
    assert pipeline.folder_.vocabulary.gene_ids == tuple(IDS)


@pytest.mark.usefixtures("tables")
def test_an_answer_says_which_table_its_genes_went_through(tmp_path):
    recipe = {**RECIPE, "optimizer": {"steps": 2, "warmup_steps": 1}}
    pipeline = CellTypeAnnotationPipeline(config=recipe).fit(named(IDS))
    query = named([*PLAIN[:18], "NONSENSE"])
    pipeline.predict(query, key_added="cellplm")
    said = query.uns["cellplm"]
    assert (said["gene_naming"], said["n_renamed"], said["n_dropped"], len(said["gene_table"])) == ("var_names", 18, 1, 64)
    write_h5ad(query, tmp_path / "answer.h5ad")


def test_without_a_table_nothing_is_renamed(tmp_path):
    with pytest.raises(VocabularyError, match=r"name their genes differently.*install an id table"):
        run(tmp_path, {"ids": named(IDS), "symbols": named(PLAIN)})
    report = cell_table(named(IDS), GeneVocabulary.from_ids(IDS), DataKeys())[1]
    assert (report["gene_table"], report["n_renamed"]) == (None, 0)
