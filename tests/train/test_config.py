"""The schedule is a function of the step, and a model file is checked like any other configuration."""

from __future__ import annotations

from itertools import pairwise

import pytest
from pydantic import ValidationError

from cellplane.config import configs_root, load_config
from cellplane.errors import ConfigError
from cellplane.model.config import ModelConfig
from cellplane.train.config import EngineConfig, ModelFile, OptimizerConfig, PretrainConfig, WorkersConfig


def test_the_rate_rises_evenly_to_its_peak_during_warm_up():
    config = OptimizerConfig(steps=100, lr=1.0, warmup_steps=4)
    assert [config.lr_at(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert config.lr_at(4) == 1.0


def test_the_cosine_falls_from_the_peak_through_its_half_to_zero_and_stays_there():
    config = OptimizerConfig(steps=110, lr=2.0, warmup_steps=10)
    rates = [config.lr_at(step) for step in range(10, 112)]
    assert rates[0] == 2.0
    assert rates[50] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert rates[101] == pytest.approx(0.0, abs=1e-12)
    assert all(later <= earlier for earlier, later in pairwise(rates))


def test_the_constant_schedule_keeps_the_peak():
    config = OptimizerConfig(steps=10, lr=0.5, warmup_steps=2, schedule="constant")
    assert {config.lr_at(step) for step in range(1, 20)} == {0.5}


def test_a_warm_up_longer_than_the_run_is_only_cut_short():
    config = OptimizerConfig(steps=5, lr=1.0, warmup_steps=10)
    assert [config.lr_at(step) for step in (0, 4)] == [0.1, 0.5]
    assert config.lr_at(12) == pytest.approx(0.0, abs=1e-1)


@pytest.mark.parametrize(
    ("cls", "values"),
    [(OptimizerConfig, {"steps": 0}), (OptimizerConfig, {"lr": 0}), (OptimizerConfig, {"clip": -1}), (WorkersConfig, {"count": 0})],
)
def test_numbers_that_cannot_train_are_refused(cls, values):
    with pytest.raises(ValidationError):
        cls(**values)


def test_a_model_file_has_the_keys_of_the_network_and_is_checked_by_it():
    assert ModelFile().model_dump() == ModelConfig().as_dict()
    with pytest.raises(ValidationError, match="multiple of n_heads"):
        ModelFile.model_validate({"width": 20, "n_heads": 3})
    with pytest.raises(ValidationError, match="Extra inputs"):
        ModelFile.model_validate({"widht": 20})


@pytest.mark.parametrize("path", sorted(configs_root().glob("model/*.yaml")), ids=lambda path: path.stem)
def test_a_run_takes_a_shipped_model_by_name(path):
    config = load_config(PretrainConfig, "demo", "pretrain", [f"model={path.stem}", "optimizer.steps=7"])
    assert config.model == ModelConfig(**load_config(ModelFile, path, "model").model_dump())
    assert config.optimizer.steps == 7


def test_an_unknown_key_of_a_run_names_the_nearest():
    with pytest.raises(ConfigError, match=r"optimizer\.stpes.*did you mean 'optimizer.steps'"):
        load_config(PretrainConfig, "demo", "pretrain", ["optimizer.stpes=7"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine.name": "torch", "engine.offload": "optimizer"}, "engine torch knows no offload optimizer; take engine.name deepspeed"),
        ({"engine.name": "torch", "engine.bf16": "true"}, r"engine torch knows no bf16 .*set model\.precision"),
        ({"engine.offload": "parameters", "engine.zero_stage": "2"}, "offload parameters needs zero_stage 3, found 2"),
        ({"engine.offload": "optimizer", "engine.zero_stage": "0"}, "offload optimizer needs zero_stage 1, 2 or 3"),
        ({"engine.bf16": "true", "engine.zero_stage": "0"}, "bf16 needs zero_stage 1, 2 or 3"),
        ({"engine.name": "torch", "checkpoint.format": "sharded"}, "sharded are DeepSpeed's own files: take engine.name deepspeed"),
    ],
)
def test_engines_that_cannot_be_are_refused_before_anything_begins(settings, said):
    with pytest.raises(ConfigError, match=said):
        load_config(PretrainConfig, "demo", "pretrain", [f"{key}={value}" for key, value in settings.items()])


def test_what_a_stage_can_offload_it_may():
    for stage in (1, 2, 3):
        assert EngineConfig(zero_stage=stage, offload="optimizer", bf16=True).offload == "optimizer"
    assert EngineConfig(zero_stage=3, offload="parameters").offload == "parameters"
    assert EngineConfig(name="torch", zero_stage=2).name == "torch"  # the stage is DeepSpeed's alone and means nothing here
