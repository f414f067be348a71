"""A fit keeps its best weights, stops when nothing gets better, learns only what it should, and survives being killed anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cellplane.errors import CheckpointError, ConfigError
from cellplane.model.cellplm import new_model
from cellplane.model.config import ModelConfig
from cellplane.tracking.journal import Journal
from cellplane.train.config import FitConfig, OptimizerConfig, TransferConfig
from cellplane.train.finetune import Best, Course, Look, device_named, finetune, restrict
from tests.house.source import PLATFORM, ROOT
from tests.tiny import ANNOTATOR, TINY
from tests.train.fit import LOOK_EVERY, RECIPE, SAVE_EVERY, STEPS, Held, fit, keeping_in, task

POINTS = (  # killed here -> steps that the next start finds done
    *((f"step_rank0:{step}", step - step % SAVE_EVERY) for step in range(STEPS)),
    ("before_checkpoint:1", SAVE_EVERY),
    ("checkpoint_file:4", SAVE_EVERY),
    ("after_checkpoint:2", 3 * SAVE_EVERY),
)


@pytest.fixture(scope="module")
def whole() -> Best:
    """The fit that nothing disturbed."""
    torch.set_num_threads(1)
    return fit()


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of fits as their kills left them."""
    root = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.train.fit", str(root), *(point for point, _ in POINTS)]
    environment = {**os.environ, "PYTHONPATH": f"{PLATFORM}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["-9"] * len(POINTS), done.stderr
    return root


def same(one: Best, other: Best) -> bool:
    """Whether two fits answered the same bits."""
    alike = all(torch.equal(tensor, other.weights[name]) for name, tensor in one.weights.items())
    return alike and (one.step, one.score, one.steps) == (other.step, other.score, other.steps)


def losses(best: Best) -> list[tuple[float, float]]:
    return [(row["step"], row["train/loss"]) for row in best.history]


@pytest.mark.parametrize(("point", "found"), POINTS, ids=[point for point, _ in POINTS])
def test_a_fit_that_was_killed_goes_on_and_ends_alike(whole, killed, point, found):
    folder, told = killed / point.replace(":", "-"), []
    resumed = fit(folder, progress=lambda done, _: told.append(done))
    assert told == list(range(found + 1, STEPS + 1))
    assert same(resumed, whole)
    assert losses(resumed) == losses(whole)
    rows = Journal(folder / "journal.jsonl").rows()
    assert [row.step for row in rows] == list(range(1, STEPS + 1))
    assert [row.step for row in rows if "val/loss" in row.metrics] == list(range(LOOK_EVERY, STEPS + 1, LOOK_EVERY))


def test_keeping_a_fit_changes_nothing(whole, tmp_path):
    assert same(fit(tmp_path), whole)


def test_a_finished_fit_is_not_done_again(whole, tmp_path):
    fit(tmp_path)
    network = new_model(ANNOTATOR, 0)
    told: list[int] = []
    again = fit(tmp_path, progress=lambda done, _: told.append(done), network=network)
    assert told == []
    assert same(again, whole)
    assert losses(again) == losses(whole)


def test_the_best_look_chooses_the_weights(whole):
    looks = {row["step"]: row["val/loss"] for row in whole.history if "val/loss" in row}
    assert list(looks) == list(range(LOOK_EVERY, STEPS + 1, LOOK_EVERY))
    assert whole.step == min(looks, key=looks.get)
    assert whole.score == (-min(looks.values()),)
    network = new_model(ANNOTATOR, 0)
    network.load_state_dict(whole.weights)
    assert Held(network)().score == whole.score


def scripted(scores: list[float], patience: int, folder: Path | None = None) -> tuple[Best, int]:
    """A fit whose looks say what they are told, one look a step, and how often it looked."""
    network = new_model(ANNOTATOR, 0)
    left, template = list(scores), Held(network)

    def look() -> Look:
        template.asked += 1
        score = left.pop(0) if left else -99.0
        return Look({"val/loss": -score}, (score,))

    recipe = RECIPE.model_copy(update={"validate_every": 1, "patience": patience})
    objective, plan = task()
    keeping = None if folder is None else keeping_in(folder)
    return finetune(network, objective, plan, recipe, look, Course(None, keeping)), template.asked


def test_it_stops_after_patience_looks_without_improvement():
    best, asked = scripted([1.0, 3.0, 2.0, 2.5, 3.0], patience=3)
    assert (best.step, best.score, best.steps, asked) == (2, (3.0,), 5, 5)


def test_a_fit_that_stopped_early_stays_stopped(tmp_path):
    first, _ = scripted([1.0, 3.0, 2.0, 2.5], patience=2, folder=tmp_path)
    again, asked = scripted([9.0] * STEPS, patience=2, folder=tmp_path)
    assert asked == 0
    assert same(again, first)
    assert again.steps == 4


def test_scores_that_are_no_numbers_never_win():
    best, _ = scripted([float("nan"), 1.0, float("inf"), float("nan")], patience=3)
    assert (best.step, best.score) == (2, (1.0,))
    best, _ = scripted([float("nan")] * STEPS, patience=50)
    assert (best.step, best.score) == (0, ())
    assert all(torch.equal(tensor, best.weights[name]) for name, tensor in new_model(ANNOTATOR, 0).state_dict().items())


def test_a_fit_of_another_identity_is_refused(tmp_path):
    fit(tmp_path)
    network = new_model(ANNOTATOR, 0)
    other = keeping_in(tmp_path)
    object.__setattr__(other, "identity", "another fit")
    with pytest.raises(CheckpointError, match="another configuration"):
        finetune(network, None, None, RECIPE, Held(network), Course(None, other))  # type: ignore[arg-type]


def fit_with(transfer: TransferConfig) -> tuple[dict[str, torch.Tensor], Best]:
    network = new_model(ANNOTATOR, 0)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    return before, fit(recipe=RECIPE.model_copy(update={"transfer": transfer}), network=network)


def changed(before: dict[str, torch.Tensor], best: Best) -> set[str]:
    """Parts of the network whose weights are others now."""
    return {name.split(".")[0] for name, tensor in before.items() if not torch.equal(tensor, best.weights[name])}


@pytest.mark.parametrize(
    ("transfer", "learns"),
    [
        (TransferConfig(), {"embedder", "encoder", "latent", "head"}),
        (TransferConfig(frozen=("embedder",)), {"encoder", "latent", "head"}),
        (TransferConfig(frozen=("encoder",)), {"embedder", "latent", "head"}),
        (TransferConfig(frozen=("embedder", "encoder", "latent")), {"head"}),
        (TransferConfig(learn="head"), {"latent", "head"}),
    ],
)
def test_only_what_is_not_frozen_learns(transfer, learns):
    assert changed(*fit_with(transfer)) == learns


def test_frozen_parts_resume_like_the_others(tmp_path):
    recipe = RECIPE.model_copy(update={"transfer": TransferConfig(frozen=("embedder",), block_lr_decay=0.5)})
    short = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"schedule": "constant"})})
    part = short.model_copy(update={"optimizer": short.optimizer.model_copy(update={"steps": 6})})
    expected = fit(recipe=short)
    fit(tmp_path, part)
    assert same(fit(tmp_path, short), expected)


