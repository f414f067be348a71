"""The verbs try and annotate: what they print, their exit codes, and what they leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cellplane.artifact.folder import ModelFolder, save_model
from cellplane.data.config import KnockoutConfig, SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import AnnData, read_h5ad, write_h5ad
from cellplane.pipelines import annotation_baselines
from tests.cli.conftest import Said
from tests.pipelines.conftest import NOBODY, RECIPE
from tests.pipelines.test_perturbation import SHORT


@pytest.fixture(autouse=True)
def few_trees(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simple methods that are tuned in a moment, and no tracker."""
    monkeypatch.setattr(annotation_baselines, "TREES", 10)
    monkeypatch.setattr(annotation_baselines, "STRENGTHS", (0.3,))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOBODY)


@pytest.fixture(scope="session")
def small() -> list[str]:
    """Overrides for an annotator that is learned in seconds, as part of another configuration."""
    options = {f"recipe.model.{key}": value for key, value in RECIPE["model"].items()}
    options |= {
        "recipe.max_cells": 100,
        "recipe.optimizer.steps": 20,
        "recipe.optimizer.lr": 1e-2,
        "recipe.device": "cpu",
        "recipe.members": 1,
    }
    return [part for key, value in options.items() for part in ("-o", f"{key}={value}")]


def test_trying_prints_the_verdict_first_and_the_report_last(run: Callable[..., Said], h5ad: Path, small: list[str]):
    said = run("try", "annotate", str(h5ad), "--out", "tried", "-o", "folds=2", *small)
    assert said.code == 0, said.err
    assert said.out.startswith(("Use ", "Too close to tell"))
    assert "200 hidden cells" in said.out
    assert "[2/2]" in said.err
    assert Path("tried/report.html").is_file()
    again = run("try", "annotate", str(h5ad), "--out", "tried", "-o", "folds=2", "--auto", "--json", *small)
    found = again.json
    assert found["verdict"] == said.out.splitlines()[0]
    assert found["decision"] in ("model", "baseline", "undecided")
    assert "nothing to answer" in found["answer"], "every cell has a label"


def test_trying_an_embedding_writes_where_the_winner_places_the_cells(run: Callable[..., Said], h5ad: Path, base_model: ModelFolder):
    save_model(base_model, Path("base"))
    arguments = ["try", "embed", str(h5ad), "--base-model", "base", "--batch-key", "batch", "-o", "halvings=2"]
    said = run(*arguments, "--auto")
    assert said.code == 0, said.err
    assert "Over 4 halves of the cells, NMI" in said.out
    assert "[4/4]" in said.err
    again = run(*arguments, "--auto", "--json")
    found = again.json
    assert found["verdict"] == said.out.splitlines()[0]
    assert read_h5ad(Path(found["answer"].split(": ")[-1])).obsm["X_auto"].shape[0] == 200


def test_trying_perturbations_says_who_foretells_them(run: Callable[..., Said]):
    knockouts = KnockoutConfig(n_genes=3, n_pairs=0, effect_sigma=1.0)
    size = {"n_cells": 400, "n_genes": 30, "n_types": 1, "n_batches": 1, "mean_counts": 400}
    write_h5ad(simulate(SimulateConfig(knockouts=knockouts, dropout_rate=0.0, **size)), Path("screen.h5ad"))
    options = [f"recipe.model.{key}={value}" for key, value in SHORT["model"].items()] + ["recipe.optimizer.steps=2", "recipe.folds=0"]
    arguments = ["try", "perturb", "screen.h5ad", "--out", "tried", *(part for one in options for part in ("-o", one))]
    said = run(*arguments, "--json", "--auto")
    assert said.code == 0, said.err
    assert "[3/3]" in said.err
    assert said.json["n"] == 3
    assert said.json["answer"].startswith(("nothing was written", "a model that learned all 3"))
    assert Path("tried/report.md").is_file()
    wrong = run("try", "perturb", "screen.h5ad", "-o", "recipe.perturbation_key=guide")
    assert wrong.code == 3
    assert "perturbation (control, GENE" in wrong.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["try", "annotate"], 2, "data is empty"),
        (["try", "impute", "FILE"], 2, "needs a reference"),
        (["try", "denoise", "nowhere.h5ad"], 3, "no such file"),
        (["try", "embed", "FILE"], 2, "--base-model FOLDER or models:/NAME@ALIAS"),
        (["try", "embed", "FILE", "--base-model", "nowhere"], 2, "nowhere"),
        (["try", "perturb", "FILE"], 3, "-o recipe.perturbation_key=COLUMN"),
        (["try", "annotate", "FILE", "--labels-key", "cell_typ"], 3, "did you mean 'cell_type'"),
        (["try", "annotate", "FILE", "-o", "fold=2"], 2, "did you mean 'folds'"),
        (["annotate"], 2, "folder is empty"),
        (["annotate", "nowhere", "--reference", "FILE"], 3, "not a folder"),
        (["annotate", ".", "--reference", "FILE", "--out", "."], 3, "holds no .h5ad"),
    ],
)
def test_what_is_missing_ends_with_its_code(run: Callable[..., Said], h5ad: Path, arguments: list[str], code: int, words: str):
    said = run(*(str(h5ad) if word == "FILE" else word for word in arguments))
    assert said.code == code
    assert words in said.err


def test_a_folder_is_annotated_and_a_bad_file_ends_with_its_code(
    run: Callable[..., Said], h5ad: Path, query: AnnData, small: list[str], tmp_path: Path
):
    folder = tmp_path / "files"
    write_h5ad(query, folder / "a.h5ad")
    (folder / "broken.h5ad").write_bytes(b"no h5ad")
    arguments = ["annotate", str(folder), "--reference", str(h5ad), "--out", "annotated", "--batch-key", "batch", *small]
    said = run(*arguments)
    assert said.code == 3
    assert "1 of the files could not be annotated, the others are complete: broken.h5ad" in said.err
    assert "[1/2] a.h5ad: 100 cells" in said.err
    assert "cellplm_cell_type" in read_h5ad(tmp_path / "annotated" / "a.h5ad").obs
    assert "broken.h5ad" in (tmp_path / "annotated" / "report.html").read_text(encoding="utf-8")
    (folder / "broken.h5ad").unlink()
    again = run(*arguments, "--json")
    assert again.code == 0, again.err
    found = again.json
    assert (found["cells"], found["new"], found["reused"], found["skipped"]) == (100, 0, 1, 0)
