"""Copies of a model load one after another and behind whoever serves."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve import turn
from serve.turn import LOWEST, behind, in_turn


@pytest.fixture
def usual() -> Iterator[int]:
    """The priority of this thread, which is given back whatever a test did."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    yield before
    if os.getpriority(os.PRIO_PROCESS, 0) != before:
        os.setpriority(os.PRIO_PROCESS, 0, before)


def test_the_second_waits_for_the_first(tmp_path: Path) -> None:
    path, order, inside = tmp_path / "lock", list[str](), threading.Event()

    def first() -> None:
        with in_turn(path):
            inside.set()
            time.sleep(0.3)
            order.append("first")

    other = threading.Thread(target=first)
    other.start()
    inside.wait(10)
    with in_turn(path):
        order.append("second")
    other.join()
    assert order == ["first", "second"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_one_that_hangs_does_not_stop_the_others(tmp_path: Path) -> None:
    with in_turn(tmp_path / "lock"):
        began = time.monotonic()
        with in_turn(tmp_path / "lock", patience_s=0.3):
            assert 0.3 <= time.monotonic() - began < 10


def test_where_no_lock_can_be_a_copy_loads_all_the_same(tmp_path: Path) -> None:
    with in_turn(tmp_path / "no folder" / "lock"):
        pass
    (tmp_path / "elsewhere").touch()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")  # somebody else's trap in a shared folder
    with in_turn(tmp_path / "link"), in_turn(tmp_path / "link"):
        pass


def test_a_failure_gives_the_turn_to_the_next(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"), in_turn(tmp_path / "lock"):
        raise ValueError("broken")
    began = time.monotonic()
    with in_turn(tmp_path / "lock", patience_s=20):
        assert time.monotonic() - began < 10


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may raise its priority again here")
def test_priority_is_lowest_while_loading_and_as_before_afterwards_for_every_thread(usual: int) -> None:
    stop, inside, made = threading.Event(), list[int](), list[int]()

    def stay() -> None:
        made.append(threading.get_native_id())
        stop.wait(20)

    with pytest.raises(ValueError, match="broken"), behind():  # noqa: PT012  (what happens inside is the test)
        helper = threading.Thread(target=stay)
        helper.start()
        while not made:
            time.sleep(0.01)
        inside += [os.getpriority(os.PRIO_PROCESS, 0), os.getpriority(os.PRIO_PROCESS, made[0])]
        raise ValueError("broken")
    assert inside == [LOWEST, LOWEST]
    assert [os.getpriority(os.PRIO_PROCESS, thread) for thread in (0, made[0])] == [usual, usual]
    stop.set()
    helper.join()


def test_priority_stays_where_there_is_no_way_back(usual: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn, "_may_return_to", lambda priority: False)
    with behind():
        assert os.getpriority(os.PRIO_PROCESS, 0) == usual
