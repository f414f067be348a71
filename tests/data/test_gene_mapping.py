"""Genes find their place under whatever name a file has for them, never under another species', and the loss is told.

Rows C7 and C9 to C13 of the catalogue of bad inputs are here.
"""

from __future__ import annotations

import logging
import time
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cellplane.data.config import DataKeys
from cellplane.data.gene_install import install_tables
from cellplane.data.gene_mapping import (
    GeneRules,
    Tables,
    align_genes,
    align_namings,
    count_shares,
    gene_namings,
    genes_without_place,
    species_of,
)
from cellplane.data.gene_tables import installed_tables
from cellplane.data.naming import default_naming, merged_columns, to_vocabulary
from cellplane.data.sources import cell_table, read_h5ad
from cellplane.errors import DataError, VocabularyError
from cellplane.genes import EXACT, RENAMED, UNKNOWN, GeneAlignment, GeneVocabulary
from tests.data.genes import PLAIN, SHARED_GENES, human, mouse, table

TABLES = {"human": table("human"), "mouse": table("mouse")}
IDS = GeneVocabulary.from_ids([*(human(number) for number in range(20)), human(100), human(101), human(105), human(108)])
SYMBOLS = GeneVocabulary.from_ids([*PLAIN, "PHB1", "MARCHF1", "TBCE", "CD4", "HERC3"])
MOUSE_IDS = [mouse(number) for number in range(20)]
MOUSE_SYMBOLS = [symbol.capitalize() for symbol in PLAIN]


def var(names: list[str], **columns: list[str]) -> pd.DataFrame:
    return pd.DataFrame(columns, index=pd.Index(names))


def aligned(names: list[str], vocabulary: GeneVocabulary, tables: Tables = TABLES, rules: GeneRules | None = None) -> GeneAlignment:
    return align_genes(var(names), vocabulary, tables, rules)[1]


@pytest.mark.parametrize(
    ("name", "place"),
    [("PHB1", 20), ("PHB", 20), ("MARCH1", 21), ("TBCE", 22), ("1-Mar", -1), ("HERC3", -1), ("GONE", -1), (f"{human(3)}.7", 3)],
)
def test_symbols_find_ensembl_ids_through_the_table(name, place):
    assert aligned([*PLAIN[10:], name], IDS).positions[-1] == place


@pytest.mark.parametrize(
    ("name", "place"),
    [
        (human(100), 20),
        ("PHB", 20),
        ("MARCH1", 21),
        (f"{human(105)}.2", 22),
        (human(104), 24),
        ("HERC3", 24),
        ("OLD-HERC3", 24),
        ("1-Mar", -1),
    ],
)
def test_ids_and_old_symbols_find_symbols_through_the_table(name, place):
    """HERC3 means two ids but only one symbol, so it is clear here."""
    assert aligned([*PLAIN[10:], name], SYMBOLS).positions[-1] == place


def test_a_symbol_of_two_coding_genes_means_the_one_that_the_vocabulary_has():
    one = GeneVocabulary.from_ids([*(human(number) for number in range(20)), human(104), human(106)])
    assert aligned([*PLAIN, "HERC3", "OLD-HERC3", "TBCE"], one).positions[-3:].tolist() == [20, 20, -1]  # 106 does not code
    assert aligned([*(human(n) for n in range(20)), human(103)], one).positions[-1] == -1  # an id is what it is


def test_a_vocabulary_of_old_symbols_is_found_too():
    old = GeneVocabulary.from_ids([*PLAIN, "PHB", "MARCH1"])
    assert aligned([*PLAIN, "PHB1", human(101)], old).positions[-2:].tolist() == [20, 21]


def test_every_loss_is_counted():
    alignment = aligned([*PLAIN, "PHB", "PHB1", human(101), "1-Mar", "MTARC1", "NONSENSE", "GONE"], IDS)
    assert alignment.report() == {
        "n_genes": 27,
        "n_shared": 23,
        "n_dropped": 4,
        "overlap": 23 / 27,
        "n_renamed": 22,
        "n_ambiguous": 1,
        "n_outside": 1,
        "n_summed": 1,
    }
    assert alignment.table == "fingerprint of human"