def test_blocks_learn_slower_the_deeper_they_lie():
    network = new_model(ModelConfig(**{**TINY.as_dict(), "n_blocks": 3, "local_blocks": 1}), 0)
    restrict(network, TransferConfig(block_lr_decay=0.5))
    scale = {name: parameter.lr_scale for name, parameter in network.named_parameters()}
    for prefix, expected in (
        ("encoder.local.0.", 1.0),
        ("encoder.blocks.2.", 0.5),
        ("encoder.blocks.1.", 0.25),
        ("encoder.blocks.0.", 0.125),
        ("embedder.", 0.0625),
        ("encoder.norm.", 1.0),
        ("latent.", 1.0),
        ("decoder.", 1.0),
    ):
        assert {value for name, value in scale.items() if name.startswith(prefix)} == {expected}, prefix


def test_a_head_on_a_decoder_leaves_the_latent_space_alone():
    network = new_model(TINY, 0)
    restrict(network, TransferConfig(learn="head"))
    assert {name.split(".")[0] for name, parameter in network.named_parameters() if parameter.requires_grad} == {"decoder"}


def test_what_cannot_be_frozen_is_refused():
    with pytest.raises(ConfigError, match="the decoder, which this network does not have"):
        restrict(new_model(ANNOTATOR, 0), TransferConfig(frozen=("decoder",)))
    with pytest.raises(ConfigError, match="nothing is left to learn"):
        restrict(new_model(TINY, 0), TransferConfig(learn="head", frozen=("decoder",)))


def test_an_absent_gpu_is_said_and_auto_does_without(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_named("auto") == device_named("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        device_named("cuda")


def test_a_recipe_says_no_more_than_it_must():
    assert TransferConfig().plain
    assert not TransferConfig(block_lr_decay=0.9).plain
    assert FitConfig().optimizer == OptimizerConfig()
