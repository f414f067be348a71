"""`cellplane models import`: a released checkpoint becomes a model folder, or an error says which key is wrong and how."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cellplane.artifact.folder import load_model
from cellplane.inference import Predictor
from tests.cli.test_main import one_line
from tests.model.released import batch_of, near

GENES = "embedder.feat_enc.emb"
QUERY = "encoder.layers.1.self_attn.query_projection.weight"


@pytest.fixture
def released(shared: Path, tmp_path: Path) -> Path:
    """A copy of the oracle's checkpoints that may be spoilt."""
    for file in (shared / "oracle").glob("tiny_*"):
        shutil.copyfile(file, tmp_path / file.name)
    return tmp_path


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "tiny_gmvae.best.ckpt"
    state = torch.load(path, weights_only=True)["model_state_dict"]
    change(state)
    torch.save({"model_state_dict": state}, path)


def change_settings(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "tiny_gmvae.config.json"
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))


def truncate(folder: Path) -> None:
    path = folder / "tiny_gmvae.best.ckpt"
    path.write_bytes(path.read_bytes()[:100_000])


@pytest.mark.parametrize("prefix", ["tiny_gmvae", "tiny_vae"])
def test_a_released_checkpoint_becomes_a_model_folder(run, released, prefix):
    said = run("models", "import", "--official", released / prefix, "--out", released / "ours", "--json")
    assert (said.code, said.json["genes"]) == (0, 200 if prefix == "tiny_gmvae" else 120)
    model = load_model(released / "ours")
    assert model.config.latent == prefix.removeprefix("tiny_")
    assert model.lineage["source"] == f"official checkpoint {prefix}"
    assert model.card.startswith("# CellPLM")


def test_the_imported_folder_answers_as_the_released_model(run, released, shared):
    run("models", "import", "--official", released / "tiny_vae", "--out", released / "ours")
    arrays = np.load(shared / "oracle" / "vae.npz")
    with torch.inference_mode():
        near(Predictor.load(released / "ours").model(batch_of(arrays["x"], n_genes=120)).latent, arrays["emb_one_context"])


def test_both_ways_to_name_a_checkpoint_write_the_same_model(run, released):
    first = run("models", "import", "--official", released / "tiny_gmvae", "--out", released / "a", "--json")
    second = run("models", "import", released, "tiny_gmvae", "--out", released / "b", "--json")
    assert first.json["model_sha256"] == second.json["model_sha256"]


def test_positions_can_be_switched_on(run, released):
    said = run("models", "import", "--official", released / "tiny_gmvae", "--out", released / "ours", "--positions", "grid")
    assert said.code == 0
    model = load_model(released / "ours")
    assert model.config.positions == "grid"
    assert "embedder.positions.missing_D" in model.weights


SPOILT: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing key": (
        lambda folder: change_weights(folder, lambda state: state.pop(QUERY)),
        ["missing", "encoder.blocks.1.query.weight"],
    ),
    "missing gene table": (lambda folder: change_weights(folder, lambda state: state.pop(GENES)), ["embedder.genes_GD"]),
    "extra key": (
        lambda folder: change_weights(folder, lambda state: state.update({"encoder.rotary": torch.zeros(2)})),
        ["no released CellPLM has", "'encoder.rotary'"],
    ),
    "misshapen key": (
        lambda folder: change_weights(folder, lambda state: state.update({QUERY: torch.zeros(48, 47)})),
        ["encoder.blocks.1.query.weight", "(48, 47) instead of (48, 48)"],
    ),
    "truncated file": (truncate, ["not a readable official checkpoint"]),
    "another gene list": (
        lambda folder: change_settings(folder, lambda settings: settings["gene_list"].pop()),
        ["199 genes are named but 200 have vectors"],
    ),
    "genes named twice": (
        lambda folder: change_settings(folder, lambda settings: settings.update(gene_list=settings["gene_list"][:-1] * 2)),
        ["ENSG00000000003"],
    ),
    "unknown value": (
        lambda folder: change_settings(folder, lambda settings: settings.update(enc_mod="rnn")),
        ["enc_mod is 'rnn'", "flowformer"],
    ),
    "another network": (lambda folder: change_settings(folder, lambda settings: settings.update(cat_pe=True)), ["cat_pe is True"]),
    "another width": (
        lambda folder: change_settings(folder, lambda settings: settings.update(enc_hid=64)),
        ["embedder.genes_GD: (200, 48) instead of (200, 64)"],
    ),
    "rows that disagree": (
        lambda folder: change_settings(folder, lambda settings: settings.update(batch_num=7)),
        ["batch_num is 7", "6 rows"],
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_checkpoint_is_invalid_data_and_the_message_says_what_is_wrong(run, released, name):
    spoil, words = SPOILT[name]
    spoil(released)
    said = run("models", "import", "--official", released / "tiny_gmvae", "--out", released / "ours")
    assert said.code == 3
    assert not [word for word in words if word not in one_line(said)], one_line(said)
    assert not (released / "ours").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--out", "x"],
        ["folder", "--out", "x"],
        ["folder", "tiny", "--official", "folder/tiny", "--out", "x"],
        ["--official", "folder/tiny"],
        ["--official", "folder/tiny", "--out", "x", "--positions", "learned"],
    ],
    ids=" ".join,
)
def test_a_half_named_checkpoint_is_a_wrong_call(run, arguments):
    assert run("models", "import", *arguments).code == 2