def test_without_a_table_only_names_as_they_stand_are_found():
    alignment = aligned([*PLAIN, "PHB", "HERC3"], SYMBOLS, {})
    assert alignment.positions[-2:].tolist() == [-1, 24]
    assert set(alignment.outcome.tolist()) == {EXACT, UNKNOWN}
    assert alignment.table is None


def test_the_share_of_counts_of_every_fate_is_told():
    alignment = aligned([*PLAIN, "PHB", "PHB1", "1-Mar", "MTARC1", "NONSENSE"], IDS)
    totals = np.array([1.0] * 20 + [10, 20, 5, 10, 35])
    assert count_shares(alignment, totals) == {
        "mapped": 0.0,
        "renamed": 0.5,
        "ambiguous": 0.05,
        "outside": 0.1,
        "unknown": 0.35,
        "summed": 0.3,
    }
    assert set(count_shares(alignment, np.zeros(25)).values()) == {0.0}


# The columns of var


@pytest.mark.parametrize("key", ["ensembl_id", "feature_id", "gene_ids", "gene_name", "feature_name"])
def test_known_columns_of_var_are_tried_before_its_names(key):
    naming, alignment = align_genes(var([str(n) for n in range(20)], **{key: PLAIN}), SYMBOLS, {})
    assert (naming, alignment.n_shared) == (key, 20)


def test_the_first_of_equally_good_columns_is_taken():
    frame = var(PLAIN, gene_name=PLAIN, ensembl_id=PLAIN)
    assert align_genes(frame, SYMBOLS, TABLES)[0] == "ensembl_id"


def test_a_retired_id_falls_back_to_its_symbol_unless_the_gene_is_there_already():
    ids = [*(human(number) for number in range(20)), human(900), human(901), human(109)]
    frame = var([*PLAIN, "PHB", "GEN3", "MARCH1"], ensembl_id=ids)
    naming, alignment = align_genes(frame, IDS, TABLES)
    assert naming == "ensembl_id"
    assert alignment.positions[-3:].tolist() == [20, -1, -1]  # human(109) is known: it is not MARCH1, whatever var_names say
    assert alignment.outcome[20] == RENAMED


def test_a_missing_value_in_a_column_falls_back_to_the_name():
    frame = var(PLAIN, ensembl_id=[*PLAIN[:18], "", None])
    assert gene_namings(frame)["ensembl_id"] == PLAIN


def test_default_naming_prefers_ids_and_never_numbers():
    numbers = [str(number) for number in range(20)]
    assert default_naming(gene_namings(var(PLAIN, gene_ids=[f"{human(n)}.1" for n in range(20)])))[:2] == [human(0), human(1)]
    assert default_naming(gene_namings(var(numbers, gene_name=PLAIN))) == PLAIN
    assert default_naming(gene_namings(var(numbers))) == numbers


# C7: names that stand there twice


def test_c7_repeated_names_are_refused_with_the_first_five_and_the_choice():
    names = [*PLAIN, *PLAIN[:7], "OTHER", "OTHER"]
    with pytest.raises(DataError, match=r"7 genes stand in var_names more than once, e.g. \['GEN0', .*'GEN4'\];.*repeated_genes=sum"):
        aligned(names, SYMBOLS, {})
    with pytest.raises(DataError, match=r"8 genes stand in var_names"):
        default_naming(gene_namings(var(names)))


def test_c7_repeated_names_are_summed_or_the_first_is_taken_when_asked():
    names = [*PLAIN, *PLAIN[:7]]
    summed, first = (aligned(names, SYMBOLS, {}, GeneRules(repeated=rule)) for rule in ("sum", "first"))
    assert (summed.n_shared, summed.n_summed) == (27, 7)
    assert (first.n_shared, first.n_summed, first.positions[20:].max()) == (20, 0, -1)
    assert len(default_naming(gene_namings(var(names)), "sum")) == 27


# C9, C10: none or few


