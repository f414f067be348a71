"""Nothing that is scored may be visible."""

from __future__ import annotations

import numpy as np
import pytest

from cellplane.errors import DataError
from cellplane.pipelines.masks import Masks, imputation_masks

OBSERVED = np.array([True, True, False, False])
HIDDEN = np.array([False, False, True, False])


def test_hidden_genes_are_visible_in_neither_platform_and_learned_from_the_reference_alone():
    masks = imputation_masks(OBSERVED, HIDDEN)
    assert masks.visible.tolist() == [OBSERVED.tolist()] * 2
    assert masks.target.tolist() == [OBSERVED.tolist(), (OBSERVED | HIDDEN).tolist()]
    assert masks.scored.tolist() == [HIDDEN.tolist(), [False] * 4]


def test_the_official_recipe_shows_them_in_the_reference_and_never_in_the_query():
    masks = imputation_masks(OBSERVED, HIDDEN, "official")
    assert masks.visible.tolist() == [OBSERVED.tolist(), (OBSERVED | HIDDEN).tolist()]


def test_a_scored_value_that_is_visible_is_refused():
    with pytest.raises(DataError, match="1 scored values are visible"):
        Masks(visible=OBSERVED, target=OBSERVED, scored=np.array([True, False, False, False]))
    with pytest.raises(DataError, match="differ in shape"):
        Masks(visible=OBSERVED, target=OBSERVED, scored=HIDDEN[:2])
