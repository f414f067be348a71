"""Which genes a model or a shard knows, in which order, and how a data set's genes find their place in it.

A cell language model reads genes by position, so a wrong order is a wrong answer without an error. Everything that
carries gene positions therefore carries the vocabulary's fingerprint too.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellplane.errors import VocabularyError

log = logging.getLogger(__name__)

ENSEMBL_PATTERN = re.compile(r"^ENS[A-Z]*G\d{6,}(\.\d+)?$")  # ENSG00000141510.18, ENSMUSG00000059552
MINIMUM_SHARED_GENES = 10  # below this an answer is noise (PROTOCOLS 4)
LOW_OVERLAP = 0.1  # a reading that shares less of the data's genes AND of the model's is warned of: one side alone is usual for a panel
FEW_SHARED_GENES, LOW_COUNT_SHARE = 200, 0.2  # below either an answer carries a warning (PROTOCOLS 4)
EXACT, RENAMED, AMBIGUOUS, OUTSIDE, UNKNOWN = range(5)  # how a column found its place, or why it has none


def gene_warnings(report: Mapping[str, Any], n_vocabulary: int) -> list[str]:
    """What to tell with an answer about cells of this ``report`` (`data.sources.cell_table`) by a model of so many genes.

    One sentence for fewer than 200 of its genes, one for genes that carry less than a fifth of the cells' counts. A panel that
    holds all of its genes is what the model was trained on, and is none of these.
    """
    shared = int(report["n_shared"]) - int(report.get("n_summed", 0))
    if shared >= n_vocabulary:
        return []
    said = []
    if shared < FEW_SHARED_GENES:
        said.append(f"{shared} of the model's {n_vocabulary} genes were measured here: answers rest on few genes")
    share = report.get("count_share")
    if share is not None and share < LOW_COUNT_SHARE:
        said.append(f"genes that the model knows carry {share:.1%} of the counts: answers rest on a small part of what was measured")
    return said


def namespace_of(gene_ids: Sequence[str]) -> str:
    """The naming scheme most ids follow: ``ensembl_human``, ``ensembl_mouse``, ``ensembl`` or ``symbol``."""
    ensembl = [gene for gene in gene_ids if ENSEMBL_PATTERN.match(gene)]
    if 2 * len(ensembl) <= len(gene_ids):
        return "symbol"
    if sum(gene.startswith("ENSG") for gene in ensembl) * 2 > len(ensembl):
        return "ensembl_human"
    if sum(gene.startswith("ENSMUSG") for gene in ensembl) * 2 > len(ensembl):
        return "ensembl_mouse"
    return "ensembl"


def without_version(gene_id: str) -> str:
    """The id without the version suffix of an Ensembl id; symbols such as RP11-34P13.7 stay as they are."""
    return gene_id.split(".", 1)[0] if gene_id.startswith("ENS") and ENSEMBL_PATTERN.match(gene_id) else gene_id


@dataclass(frozen=True)
class GeneVocabulary:
    """The ordered genes a model knows.

    ``gene_ids`` are unique; ``namespace`` says how they are named (see `namespace_of`). Raises VocabularyError on
    an empty or repeated list, or an id with a line break.
    """

    gene_ids: tuple[str, ...]
    namespace: str

    def __post_init__(self) -> None:
        if not self.gene_ids:
            raise VocabularyError("a gene vocabulary needs at least one gene")
        if len(self._positions) != len(self.gene_ids):
            repeated = [gene for gene, times in Counter(self.gene_ids).items() if times > 1]
            raise VocabularyError(f"{len(repeated)} genes stand more than once in the vocabulary, e.g. {repeated[:5]}; make them unique")
        if broken := [gene for gene in self.gene_ids if "\n" in gene]:  # ids are kept one a line, and fingerprinted so
            raise VocabularyError(f"{len(broken)} gene ids hold a line break, e.g. {broken[0]!r}; rename them")

    @classmethod
    def from_ids(cls, gene_ids: Iterable[str]) -> GeneVocabulary:
        """A vocabulary of these ids in this order, Ensembl versions stripped, its namespace recognised from them."""
        ids = tuple(without_version(str(gene)) for gene in gene_ids)
        return cls(gene_ids=ids, namespace=namespace_of(ids))

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {gene: position for position, gene in enumerate(self.gene_ids)}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over namespace and ordered ids: two vocabularies are the same exactly when this is."""
        return hashlib.sha256("\n".join((self.namespace, *self.gene_ids)).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.gene_ids)

    def extended(self, new_ids: Iterable[str]) -> GeneVocabulary:
        """This vocabulary with more genes after its own, so that every old position stays; known ids are not added again."""
        added = dict.fromkeys(without_version(str(gene)) for gene in new_ids)
        return GeneVocabulary((*self.gene_ids, *(gene for gene in added if gene not in self._positions)), self.namespace)

    def index(self, gene_ids: Iterable[str]) -> NDArray[np.int64]:
        """Position of each id, shape [n] int64; -1 where the vocabulary does not have it."""
        return np.array([self._positions.get(without_version(str(gene)), -1) for gene in gene_ids], dtype=np.int64)

    def align(self, gene_ids: Sequence[str]) -> GeneAlignment:
        """How these columns map into the vocabulary; raises VocabularyError when fewer than 10 (or all, if fewer exist) are shared."""
        positions = self.index(gene_ids)
        alignment = GeneAlignment(positions=positions, n_vocabulary=len(self), source_namespace=namespace_of(list(gene_ids)))
        self.require_enough(alignment, gene_ids)
        shared = positions[positions >= 0]
        if len(np.unique(shared)) != len(shared):
            raise VocabularyError(
                f"{len(shared) - len(np.unique(shared))} genes of the data fall on the same vocabulary gene once version suffixes are "
                "stripped; sum or drop the repeated columns first"
            )
        return alignment

    def require_enough(self, alignment: GeneAlignment, gene_ids: Sequence[str]) -> None:
        """Raises VocabularyError when fewer than 10 genes (or all, if fewer exist) have a place; warns of a small share of both sides."""
        needed = min(MINIMUM_SHARED_GENES, len(self))
        if alignment.n_shared < needed:
            raise VocabularyError(self._too_few(alignment, gene_ids, needed))
        if max(alignment.overlap, alignment.n_shared / len(self)) < LOW_OVERLAP:
            found = f"{alignment.n_shared} of {len(alignment.positions)} genes"
            log.warning("only %s are among the model's %d: answers rest on few genes", found, len(self))

    def _too_few(self, alignment: GeneAlignment, gene_ids: Sequence[str], needed: int) -> str:
        found = f"{alignment.n_shared} of {len(alignment.positions)} genes are in the model's vocabulary, at least {needed} are needed"
        if 2 * alignment.n_shared > len(alignment.positions):
            return f"{found}: the data measured too few genes for this model"
        foreign = [str(gene) for gene, place in zip(gene_ids, alignment.positions.tolist(), strict=False) if place < 0]
        own, theirs = list(self.gene_ids[:2]), foreign[:2]
        return (
            f"{found}; the model's are {self.namespace}, e.g. {own}, yours look like {alignment.source_namespace}, e.g. {theirs}: "
            "use the same naming scheme and species as the model"
        )


