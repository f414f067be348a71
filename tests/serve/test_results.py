"""An answer stands for a call only when that call would give the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from cellplane.batch import PredictConfig, answer_task, predict_with
from cellplane.data.sources import AnnData, write_h5ad
from cellplane.results import ONLY_SOME, same_call


@pytest.mark.parametrize(
    ("said", "context", "same"),
    [
        ({}, "own", True),
        ({"context": "own: sentences of at most 16 cells"}, "own", True),
        ({"context": "own: sentences of at most 16 cells"}, "self", False),
        ({"context": "panel: 40 cells in every sentence"}, "own", False),
        ({"context": "panel: 40 cells in every sentence"}, "panel", True),
        ({"context": {"policy": "every cell alone", "choice": "self"}}, "own", False),
        ({"context": "control cells of one batch"}, "own", True),
        ({ONLY_SOME: True}, "own", False),
    ],
)
def test_company_and_what_was_asked_count_beside_the_model(said, context, same):
    assert same_call({"model_sha256": "abc", **said}, "abc", context) is same
    assert not same_call({"model_sha256": "abc", **said}, "other", context)


@pytest.mark.parametrize("form", ["h5ad", "parquet"])
def test_a_job_in_another_company_writes_anew(form, model_path: Path, cells: AnnData, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / "home"))
    write_h5ad(cells[:20].copy(), tmp_path / "cells.h5ad")
    config = PredictConfig(inputs=(str(tmp_path / "cells.h5ad"),), model=str(model_path), out=str(tmp_path / "out"), format=form)

    def asked(one: PredictConfig) -> tuple[int, int]:
        report = predict_with(one, lambda tasks: [answer_task(task) for task in tasks])
        assert not report.failed
        return len(report.written), len(report.reused)

    assert asked(config) == (1, 0)
    assert asked(config) == (0, 1)
    alone = config.model_copy(update={"context": "self"})
    assert asked(alone) == (1, 0)
    assert asked(alone) == (0, 1)
    assert asked(config) == (1, 0)
