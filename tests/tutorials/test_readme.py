"""The notebook blocks of the README and of docs/try.md run as they stand, after the commands of their own pages."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cellplane import CellTypeAnnotationPipeline, demo
from cellplane.artifact.folder import ModelFolder, save_model
from cellplane.data.config import DataKeys, SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.data.sources import find_counts, read_h5ad, write_h5ad
from cellplane.genes import GeneVocabulary
from cellplane.model.cellplm import new_model
from cellplane.model.config import ModelConfig
from tests.house.source import ROOT
from tests.tutorials.test_tutorials import BLOCK, SMALLEST_PICTURE_BYTES

SHORT = {"model": {"width": 16, "n_heads": 2, "n_blocks": 1, "latent_width": 8}, "optimizer": {"steps": 2, "lr": 1e-2, "warmup_steps": 1}}
TINY = ModelConfig(n_genes=1, n_blocks=1, n_clusters=3, width=32, n_heads=2, latent_width=16, cluster_width=8, decoder_width=16)


@pytest.fixture
def after_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the demo leaves, where it leaves them; its base is as it began, so that a minute is saved."""
    monkeypatch.chdir(tmp_path)
    for name in ("CELLPLANE_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    left = demo.Demo(0, lambda text: None, Path(".cellplane/demo/seed0"))
    demo._split(left)
    genes = GeneVocabulary.from_ids(find_counts(read_h5ad(left.train), DataKeys(recover_counts=True)).gene_ids)
    config = replace(TINY, n_genes=len(genes))
    weights = new_model(config, 0).state_dict()
    base = ModelFolder(config=config, weights=weights, vocabulary=genes, task="pretrain", max_cells=64)
    save_model(base, Path(".cellplane/runs/demo-pretrain-seed0/model"))
    return tmp_path


def test_the_notebook_block_can_be_pasted_after_the_demo(after_the_demo, capsys):
    torch.set_num_threads(1)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first = BLOCK.findall(text[text.index("## In a notebook") :])[0]
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # anndata's, about how old the demo's file is
        exec(compile(first, "README.md, In a notebook", "exec"), names)
    query = names["query"]
    assert {"cellplm_cell_type", "cellplm_confidence"} <= set(query.obs)
    assert ("X_cellplm" in query.obsm, "cellplm_denoised" in query.layers) == (True, True)
    assert 0.2 < float(capsys.readouterr().out.split()[-1]) <= 1
    assert (after_the_demo / "annotator" / "manifest.json").is_file()


def test_the_paths_in_the_block_are_those_of_the_demo():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = (ROOT / "platform" / "cellplane" / "demo.py").read_text(encoding="utf-8")
    assert ".cellplane/runs/demo-pretrain-seed0/model" in text
    assert "run=demo-pretrain-seed{demo.seed}" in code
    assert 'home() / "demo" / f"seed{seed}"' in code


@pytest.fixture
def after_annotating(tmp_path: Path) -> Path:
    """What `cellplane annotate` left, under the names that docs/try.md shows."""
    cells = simulate(SimulateConfig(n_cells=90, n_genes=40, n_types=3))
    pipeline = CellTypeAnnotationPipeline(config=SHORT).fit(cells)
    pipeline.save(tmp_path / ".cellplane" / "runs" / "annotate-017dd851868c" / "model")
    pipeline.predict(cells, key_added="cellplm")
    write_h5ad(cells, tmp_path / "annotated" / "ctrl107.h5ad")
    return tmp_path


def test_the_picture_of_the_try_page_is_drawn_of_an_annotated_file(after_annotating, monkeypatch):
    monkeypatch.chdir(after_annotating)
    (block,) = BLOCK.findall((ROOT / "docs" / "try.md").read_text(encoding="utf-8"))
    exec(compile(block, "docs/try.md", "exec"), {})
    assert (after_annotating / "umap.png").stat().st_size > SMALLEST_PICTURE_BYTES
