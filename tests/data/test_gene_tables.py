"""What a name means is told once, offline, and a table that changed on disk is not believed."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import urllib.request
from pathlib import Path

import pandas as pd
import pytest

from cellplane.data import gene_install
from cellplane.data.gene_install import install_tables
from cellplane.data.gene_tables import installed_tables, table_manifests, tables_home
from cellplane.errors import ConfigError, DataError, FileFormatError, IntegrityError, ServiceError
from tests.data.genes import SHARED_GENES, alias_file, gene_file, human, table


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CELLPLANE_HOME of its own."""
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with both gene tables and the human symbol table, and something that is none."""
    folder = tmp_path / "files"
    folder.mkdir()
    gene_file("human", folder / "human.csv")
    gene_file("mouse", folder / "mouse.csv")
    alias_file(folder / "symbols.tsv")
    (folder / "README.md").write_text("# not a table\n")
    return folder


@pytest.mark.parametrize(
    ("name", "means"),
    [
        (human(3), human(3)),
        ("GEN3", human(3)),
        ("PHB", human(100)),
        ("MARCH1", human(101)),
        ("1-Mar", "several"),
        ("HERC3", "several"),
        ("OLD-HERC3", "several"),
        ("TBCE", human(105)),
        ("TBCE-OLD", human(105)),
        ("CD4", human(108)),
        ("GONE", "nothing"),
        ("Cd4", "nothing"),
    ],
)
def test_a_name_means_one_gene_several_or_none(name, means):
    row = table().rows(pd.Index([name]))[0][0]
    found = {-1: "nothing", -2: "several"}.get(int(row)) or table().ids[row]
    assert found == means


def test_a_table_without_aliases_knows_symbols_all_the_same():
    assert table("mouse").rows(pd.Index(["Cd4", "CD4"]))[0].tolist() == [20, -1]


def test_a_folder_installs_every_table_for_the_species_it_is_of(files):
    manifests = {manifest["species"]: manifest for manifest in install_tables(str(files))}
    assert {species: (m["genes"], m["aliases"]) for species, m in manifests.items()} == {"human": (30, 6), "mouse": (21, 0)}
    assert [source["kind"] for source in manifests["human"]["sources"]] == ["genes", "aliases"]
    assert manifests["human"]["sources"][0]["sha256"] == hashlib.sha256((files / "human.csv").read_bytes()).hexdigest()
    tables = installed_tables()
    assert set(tables) == {"human", "mouse"}
    assert tables["human"].rows(pd.Index(["PHB", "1-Mar"]))[0].tolist() == [20, -2]


def test_nothing_is_installed_at_first():
    assert (installed_tables(), table_manifests()) == ({}, [])


def test_gzipped_files_and_single_ones_are_taken_one_after_another(files, tmp_path):
    packed = tmp_path / "genes.csv.gz"
    packed.write_bytes(gzip.compress((files / "human.csv").read_bytes()))
    assert install_tables(str(packed))[0]["aliases"] == 0
    (manifest,) = install_tables(str(files / "symbols.tsv"))
    assert (manifest["genes"], manifest["aliases"]) == (30, 6)
    assert [source["name"] for source in manifest["sources"]] == ["genes.csv.gz", "symbols.tsv"]
    assert installed_tables()["human"].rows(pd.Index(["PHB"]))[0].tolist() == [20]
    assert len(list((tables_home() / "human").glob("*.parquet"))) == 2  # the older ones are gone


def test_installing_the_same_again_changes_nothing(files):
    install_tables(str(files))
    before = {path: path.read_bytes() for path in tables_home().rglob("*") if path.is_file()}
    install_tables(str(files))
    assert {path: path.read_bytes() for path in tables_home().rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("damaged", ["manifest.json", "genes", "aliases"])
def test_one_changed_byte_is_noticed_when_a_table_is_loaded(files, damaged):
    install_tables(str(files))
    (path,) = (tables_home() / "human").glob(f"{damaged}*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match=r"human.*cellplane data genes install"):
        installed_tables()


def test_a_missing_file_of_a_table_is_named(files):
    install_tables(str(files))
    next((tables_home() / "mouse").glob("genes-*")).unlink()
    with pytest.raises(IntegrityError, match=r"genes-.*parquet is missing.*install the mouse table again"):
        installed_tables()


def test_a_table_of_a_newer_format_is_refused(files, monkeypatch):
    monkeypatch.setattr("cellplane.data.gene_tables.FORMAT_VERSION", 2)
    install_tables(str(files))
    monkeypatch.setattr("cellplane.data.gene_tables.FORMAT_VERSION", 1)
    with pytest.raises(FileFormatError, match=r"format version 2.*up to 1.*newer cellplane"):
        table_manifests()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"gene,count\nA,1\n", "no gene table: its first line is 'gene,count'.*Approved.Symbol"),
        (b"", "no gene table"),
        (b"\x89PNG\r\n\x1a\n\xff", "cannot be read as text"),
        (b"\x1f\x8bnot gzip at all", "cannot be read as text"),
        (b"ENSDARG00000000001,x,1,1,protein_coding\n", "ids of the kinds .*ENSDARG.*expected one of ENSG, ENSMUSG"),
        (b"ENSG00000000001,A,1,1,lncRNA\nENSMUSG00000000001,a,1,1,lncRNA\n", "ids of the kinds"),
        (b"ENSG00000000001,A,1,1,lncRNA\nENSG00000000001,B,1,1,lncRNA\n", "names ENSG00000000001 twice"),
        (b"ENSG00000000001,A,1,1,lncRNA\nENSG00000000002,A,1,1,lncRNA,x,y\n", "is no table"),
    ],
)
def test_a_file_that_is_no_gene_table_is_refused(tmp_path, content, said):
    (tmp_path / "file.csv").write_bytes(content)
    with pytest.raises(FileFormatError, match=said):
        install_tables(str(tmp_path / "file.csv"))
    assert not installed_tables()


def test_a_table_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gene_install, "MAX_BYTES", 4096)
    (tmp_path / "bomb.csv.gz").write_bytes(gzip.compress(b"x" * 100_000))
    with pytest.raises(FileFormatError, match=r"unpacks to more than 16384 bytes"):
        install_tables(str(tmp_path / "bomb.csv.gz"))
    (tmp_path / "large.csv").write_bytes(b"x" * 5000)
    with pytest.raises(FileFormatError, match=r"5000 bytes; a gene table has at most 4096"):
        install_tables(str(tmp_path / "large.csv"))


def test_the_species_asked_for_must_be_that_of_the_file(files):
    with pytest.raises(DataError, match=r"holds mouse genes .*--species human"):
        install_tables(str(files / "mouse.csv"), species="human")
    with pytest.raises(ConfigError, match=r"no species 'yeast'; known: human, mouse"):
        install_tables(str(files / "mouse.csv"), species="yeast")


def test_symbols_need_the_genes_they_belong_to(files):
    with pytest.raises(DataError, match=r"belongs to no installed gene table .no gene table yet"):
        install_tables(str(files / "symbols.tsv"))
    install_tables(str(files / "mouse.csv"))
    with pytest.raises(DataError, match=r"0% of the mouse symbols"):
        install_tables(str(files / "symbols.tsv"))


def test_two_tables_of_one_kind_are_one_too_many(files):
    shutil.copy(files / "human.csv", files / "again.csv")
    with pytest.raises(DataError, match=r"again.csv and human.csv are both human gene tables"):
        install_tables(str(files))


@pytest.mark.parametrize(("source", "error"), [("nowhere.csv", DataError), ("http://example.org/genes.csv", ConfigError), (".", DataError)])
def test_a_source_that_gives_no_table_is_named(source, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=r"no such file|https only|holds no table"):
        install_tables(source)


def test_a_checksum_belongs_to_one_file_and_must_be_right(files):
    right = hashlib.sha256((files / "human.csv").read_bytes()).hexdigest()
    assert install_tables(str(files / "human.csv"), sha256=right.upper())[0]["genes"] == 30
    with pytest.raises(IntegrityError, match=f"human.csv has sha256 {right}, expected 0000"):
        install_tables(str(files / "human.csv"), sha256="0" * 64)
    with pytest.raises(ConfigError, match=r"belongs to one file"):
        install_tables(str(files), sha256=right)


class Answer:
    """What urlopen gives, without a network."""

    def __init__(self, data: bytes, address: str) -> None:
        self._data, self._address = data, address

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def geturl(self) -> str:
        return self._address

    def read(self, size: int) -> bytes:
        return self._data[:size]


def test_a_table_comes_through_https_with_limits(files, monkeypatch):
    data = (files / "human.csv").read_bytes()
    monkeypatch.setattr(urllib.request, "urlopen", lambda address, timeout: Answer(data, address))
    assert install_tables("https://example.org/a/genes.csv")[0]["sources"][0]["name"] == "genes.csv"
    with pytest.raises(IntegrityError, match=r"https://example.org/a/genes.csv has sha256"):
        install_tables("https://example.org/a/genes.csv", sha256="0" * 64)
    monkeypatch.setattr(gene_install, "MAX_BYTES", 100)
    with pytest.raises(FileFormatError, match=r"more than 100 bytes"):
        install_tables("https://example.org/a/genes.csv")
    monkeypatch.setattr(urllib.request, "urlopen", lambda address, timeout: Answer(data, "http://elsewhere.org"))
    with pytest.raises(ServiceError, match=r"leads away from https"):
        install_tables("https://example.org/a/genes.csv")


def test_a_download_that_fails_says_the_way_out(monkeypatch):
    def refuse(address: str, timeout: float) -> Answer:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(ServiceError, match=r"no route to host.*install it from disk"):
        install_tables("https://example.org/genes.csv")


@pytest.mark.skipif(not SHARED_GENES.is_dir(), reason="the published tables lie in ../shared/genes, which is absent here")
def test_the_published_tables_install_and_load(tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    for path in SHARED_GENES.glob("*.gz"):
        (folder / path.name).symlink_to(path)
    manifests = {manifest["species"]: manifest for manifest in install_tables(str(folder))}
    assert {species: (m["genes"], m["protein_coding"]) for species, m in manifests.items()} == {
        "human": (78_894, 20_120),  # GENCODE v48, counted with awk
        "mouse": (78_317, 21_807),  # GENCODE vM37
    }
    assert json.loads((tables_home() / "human" / "manifest.json").read_text())["aliases"] > 50_000
    assert len(installed_tables()["mouse"].ids) == 78_317
