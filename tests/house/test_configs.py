"""Every shipped configuration loads, is commented, and is of the kind its folder says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cellplane.config import Config, configs_root, fingerprint, read_yaml, to_plain, to_yaml, validate
from cellplane.errors import ConfigError
from tests.house.source import ROOT

FILES = sorted((ROOT / "configs").glob("*/*.yaml"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())


@pytest.fixture(scope="module")
def load_any() -> Callable[[Path], Config]:
    """The command line's own loader: the folder of a file says which class reads it."""
    from cellplane.cli import ops

    return ops.load_any


def test_configs_are_shipped_for_every_kind():
    from cellplane.cli.ops import SCHEMAS

    assert {path.parent.name for path in FILES} == set(SCHEMAS)


def test_the_repository_is_where_an_editable_install_finds_them():
    assert configs_root() == ROOT / "configs"


def test_configs_lie_in_the_folder_of_their_kind_and_what_lies_deeper_is_for_other_programs():
    others = {path for path in (ROOT / "configs").rglob("*") if path.is_file()} - set(FILES)
    folders = {path.parent.relative_to(ROOT / "configs").as_posix() for path in others}
    assert folders <= {f"cluster/{program}" for program in ("grafana", "image", "kuberay", "prometheus", "slurm")}


@each_file
def test_a_config_loads_and_its_kind_is_its_folder(path, load_any):
    assert isinstance(load_any(path), Config)
    assert read_yaml(path).get("kind", path.parent.name) == path.parent.name


@each_file
def test_what_a_config_resolves_to_loads_again_as_the_same(path, load_any, tmp_path):
    config = load_any(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(config), encoding="utf-8")
    again = validate(type(config), read_yaml(copy), str(copy))
    assert fingerprint(again) == fingerprint(config)
    assert to_plain(again) == to_plain(config)


@each_file
def test_a_config_says_what_it_is_for_in_its_first_line(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20


@each_file
def test_a_config_explains_most_of_its_keys(path):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    keys = [line for line in lines if not line.lstrip().startswith("#")]
    comments = [line for line in lines if "#" in line]
    assert len(comments) >= len(keys) / 4


@each_file
def test_a_config_holds_no_secret_and_no_path_of_one_machine(path):
    text = path.read_text(encoding="utf-8").lower()
    assert not [word for word in ("password:", "token:", "secret:", "/home/", "/users/") if word in text]


@each_file
def test_an_unknown_key_is_refused(path, load_any, tmp_path):
    spoilt = tmp_path / path.parent.name / path.name
    spoilt.parent.mkdir()
    spoilt.write_text(path.read_text(encoding="utf-8") + "\nno_such_key: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="no_such_key"):
        load_any(spoilt)


def test_a_missing_file_is_refused(load_any, tmp_path):
    with pytest.raises(ConfigError):
        load_any(tmp_path / "model" / "absent.yaml")
