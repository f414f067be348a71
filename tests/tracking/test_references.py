"""What the tracker refers to: registered models, and runs that somebody tagged to be kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from cellplane.artifact.folder import load_model
from cellplane.errors import ServiceError
from cellplane.tracking.references import references
from cellplane.tracking.registry import register
from cellplane.tracking.runs import RunSpec, TrackedRun, local_uri

MODEL = Path(__file__).parents[1] / "compat" / "v1" / "model"


def opened(uri: str, key: str, experiment: str = "cellplane/pretrain") -> TrackedRun:
    return TrackedRun.open(RunSpec(run_key=key, experiment=experiment, name="run"), uri)


def test_a_tracker_that_was_never_made_refers_to_nothing_and_is_not_made(tmp_path):
    found = references(local_uri(tmp_path / "nothing"))
    assert (found.model_sha256, found.run_names) == (frozenset(), frozenset())
    assert not (tmp_path / "nothing").exists()


def test_registered_models_and_tagged_runs_are_referred_to(tmp_path):
    uri = local_uri(tmp_path)
    tracked = opened(uri, "pretrain:one:0123")
    opened(uri, "finetune:two:4567", "cellplane/finetune/annotate").set_tags({"cellplane.keep": "yes"})
    opened(uri, "odd").set_tags({"keep": ""})
    assert references(uri).model_sha256 == frozenset()
    tracked.log_artifacts(MODEL, "model")
    register(MODEL, tracked.run_id, "tiny", uri)
    found = references(uri)
    assert found.model_sha256 == {load_model(MODEL).model_sha256}
    assert found.run_names == {"two"}


def test_a_tracker_that_is_away_is_an_error():
    with pytest.raises(ServiceError, match="cannot be reached"):
        references("http://127.0.0.1:9")