@dataclass(frozen=True)
class GeneAlignment:
    """Where each column of a data set goes: ``positions`` [n] int64, -1 = no place in the vocabulary, left out.

    Two columns of one position are added up. ``outcome`` [n] int8 says of each column EXACT, RENAMED (through an id
    table or ignoring case), or why it is left out: AMBIGUOUS, OUTSIDE (a known gene that the vocabulary does not have)
    or UNKNOWN. ``table`` is the fingerprint of the id table that was used, or None.
    """

    positions: NDArray[np.int64]
    n_vocabulary: int
    source_namespace: str
    outcome: NDArray[np.int8] | None = None
    table: str | None = None

    @property
    def n_shared(self) -> int:
        """Columns that have a place in the vocabulary."""
        return int((self.positions >= 0).sum())

    @cached_property
    def n_summed(self) -> int:
        """Columns that are added to another one of the same gene."""
        return self.n_shared - int(self.panel().sum())

    @property
    def overlap(self) -> float:
        """Share of the data's own genes that the vocabulary knows, 0 to 1."""
        return self.n_shared / max(len(self.positions), 1)

    def panel(self) -> NDArray[np.bool_]:
        """[G] bool: the vocabulary genes that this data set measured. Absent is not zero."""
        panel = np.zeros(self.n_vocabulary, dtype=bool)
        panel[self.positions[self.positions >= 0]] = True
        return panel

    def report(self) -> dict[str, int | float]:
        """Counts for logs, answers and `uns`: genes shared, dropped for any reason, the overlap.

        With an ``outcome`` also how many of the shared were renamed or added to another, and how many of the dropped
        were ambiguous, or are known genes outside the vocabulary.
        """
        dropped = len(self.positions) - self.n_shared
        counts = {"n_genes": len(self.positions), "n_shared": self.n_shared, "n_dropped": dropped, "overlap": self.overlap}
        if self.outcome is None:
            return counts
        kinds = {"n_renamed": RENAMED, "n_ambiguous": AMBIGUOUS, "n_outside": OUTSIDE}
        return {**counts, **{name: int((self.outcome == kind).sum()) for name, kind in kinds.items()}, "n_summed": self.n_summed}
