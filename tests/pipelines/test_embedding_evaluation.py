"""A zero-shot embedding is scored beside what costs nothing, and whether it is zero-shot is said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cellplane.artifact.folder import save_model
from cellplane.data.inputs import SOURCE_DIGITS, source_sha256
from cellplane.data.sources import find_counts, write_h5ad
from cellplane.pipelines.embedding_evaluation import components, run_embedding_protocol, spaces_of
from cellplane.pipelines.protocol_config import EmbeddingProtocol, EvaluatedData
from cellplane.pipelines.protocol_run import seen
from tests.pipelines.conftest import NOBODY

ASKED = {"keys": {"labels_key": "cell_type", "batch_key": "batch"}}


@pytest.fixture(scope="module")
def done(tmp_path_factory, cells, base_model):
    folder = tmp_path_factory.mktemp("embedding")
    write_h5ad(cells, folder / "cells.h5ad")
    told = {"sources": f"{'0' * SOURCE_DIGITS} {source_sha256(folder / 'cells.h5ad', False)[:SOURCE_DIGITS]}"}
    save_model(replace(base_model, lineage=told), folder / "base")
    data = {"four": {**ASKED, "path": str(folder / "cells.h5ad"), "bases": {"demo": str(folder / "base")}}}
    config = EmbeddingProtocol.model_validate({"data": data, "seeds": (0, 1), "out": str(folder / "out"), "tracking_uri": NOBODY})
    said: list[str] = []
    return run_embedding_protocol(config, said.append), said, config


def test_every_row_has_agreement_and_mixing(done):
    finished, said, _ = done
    rows = {row.method.name: row for row in finished.evaluation.rows("four", "all cells")}
    assert {name: row.method.kind for name, row in rows.items()} == {
        "cellplm": "model",
        "cellplm, evened": "model",
        "cellplm, evened, samples centred": "model",
        "cellplm, mixed sentences": "model",
        "random weights of demo": "control",
        "random weights of demo, evened": "control",
        "PCA50": "baseline",
        "PCA50, evened": "baseline",
        "PCA50, evened, samples centred": "baseline",
        "PCA50 of all genes": "baseline",
        "log counts of variable genes": "baseline",
    }
    assert len(said) == 22
    for row in rows.values():
        assert {name for name, values in row.values.items() if len(values) == 2} == {
            "nmi",
            "ari",
            "nmi_fixed",
            "ari_fixed",
            "ilisi",
            "kbet",
        }
    assert rows["PCA50"].mean("nmi_fixed") > 0.9, "four simulated types are told apart"


def test_a_base_that_saw_the_cells_is_called_so(done):
    finished, _, _ = done
    assert "SEEN IN PRE-TRAINING" in finished.report.markdown.read_text()


def test_samples_that_coincide_with_types_are_told_in_the_notes(cells, tmp_path):
    few = cells[:80].copy()
    few.obs["batch"] = few.obs["cell_type"].astype(str)
    write_h5ad(few, tmp_path / "few.h5ad")
    data = {"few": {**ASKED, "path": str(tmp_path / "few.h5ad")}}
    config = EmbeddingProtocol.model_validate({"data": data, "seeds": (0,), "out": str(tmp_path / "out"), "tracking_uri": NOBODY})
    notes = run_embedding_protocol(config).evaluation.notes
    assert any("few: 4 of 4 cell types lie in one of 4 batches alone" in note for note in notes)


def test_whether_a_base_saw_a_file_is_known_or_said_to_be_unknown(base_model, tmp_path):
    path = tmp_path / "file.h5ad"
    path.write_bytes(b"cells")
    digits = source_sha256(path, False)[:SOURCE_DIGITS]
    assert seen(base_model, path) is None
    assert seen(replace(base_model, lineage={"sources": f"abc {digits}"}), path) is True
    assert seen(replace(base_model, lineage={"sources": "abc"}), path) is False


def test_what_is_known_is_not_measured_again(done):
    finished, _, config = done
    said: list[str] = []
    assert run_embedding_protocol(config, said.append).evaluation.entries == finished.evaluation.entries
    assert said == []


def test_labels_place_no_cell(cells, base_model):
    asked = EvaluatedData.model_validate({**ASKED, "path": "none"})
    lied = cells.copy()
    lied.obs["cell_type"] = np.roll(lied.obs["cell_type"].astype(str), 1)
    for mine, its in zip(*(spaces_of(data, asked, {"demo": base_model}) for data in (cells, lied)), strict=True):
        assert np.array_equal(mine.embed(0), its.embed(0)), mine.method


def test_components_are_at_most_fifty_and_no_more_than_cells_allow(cells):
    counts = find_counts(cells, EvaluatedData(path="none").keys).matrix
    assert components(counts, 0).shape == (300, 50)
    assert components(counts[:20], 0).shape == (20, 19)
