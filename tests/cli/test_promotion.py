"""`cellplane models promote | rollback | history`: the gate speaks, the way back is one word, and it is all written down."""

from __future__ import annotations

from pathlib import Path

import pytest

from cellplane.tracking.registry import HISTORY_TAG, aliases_of, list_models
from cellplane.tracking.runs import connect, local_uri


@pytest.fixture
def uri(registered, tmp_path):
    """A copy of the registry, in which nothing was promoted yet."""
    original = Path(registered[0].removeprefix("sqlite:///"))
    (tmp_path / "mlflow.db").write_bytes(original.read_bytes())
    copy = local_uri(tmp_path)
    client = connect(copy)
    for alias in aliases_of("types", copy):
        client.delete_registered_model_alias("types", alias)
    client.set_registered_model_tag("types", HISTORY_TAG, "[]")
    return copy


def test_a_promotion_is_taken_back_and_the_history_shows_both(run, uri):
    name = "types"
    assert run("models", "promote", name, "1", "--tracking-uri", uri).code == 0
    nowhere = run("models", "rollback", name, "--tracking-uri", uri)
    assert (nowhere.code, "no previous version" in nowhere.err) == (2, True)
    run("models", "promote", name, "2", "--tracking-uri", uri)
    back = run("models", "rollback", name, "--tracking-uri", uri, "--json").json
    assert (back["champion"], back["previous"]) == (1, 2)
    told = run("models", "history", name, "--tracking-uri", uri, "--json").json["promotions"]
    moves = [(entry["what"], entry["from"], entry["version"]) for entry in told]
    assert moves == [("promote", None, 1), ("promote", 1, 2), ("rollback", 2, 1)]
    assert "rollback" in run("models", "history", name, "--tracking-uri", uri).out


def test_a_worse_version_needs_force(run, uri):
    for version, score in ((1, 0.9), (2, 0.5)):
        (run_id,) = [model.run_id for model in list_models(uri) if model.version == version]
        connect(uri).log_metric(run_id, "test/cellplm/macro_f1", score)
    assert "macro_f1 0.9000" in (out := run("models", "promote", "types", "1", "--tracking-uri", uri).out)
    assert "warning" not in out
    refused = run("models", "promote", "types", "2", "--tracking-uri", uri)
    assert (refused.code, "champion has 0.9000" in " ".join(refused.err.split())) == (2, True)
    assert run("models", "promote", "types", "2", "--tracking-uri", uri, "--force").code == 0
    connect(uri).log_metric(run_id, "test/majority/macro_f1", 0.45)
    assert "no method does much better" in run("models", "promote", "types", "2", "--tracking-uri", uri, "--force").out
    assert "forced" in run("models", "history", "types", "--tracking-uri", uri).out
