"""Which checkpoints stay is a rule about what looks whole, not about what lies there."""

from __future__ import annotations

from pathlib import Path

import pytest

from cellplane.train.checkpoint import write_checkpoint
from cellplane.train.retention import Entry, best_first, folder_name, folders, look, remove, step_of, surplus, sweep
from tests.train.states import state_of


def entries(text: str) -> list[Entry]:
    """`10 20:1.5 30!` = steps, with a score, damaged."""
    found = []
    for word in text.split():
        step, _, score = word.rstrip("!").partition(":")
        found.append(Entry(int(step), not word.endswith("!"), float(score) if score else None))
    return found


@pytest.mark.parametrize(
    ("there", "newest", "keep", "goes"),
    [
        ("10 20 30", 30, 2, [10]),
        ("10 20 30", 30, 3, []),
        ("10 20 30", 30, 5, []),
        ("10:1 20:2 30:3", 30, 1, [20]),
        ("10:2 20:1 30:1", 30, 1, [10]),  # the earlier of equals is the best
        ("10 20! 30", 30, 2, []),  # the damaged one does not count, so 10 is needed
        ("10 20! 30 40", 40, 2, [10, 20]),
        ("10! 20 30", 30, 2, [10]),
        ("10:1! 20 30", 30, 1, [10, 20]),  # a damaged best is none
        ("10 20 30 40", 20, 1, [10, 30, 40]),  # a run never goes back: what is newer was damaged
        ("10 20!", 20, 1, []),  # the one just written is not whole: whatever happened, nothing goes
        ("10", 10, 1, []),
        ("", 10, 1, []),
    ],
)
def test_what_may_go(there, newest, keep, goes):
    assert [entry.step for entry in surplus(entries(there), newest, keep, keep_best=True)] == goes


def test_the_best_goes_with_the_others_when_it_is_not_to_be_kept():
    assert [entry.step for entry in surplus(entries("10:1 20:2 30:3"), 30, 1, keep_best=False)] == [10, 20]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_whole_one_never_goes(keep):
    for there in ("10 20 30", "10 20 30!", "10:1 20! 30!", "10! 20! 30"):
        found = entries(there)
        newest = max(entry.step for entry in found if entry.whole)
        assert newest not in [entry.step for entry in surplus(found, newest, keep, keep_best=False)]


def test_scores_are_ordered_the_lowest_first():
    assert [entry.step for entry in best_first(entries("10:2 20:1 30 40:1 50:0.5!"))] == [20, 40, 10]


def test_names_and_steps_say_the_same():
    assert folder_name(50) == "step-00000050"
    assert step_of("step-00000050") == 50
    assert step_of(folder_name(123_456_789)) == 123_456_789
    assert [step_of(name) for name in ("step-50", "step-000000050", ".step-00000050", "step-00000050.x")] == [None] * 4


def test_folders_are_ordered_by_their_step_not_by_their_name(tmp_path):
    for name in ("step-100000000", "step-99999999", "step-00000005", "other", ".step-00000001"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000007").touch()
    assert [path.name for path in folders(tmp_path)] == ["step-00000005", "step-99999999", "step-100000000"]
    assert folders(tmp_path / "nothing") == []


def test_a_look_sees_the_score_and_whether_all_is_there(tmp_path):
    path = write_checkpoint(tmp_path, state_of(10), 0.25)
    assert look(path) == Entry(10, True, 0.25)
    assert look(write_checkpoint(tmp_path, state_of(20))) == Entry(20, True, None)
    (path / "state.json").unlink()
    assert look(path) == Entry(10, False, 0.25)
    (path / "manifest.json").write_text("{}")
    assert look(path) == Entry(10, False)


def test_removing_and_sweeping_leave_nothing(tmp_path):
    path = write_checkpoint(tmp_path, state_of(10))
    remove(path)
    for name in (".step-00000010.removed", ".step-00000020.abc", ".mine"):
        (tmp_path / name / "inner").mkdir(parents=True)
    sweep(tmp_path)
    assert [found.name for found in Path(tmp_path).iterdir()] == [".mine"]
