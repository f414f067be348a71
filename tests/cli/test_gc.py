"""`cellplane gc` lists and leaves alone, unless it is told to remove."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from cellplane.cli.gc import size
from cellplane.train.checkpoint import Checkpoints
from tests.test_cleanup import new_run


class Terminal(io.StringIO):
    """Standard input with a person at it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def steps(home: Path) -> Checkpoints:
    """Checkpoints of a finished run: 10, 20, 30, 40, of which 10 and 30 may go."""
    return Checkpoints(new_run(home, "done") / "checkpoints")


def test_it_lists_with_sizes_and_removes_nothing(run, steps):
    said = run("gc")
    assert said.code == 0
    lines = said.out.splitlines()
    assert lines[0].split() == ["kind", "size", "path", "why"]
    assert "step-00000010" in lines[1]
    assert "neither the newest nor the best" in lines[1]
    assert lines[-1] == "nothing was removed; `cellplane gc --remove` removes what is listed"
    assert steps.steps() == [10, 20, 30, 40]


def test_yes_removes(run, steps):
    said = run("gc", "--yes")
    assert said.code == 0
    assert "removed 2 items" in said.out
    assert steps.steps() == [20, 40]
    assert run("gc").out == "nothing to remove\n"


@pytest.mark.parametrize(("answer", "left"), [("y\n", [20, 40]), ("n\n", [10, 20, 30, 40])])
def test_remove_asks_first(run, steps, monkeypatch, answer, left):
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert run("gc", "--remove").code == 0
    assert steps.steps() == left


def test_remove_without_a_person_is_a_usage_error(run, steps, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    said = run("gc", "--remove")
    assert said.code == 2
    assert "add --yes" in said.err
    assert steps.steps() == [10, 20, 30, 40]


def test_json_is_one_object_with_what_was_removed(run, steps):
    listed = run("gc", "--json").json
    assert [(item["kind"], item["removed"]) for item in listed["items"]] == [("checkpoint", False)] * 2
    assert listed["bytes"] == sum(item["bytes"] for item in listed["items"]) > 0
    removed = run("gc", "--json", "--yes").json
    assert [item["removed"] for item in removed["items"]] == [True] * 2
    assert run("gc", "--json").json == {"items": [], "bytes": 0, "in_use": [], "notes": []}


def test_runs_go_by_their_options(run, home, steps):
    new_run(home, "half", finished=False)
    assert [Path(item["path"]).name for item in run("gc", "--json", "--runs", 5).json["items"]] == ["done"]
    both = run("gc", "--json", "--runs", 5, "--unfinished", 5).json["items"]
    assert [Path(item["path"]).name for item in both] == ["done", "half"]


def test_days_below_zero_are_a_usage_error(run):
    assert run("gc", "--runs=-1").code == 2


def test_what_stays_against_the_wish_is_a_failure(run, steps, monkeypatch):
    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    said = run("gc", "--yes")
    assert said.code == 1
    assert "step-00000010 stays: Permission denied" in said.err


def test_what_is_in_use_is_told_beside_the_list(run, home, steps):
    (home / "runs" / "done" / "journal.jsonl").touch()
    said = run("gc")
    assert said.out == "nothing to remove\n"
    assert f"in use, or changed within the hour: {home / 'runs' / 'done'}" in said.err


@pytest.mark.parametrize(("number", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (852_000_000, "852.0 MB"), (3e15, "3000.0 TB")])
def test_sizes_are_for_people(number, text):
    assert size(number) == text
