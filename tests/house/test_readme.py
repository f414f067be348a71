"""What the README tells a reader to type exists: commands with their options, make targets, job modules, files."""

from __future__ import annotations

import importlib.util
import re
import shlex
from functools import cache
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tests.house.source import ROOT

PAGES = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))
GUIDES = ("README.md", "CONTRIBUTING.md", *PAGES)
FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^```", re.MULTILINE | re.DOTALL)
SHELLS = ("", "bash", "sh", "console", "shell", "text")
PROMPTS = re.compile(r"^\s*(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?=cellplane |make |python3? -m jobs\.)")


def read(guide: str) -> str:
    path = ROOT / guide
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def commands(guide: str) -> list[list[str]]:
    """The words of every command of ours in the fenced blocks of a guide; comments and pipes behind it are cut."""
    bodies = [match["body"].replace("\\\n", " ") for match in FENCE.finditer(read(guide)) if match["language"] in SHELLS]
    pieces = [piece for body in bodies for line in body.splitlines() for piece in re.split(r"&&|;|\|", line)]
    found = [PROMPTS.sub("", piece, count=1) for piece in pieces if PROMPTS.match(piece)]
    return [shlex.split(command, comments=True) for command in found]


def typed(first: str) -> list[Any]:
    """All commands of the guides that begin with a word, as test parameters."""
    written = [guide for guide in GUIDES if not guide.startswith("docs/reference/")]  # those come from the code, usage lines and all
    chosen = sorted({tuple(words) for guide in written for words in commands(guide) if words[0] == first})
    return [pytest.param(list(words), id=" ".join(words)) for words in chosen]


@cache
def command_tree() -> Any:
    from cellplane.cli.main import app

    return typer.main.get_command(app)


def resolve(words: list[str]) -> tuple[list[str], Any, list[str]]:
    """(verbs, the command they name, what remains); KeyError with the verb that does not exist."""
    node, verbs = command_tree(), []
    while hasattr(node, "commands") and len(words) > len(verbs) and not words[len(verbs)].startswith("-"):
        node = node.commands[words[len(verbs)]]
        verbs.append(words[len(verbs)])
    return verbs, node, words[len(verbs) :]


def options(command: Any) -> set[str]:
    return {"--help"}.union(*((*parameter.opts, *parameter.secondary_opts) for parameter in command.params))


def test_the_readme_shows_commands_of_every_sort():
    first = {words[0] for words in commands("README.md")}
    assert {"cellplane", "make", "python"} <= first


@pytest.mark.parametrize("words", typed("cellplane"))
def test_a_command_exists_with_the_options_it_is_given(words):
    from cellplane.cli.main import app

    verbs, command, rest = resolve(words[1:])
    given = {word.partition("=")[0] for word in rest if word.startswith("-")}
    assert given <= options(command)
    assert CliRunner().invoke(app, [*verbs, "--help"]).exit_code == 0


@pytest.mark.parametrize("words", typed("make"))
def test_a_make_target_exists(words):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {word for word in words[1:] if "=" not in word} <= targets


@pytest.mark.parametrize("words", [*typed("python"), *typed("python3")])
def test_a_job_exists_and_its_config_is_shipped(words):
    assert importlib.util.find_spec(words[2]) is not None
    shipped = [word for word in words if word.startswith("configs/")]
    assert not [path for path in shipped if not (ROOT / path).is_file()]


@pytest.mark.parametrize("guide", GUIDES)
def test_files_and_pictures_a_guide_points_to_exist(guide):
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", read(guide))
    assert not [target for target in targets if not ((ROOT / guide).parent / target).exists()]


def test_the_readme_shows_the_rooms_of_the_house():
    assert not [room for room in ("platform/cellplane/", "jobs/", "serve/", "configs/", "tests/") if room not in read("README.md")]


def test_every_make_target_has_its_line_of_help():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)[0].split())
    assert targets == set(re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE))


def test_the_top_of_the_house_is_complete():
    texts = ("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff")
    tools = ("Makefile", "requirements.lock", "pyproject.toml", ".ci/run")
    assert not [name for name in (*texts, *tools) if not (ROOT / name).is_file()]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
