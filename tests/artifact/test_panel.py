"""A panel lies in the model folder as verified files, and is part of what the model is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cellplane.artifact.folder import PANEL, PANEL_CELLS, load_model, save_model
from cellplane.artifact.panel import Panel
from cellplane.errors import FileFormatError
from tests.tiny import N_GENES, tiny_folder


@pytest.fixture
def panel() -> Panel:
    gene = np.array([0, 3, 1, 2, 3], dtype=np.int64)
    return Panel(np.array([0, 2, 5]), gene, np.array([1, 4, 2, 2, 9], dtype=np.float32), np.arange(N_GENES) < 20, "centroids")


def test_it_comes_back_as_it_was_and_changes_the_models_identity(panel, tmp_path):
    folder = tiny_folder()
    with_one = replace(folder, attachments=panel.attachments())
    loaded = load_model(save_model(with_one, tmp_path / "with"))
    found = Panel.of(loaded.attachments)
    for name in ("crow", "gene", "value", "measured"):
        np.testing.assert_array_equal(getattr(found, name), getattr(panel, name))
    assert (found.origin, found.n_cells) == ("centroids", 2)
    assert loaded.model_sha256 != load_model(save_model(folder, tmp_path / "without")).model_sha256
    assert Panel.of(folder.attachments) is None


def test_it_says_in_words_whose_cells_they_are(panel):
    assert panel.told == "2 synthetic centroids of training cells"
    assert "REAL" in replace(panel, origin="cells").told


@pytest.mark.parametrize("broken", [{PANEL: b"{}"}, {PANEL: b'{"origin": "nobody"}'}, {PANEL_CELLS: b"x"}])
def test_a_broken_one_is_an_error(panel, broken):
    with pytest.raises(FileFormatError):
        Panel.of({**panel.attachments(), **broken})
