"""Protocols from the command line: a shipped file by name, overrides, tables or one JSON object, and errors before any work."""

from __future__ import annotations

import json

import pytest

from cellplane.cli.main import main, run_job
from cellplane.cli.ops import load_any
from cellplane.cli.train import evaluate_annotate, evaluate_app
from cellplane.config import configs_root
from cellplane.data.config import SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import write_h5ad

NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Options that make the shipped protocol small."""
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOBODY)
    write_h5ad(simulate(SimulateConfig(n_cells=80, n_genes=40, n_types=2)), tmp_path / "cells.h5ad")
    protocol = tmp_path / "small.yaml"
    protocol.write_text(f"kind: evaluate\ntask: embed\nprotocol: full\ndata: {{few: {{path: {tmp_path / 'cells.h5ad'}}}}}\nseeds: [0]\n")
    return ["--protocol", str(protocol)]


def test_a_protocol_prints_its_tables_and_where_the_report_is(asked, tmp_path, capsys):
    assert main(["evaluate", "embed", *asked]) == 0
    printed = capsys.readouterr()
    assert "few, all cells" in printed.out
    assert "PCA50" in printed.out
    assert f"{tmp_path}/evaluations/embed/report.html" in printed.out
    assert "few seed 0: PCA50  NMI" in printed.err
    assert main(["evaluate", "embed", *asked, "--json"]) == 0
    again = capsys.readouterr()
    assert json.loads(again.out)["tables"][0]["dataset"] == "few"
    assert "NMI" not in again.err, "nothing was measured again"


def test_what_is_missing_is_a_configuration_error(asked, capsys):
    assert main(["evaluate", "embed", *asked, "-o", "data.few.path=nowhere.h5ad"]) == 2
    assert "data.few.path" in capsys.readouterr().err
    assert main(["evaluate", "annotate", "--protocol", "cpu_annotate", "-o", "data.pbmc3k.path=nowhere.h5ad"]) == 2
    assert main(["evaluate", "annotate", "--protocol", "no_such_protocol"]) == 2


def test_a_protocol_takes_no_finished_model(capsys):
    assert main(["evaluate", "annotate", "--protocol", "cpu_annotate", "--model", "somewhere"]) == 2
    assert "leave out --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("cpu_annotate", "AnnotationProtocol"),
        ("cpu_embed", "EmbeddingProtocol"),
        ("cpu_unknown", "UnknownProtocol"),
        ("annotate", "EvaluateConfig"),
    ],
)
def test_the_protocol_key_tells_a_protocol_from_scoring_one_model(name, schema):
    assert type(load_any(configs_root() / "evaluate" / f"{name}.yaml")).__name__ == schema


def test_types_are_left_out_by_the_verb_and_by_the_job(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOBODY)
    write_h5ad(simulate(SimulateConfig(n_cells=120, n_genes=40, n_types=3)), tmp_path / "cells.h5ad")
    data = f"{{few: {{path: {tmp_path / 'cells.h5ad'}, types: [type_1]}}}}"
    recipe = "{model: {width: 16, n_heads: 2}, optimizer: {steps: 2, warmup_steps: 0}}"
    text = f"kind: evaluate\ntask: unknown\nprotocol: full\ndata: {data}\nseeds: [0]\nrecipe: {recipe}\n"
    (tmp_path / "small.yaml").write_text(text)
    asked = ["--protocol", str(tmp_path / "small.yaml")]
    assert main(["evaluate", "unknown", *asked]) == 0
    printed = capsys.readouterr()
    assert "few, own context: by type" in printed.out
    assert f"{tmp_path}/evaluations/unknown/report.html" in printed.out
    monkeypatch.setattr("sys.argv", ["jobs.evaluate", "unknown", *asked, "--json"])
    with pytest.raises(SystemExit) as ended:
        run_job(evaluate_annotate, evaluate_app)
    assert ended.value.code == 0
    again = capsys.readouterr()
    assert json.loads(again.out)["metric"] == "auroc"
    assert "AUROC" not in again.err, "nothing was fitted again"
