"""Six epochs of the released annotation recipe, trained by our engine: the same losses, answers and scores.

See tests/model/released.py for where the arrays come from. The released optimizer leaves the norm before the latent
space untrained, warms up everything but the embedder, and gives the embedder a weight decay of its own; its gradients
of the untrained norm are never cleared and count in the clipping.
"""

# C cells

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import f1_score

from cellplane.artifact.official import our_key, read_official
from cellplane.cells import CellBatch
from cellplane.model.cellplm import CellPLM
from cellplane.pipelines.metrics import annotation_scores
from cellplane.train.config import OptimizerConfig
from cellplane.train.engine import TorchEngine
from cellplane.train.objective import Work
from tests.model.released import batch_of, near, no_attention_dropout

WARM_UP = 30
RECIPE = OptimizerConfig(
    steps=WARM_UP, lr=5e-3, weight_decay=1e-7, warmup_steps=WARM_UP, schedule="constant", clip=2.0, embedder_lr_scale=0.1
)


@dataclass(frozen=True)
class Fit:
    """What six epochs left: losses of each, and the answers of the one with the best validation score."""

    train_loss: list[float]
    valid_loss: list[float]
    predicted: NDArray[np.int64]


def network(oracle: Path, arrays: dict[str, np.ndarray]) -> CellPLM:
    config, _, weights = read_official(oracle, "tiny_gmvae")
    model = CellPLM(replace(config, latent="ae", decoder="none", n_classes=5, dropout=0.0, head_dropout=0.0))
    kept = {name: tensor for name, tensor in weights.items() if name.startswith(("embedder.", "encoder."))}
    new = {our_key(key[2:]): torch.from_numpy(array) for key, array in arrays.items() if key.startswith("w:")}
    model.load_state_dict(kept | new, strict=True)
    return model


def labelled(arrays: dict[str, np.ndarray], split: str) -> CellBatch:
    """All cells as one context; only those of one split have labels."""
    labels = np.where(arrays["split"] == split, arrays["label"], -1)
    return replace(batch_of(arrays["x"]), labels=torch.from_numpy(labels))


def released_rates(engine: TorchEngine, epoch: int) -> None:
    """The embedder is not warmed up and decays by 1e-10."""
    embedder = engine.optimizer.param_groups[1]
    embedder["scale"], embedder["weight_decay"] = RECIPE.embedder_lr_scale * WARM_UP / (epoch + 1), 1e-10


@pytest.fixture(scope="module")
def arrays(oracle: Path) -> dict[str, np.ndarray]:
    return dict(np.load(oracle / "annotation.npz"))


@pytest.fixture(scope="module")
def fit(oracle: Path, arrays: dict[str, np.ndarray]) -> Fit:
    model = network(oracle, arrays)
    model.encoder.norm.requires_grad_(False)  # so that the optimizer does not take it
    engine = TorchEngine(model, RECIPE)
    model.encoder.norm.requires_grad_(True)  # its gradients add up all the same
    training, validation = labelled(arrays, "train"), labelled(arrays, "valid")
    held_out = arrays["split"] == "valid"
    train_loss, valid_loss, best, predicted = [], [], 0.0, np.zeros(0, dtype=np.int64)
    with no_attention_dropout():
        for epoch in range(int(arrays["fit_epochs"])):
            released_rates(engine, epoch)
            train_loss.append(engine.step([Work(training, None, torch.ones(1), key=epoch)], 1.0, epoch).loss)
            with torch.no_grad():
                output = model(validation)
            valid_loss.append(float(output.loss.total))
            answers = output.logits.argmax(1).numpy()
            score = f1_score(arrays["label"][held_out], answers[held_out], average="macro", zero_division=0)
            if score >= best:  # of equal ones the last
                best, predicted = score, answers
    return Fit(train_loss, valid_loss, predicted)


def test_the_training_loss_of_every_epoch_is_the_released_one(fit: Fit, arrays: dict[str, np.ndarray]) -> None:
    near(fit.train_loss, arrays["fit_train_loss"])


def test_the_validation_loss_of_every_epoch_is_the_released_one(fit: Fit, arrays: dict[str, np.ndarray]) -> None:
    near(fit.valid_loss, arrays["fit_valid_loss"])


def test_every_cell_is_given_the_released_type(fit: Fit, arrays: dict[str, np.ndarray]) -> None:
    assert fit.predicted.tolist() == arrays["fit_predict_all"].tolist()


def test_the_scores_of_the_test_cells_are_the_released_ones(fit: Fit, arrays: dict[str, np.ndarray]) -> None:
    tested = arrays["split"] == "test"
    scores = annotation_scores(arrays["label"][tested].astype(str), fit.predicted[tested].astype(str))
    found = (scores["accuracy"], scores["macro_f1"], scores["macro_precision"], scores["macro_recall"])
    near(found, np.array([arrays[f"fit_test_{name}"] for name in ("acc", "f1_score", "precision", "recall")]))
