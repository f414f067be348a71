"""Trials run side by side, the hopeless are stopped early, and every end is told in the driver."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from cellplane.errors import ServiceError
from cellplane.train.tune import FINISHED, STOPPED, Search, run_trials

STEPS = 27


def climb(name: str, report) -> None:
    """A trial whose score grows by its number each step, the first ones best; `broken` fails."""
    if name == "broken":
        raise ValueError("this recipe cannot be")
    slope = 10.0 - int(name.rpartition("-")[2])
    for step in range(1, STEPS + 1):
        report(step, slope * step)


def note(folder: str, name: str, status: str, score: float, steps: int) -> None:
    (Path(folder) / f"{name}.json").write_text(json.dumps([status, score, steps]))


def ended(folder: Path) -> dict[str, tuple[str, float, int]]:
    return {file.stem: tuple(json.loads(file.read_text())) for file in folder.glob("*.json")}


@pytest.mark.cluster
def test_the_best_go_on_the_others_stop_and_failures_are_named(ray_cluster, tmp_path):
    names = [*(f"trial-{number}" for number in range(9)), "broken"]
    search = Search(folder=tmp_path / "ray", most_steps=STEPS, grace_steps=3, reduction=3, concurrent=1)
    notes = tmp_path / "notes"
    notes.mkdir()
    failed = run_trials(climb, names, search, partial(note, str(notes)))
    assert failed.keys() == {"broken"}
    assert "this recipe cannot be" in failed["broken"]
    found = ended(notes)
    assert found.keys() == set(names) - {"broken"}
    assert found["trial-0"] == (FINISHED, 10.0 * STEPS, STEPS)
    assert all(status == STOPPED and steps < STEPS for name, (status, _, steps) in found.items() if name != "trial-0")


def test_without_ray_nothing_begins(tmp_path, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(ServiceError, match="cellplane up"):
        run_trials(climb, ["trial-0"], Search(folder=tmp_path, most_steps=3, grace_steps=1), partial(note, str(tmp_path)))