def test_c9_no_shared_gene_says_what_both_sides_look_like():
    with pytest.raises(VocabularyError, match=r"0 of 20 genes .*var_names looks like mouse, e.g. \['ENSMUSG00000000000'.* genes are human"):
        aligned(MOUSE_IDS, SYMBOLS, {})
    with pytest.raises(
        VocabularyError, match=r"0 of 12 genes .*are symbol.*yours look like symbol.*tried gene_name, var_names.*data genes install"
    ):
        align_genes(var([f"PEAK{n}" for n in range(12)], gene_name=[f"peak{n}" for n in range(12)]), SYMBOLS, {})


def test_c10_few_shared_genes_are_refused_below_the_floor_and_warned_about_above(caplog):
    large = GeneVocabulary.from_ids([f"GEN{n}" for n in range(400)])
    others = [f"PEAK{n}" for n in range(200)]
    with pytest.raises(VocabularyError, match=r"9 of 209 genes .*at least 10"):
        aligned([*PLAIN[:9], *others], large)
    with caplog.at_level(logging.WARNING):
        alignment = aligned([*PLAIN[:12], *others], large)
    assert "only 12 of 212 genes are among the model's 400" in caplog.text
    assert alignment.report()["overlap"] == 12 / 212


def test_c10_a_small_model_that_is_covered_in_full_is_no_reason_to_warn(caplog):
    with caplog.at_level(logging.WARNING):
        aligned([*PLAIN, *(f"PEAK{n}" for n in range(900))], GeneVocabulary.from_ids(PLAIN))
    assert not caplog.text


# C11: versions


@pytest.mark.parametrize("tables", [{}, TABLES], ids=["without a table", "with tables"])
def test_c11_versions_are_stripped_and_what_falls_together_is_summed_and_reported(tables):
    names = [*(f"{human(number)}.{number}" for number in range(20)), f"{human(3)}.99"]
    alignment = aligned(names, IDS, tables)
    assert alignment.positions.tolist() == [*range(20), 3]
    assert alignment.report()["n_summed"] == 1
    assert default_naming(gene_namings(var(names)))[-1] == human(3)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32, np.float64])
def test_c11_counts_of_one_gene_are_added_up_beyond_their_type(dtype):
    dense = np.array([[200, 0, 100, 7], [0, 5, 0, 0]], dtype=dtype)
    alignment = GeneAlignment(np.array([1, 0, 1, -1]), 2, "")
    rows = to_vocabulary(sp.csr_matrix(dense), alignment)
    assert rows.toarray().tolist() == [[0, 300], [5, 0]]
    assert rows.has_canonical_format


def test_columns_of_one_gene_become_one_column():
    matrix = sp.csr_matrix(np.array([[1, 2, 3], [0, 0, 4]], dtype=np.float32))
    merged, genes = merged_columns(matrix, ["A", "B", "A"])
    assert (genes, merged.toarray().tolist()) == (["A", "B"], [[4, 2], [4, 0]])
    assert merged_columns(matrix, ["A", "B", "C"])[0] is matrix


# C12: letters and species


def test_c12_another_spelling_is_taken_only_when_asked_and_unique():
    names = [*PLAIN[:19], "gen19", "c1ORF112", "Phb"]
    vocabulary = GeneVocabulary.from_ids([*PLAIN, "C1orf112", "PHB1"])
    assert aligned(names, vocabulary).positions[-3:].tolist() == [-1, -1, -1]
    loose = GeneRules(ignore_case=True)
    assert aligned(names, vocabulary, rules=loose).positions[-3:].tolist() == [
        19,
        20,
        -1,
    ]  # "phb" is no symbol, and aliases need their case
    assert aligned([*PLAIN[:18], "gen19", "Gen19"], vocabulary, rules=loose).positions[-2:].tolist() == [-1, -1]
    double = GeneVocabulary.from_ids([*PLAIN[:19], "GEN19", "Gen19"])
    assert aligned([*PLAIN[:19], "gen19"], double, {}, loose).positions[-1] == -1


