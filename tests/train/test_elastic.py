"""How many workers fit, and that all ranks hear the same answer."""

from __future__ import annotations

import pytest
import torch

from cellplane.train.config import WorkersConfig
from cellplane.train.elastic import Nodes, agreed, has_room, resources_of

EACH = {"CPU": 2.0}


def test_a_worker_never_spans_nodes():
    nodes = Nodes(({"CPU": 3.0}, {"CPU": 3.0}, {"memory": 5.0}), {"CPU": 6.0})
    assert nodes.holds(EACH) == 2
    assert nodes.holds_now(EACH) == 2
    assert Nodes(({"CPU": 8.0},), {"CPU": 3.0}).holds_now(EACH) == 1
    assert Nodes((), {}).holds(EACH) == 0


def test_a_gpu_counts_like_a_cpu():
    workers = WorkersConfig(count=2, cpus=4, use_gpu=True)
    assert resources_of(workers) == {"CPU": 4.0, "GPU": 1.0}
    assert Nodes(({"CPU": 64.0, "GPU": 3.0},), {}).holds(resources_of(workers)) == 3
    assert Nodes(({"CPU": 64.0},), {}).holds(resources_of(workers)) == 0


@pytest.mark.parametrize(
    ("totals", "free", "present", "expected"),
    [
        ((1, 1), 1, 1, True),  # a node has come
        ((1,), 0, 1, False),  # none has
        ((1, 1), 0, 1, False),  # one has, but somebody else uses it
        ((1, 1, 1), 1, 2, False),  # as many as wanted are there
    ],
)
def test_there_is_room_when_a_larger_group_would_fit(totals, free, present, expected):
    workers = WorkersConfig(min=1, max=2)
    nodes = Nodes(tuple({"CPU": float(cpus)} for cpus in totals), {"CPU": float(free)})
    assert has_room(workers, nodes, present) is expected


def test_alone_one_agrees_with_oneself():
    assert agreed(True, torch.device("cpu")) is True
    assert agreed(False, torch.device("cpu")) is False


def test_bounds_follow_from_the_count_where_they_are_not_given():
    assert (WorkersConfig(count=3).least, WorkersConfig(count=3).most, WorkersConfig(count=3).elastic) == (3, 3, False)
    assert (WorkersConfig(count=3, min=1).least, WorkersConfig(count=3, min=1).most) == (1, 3)
    assert WorkersConfig(count=3, max=5).elastic
