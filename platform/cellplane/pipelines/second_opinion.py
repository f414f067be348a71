"""A tuned classical annotator beside the model: where the two disagree, a person should look.

Both learn from the same atlas. Family and setting are chosen once by inner cross-validation on the atlas; for every file the
choice is fitted anew on the genes that atlas and file share. The markers of each type come from the atlas too.
"""

# C cells, G genes of the vocabulary, K types

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from cellplane.data.sentences import CellTable
from cellplane.errors import DataError
from cellplane.pipelines.annotation_baselines import answers_by, inner_scores
from cellplane.pipelines.baselines import log_cp10k
from cellplane.seeds import keyed_seed

INNER_FOLDS = 3
Choice = tuple[str, str]  # family, setting


@dataclass(frozen=True)
class Atlas:
    """Labelled cells over the model's vocabulary; ``genes`` [G] as the atlas calls them."""

    table: CellTable
    labels: NDArray[Any]
    genes: tuple[str, ...]

    @cached_property
    def counts(self) -> Any:
        """[C, G]."""
        return counts_of(self.table)

    @cached_property
    def types(self) -> tuple[str, ...]:
        """The types, sorted."""
        return tuple(sorted(set(self.labels)))

    def thinned(self, cells: int, seed: int) -> Atlas:
        """At most about so many cells, the same share of every type and two of each where there are two."""
        if self.table.n_cells <= cells:
            return self
        rng, share = np.random.default_rng(keyed_seed(seed, "atlas")), cells / self.table.n_cells
        rows = []
        for name in self.types:
            own = rng.permutation(np.flatnonzero(self.labels == name))
            rows.append(own[: max(2, round(share * len(own)))])
        kept = np.sort(np.concatenate(rows))
        return Atlas(self.table.rows(kept), self.labels[kept], self.genes)

    def choose(self, seed: int) -> tuple[Choice, float]:
        """The best (family, setting) by inner cross-validation, and its macro-F1."""
        with threadpool_limits(limits=1):
            scores = inner_scores(self.counts[:, self.table.panel], self.labels, seed, INNER_FOLDS)
        best = max(scores, key=scores.__getitem__)
        return best, scores[best]

    def answers(self, choice: Choice, table: CellTable, seed: int) -> NDArray[Any]:
        """What the choice calls the cells of another table over the same vocabulary. DataError without shared genes."""
        shared = np.flatnonzero(self.table.panel & table.panel)
        if not len(shared):
            raise DataError("the cells share no gene with the atlas")
        found: NDArray[Any] = answers_by(choice, (self.counts[:, shared], self.labels), counts_of(table)[:, shared], seed)
        return found

    def markers(self, each: int) -> list[int]:
        """Positions of the genes that tell each type from its nearest one: mean log level above that of any other type."""
        logs = log_cp10k(self.counts)
        means = np.stack([np.asarray(logs[self.labels == name].mean(axis=0)).ravel() for name in self.types])
        chosen: list[int] = []
        for place in range(len(self.types)):
            lead = means[place] - np.delete(means, place, axis=0).max(axis=0, initial=0.0)
            best = [int(gene) for gene in np.argsort(-lead, kind="stable")[:each] if lead[gene] > 0]
            chosen.extend(gene for gene in best if gene not in chosen)
        return chosen


def counts_of(table: CellTable) -> Any:
    """Counts [C, G], CSR."""
    return sp.csr_matrix((table.value, table.gene, table.crow), shape=(table.n_cells, len(table.panel)))
