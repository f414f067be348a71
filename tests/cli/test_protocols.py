"""Protocols from the command line: a shipped file by name, overrides, tables or one JSON object, and errors before any work."""

from __future__ import annotations

import json

import pytest

from cellplane.cli.main import main
from cellplane.cli.ops import load_any
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
    ("name", "schema"), [("cpu_annotate", "AnnotationProtocol"), ("cpu_embed", "EmbeddingProtocol"), ("annotate", "EvaluateConfig")]
)
def test_the_protocol_key_tells_a_protocol_from_scoring_one_model(name, schema):
    assert type(load_any(configs_root() / "evaluate" / f"{name}.yaml")).__name__ == schema
