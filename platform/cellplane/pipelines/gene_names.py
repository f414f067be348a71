"""Finding a gene that a person names: a model may know it by Ensembl id while its data, and everybody, call it GATA1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cellplane.data.config import DataKeys
from cellplane.data.gene_mapping import Finder, GeneRules, gene_namings
from cellplane.data.gene_tables import installed_tables
from cellplane.data.naming import best_naming
from cellplane.data.sources import AnnData
from cellplane.genes import GeneVocabulary


@dataclass(frozen=True)
class GeneNames:
    """A vocabulary and what the data call its genes: ``labels`` [G], unique, the vocabulary's own id where they say nothing."""

    vocabulary: GeneVocabulary
    labels: tuple[str, ...]

    @classmethod
    def of(cls, data: AnnData, vocabulary: GeneVocabulary, keys: DataKeys) -> GeneNames:
        """The var_names of an AnnData over a vocabulary; a name that stands there twice is not used."""
        _, alignment = best_naming(gene_namings(data.var), vocabulary, GeneRules(keys.repeated_genes, keys.ignore_gene_case))
        names = [str(name) for name in data.var_names]
        labels = list(vocabulary.gene_ids)
        for name, position in zip(names, alignment.positions.tolist(), strict=True):
            if position >= 0:
                labels[position] = name
        if len(set(labels)) < len(labels):
            labels = list(vocabulary.gene_ids)
        return cls(vocabulary, tuple(labels))

    @cached_property
    def _by_label(self) -> dict[str, int]:
        return {label: position for position, label in enumerate(self.labels)}

    @cached_property
    def _finder(self) -> Finder:
        return Finder(self.vocabulary, installed_tables())

    def find(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Position of every name [n], -1 = unknown: as the vocabulary, the data or an installed gene table call it."""
        asked = [str(name) for name in names]
        found = np.array([self._by_label.get(name, -1) for name in asked], dtype=np.int64)
        own = self.vocabulary.index(asked)
        found = np.where(own >= 0, own, found)
        return found if (found >= 0).all() else np.where(found >= 0, found, self._finder.find(asked)[0])

    def call(self, flags: NDArray[np.bool_]) -> list[str]:
        """The labels of some genes, [G] bool."""
        return [self.labels[gene] for gene in np.flatnonzero(flags)]
