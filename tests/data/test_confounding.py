"""A cell type that lies in one of several batches alone cannot be told from its batch, and that is said."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from cellplane.data.config import DataKeys
from cellplane.data.confounding import confounding
from cellplane.data.sources import AnnData

KEYS = DataKeys(labels_key="cell_type", batch_key="batch")


def labelled(*groups: tuple[object, object, int]) -> AnnData:
    """So many cells of a type in a batch."""
    rows = [(name, batch) for name, batch, cells in groups for _ in range(cells)]
    obs = pd.DataFrame(rows, columns=["cell_type", "batch"], index=[str(row) for row in range(len(rows))])
    return ad.AnnData(X=np.ones((len(rows), 1), dtype=np.float32), obs=obs)


def test_types_of_one_batch_alone_are_named_with_their_batch_and_size(caplog):
    cells = labelled(("B", "x", 20), ("B", "y", 1), ("T", "x", 12), ("NK", "y", 30))
    said = confounding(cells, KEYS)
    assert said == (
        "2 of 3 cell types lie in one of 2 batches alone, so what sets them apart may be the batch: "
        "NK: 30 cells, all in y; T: 12 cells, all in x"
    )
    assert caplog.messages == [said]


@pytest.mark.parametrize(
    ("groups", "keys"),
    [
        ([("B", "x", 20), ("T", "x", 20)], KEYS),
        ([("B", "x", 20), ("B", "y", 20), ("T", "x", 9), ("T2", "y", 9)], KEYS),
        ([("B", "x", 20), ("B", "y", 20), ("NA", "x", 20), (None, "y", 20)], KEYS),
        ([("B", "x", 20), ("T", "x", 20), (None, "y", 20)], KEYS),
        ([("B", "x", 20), ("T", "y", 20)], DataKeys(labels_key="cell_type")),
        ([("B", "x", 20), ("T", "y", 20)], DataKeys(batch_key="batch")),
        ([("B", "x", 20), ("T", "y", 20)], DataKeys(batch_key="batch", labels_key="elsewhere")),
        ([], KEYS),
    ],
    ids=["one batch", "rare", "no types", "the other batch is unlabelled", "no batch", "no label", "no such column", "no cells"],
)
def test_nothing_is_said_of(groups, keys, caplog):
    assert confounding(labelled(*groups), keys) is None
    assert not caplog.messages


def test_many_types_are_counted_and_some_are_named():
    said = confounding(labelled(*((f"t{number:02}", number % 2, 10) for number in range(30))), KEYS)
    assert said is not None
    assert said.startswith("30 of 30 cell types")
    assert said.endswith("t11: 10 cells, all in 1; and 18 more")


def test_numbers_and_categories_are_labels_too():
    cells = labelled((1, True, 10), (2, False, 10), (1, False, 10))
    cells.obs["cell_type"] = cells.obs["cell_type"].astype("category")
    assert "2: 10 cells, all in False" in str(confounding(cells, KEYS))
