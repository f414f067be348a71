"""`cellplane data genes` installs tables, lists them, and tells how a file's genes map."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cellplane.data.sources import AnnData, write_h5ad
from tests.data.genes import PLAIN, alias_file, gene_file, human


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """A folder of both gene tables and the human symbols."""
    folder = tmp_path / "tables"
    folder.mkdir()
    gene_file("human", folder / "human.csv")
    gene_file("mouse", folder / "mouse.csv")
    alias_file(folder / "symbols.tsv")
    return folder


def file_of(names: list[str], path: Path, scale: float = 1.0) -> Path:
    """Ten cells with one count of every gene."""
    counts = sp.csr_matrix(np.full((10, len(names)), scale, dtype=np.float32))
    write_h5ad(AnnData(counts, var=pd.DataFrame(index=pd.Index(names))), path)
    return path


NAMES = [*PLAIN[:18], "PHB", "PHB1", "1-Mar", "NONSENSE"]


def test_tables_are_installed_and_listed(run, tables, home):
    said = run("data", "genes", "install", "--from", tables)
    assert said.code == 0
    assert said.out.splitlines()[1].split()[:4] == ["human", "30", "28", "6"]
    listed = run("data", "genes", "list", "--json").json["tables"]
    assert [(one["species"], one["genes"]) for one in listed] == [("human", 30), ("mouse", 21)]
    assert (home / "genes" / "human" / "manifest.json").is_file()
    assert "human.csv, symbols.tsv" in run("data", "genes", "list").out


def test_nothing_installed_is_said(run):
    assert run("data", "genes", "list").out.splitlines()[1] == "none"


@pytest.mark.parametrize("verb", [("genes",), ("genes", "report")], ids=" ".join)
def test_a_file_is_reported_on(run, tables, tmp_path, verb):
    run("data", "genes", "install", "--from", tables)
    found = run("data", *verb, file_of(NAMES, tmp_path / "cells.h5ad"), "--json").json
    assert found["genes"] == {"mapped": 0, "renamed": 20, "ambiguous": 1, "outside": 0, "unknown": 1, "summed": 2}
    assert {kind: round(share * 22) for kind, share in found["count_shares"].items()} == found["genes"]
    assert (found["vocabulary"], found["naming"], found["counts"]) == ("the installed human table", "var_names (symbol)", "X")
    assert (found["ambiguous_examples"], found["unknown_examples"]) == ("1-Mar", "NONSENSE")


def test_a_report_is_a_table_for_people(run, tables, tmp_path):
    run("data", "genes", "install", "--from", tables)
    said = run("data", "genes", file_of(NAMES, tmp_path / "cells.h5ad"))
    assert said.code == 0
    assert "renamed    20      90.91%" in said.out
    assert "unknown examples" in said.out


def test_a_vocabulary_needs_no_table(run, tmp_path):
    (tmp_path / "genes.txt").write_text("\n".join(PLAIN))
    found = run("data", "genes", file_of(NAMES, tmp_path / "cells.h5ad"), "--vocabulary", tmp_path / "genes.txt", "--json").json
    assert (found["genes"]["mapped"], found["genes"]["unknown"], found["table"]) == (18, 4, None)


def test_a_file_without_counts_is_reported_without_shares(run, tables, tmp_path):
    run("data", "genes", "install", "--from", tables)
    path = file_of(NAMES, tmp_path / "scaled.h5ad", scale=0.3)
    said = run("data", "genes", path, "--json").json
    assert (said["genes"]["renamed"], said["count_shares"]) == (20, None)
    assert "unknown" in run("data", "genes", path).out


@pytest.mark.parametrize(
    ("names", "message"),
    [([human(n) for n in range(12)], "look like human .*installed tables: none.*data genes install"), (["a", "b"], "look like no species")],
)
def test_without_a_table_the_way_out_is_said(run, tmp_path, names, message):
    said = run("data", "genes", file_of(names, tmp_path / "cells.h5ad"))
    assert said.code == 3
    assert re.search(message, said.err)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["install", "--from", "nowhere.csv"], 3),
        (["install", "--from", "http://example.org/x.csv"], 2),
        (["install"], 2),
        (["nowhere.h5ad"], 3),
        (["nonsense"], 2),
    ],
)
def test_mistakes_end_with_their_code(run, arguments, code):
    said = run("data", "genes", *arguments)
    assert said.code == code
    assert "Traceback" not in said.err
