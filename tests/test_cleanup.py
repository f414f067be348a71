"""What may go is listed with its reason; what somebody needs, holds or has just changed never is."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cellplane import cleanup
from cellplane.artifact.folder import load_model, save_model
from cellplane.cleanup import DAY_S, Survey, Wanted, is_in_use, remove, survey
from cellplane.tracking.registry import register
from cellplane.tracking.runs import RunSpec, TrackedRun, local_uri
from cellplane.train.checkpoint import Checkpoints
from tests.train.states import state_of

MODEL = Path(__file__).parent / "compat" / "v1" / "model"
OLD_DAYS = 10
ALL = Wanted(runs_days=5, unfinished_days=5, caches_days=5)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CELLPLANE_HOME of this test alone, without a tracker."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("CELLPLANE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def age(path: Path, days: float = OLD_DAYS) -> None:
    """Sets the times of everything in a folder back."""
    then = time.time() - days * DAY_S
    for place in (path, *path.rglob("*")):
        os.utime(place, (then, then), follow_symlinks=False)


def new_run(home: Path, name: str, finished: bool = True, lineage: dict[str, str] | None = None) -> Path:
    """A run with five checkpoints of which step 20 is the best, ten days old."""
    run = home / "runs" / name
    checkpoints = Checkpoints(run / "checkpoints", keep=9)
    for step, score in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 2.0)):
        checkpoints.save(state_of(step), score)
    (run / "journal.jsonl").write_text("{}\n")
    if finished:
        model = load_model(MODEL)
        save_model(replace(model, max_cells=16 + len(name), lineage=lineage or {"run": name}, manifest={}), run / "model")
    age(run)
    return run


def listed(found: Survey, kind: str | None = None) -> list[str]:
    return [str(item.path.relative_to(cleanup.home())) for item in found.items if kind in (None, item.kind)]


def tree(folder: Path) -> dict[str, tuple[int, float]]:
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime) for path in folder.rglob("*")}


def test_an_empty_or_missing_home_holds_nothing_to_remove(home):
    assert survey(ALL).items == ()
    home.mkdir()
    assert survey(ALL).items == ()


def test_a_finished_run_keeps_its_newest_and_its_best_checkpoint(home):
    run = new_run(home, "done")
    found = survey(Wanted())
    assert listed(found) == ["runs/done/checkpoints/step-00000010", "runs/done/checkpoints/step-00000030"]
    assert found.bytes == sum(file.stat().st_size for item in found.items for file in item.path.rglob("*")) + sum(
        item.path.stat().st_size for item in found.items
    )
    removed, kept = remove(found.items)
    assert (len(removed), kept) == (2, [])
    assert Checkpoints(run / "checkpoints").steps() == [20, 40]
    assert survey(Wanted()).items == ()


def test_a_survey_changes_nothing(home):
    new_run(home, "done")
    before = tree(home)
    survey(ALL)
    assert tree(home) == before


def test_an_unfinished_run_keeps_all_its_checkpoints(home):
    new_run(home, "half", finished=False)
    assert survey(Wanted(runs_days=0)).items == ()


def test_an_unfinished_run_goes_only_when_that_is_asked_for(home):
    run = new_run(home, "half", finished=False)
    assert listed(survey(Wanted(unfinished_days=11))) == []
    found = survey(Wanted(unfinished_days=9))
    assert listed(found, "run") == ["runs/half"]
    remove(found.items)
    assert not run.exists()


def test_a_finished_run_goes_only_when_that_is_asked_for(home):
    new_run(home, "done")
    assert listed(survey(Wanted()), "run") == []
    assert listed(survey(Wanted(runs_days=9))) == ["runs/done"]


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_with_a_file_that_says_so_is_kept(home, finished):
    (new_run(home, "mine", finished) / "KEEP").touch()
    age(home / "runs" / "mine")
    assert listed(survey(ALL), "run") == []


def test_a_run_whose_model_another_was_made_from_is_kept(home):
    base = new_run(home, "base")
    sha256 = load_model(base / "model").model_sha256
    new_run(home, "fine", lineage={"base": sha256})
    assert listed(survey(ALL), "run") == ["runs/fine"]


def test_a_registered_or_tagged_run_is_kept(home):
    uri = local_uri(home)
    runs = {name: new_run(home, name) for name in ("registered", "tagged", "neither")}
    tracked = {
        name: TrackedRun.open(RunSpec(run_key=f"pretrain:{name}:0123", experiment="cellplane/pretrain", name=name), uri) for name in runs
    }
    tracked["registered"].log_artifacts(runs["registered"] / "model", "model")
    register(runs["registered"] / "model", tracked["registered"].run_id, "cellplm-tiny", uri)
    tracked["tagged"].set_tags({"keep": "the paper's figure 2"})
    assert listed(survey(ALL), "run") == ["runs/neither"]


def test_no_run_is_listed_when_the_tracker_cannot_be_asked(home):
    new_run(home, "done")
    found = survey(ALL, "http://127.0.0.1:9")
    assert listed(found, "run") == []
    assert "no run is listed, because the tracker may refer to any" in found.notes[0]


@pytest.fixture
def held(home: Path) -> Iterator[Path]:
    """A finished run whose lock a living process holds."""
    run = new_run(home, "held")
    (run / "run.lock").touch()
    age(run)
    with (run / "run.lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield run


def test_what_a_living_process_holds_is_not_listed(held):
    found = survey(ALL)
    assert (found.items, found.in_use) == ((), (held,))


def test_a_lock_that_nobody_holds_keeps_nothing(home):
    run = new_run(home, "done")
    (run / "run.lock").touch()
    age(run)
    assert len(survey(Wanted()).items) == 2


def test_what_was_changed_within_the_hour_is_not_listed(home):
    run = new_run(home, "fresh")
    (run / "journal.jsonl").touch()
    assert is_in_use(run)
    found = survey(ALL)
    assert (found.items, found.in_use) == ((), (run,))


def test_what_was_taken_into_use_after_the_listing_stays(home):
    run = new_run(home, "done")
    (run / "run.lock").touch()
    age(run)
    found = survey(Wanted())
    with (run / "run.lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        removed, kept = remove(found.items)
    assert (removed, {why for _, why in kept}) == ([], {"in use since it was listed"})
    (found.items[0].path / "state.json").touch()
    removed, kept = remove(found.items)
    assert (len(removed), [item.path.name for item, _ in kept]) == (1, ["step-00000010"])


def test_nothing_outside_of_the_home_is_touched(home, tmp_path):
    outside = tmp_path / "elsewhere"
    new_run(tmp_path / "elsewhere", "theirs")
    (home / "runs").mkdir(parents=True)
    (home / "runs" / "link").symlink_to(outside / "runs" / "theirs")
    (home / "cache").symlink_to(outside)
    run = new_run(home, "done")
    os.rename(run / "checkpoints", outside / "checkpoints")
    (run / "checkpoints").symlink_to(outside / "checkpoints")
    before = tree(outside)
    remove(survey(ALL).items)
    assert tree(outside) == before


def test_leftovers_of_killed_writers_and_removers_are_listed(home):
    run = new_run(home, "half", finished=False)
    for place in (run / "checkpoints/.step-00000050.abc", run / "checkpoints/.step-00000010.removed", run / ".ray.removed", run / "ray"):
        (place / "inner").mkdir(parents=True)
        (place / "inner" / "file").write_text("x")
    (home / "runs" / ".gone.removed").mkdir()
    age(home)
    found = survey(Wanted())
    assert set(listed(found, "leftover")) == {
        "runs/half/checkpoints/.step-00000010.removed",
        "runs/half/checkpoints/.step-00000050.abc",
        "runs/half/.ray.removed",
        "runs/.gone.removed",
    }
    assert listed(found, "ray") == ["runs/half/ray"]
    removed, kept = remove(found.items)
    assert (len(removed), kept) == (5, [])
    assert [path.name for path in run.iterdir() if path.name.startswith((".", "ray"))] == []


def new_conversion(folder: Path, days: float) -> Path:
    (folder / ".staging").mkdir(parents=True)
    (folder / ".staging" / "shard-0.arrow").write_bytes(b"0" * 100)
    (folder / ".lock").touch()
    age(folder, days)
    return folder


def test_staging_folders_of_conversions_that_nobody_runs_are_listed(home):
    old, new, held = (new_conversion(home / name, days) for name, days in (("shards/old", 3), ("new", 0.5), ("shards/deep/er", 3)))
    with (held / ".lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = survey(Wanted())
    assert listed(found) == ["shards/old/.staging"]
    assert found.in_use == (held,)
    assert "an interrupted conversion would go on from it" in found.items[0].why
    remove(found.items)
    assert [path.name for path in old.iterdir()] == [".lock"]
    assert (new / ".staging").exists()


def test_caches_go_when_they_were_not_read_for_long(home):
    for name in ("inputs/abc", "environments/scanpy", "0" * 64, "verified/node", "inputs/young"):
        (home / "cache" / name).mkdir(parents=True)
        (home / "cache" / name / "file").write_text("x")
    age(home / "cache")
    age(home / "cache" / "inputs" / "young", 1)
    assert listed(survey(Wanted(caches_days=30))) == []
    found = survey(Wanted(caches_days=5))
    assert set(listed(found, "cache")) == {"cache/inputs/abc", "cache/environments/scanpy", f"cache/{'0' * 64}"}
    remove(found.items)
    assert sorted(path.name for path in (home / "cache").iterdir()) == ["environments", "inputs", "verified"]


def test_what_cannot_be_removed_is_said_and_the_rest_goes(home, monkeypatch):
    new_run(home, "done")
    found = survey(Wanted())
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "step-00000010":
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    removed, kept = remove(found.items)
    assert [item.path.name for item in removed] == ["step-00000030"]
    assert [(item.path.name, why) for item, why in kept] == [("step-00000010", "Permission denied")]
