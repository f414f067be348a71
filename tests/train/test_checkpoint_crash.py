"""A process that is killed anywhere in the middle of a save leaves the checkpoint before or the new one, never neither."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cellplane.train.checkpoint import Checkpoints
from cellplane.train.remote import RemoteFolder
from tests.house.source import PLATFORM, ROOT
from tests.train.saver import STEPS
from tests.train.states import IDENTITY, assert_same, state_of

BEFORE, AFTER = STEPS
POINTS = {  # killed here -> the step that a restart finds
    "checkpoint_file:0": BEFORE,
    "checkpoint_file:1": BEFORE,
    "checkpoint_file:2": BEFORE,
    "before_checkpoint_manifest:0": BEFORE,
    "before_checkpoint_rename:0": BEFORE,
    "after_checkpoint:0": AFTER,
    "before_removal:0": AFTER,
    "in_removal:0": AFTER,
}
HERE = {f"{mode}/{point}": step for mode in ("sync", "background") for point, step in POINTS.items()}
THERE = {f"remote/in_upload:{number}": BEFORE for number in range(4)} | {"remote/in_remote_removal:1": AFTER}
EITHER = "background/checkpoint_handed_over:0"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each scenario, as the kill left it."""
    root = tmp_path_factory.mktemp("killed")
    scenarios = [*HERE, *THERE, EITHER]
    command = [sys.executable, "-m", "tests.train.saver", str(root), *scenarios]
    environment = {**os.environ, "PYTHONPATH": f"{PLATFORM}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["-9"] * len(scenarios), done.stderr
    return root


def folder_of(killed: Path, scenario: str) -> Path:
    return killed / scenario.replace("/", "-").replace(":", "-")


def assert_goes_on(checkpoints: Checkpoints) -> None:
    """The next save works and leaves nothing of the kill behind."""
    checkpoints.save(state_of(30))
    assert_same(checkpoints.newest_valid(IDENTITY), state_of(30))
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000030"]


@pytest.mark.parametrize(("scenario", "step"), HERE.items(), ids=HERE)
def test_a_killed_save_leaves_the_previous_or_the_new(killed, scenario, step):
    checkpoints = Checkpoints(folder_of(killed, scenario) / "here", keep=1, keep_best=False)
    assert_same(checkpoints.newest_valid(IDENTITY), state_of(step))
    assert_goes_on(checkpoints)


def test_a_kill_while_the_thread_writes_leaves_one_of_the_two(killed):
    checkpoints = Checkpoints(folder_of(killed, EITHER) / "here", keep=1, keep_best=False)
    found = checkpoints.newest_valid(IDENTITY)
    assert found is not None
    assert_same(found, state_of(found.step))
    assert found.step in STEPS
    assert_goes_on(checkpoints)


@pytest.mark.parametrize(("scenario", "step"), THERE.items(), ids=THERE)
def test_a_killed_upload_leaves_the_previous_or_the_new_at_the_url(killed, tmp_path, scenario, step):
    """The machine is lost together with its folder: what is at the URL is all there is."""
    checkpoints = Checkpoints(tmp_path / "another machine", keep=1, keep_best=False)
    checkpoints.remote = RemoteFolder((folder_of(killed, scenario) / "there").as_uri())
    assert_same(checkpoints.newest_valid(IDENTITY), state_of(step))
    checkpoints.save(state_of(30))
    assert [entry.step for entry in checkpoints.remote.entries()] == [30]


def test_the_machine_itself_has_the_checkpoint_whose_upload_was_killed(killed):
    folder = folder_of(killed, "remote/in_upload:2")
    checkpoints = Checkpoints(folder / "here", keep=1, keep_best=False)
    assert_same(checkpoints.newest_valid(IDENTITY), state_of(AFTER))