@pytest.mark.parametrize("tables", [{}, {"human": TABLES["human"]}, TABLES], ids=["no table", "human table", "both tables"])
@pytest.mark.parametrize("ignore_case", [False, True])
@pytest.mark.parametrize("vocabulary", [IDS, SYMBOLS], ids=["ids", "symbols"])
@pytest.mark.parametrize("names", [MOUSE_IDS, MOUSE_SYMBOLS], ids=["mouse ids", "mouse symbols"])
def test_c12_mouse_genes_never_become_human_ones(names, vocabulary, ignore_case, tables):
    with pytest.raises(VocabularyError, match=r"looks like mouse.*genes are human.*orthologs"):
        aligned(names, vocabulary, tables, GeneRules(ignore_case=ignore_case))


@pytest.mark.parametrize("tables", [{}, {"mouse": TABLES["mouse"]}, TABLES], ids=["no table", "mouse table", "both tables"])
@pytest.mark.parametrize("vocabulary", [MOUSE_IDS, MOUSE_SYMBOLS], ids=["ids", "symbols"])
def test_c12_human_genes_never_become_those_of_mice(vocabulary, tables):
    with pytest.raises(VocabularyError, match=r"looks like human.*genes are mouse"):
        aligned(PLAIN, GeneVocabulary.from_ids(vocabulary), tables, GeneRules(ignore_case=True))


def test_c12_the_ids_beside_the_symbols_tell_the_species():
    with pytest.raises(VocabularyError, match=r"ensembl_id looks like mouse"):
        align_genes(
            var([*PLAIN[:10], *MOUSE_SYMBOLS[10:]], ensembl_id=MOUSE_IDS),
            GeneVocabulary.from_ids([*PLAIN, *(f"G{n}" for n in range(30))]),
            {},
        )


def test_c12_cells_of_two_species_keep_the_genes_of_the_models():
    alignment = aligned([*(human(n) for n in range(20)), *(mouse(n) for n in range(60))], IDS)
    assert alignment.n_shared == 20


@pytest.mark.parametrize(
    ("names", "species"),
    [
        (["TP53", "C1orf112", "MT-CO1", "RP11-34P13.7", "HLA-A", "LINC00115", "FAM41C", "AC114498.1", "U2AF1", "H4C3"], "human"),
        (["Trp53", "1700034P13Rik", "mt-Co1", "H2-K1", "Gm37180", "Xkr4", "Sox17", "Rp1", "Lypla1", "Tcea1"], "mouse"),
        (["tp53", "sox2", "gata1"], None),
        (["ENSDARG00000000001"], None),
        ([mouse(1)], "mouse"),
        ([], None),
    ],
)
def test_how_genes_are_written_tells_the_species(names, species):
    assert species_of(names, {}) == species


# C13: ids here, symbols there


def test_c13_a_column_of_var_helps_where_its_names_do_not():
    ids = [human(n) for n in range(20)]
    naming, alignment = align_genes(var(ids, feature_name=PLAIN), SYMBOLS, {})
    assert (naming, alignment.n_shared) == ("feature_name", 20)
    with pytest.raises(VocabularyError, match=r"0 of 20 .*tried gene_ids, var_names.*cellplane data genes install"):
        align_genes(var(ids, gene_ids=ids), SYMBOLS, {})
    assert align_genes(var(ids, gene_ids=ids), SYMBOLS, TABLES)[1].n_shared == 20


# Genes a vocabulary lacks


def test_what_a_vocabulary_lacks_is_named_as_it_names_its_own():
    names = ["GEN3", "C1orf112", f"{human(109)}.4", "1-Mar", "NONSENSE", human(102)]
    assert genes_without_place(names, IDS, TABLES) == [human(109), human(102)]
    assert genes_without_place(names, SYMBOLS, TABLES) == ["C1orf112", "NONSENSE", "MTARC1"]
    assert genes_without_place(names, IDS, {}) == [human(109), human(102)]


def test_a_vocabulary_grows_at_its_end():
    grown = IDS.extended([human(109), human(3), human(109)])
    assert grown.gene_ids == (*IDS.gene_ids, human(109))
    assert (grown.namespace, grown.fingerprint != IDS.fingerprint) == (IDS.namespace, True)
    assert IDS.extended([]) == IDS


