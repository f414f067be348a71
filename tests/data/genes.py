"""A small id table of two species with everything that is awkward about gene names, and the files it is made from."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from cellplane.data.gene_tables import GeneTable, make_table

SHARED_GENES = Path(__file__).resolve().parents[3] / "shared" / "genes"

PLAIN = [f"GEN{number}" for number in range(20)]  # nothing special about these
SPECIAL = [  # id number, symbol, whether it codes for a protein
    (100, "PHB1", True),
    (101, "MARCHF1", True),
    (102, "MTARC1", True),
    (103, "HERC3", True),  # two genes of one symbol, both coding
    (104, "HERC3", True),
    (105, "TBCE", True),  # two genes of one symbol, one of them coding
    (106, "TBCE", False),
    (107, "ENSG00000000107", False),  # a gene without a symbol
    (108, "CD4", True),
    (109, "C1orf112", True),
]
ALIASES = [
    ("PHB", "PHB1"),
    ("1-Mar", "MARCHF1"),  # as Excel writes MARCH1 and MARC1
    ("1-Mar", "MTARC1"),
    ("MARCH1", "MARCHF1"),
    ("OLD-HERC3", "HERC3"),
    ("TBCE-OLD", "TBCE"),
    ("CD4", "PHB1"),  # a symbol that stands is no alias
    ("GONE", "WITHDRAWN"),  # of a gene the table does not have
]


def human(number: int) -> str:
    """The human id of this number."""
    return f"ENSG{number:011d}"


def mouse(number: int) -> str:
    """The mouse id of this number."""
    return f"ENSMUSG{number:011d}"


def gene_rows(species: str) -> list[tuple[str, str, bool]]:
    """(id, symbol, coding) of every gene."""
    if species == "human":
        plain = [(human(number), symbol, True) for number, symbol in enumerate(PLAIN)]
        return [*plain, *((human(number), symbol, coding) for number, symbol, coding in SPECIAL)]
    return [*((mouse(number), symbol.capitalize(), True) for number, symbol in enumerate(PLAIN)), (mouse(108), "Cd4", True)]


def table(species: str = "human") -> GeneTable:
    """The table of a species, in memory."""
    genes = pd.DataFrame(gene_rows(species), columns=["id", "symbol", "coding"])
    aliases = pd.DataFrame(ALIASES if species == "human" else [("PHB", "Gen0")], columns=["alias", "approved"])
    return make_table(species, genes, aliases, f"fingerprint of {species}")


def gene_file(species: str, path: Path) -> Path:
    """The gene table as GENCODE's excerpt is written."""
    biotype = {True: "protein_coding", False: "lncRNA"}
    path.write_text("".join(f"{gene},{symbol},3,100,{biotype[coding]}\n" for gene, symbol, coding in gene_rows(species)))
    return path


def alias_file(path: Path) -> Path:
    """The symbol table as HGNChelper's is written, every symbol its own first."""
    own = [(symbol, symbol) for _, symbol, _ in gene_rows("human") if not symbol.startswith("ENSG")]
    rows = [("Symbol", "Approved.Symbol"), *dict.fromkeys(own), *ALIASES]
    path.write_text("".join(f"{alias}\t{approved}\t1\n" for alias, approved in rows))
    return path
