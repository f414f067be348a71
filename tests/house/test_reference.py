"""docs/reference/ is what the code says: every command, configuration key, endpoint and error is there, and each is explained."""

from __future__ import annotations

import re

import pytest

from cellplane.cli.reference import CONFIGS, PAGES, _fields, _found, _has_keys, _meanings
from cellplane.config import configs_root
from tests.house.source import ROOT, sources

REFERENCE = ROOT / "docs" / "reference"
NO_CONFIG = {"model", "cluster"}  # sections of others; manifests and files of other programs lie below cluster/


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_what_the_code_says(page: str) -> None:
    assert (REFERENCE / f"{page}.md").read_text(encoding="utf-8") == PAGES[page](), "run `make reference`"


def test_no_page_is_left_over() -> None:
    assert {path.stem for path in REFERENCE.iterdir()} == set(PAGES)


def test_every_kind_of_file_is_there() -> None:
    kinds = {found for source in sources() for found in re.findall(r'^    kind: Literal\["(\w+)"\]', source.text, re.MULTILINE)}
    told = {_found(where).model_fields["kind"].default for classes in CONFIGS.values() for where in classes}
    assert told == kinds
    folders = {path.name for path in configs_root().iterdir() if path.is_dir()}
    assert folders - NO_CONFIG == set(CONFIGS) - NO_CONFIG


def test_every_key_is_explained() -> None:
    waiting, seen = [_found(where) for classes in CONFIGS.values() for where in classes], set()
    while waiting:
        config = waiting.pop()
        if config in seen:
            continue
        seen.add(config)
        meanings = _meanings(config)
        for name, kind, _ in _fields(config):
            assert meanings.get(name), f"{config.__name__}.{name} has no text under it"
            waiting += [part for part in (kind, *getattr(kind, "__args__", ())) if isinstance(part, type) and _has_keys(part)]
    assert len(seen) > 20


def test_nothing_of_this_machine_is_in_a_page() -> None:
    for path in REFERENCE.iterdir():
        text = path.read_text(encoding="utf-8")
        assert str(ROOT) not in text
        assert not re.search(r"0x[0-9a-f]{6,}|<object|<function", text), path