# The published tables


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    if not SHARED_GENES.is_dir():
        pytest.skip("the published tables lie in ../shared/genes, which is absent here")
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("published")
    for path in SHARED_GENES.glob("*.gz"):
        (folder / path.name).symlink_to(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELLPLANE_HOME", str(home))
        install_tables(str(folder))
        return installed_tables()


def test_52_of_the_65_unknown_symbols_of_scanpys_pbmc_are_recovered(published, pbmc68k):
    """The figure of SHARDS.md: 13 names remain that GENCODE v48 does not have under any name the tables know."""
    names = [str(name) for name in read_h5ad(pbmc68k).var_names]
    genes = published["human"]
    vocabulary = GeneVocabulary.from_ids(dict.fromkeys(genes.symbols))
    missing = [name for name in names if name not in set(genes.symbols)]
    alignment = align_namings({"var_names": names}, vocabulary, published)[1]
    remain = [name for name, place in zip(names, alignment.positions, strict=True) if place < 0]
    assert (len(names), len(missing), len(remain)) == (765, 65, 13)
    assert set(remain) < set(missing)
    assert sum(name.startswith(("RP", "CTD-", "AC0", "AL9")) for name in remain) == 11  # clones; the others are C20orf27 and TMBIM4-1


@pytest.mark.parametrize(("name", "agree", "of"), [("pbmc3k", 272, 273), ("cellbench_lung_lines", 654, 661), ("kang_pbmc_ifnb", 59, 59)])
def test_a_renamed_symbol_is_the_gene_that_the_files_own_ids_say(published, name, agree, of):
    """Files with ids beside symbols are the judge: of old symbols whose id is still current, how many find that id."""
    path = SHARED_GENES.parent / "data" / f"{name}.h5ad"
    frame, genes = read_h5ad(path).var, published["human"]
    names, ids = pd.Index(frame.index.astype(str)), frame["ensembl_id"].astype(str).to_numpy()
    code = genes.rows(names)[1]
    symbol = dict(zip(genes.ids, genes.symbols, strict=True))
    old = [index for index, there in enumerate(names.isin(set(genes.symbols))) if not there and code[index] >= 0 and ids[index] in symbol]
    right = Counter(bool(symbol[ids[index]] == genes.symbol(code[index])) for index in old)
    assert (right[True], len(old)) == (agree, of)


def test_thirty_thousand_genes_are_mapped_in_well_under_a_second(published):
    human_table = published["human"]
    vocabulary = GeneVocabulary.from_ids(human_table.ids[::4])
    rows = np.random.default_rng(0).choice(len(human_table.ids), 30_000, replace=False)
    frame = var(list(human_table.symbols[rows]), gene_ids=list(human_table.ids[rows]))
    align_genes(frame, vocabulary, published, GeneRules(repeated="sum"))
    began = time.process_time()
    naming, alignment = align_genes(frame, vocabulary, published, GeneRules(repeated="sum"))
    assert time.process_time() - began < 1.0  # 0.15 s measured
    assert (naming, alignment.n_shared) == ("gene_ids", int(np.isin(rows, np.arange(0, len(human_table.ids), 4)).sum()))


def test_an_anndata_says_how_its_genes_were_mapped(published, pbmc68k, monkeypatch):
    monkeypatch.setattr("cellplane.data.naming.installed_tables", lambda: published)
    vocabulary = GeneVocabulary.from_ids((SHARED_GENES / "cellplm_85m_genes.txt").read_text(encoding="utf-8").split())
    report = cell_table(read_h5ad(pbmc68k), vocabulary, DataKeys(recover_counts=True))[1]
    assert (report["gene_naming"], report["n_genes"]) == ("var_names", 765)
    assert report["n_shared"] == report["n_renamed"] > 700


def test_a_file_of_mice_is_refused_by_a_human_model(published):
    vocabulary = GeneVocabulary.from_ids((SHARED_GENES / "cellplm_85m_genes.txt").read_text(encoding="utf-8").split())
    frame = read_h5ad(SHARED_GENES.parent / "data" / "starmap_visp.h5ad").var
    for tables in (published, {}):
        with pytest.raises(VocabularyError, match=r"looks like mouse, e.g. .'A830018L16Rik', 'Aamp'"):
            align_genes(frame, vocabulary, tables)
