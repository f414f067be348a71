"""Workers name the interface they are reached at, and a group that never connects holds nobody's CPUs."""

from __future__ import annotations

import os

import pytest

from cellplane.errors import TrainingError
from cellplane.processes import interface_of
from cellplane.train.launch import pretrain
from cellplane.train.network import INTERFACE, name_interface
from cellplane.train.run_folder import RunFolder


@pytest.fixture
def at(monkeypatch):
    """Makes Ray know this process by an address."""

    def known(address):
        monkeypatch.setattr("ray.util.get_node_ip_address", lambda: address)
        monkeypatch.setenv(INTERFACE, "")
        monkeypatch.delenv(INTERFACE)  # restored afterwards, whatever the test leaves

    return known


def test_an_address_leads_to_its_interface(at):
    assert interface_of("127.0.0.1") == "lo"
    at("127.0.0.1")
    name_interface()
    assert os.environ[INTERFACE] == "lo"


def test_an_address_that_no_interface_has_changes_nothing(at):
    assert interface_of("203.0.113.7") is None
    at("203.0.113.7")
    name_interface()
    assert INTERFACE not in os.environ


def test_what_a_person_set_stays(at, monkeypatch):
    at("127.0.0.1")
    monkeypatch.setenv(INTERFACE, "ib0")
    name_interface()
    assert os.environ[INTERFACE] == "ib0"


@pytest.mark.chaos
@pytest.mark.cluster
def test_a_group_that_cannot_connect_gives_its_cpus_back(ray_cluster, run_config, cellplane_home, monkeypatch):
    """Ray itself keeps them until the driver ends, so the second group would wait for ever."""
    monkeypatch.setattr("cellplane.train.launch.QUIET_THREADS", {INTERFACE: "nowhere0"})
    with pytest.raises(TrainingError, match="nowhere0"):
        pretrain(run_config("r", {"workers": {"count": 2, "max_failures": 1}}))
    assert [start.workers for start in RunFolder.of("r").starts()] == [2, 2]
