"""A model saved with golden answers gives them again, and a model that does not is found out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cellplane.artifact.folder import ModelFolder, load_model, save_model
from cellplane.artifact.golden import GOLDEN, Golden
from cellplane.errors import FileFormatError, IntegrityError
from cellplane.genes import GeneVocabulary
from cellplane.inference import Predictor
from cellplane.model.cellplm import CellPLM
from cellplane.model.config import ModelConfig
from cellplane.pipelines.golden import check_golden, with_golden


@pytest.fixture
def folder() -> ModelFolder:
    torch.manual_seed(0)
    config = ModelConfig(n_genes=30, width=32, n_blocks=1, n_heads=2, latent="ae", latent_width=8, decoder="none", n_classes=2)
    vocabulary = GeneVocabulary.from_ids([f"GENE{gene:04d}" for gene in range(30)])
    weights = CellPLM(config).state_dict()
    return ModelFolder(config=config, weights=weights, vocabulary=vocabulary, task="annotate", max_cells=16, classes=("a", "b"))


def test_a_saved_model_gives_its_golden_answers_again(folder: ModelFolder, tmp_path: Path) -> None:
    plain = load_model(save_model(folder, tmp_path / "plain"))
    golden = load_model(save_model(with_golden(folder), tmp_path / "golden"))
    assert golden.model_sha256 == plain.model_sha256
    assert set(Golden.of(golden.attachments).answers) == {"embedding", "proba"}
    assert check_golden(Predictor(golden)) <= 1e-6
    assert check_golden(Predictor(plain)) is None


def test_other_weights_under_the_same_golden_answers_are_found_out(folder: ModelFolder) -> None:
    golden = with_golden(folder)
    for change in (1e-2, float("nan")):
        weights = {name: tensor + change if tensor.is_floating_point() else tensor for name, tensor in golden.weights.items()}
        with pytest.raises(IntegrityError, match="golden answers"):
            check_golden(Predictor(replace(golden, weights=weights)))


def test_a_damaged_attachment_is_an_error_and_not_an_absent_one(folder: ModelFolder) -> None:
    with pytest.raises(FileFormatError):
        Golden.of({GOLDEN: b"not safetensors"})
    cells = Golden.of(with_golden(folder).attachments)
    with pytest.raises(IntegrityError, match="lacks answers"):
        Golden.of(replace(cells, answers={}).attachment())
