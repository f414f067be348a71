"""How the genes of a file find their place in a vocabulary, and what that costs in counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellplane.data.config import DataKeys
from cellplane.data.counts import Candidate, choose
from cellplane.data.gene_mapping import KINDS, GeneRules, align_namings, count_shares, gene_namings, species_of
from cellplane.data.gene_tables import PREFIXES, GeneTable, installed_tables
from cellplane.data.manifest import parse_vocabulary
from cellplane.data.reader import CellReader, count_candidates
from cellplane.errors import CountsNotFoundError, VocabularyError
from cellplane.genes import GeneAlignment, GeneVocabulary, namespace_of

SAMPLE_CELLS = 256  # tell what a matrix holds
COLUMN_SHOWN = 5


def gene_report(path: Path, vocabulary: Path | None = None, layer: str | None = None, ignore_case: bool = False) -> dict[str, Any]:
    """A JSON-ready report: the naming used, ``genes`` by KINDS and summed, ``count_shares`` of each (None without raw counts), examples.

    Without a ``vocabulary`` (a text file of ids, or a model folder) genes are looked up in the installed table of their
    species. Names that stand in the file twice count as summed. Raises VocabularyError when neither is there, or too few
    genes are found, and what opening the file raises.
    """
    with CellReader(path) as reader:
        place, totals = _column_totals(reader, DataKeys(layer=layer))
        namings = gene_namings(reader.var(place))
    tables = installed_tables()
    if vocabulary is not None:
        target, name = parse_vocabulary(vocabulary), str(vocabulary)
    else:
        own = _own_table(namings, path)
        target, name = GeneVocabulary.from_ids(own.ids), f"the installed {own.species} table"
    naming, alignment = align_namings(namings, target, tables, GeneRules("sum", ignore_case))
    return {
        "file": str(path),
        "counts": place if totals is not None else "none found: the shares are unknown",
        "vocabulary": name,
        "naming": f"{naming} ({namespace_of(namings[naming])})",
        "table": alignment.table,
        "genes": numbers(alignment),
        "count_shares": None if totals is None else count_shares(alignment, totals),
        **_examples(namings[naming], alignment),
    }


def numbers(alignment: GeneAlignment) -> dict[str, int]:
    """How many columns had each fate: KINDS, which add up to all of them, and summed ones among those with a place."""
    outcome = np.zeros(0) if alignment.outcome is None else alignment.outcome
    place = alignment.positions[alignment.positions >= 0]
    shared = np.bincount(place, minlength=alignment.n_vocabulary)
    return {**{kind: int((outcome == code).sum()) for kind, code in KINDS.items()}, "summed": int((shared[place] > 1).sum())}


def _examples(names: list[str], alignment: GeneAlignment) -> dict[str, str]:
    outcome = np.zeros(0) if alignment.outcome is None else alignment.outcome
    found = {kind: [names[index] for index in np.flatnonzero(outcome == KINDS[kind])[:COLUMN_SHOWN]] for kind in ("ambiguous", "unknown")}
    return {f"{kind}_examples": ", ".join(some) for kind, some in found.items() if some}


def _own_table(namings: dict[str, list[str]], path: Path) -> GeneTable:
    tables = installed_tables()
    seen = [species_of(names, tables) for names in namings.values()]
    species = next((one for one in seen if one in tables), None)
    if species is None:
        looks = next((one for one in seen if one is not None), "no species known here")
        known = ", ".join(tables) or "none"
        raise VocabularyError(
            f"{path}: its genes look like {looks} ({', '.join(PREFIXES)} are known), installed tables: {known}; "
            "install the table with `cellplane data genes install --from FILE`, or give --vocabulary"
        )
    return tables[species]


def _column_totals(reader: CellReader, keys: DataKeys) -> tuple[str, NDArray[np.float64] | None]:
    """Where raw counts are and each gene's total [n_var]; X, or the first matrix there is, and None where there are none."""
    stop = min(reader.n_cells, SAMPLE_CELLS)
    candidates: list[Candidate] = [
        (place, lambda place=place: reader.rows(place, 0, stop) if place in reader.places else None)  # type: ignore[misc]
        for place in count_candidates(keys, reader.places)
    ]
    try:
        place = choose(candidates, recover_counts=False).place
    except CountsNotFoundError:
        return ("X" if "X" in reader.places or not reader.places else next(iter(reader.places))), None
    totals = np.zeros(reader.matrix(place).shape[1])
    for _, raw in reader.parts(place, 0, reader.n_cells):
        rows = raw.matrix(len(totals), place)
        totals += np.bincount(rows.indices, weights=rows.data, minlength=len(totals))
    return place, totals
