"""What a comparison rests on: workers that answer or say why not, rounds without foreign load, cells, environments, output."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from cellplane.benchmark import environments, sides
from cellplane.benchmark.cells import random_cells
from cellplane.benchmark.report import Figure, at_least, at_most, machine, table
from cellplane.benchmark.sides import LoadMeter, Rounds, Side, alternate
from cellplane.errors import BenchmarkError
from tests.house.source import ROOT

WORKER = """
import os, sys, time
from cellplane.benchmark.worker import measured, resident_bytes, serve

kept = []

def add(a, b):
    print("a library says hello")
    return {"sum": a + b, "threads": os.environ["OMP_NUM_THREADS"]}

def nothing():
    return None

def fail(kind):
    raise {"lookup": LookupError, "memory": MemoryError}[kind]("on purpose")

def end():
    print("first line\\nlast words", file=sys.stderr)
    sys.stderr.flush()
    os._exit(7)

def allocate(size):
    return measured(lambda: bytearray(size).count(1))

def busy(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return {"resident": resident_bytes()}

serve({command.__name__: command for command in (add, nothing, fail, end, allocate, busy)})
"""


@pytest.fixture
def worker(tmp_path, monkeypatch) -> Iterator[Side]:
    """A process of standard-library commands."""
    (tmp_path / "tiny_worker.py").write_text(WORKER)
    monkeypatch.setattr(sides, "PACKAGE_PARENT", os.pathsep.join([str(sides.PACKAGE_PARENT), str(tmp_path)]))
    with Side("tiny", "tiny_worker", threads=3) as side:
        yield side


def test_a_worker_answers_and_what_it_prints_stays_out_of_the_answers(worker):
    assert worker.ask("add", {"a": 1, "b": 2}) == {"sum": 3, "threads": "3"}
    assert worker.ask("nothing") == {}


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("fail", {"kind": "lookup"}, "tiny: fail: LookupError: on purpose"),
        ("fail", {"kind": "memory"}, "tiny: fail: out of memory: on purpose"),
        ("add", {"a": 1}, "tiny: add: TypeError"),
        ("no_such_command", {}, "tiny: no_such_command: KeyError"),
    ],
)
def test_a_failed_command_is_an_error_and_the_worker_goes_on(worker, command, arguments, message):
    with pytest.raises(BenchmarkError, match=message):
        worker.ask(command, arguments)
    assert worker.ask("add", {"a": 2, "b": 2})["sum"] == 4


def test_an_ended_worker_is_an_error_with_its_last_words(worker):
    with pytest.raises(BenchmarkError, match=r"tiny ended \(exit code 7\): first line last words"):
        worker.ask("end")


def test_a_worker_that_cannot_start_is_an_error_with_its_last_words():
    with Side("absent", "no_such_module") as side, pytest.raises(BenchmarkError, match=r"absent ended .*No module named no_such_module"):
        side.ask("anything")


def test_a_worker_ends_with_its_context(worker):
    with Side("other", "tiny_worker") as side:
        pid = side.pid
        side.ask("nothing")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_peak_of_one_command_is_not_that_of_an_earlier_one(worker):
    large, small = (worker.ask("allocate", {"size": size}) for size in (64 << 20, 1 << 10))
    assert large["peak_bytes"] - large["before_bytes"] > 60 << 20
    assert small["peak_bytes"] - small["before_bytes"] < 30 << 20
    assert min(large["wall_s"], large["cpu_s"]) > 0


def test_what_a_side_does_is_not_foreign_load(worker):
    worker.ask("nothing")
    knowing, unknowing = LoadMeter([worker.pid]), LoadMeter([])
    worker.ask("busy", {"seconds": 0.5})
    assert unknowing.foreign() > knowing.foreign()


def alternated(monkeypatch, shares: Sequence[float], rounds: int) -> tuple[Rounds, list[str]]:
    """Rounds of two sides of which b takes twice as long, under these shares of foreign load; and who ran when."""
    waiting, ran = iter(shares), []
    monkeypatch.setattr(LoadMeter, "foreign", lambda self: next(waiting))

    def turn(name: str, wall: float):
        def run(side: Side) -> dict[str, float]:
            ran.append(name)
            return {"wall_s": wall * (1 + len(ran) // 2)}

        return SimpleNamespace(pid=os.getpid()), run

    return alternate({"a": turn("a", 1.0), "b": turn("b", 2.0)}, rounds), ran


def test_sides_run_in_turn(monkeypatch):
    found, ran = alternated(monkeypatch, [0.0, 0.1, 0.05], 3)
    assert ran == ["a", "b"] * 3
    assert (found.foreign, found.discarded) == ([0.0, 0.1, 0.05], 0)
    assert found.ratio("b", "b") == 1.0


def test_a_noisy_round_is_discarded_and_measured_again(monkeypatch):
    found, ran = alternated(monkeypatch, [0.0, 0.5, 0.02], 2)
    assert ran == ["a", "b"] * 3
    assert (found.foreign, found.discarded) == ([0.0, 0.02], 1)
    assert [answer["wall_s"] for answer in found.answers["a"]] == [1.0, 3.0]


def test_no_ratio_is_given_when_every_round_was_noisy(monkeypatch):
    found, ran = alternated(monkeypatch, [0.5] * 6, 2)
    assert len(ran) == 2 * 6
    assert found.ratio("a", "b") is None
    assert (found.foreign, found.discarded) == ([], 6)
    assert found.median("a", "wall_s") == 3.5  # still shown


def test_a_ratio_is_the_slower_median_over_the_faster_one():
    rounds = Rounds({"a": [{"wall_s": 1}, {"wall_s": 9}, {"wall_s": 2}], "b": [{"wall_s": 6}] * 3}, [0.0] * 3)
    assert rounds.ratio("a", "b") == 3.0
    assert rounds.spread("a", "wall_s") == 4.0


def test_cells_are_the_same_for_the_same_seed_and_others_for_another():
    first, again, other = random_cells(5, 7, 40), random_cells(5, 7, 40), random_cells(5, 7, 40, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[1], other[1])


@pytest.mark.parametrize("nonzeros", [1, 7, 40])
def test_cells_have_as_many_counts_as_asked_at_ascending_genes(nonzeros):
    crow, gene, value = random_cells(5, nonzeros, 40)
    assert crow.tolist() == [cell * nonzeros for cell in range(6)]
    assert gene.shape == value.shape == (5 * nonzeros,)
    assert (np.diff(gene.reshape(5, nonzeros), axis=1) > 0).all()
    assert gene.min() >= 0
    assert gene.max() < 40
    assert ((value >= 1) & (value == value.round())).all()


def test_a_figure_holds_when_it_is_on_the_right_side_of_its_limit():
    assert [at_least("a", value, 2.0).holds for value in (1.9, 2.0, None)] == [False, True, None]
    assert [at_most("a", value, 2.0, "s").holds for value in (2.1, 2.0, None)] == [False, True, None]


def test_a_line_is_json_without_what_is_empty_but_always_with_the_value():
    assert json.loads(Figure("a", None, "x").line()) == {"name": "a", "value": None, "unit": "x"}
    full = at_least("a", 1.0, 2.0).because("why", {"rounds": 3})
    expected = {"name": "a", "value": 1.0, "unit": "x", "gate": ">= 2", "holds": False, "note": "why", "details": {"rounds": 3}}
    assert json.loads(full.line()) == expected


def test_the_table_has_a_row_for_each_figure_in_columns():
    figures = [at_least("speed", 3.14159, 2.0).because("5 rounds"), at_most("memory", 9.0, 2.0, "GiB"), Figure("unknown", None, "x")]
    header, speed, memory, unknown = table(figures).splitlines()
    assert header.split() == ["figure", "value", "asked", "holds", "note"]
    assert speed.split() == ["speed", "3.142", "x", ">=", "2", "yes", "5", "rounds"]
    assert memory.split() == ["memory", "9", "GiB", "<=", "2", "NO"]
    assert unknown.split() == ["unknown", "-"]
    assert header.index("asked") == speed.index(">=") == memory.index("<=")


def test_the_machine_is_described_as_json():
    assert json.loads(json.dumps(machine()))["cores"] == os.cpu_count()


@pytest.fixture
def commands(tmp_path, monkeypatch) -> list[list[str]]:
    """What would be run to make environments under a home of this test's own."""
    ran: list[list[str]] = []

    def run(command: list[str], **how: object) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        if command[1:3] == ["-m", "venv"]:
            (tmp_path / "cache" / "environments" / "small").mkdir(parents=True)
        return subprocess.CompletedProcess(command, int("no-such-package" in command), "", "a warning\nno matching distribution\n")

    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    monkeypatch.setattr(environments, "ENVIRONMENTS", {"small": (("torch==1",), ("a", "b"))})
    monkeypatch.setattr(environments, "subprocess", SimpleNamespace(run=run))
    return ran


def test_an_environment_is_made_once_in_the_order_of_its_recipe(commands, tmp_path):
    python = environments.environment("small")
    assert python == tmp_path / "cache" / "environments" / "small" / "bin" / "python"
    assert commands[0][:3] == [sys.executable, "-m", "venv"]
    assert [command[-2:] for command in commands[1:]] == [["--disable-pip-version-check", "torch==1"], ["a", "b"]]
    assert environments.environment("small") == environments.installed("small") == python
    assert len(commands) == 3


def test_an_environment_is_made_anew_when_its_recipe_changed(commands, monkeypatch):
    environments.environment("small")
    monkeypatch.setattr(environments, "ENVIRONMENTS", {"small": (("torch==2",),)})
    assert environments.installed("small") is None
    environments.environment("small")
    assert commands[-1][-1] == "torch==2"


def test_torch_alone_comes_from_the_index_that_is_named(commands, monkeypatch):
    monkeypatch.setenv("TORCH_INDEX", "https://example.org/cpu")
    environments.environment("small")
    assert ["https://example.org/cpu" in command for command in commands] == [False, True, False]


def test_an_environment_that_cannot_be_made_is_an_error_and_is_not_taken_for_complete(commands, monkeypatch):
    monkeypatch.setattr(environments, "ENVIRONMENTS", {"small": (("no-such-package",),)})
    with pytest.raises(BenchmarkError, match=r"could not be made: .*no-such-package: no matching distribution$"):
        environments.environment("small")
    assert environments.installed("small") is None


def test_an_environment_has_the_python_that_its_packages_need(commands, monkeypatch, tmp_path):
    monkeypatch.setattr(environments, "PYTHONS", {"small": "9.9"})
    monkeypatch.setattr(environments.Path, "home", lambda: tmp_path)
    with pytest.raises(BenchmarkError, match=r"small needs Python 9\.9, this is 3\..*put it on the PATH"):
        environments.environment("small")
    interpreter = tmp_path / ".pyenv" / "versions" / "9.9.1" / "bin" / "python9.9"
    interpreter.parent.mkdir(parents=True)
    interpreter.touch()
    environments.environment("small")
    assert commands[1][:3] == [str(interpreter), "-m", "venv"]


@pytest.mark.parametrize("name", sorted(set(environments.ENVIRONMENTS) - {"annbatch"}))  # which hands out scipy's matrices
def test_other_packages_are_measured_with_the_torch_we_use_ourselves(name):
    pinned = re.search(r"^TORCH := (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    assert list(environments.ENVIRONMENTS[name][0]) == [pinned[1]]
