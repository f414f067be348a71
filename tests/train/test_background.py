"""One thread, one piece of work, no lost error; and copies in memory that is used again."""

from __future__ import annotations

import os
import sys
import threading

import pytest
import torch

from cellplane.train.background import NICENESS, Background, Buffers


def test_work_is_done_in_another_thread_and_waited_for():
    background, seen = Background(), []
    background.start(lambda: seen.append(threading.get_ident()))
    background.wait()
    assert seen[0] != threading.get_ident()
    background.close()


def test_the_second_begins_when_the_first_has_ended():
    background, order, gate = Background(), [], threading.Event()

    def first() -> None:
        gate.wait(10)
        order.append("first")

    background.start(first)
    threading.Timer(0.05, gate.set).start()
    background.start(lambda: order.append("second"))
    background.close()
    assert order == ["first", "second"]


def fail() -> None:
    raise ValueError("the work")


@pytest.mark.parametrize("next_call", ["start", "wait", "close"])
def test_an_error_is_raised_once_by_the_next_call(next_call):
    background = Background()
    background.start(fail)
    with pytest.raises(ValueError, match="the work"):
        background.start(lambda: None) if next_call == "start" else getattr(background, next_call)()
    background.wait()
    background.close()


def test_a_closed_one_may_be_used_again():
    background, seen = Background(), []
    background.close()
    background.start(lambda: seen.append(1))
    background.close()
    assert seen == [1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives a thread a priority of its own")
def test_the_thread_gives_way_and_the_process_does_not():
    background, found = Background(), []
    before = os.getpriority(os.PRIO_PROCESS, 0)
    background.start(lambda: found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
    background.close()
    assert found == [max(NICENESS, before)] or found == [NICENESS]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_copies_are_contiguous_and_share_nothing_with_the_state():
    source = torch.arange(6.0).reshape(2, 3).T
    copied = Buffers().copy({"a": source})["a"]
    source.zero_()
    assert copied.is_contiguous()
    assert copied.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


def test_the_memory_is_used_again_while_shapes_stay():
    buffers = Buffers()
    first = {name: tensor.data_ptr() for name, tensor in buffers.copy({"a": torch.zeros(4), "b": torch.zeros(2)}).items()}
    again = buffers.copy({"a": torch.ones(4), "b": torch.ones(3)})
    assert again["a"].data_ptr() == first["a"]
    assert again["b"].tolist() == [1.0] * 3


def test_tensors_that_are_gone_are_not_copied():
    buffers = Buffers()
    buffers.copy({"a": torch.zeros(4), "b": torch.zeros(2)})
    assert buffers.copy({"a": torch.ones(4)}).keys() == {"a"}
