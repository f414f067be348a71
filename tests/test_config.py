"""Configuration: what is wrong is named with its place and the nearest right thing, before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field

from cellplane.config import Config, configs_root, find_config, fingerprint, home, load_config, read_yaml, to_plain, to_yaml, validate
from cellplane.data.sentences import PlanConfig
from cellplane.errors import ConfigError
from cellplane.model.config import ModelConfig


class Optimizer(Config):
    lr: float = 1e-3
    steps: int = Field(10, ge=1)


class Inner(Config):
    optimizer: Optimizer = Optimizer()


class Run(Config):
    references: ClassVar = {"model": "model"}
    name: str = "run"
    inner: Inner = Inner()
    optimizer: Optimizer = Optimizer()
    model: ModelConfig = ModelConfig()
    inputs: tuple[str, ...] = ()


@pytest.fixture
def write(tmp_path: Path):
    def writer(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return writer


def load(path: Path | None, *overrides: str) -> Run:
    return load_config(Run, path, "pretrain", overrides)


def test_a_file_is_read_over_the_defaults(write):
    config = load(write("optimizer:\n  lr: 5e-4\ninputs: [a, b]\n"))
    assert (config.optimizer.lr, config.optimizer.steps, config.inputs) == (5e-4, 10, ("a", "b"))


def test_an_empty_file_and_no_file_are_the_defaults(write):
    assert load(None) == load(write("{}")) == Run()


def test_overrides_win_over_the_file_and_the_last_one_wins(write):
    config = load(write("optimizer: {lr: 5e-4}"), "optimizer.lr=1e-2", "optimizer.lr=2e-2", "name=other")
    assert (config.optimizer.lr, config.name) == (0.02, "other")


def test_a_section_can_be_the_name_of_a_shipped_file(write):
    assert load(write("model: tiny")).model.width == load(None, "model=tiny", "model.n_blocks=1").model.width == 128
    assert load(write("model: tiny"), "model=cellplm_85m" if (configs_root() / "model/cellplm_85m.yaml").is_file() else "model=tiny")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["optimiser.lr=1"], "the options given: unknown key 'optimiser'; did you mean 'optimizer'"),
        (["optimizer.lrr=1"], "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'"),
        (["model.widht=64"], "unknown key 'model.widht'; did you mean 'model.width'"),
        (["inner.lr=1"], "unknown key 'inner.lr'; did you mean 'inner.optimizer.lr'"),
        (["zzz=1"], "unknown key 'zzz'; valid keys: inner, inputs, model, name, optimizer"),
        (["optimizer.lr=fast"], "optimizer.lr: .*number.*'fast'"),
        (["optimizer.steps=0"], "optimizer.steps: .*greater than or equal to 1"),
        (["model.attention=flow"], "model.attention: .*'flowformer' or 'softmax'"),
        (["model.width=30"], "width 30 .* multiple"),
        (["model.n_heads=0"], "n_heads"),
        (["model.n_blocks=-1"], "n_blocks"),
        (["model=none_such"], "no config file 'none_such'.*tiny"),
        (["optimizer.lr"], "'optimizer.lr' is not of the form"),
        (["inputs=[a"], "override"),
        (["name: x=}"], "override"),
        (["=3"], "unknown key ''"),
        (["name=${missing}"], "missing"),
        (["optimizer=3"], "optimizer"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(overrides, says):
    with pytest.raises(ConfigError, match=says):
        load(None, *overrides)


def test_every_finding_is_told_at_once():
    with pytest.raises(ConfigError, match=r"optimizer.lr: .*optimizer.steps: .*unknown key 'nmae'"):
        load(None, "optimizer.lr=x", "optimizer.steps=0", "nmae=1")


@pytest.mark.parametrize("text", ["a: [1", "- a\n- b", "a: 1\na: 2", "\ta: 1"], ids=["open", "list", "twice", "tab"])
def test_a_file_that_is_no_mapping_is_refused_by_name(write, text):
    path = write(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        read_yaml(path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not readable YAML"):
        read_yaml(path)


def test_a_missing_file_lists_what_is_shipped():
    with pytest.raises(ConfigError, match=r"no config file 'nope'.*shipped for model: .*tiny"):
        find_config("nope", "model")


@pytest.mark.parametrize("name", ["tiny", "tiny.yaml", "model/tiny", "model/tiny.yaml"])
def test_a_shipped_file_is_found_by_name(name):
    assert find_config(name, "model") == configs_root() / "model" / "tiny.yaml"


def test_the_path_of_another_folder_does_not_find_a_shipped_file():
    with pytest.raises(ConfigError):
        find_config("elsewhere/tiny", "model")


def test_the_resolved_configuration_reproduces_itself(write):
    config = load(None, "optimizer.lr=3e-7", "model=tiny", "inputs=[a,b]")
    assert load(write(to_yaml(config))) == config
    assert validate(Run, to_plain(config), "again") == config


def test_the_fingerprint_follows_values_not_how_they_were_given(write):
    assert fingerprint(load(write("optimizer: {lr: 0.02}"))) == fingerprint(load(None, "optimizer.lr=2e-2"))
    assert fingerprint(load(None)) != fingerprint(load(None, "optimizer.lr=2e-2"))


def test_configurations_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Run().name = "other"


@pytest.mark.parametrize("field", ["cells_per_micro_batch", "micro_batches_per_step"])
def test_a_plan_without_room_for_anything_is_refused(field):
    with pytest.raises(ConfigError, match=field):
        load_config(PlanConfig, None, "pretrain", [f"{field}=0"])


def test_home_is_absolute_and_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / "here"))
    assert home() == tmp_path / "here"
    monkeypatch.delenv("CELLPLANE_HOME")
    monkeypatch.chdir(tmp_path)
    assert home() == tmp_path / ".cellplane"
