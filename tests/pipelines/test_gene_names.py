"""A gene is found by the vocabulary's name and by the data's own."""

from __future__ import annotations

import numpy as np
import pandas as pd

from cellplane.data.config import DataKeys
from cellplane.data.sources import AnnData
from cellplane.genes import GeneVocabulary
from cellplane.pipelines.gene_names import GeneNames

IDS = [f"ENSG{number:011d}" for number in range(12)]
NAMES = [f"NAME{number}" for number in range(12)]


def named(names: list[str]) -> GeneNames:
    data = AnnData(X=np.ones((3, 12), dtype=np.float32), var=pd.DataFrame({"ensembl_id": IDS}, index=pd.Index(names)))
    return GeneNames.of(data, GeneVocabulary.from_ids(reversed(IDS)), DataKeys())


def test_genes_are_found_by_id_and_by_the_datas_name_whatever_the_order():
    names = named(NAMES)
    assert names.find([IDS[2], NAMES[2], "nothing"]).tolist() == [9, 9, -1]
    assert names.labels[9] == NAMES[2]
    assert names.call(np.arange(12) == 9) == [NAMES[2]]


def test_without_other_names_the_vocabularys_own_are_used():
    vocabulary = GeneVocabulary.from_ids(NAMES)
    data = AnnData(X=np.ones((3, 12), dtype=np.float32), var=pd.DataFrame(index=pd.Index(NAMES)))
    assert GeneNames.of(data, vocabulary, DataKeys()).labels == tuple(NAMES)
