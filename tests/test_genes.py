"""Genes find their place by name, and a wrong match is an error, not a wrong answer."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from cellplane.errors import VocabularyError
from cellplane.genes import GeneVocabulary, namespace_of, without_version

SYMBOLS = [f"GENE{gene}" for gene in range(20)]
HUMAN = [f"ENSG{gene:011d}" for gene in range(20)]
MOUSE = [f"ENSMUSG{gene:011d}" for gene in range(20)]


@pytest.mark.parametrize(
    ("ids", "namespace"),
    [
        (SYMBOLS, "symbol"),
        (HUMAN, "ensembl_human"),
        (MOUSE, "ensembl_mouse"),
        ([f"ENSDARG{gene:011d}" for gene in range(9)], "ensembl"),
        (HUMAN + SYMBOLS[:5], "ensembl_human"),
        (HUMAN + SYMBOLS, "symbol"),
        ([], "symbol"),
    ],
)
def test_the_naming_scheme_of_most_ids_is_recognised(ids, namespace):
    assert namespace_of(ids) == namespace


@pytest.mark.parametrize(
    ("gene", "expected"),
    [("ENSG00000141510.18", "ENSG00000141510"), ("ENSMUSG00000059552.1", "ENSMUSG00000059552"), ("RP11-34P13.7", "RP11-34P13.7")],
)
def test_only_ensembl_ids_lose_their_version(gene, expected):
    assert without_version(gene) == expected


def test_positions_follow_the_order_of_the_vocabulary_whatever_the_order_asked():
    vocabulary = GeneVocabulary.from_ids(SYMBOLS)
    order = np.random.default_rng(0).permutation(20)
    assert vocabulary.index(np.array(SYMBOLS)[order]).tolist() == order.tolist()
    assert vocabulary.index(["unknown"]).tolist() == [-1]


def test_versions_do_not_hinder_finding_a_gene():
    assert GeneVocabulary.from_ids(f"{gene}.3" for gene in HUMAN).index([f"{HUMAN[7]}.12", HUMAN[2]]).tolist() == [7, 2]


@pytest.mark.parametrize(
    "other", [SYMBOLS[::-1], SYMBOLS[:-1], [*SYMBOLS[:-1], "OTHER"]], ids=["another order", "one gene fewer", "another gene"]
)
def test_another_vocabulary_has_another_fingerprint(other):
    assert GeneVocabulary.from_ids(SYMBOLS).fingerprint != GeneVocabulary.from_ids(other).fingerprint


def test_the_same_genes_in_another_namespace_have_another_fingerprint():
    assert GeneVocabulary(("A",), "symbol").fingerprint != GeneVocabulary(("A",), "ensembl").fingerprint


def test_a_vocabulary_survives_pickling_with_its_fingerprint():
    vocabulary = GeneVocabulary.from_ids(SYMBOLS)
    again = pickle.loads(pickle.dumps(vocabulary))
    assert (again, again.fingerprint) == (vocabulary, vocabulary.fingerprint)


@pytest.mark.parametrize(
    ("ids", "says"),
    [([], "at least one"), (["A", "B", "A"], "more than once.*'A'"), (["A\nB", "C"], "line break")],
    ids=["none", "repeated", "broken"],
)
def test_a_list_that_is_no_vocabulary_is_refused(ids, says):
    with pytest.raises(VocabularyError, match=says):
        GeneVocabulary.from_ids(ids)


def test_genes_that_differ_only_in_their_version_are_no_vocabulary():
    with pytest.raises(VocabularyError, match="more than once"):
        GeneVocabulary.from_ids([f"{HUMAN[0]}.1", f"{HUMAN[0]}.2"])


def test_aligning_tells_what_is_shared_and_what_is_left_out():
    alignment = GeneVocabulary.from_ids(SYMBOLS).align([*SYMBOLS[5:], "X", "Y"])
    assert alignment.report() == {"n_genes": 17, "n_shared": 15, "n_dropped": 2, "overlap": 15 / 17}
    assert alignment.positions.tolist() == [*range(5, 20), -1, -1]
    assert alignment.panel().tolist() == [False] * 5 + [True] * 15


def test_too_few_shared_genes_are_refused_naming_both_sides():
    with pytest.raises(VocabularyError, match=r"0 of 20 genes .* at least 10 .*ensembl_human.*symbol.*GENE0"):
        GeneVocabulary.from_ids(HUMAN).align(SYMBOLS)


def test_a_vocabulary_smaller_than_the_minimum_must_be_shared_in_full():
    small = GeneVocabulary.from_ids(SYMBOLS[:4])
    assert small.align(SYMBOLS).n_shared == 4
    with pytest.raises(VocabularyError, match="3 of 3"):
        small.align(SYMBOLS[:3])


def test_two_columns_for_one_gene_are_refused():
    with pytest.raises(VocabularyError, match=r"2 genes .* same vocabulary gene"):
        GeneVocabulary.from_ids(HUMAN).align([*HUMAN, f"{HUMAN[0]}.1", f"{HUMAN[1]}.1"])


def test_no_columns_at_all_are_refused():
    with pytest.raises(VocabularyError, match="0 of 0"):
        GeneVocabulary.from_ids(SYMBOLS).align([])


def test_a_panel_that_is_too_small_is_told_from_wrong_names():
    vocabulary = GeneVocabulary.from_ids([f"GENE{n}" for n in range(40)])
    with pytest.raises(VocabularyError, match=r"8 of 8 genes .* measured too few genes"):
        vocabulary.align([f"GENE{n}" for n in range(8)])
    with pytest.raises(VocabularyError, match="same naming scheme and species"):
        vocabulary.align([f"ENSMUSG{n:011d}" for n in range(40)])
