"""Finding a data set's genes in a vocabulary, whatever they are called there, and saying how it went.

A name is taken as it stands first; then, through the id table of the vocabulary's species, as another name of the same
gene. Names with several meanings are left out and counted, and genes of one species never become another's: CD4 and Cd4
are different genes, and a model that mixes them up answers without an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellplane.data.gene_tables import PREFIXES, SEVERAL, GeneTable
from cellplane.errors import DataError, VocabularyError
from cellplane.genes import (
    AMBIGUOUS,
    ENSEMBL_PATTERN,
    EXACT,
    OUTSIDE,
    RENAMED,
    UNKNOWN,
    GeneAlignment,
    GeneVocabulary,
    namespace_of,
    without_version,
)

Tables = Mapping[str, GeneTable]
Repeated = Literal["error", "sum", "first"]
Found = tuple[NDArray[np.int64], NDArray[np.int8]]  # position of each name, -1 = none, and how it was found or why not
GENE_COLUMNS = ("ensembl_id", "feature_id", "gene_ids", "gene_name", "feature_name")  # as scanpy, CELLxGENE and 10x call them, in order
KINDS = {"mapped": EXACT, "renamed": RENAMED, "ambiguous": AMBIGUOUS, "outside": OUTSIDE, "unknown": UNKNOWN}
CLEARLY = 2  # times as many symbols of one species as of another tell them apart
KNOWN_SHARE = 0.3  # of the names must be symbols of a species to call them that species'
SAMPLE_NAMES = 4000  # enough to see how a list of genes is written
HUMAN_LOWERCASE = re.compile(r"C[0-9XY]+orf[0-9]+|-?(AS|IT|OT)[0-9]|^hsa-")  # the small letters that human symbols have


@dataclass(frozen=True)
class GeneRules:
    """What may be done about names: ``repeated`` ones in the file, and ``ignore_case`` where a spelling is unique without it."""

    repeated: Repeated = "error"
    ignore_case: bool = False


def gene_namings(var: pd.DataFrame) -> dict[str, list[str]]:
    """Every naming of the genes: known columns in order, then var_names. A missing name falls back to the var_name."""
    names = [str(name) for name in var.index]
    if not names:
        raise DataError("the data has no genes at all; expected a row of var for every column of the counts")
    found = {}
    for key in GENE_COLUMNS:
        if key in var:
            values = var[key].astype(object).to_numpy()
            present = var[key].notna().to_numpy() & (values.astype(str) != "")
            found[key] = [str(value) if ok else name for value, ok, name in zip(values, present, names, strict=True)]
    return {**found, "var_names": names}


def align_genes(var: pd.DataFrame, vocabulary: GeneVocabulary, tables: Tables, rules: GeneRules | None = None) -> tuple[str, GeneAlignment]:
    """The naming of ``var`` that finds most genes of the vocabulary, and where each gene goes (see `align_namings`)."""
    return align_namings(gene_namings(var), vocabulary, tables, rules)


def align_namings(
    namings: Mapping[str, Sequence[str]], vocabulary: GeneVocabulary, tables: Tables, rules: GeneRules | None = None
) -> tuple[str, GeneAlignment]:
    """The naming that finds most genes, the first of equals, and where each of its columns goes.

    With an id table Ensembl ids come first, and a gene whose id the table does not know (retired ones, mostly) may find
    a place under another of its names, if no other gene has it. Raises VocabularyError when too few genes are found
    (naming the columns tried) or the data are of another species, DataError listing names that stand there twice unless
    ``rules`` say what to do.
    """
    rules = GeneRules() if rules is None else rules
    finder = Finder(vocabulary, tables, rules.ignore_case)
    plain = {key: [without_version(name) for name in names] for key, names in namings.items()}
    found = {key: finder.find(names) for key, names in plain.items()}
    best = max(found, key=lambda key: _n_found(found[key]))
    if finder.table is not None:
        ids = next((key for key, names in plain.items() if namespace_of(names).startswith("ensembl")), best)
        best = ids if 2 * _n_found(found[ids]) >= _n_found(found[best]) else best
        _fill_unknown(found[best], [found[key] for key in found if key != best])
    positions, outcome = found[best]
    finder.refuse_other_species(plain, best, positions)
    _settle_repeated(namings[best], best, rules.repeated, (positions, outcome))
    table = None if finder.table is None else finder.table.fingerprint
    alignment = GeneAlignment(positions, len(vocabulary), namespace_of(plain[best]), outcome, table)
    try:
        vocabulary.require_enough(alignment, namings[best])
    except VocabularyError as error:
        hint = "" if tables else "; an id table may know other names of them: cellplane data genes install"
        raise VocabularyError(f"{error} (tried {', '.join(namings)}){hint}") from None
    return best, alignment


def _n_found(found: Found) -> int:
    return int((found[0] >= 0).sum())


def _fill_unknown(found: Found, others: Sequence[Found]) -> None:
    """Gives genes of unknown name the place another of their names has, in place; a place that is taken stays as it is."""
    positions, outcome = found
    for other, _ in others:
        free = (outcome == UNKNOWN) & (other >= 0) & ~np.isin(other, positions[positions >= 0])
        positions[free], outcome[free] = other[free], RENAMED


def _settle_repeated(names: Sequence[str], naming: str, rule: Repeated, found: Found) -> None:
    """Names written twice in the file: refused, left to be summed, or all but the first left out, in place."""
    positions, outcome = found
    again = pd.Index(names).duplicated() & (positions >= 0)
    if rule == "sum" or not again.any():
        return
    if rule == "error":
        raise repeated_names([name for name, one in zip(names, again, strict=True) if one], naming)
    positions[again], outcome[again] = -1, AMBIGUOUS


def repeated_names(names: Sequence[str], naming: str) -> DataError:
    """The error about names that stand in a file more than once."""
    distinct = list(dict.fromkeys(names))
    found = f"{len(distinct)} genes stand in {naming} more than once, e.g. {distinct[:5]}"
    return DataError(f"{found}; sum or drop the repeated columns first, or choose with keys.repeated_genes=sum (or first)")


class Finder:
    """Finds genes in one vocabulary; what it needs of the vocabulary's side is worked out once."""

    def __init__(self, vocabulary: GeneVocabulary, tables: Tables, ignore_case: bool = False) -> None:
        self.vocabulary, self.tables, self.ignore_case = vocabulary, tables, ignore_case
        self.species = species_of(vocabulary.gene_ids, tables)
        self.table = tables.get(self.species or "")
        if self.table is not None:
            self._place_of_row, self._place_of_symbol = self._places(self.table)
            self._only_here = self.table.only_coding(self._place_of_row)

    def _places(self, table: GeneTable) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the vocabulary has each gene of the table, [n] by row and [symbols] by symbol; its own names may be old ones too."""
        names = pd.Index(self.vocabulary.gene_ids, dtype=object)
        row, symbol = table.rows(names)
        place = np.arange(len(names), dtype=np.int64)
        is_id = row >= 0
        is_id[is_id] = table.ids[row[is_id]] == names[is_id]
        by_row = np.full(len(table.ids), -1, dtype=np.int64)
        by_row[row[is_id]] = place[is_id]
        by_symbol = np.full(table.n_symbols, -1, dtype=np.int64)
        named = ~is_id & (symbol >= 0)
        current = named.copy()
        current[named] = table.symbol(symbol[named]) == names[named]
        for group in (named, current):  # a symbol as it stands wins over an older one
            by_symbol[symbol[group][::-1]] = place[group][::-1]
        return by_row, by_symbol

    def find(self, names: Sequence[str]) -> Found:
        """Position of every name [n] int64, -1 = none, and how it was found or why not [n] int8."""
        positions = self.vocabulary.index(names)
        outcome = np.where(positions >= 0, EXACT, UNKNOWN).astype(np.int8)
        self._through_table(pd.Index(names, dtype=object), positions, outcome)
        if self.ignore_case and (missing := np.flatnonzero(outcome == UNKNOWN)).size:
            respelled = self._respelled(np.asarray(names, dtype=object), missing)
            again = self.vocabulary.index(respelled)
            how = np.where(again >= 0, RENAMED, UNKNOWN).astype(np.int8)
            self._through_table(pd.Index(respelled, dtype=object), again, how)
            positions[missing], outcome[missing] = again, how
        return positions, outcome

    def _through_table(self, names: pd.Index, positions: NDArray[np.int64], outcome: NDArray[np.int8]) -> None:
        """Fills in, in place, what the table knows about names without a position."""
        missing = np.flatnonzero(positions < 0)
        if self.table is None or not missing.size:
            return
        row, symbol = self.table.rows(names[missing])
        place = np.where(row >= 0, self._place_of_row[row], -1)
        place = np.where((place < 0) & (symbol >= 0), self._place_of_symbol[symbol], place)
        place = np.where((place < 0) & (row == SEVERAL) & (symbol >= 0), self._only_here[symbol], place)
        several = (place < 0) & ((row == SEVERAL) | (symbol == SEVERAL))
        positions[missing] = place
        known = (row >= 0) | (symbol >= 0)
        outcome[missing] = np.select([place >= 0, several, known], [RENAMED, AMBIGUOUS, OUTSIDE], UNKNOWN)

    def _respelled(self, names: NDArray[np.object_], missing: NDArray[np.int64]) -> list[str]:
        """The missing names as the vocabulary or the table spells them, where exactly one spelling and one column fit."""
        known = pd.Series([*dict.fromkeys((*self.vocabulary.gene_ids, *(() if self.table is None else self.table.symbols)))], dtype=object)
        known.index = pd.Index(known.str.lower())
        unique = known[~known.index.duplicated(keep=False)]
        lower = pd.Series(names, dtype=object).str.lower()
        clear = ~lower.duplicated(keep=False).to_numpy()[missing]
        spelled = unique.reindex(lower.to_numpy()[missing]).to_numpy(dtype=object)
        return [new if ok and isinstance(new, str) else old for new, ok, old in zip(spelled, clear, names[missing], strict=True)]

    def refuse_other_species(self, namings: Mapping[str, Sequence[str]], best: str, positions: NDArray[np.int64]) -> None:
        """VocabularyError when the data are clearly another species' than the vocabulary.

        Lists that are mostly the same, name by name, are never refused.
        """
        exact = int((self.vocabulary.index(namings[best]) >= 0).sum())
        if 2 * exact > min(len(positions), len(self.vocabulary)):
            return
        as_ids = [key for key, names in namings.items() if namespace_of(names).startswith("ensembl")]
        key = next(iter(as_ids), best)
        theirs = species_of(namings[key], self.tables)
        if theirs is None or self.species is None or theirs == self.species:
            return
        raise VocabularyError(
            f"{int((positions >= 0).sum())} of {len(positions)} genes are in the model's vocabulary: {key} looks like {theirs}, "
            f"e.g. {list(namings[key][:2])}, the model's genes are {self.species}, e.g. {list(self.vocabulary.gene_ids[:2])}; "
            "use a model of the same species, or replace the genes by their orthologs yourself"
        )


def species_of(names: Sequence[str], tables: Tables) -> str | None:
    """human or mouse: by Ensembl prefix, else by the tables that know the symbols, else by how they are written; None = unclear."""
    scheme = namespace_of(names)
    if scheme != "symbol":
        return scheme.removeprefix("ensembl_") if scheme.removeprefix("ensembl_") in PREFIXES else None
    sample = list(names)[:: max(1, len(names) // SAMPLE_NAMES)]
    symbols = pd.Index([name for name in sample if not ENSEMBL_PATTERN.match(name)], dtype=object)
    known = sorted(((table.known_symbols(symbols), species) for species, table in tables.items()), reverse=True)
    if known and known[0][0] >= KNOWN_SHARE * len(symbols) and (len(known) == 1 or known[0][0] >= CLEARLY * known[1][0]):
        return known[0][1]
    return _by_letters(list(symbols))


def _by_letters(symbols: Sequence[str]) -> str | None:
    """Human symbols are capitals (TP53, C1orf112), those of mice are written as names are (Trp53, 1700034P13Rik)."""
    if not symbols:
        return None
    small = sum(any(letter.islower() for letter in HUMAN_LOWERCASE.sub("", symbol)) for symbol in symbols) / len(symbols)
    capital = sum(symbol[:1].isupper() or symbol[:1].isdigit() for symbol in symbols) / len(symbols)
    if small <= 0.1:
        return "human"
    return "mouse" if small >= 0.6 and capital >= 0.8 else None


def genes_without_place(names: Sequence[str], vocabulary: GeneVocabulary, tables: Tables) -> list[str]:
    """Those of these genes that the vocabulary lacks, named as it names its own, each once, in order of appearance.

    Names that have several meanings, or none in the vocabulary's naming scheme, are left out.
    """
    finder = Finder(vocabulary, tables)
    plain = [without_version(name) for name in names]
    positions, outcome = finder.find(plain)
    missing = (positions < 0) & (outcome != AMBIGUOUS)
    lacking = pd.Index(np.asarray(plain, dtype=object)[missing], dtype=object)
    own_scheme = [(ENSEMBL_PATTERN.match(name) is None) == (vocabulary.namespace == "symbol") for name in lacking]
    named: list[str | None] = [name if own else None for name, own in zip(lacking, own_scheme, strict=True)]
    if finder.table is not None and len(lacking):
        row, symbol = finder.table.rows(lacking)
        code = symbol if vocabulary.namespace == "symbol" else row
        spelled = finder.table.symbol(code) if vocabulary.namespace == "symbol" else finder.table.ids[code]
        named = [str(new) if ok else old for new, ok, old in zip(spelled, code >= 0, named, strict=True)]
    return list(dict.fromkeys(name for name in named if name is not None))


def count_shares(alignment: GeneAlignment, totals: NDArray[np.floating]) -> dict[str, float]:
    """The share of all counts that genes of each of KINDS carry, and summed ones, from each column's total [n].

    Those of KINDS add up to 1; all are 0 where there are no counts. Summed are the columns that share a position.
    """
    every = float(totals.sum())
    outcome = np.where(alignment.positions >= 0, EXACT, UNKNOWN) if alignment.outcome is None else alignment.outcome
    kinds = {name: outcome == kind for name, kind in KINDS.items()}
    there = np.where(alignment.positions >= 0, alignment.positions, 0)
    columns = np.bincount(there[alignment.positions >= 0], minlength=alignment.n_vocabulary)
    kinds["summed"] = (alignment.positions >= 0) & (columns[there] > 1)
    return {name: float(totals[chosen].sum()) / every if every else 0.0 for name, chosen in kinds.items()}
