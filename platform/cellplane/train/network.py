"""Workers of several hosts find one another at the addresses Ray knows them by.

gloo takes the network interface that the host's own name leads to. On many machines that is the loopback, where no other
host is found; so every worker names the interface of its Ray address before the group connects.
"""

from __future__ import annotations

import os
from typing import Any

import ray
from ray.train.torch import TorchConfig

from cellplane.processes import interface_of

INTERFACE = "GLOO_SOCKET_IFNAME"


class OwnAddress(TorchConfig().backend_cls):  # type: ignore[misc]
    """Ray's way to connect a group, after each worker has named its interface."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Called by Ray Train once the workers are there."""
        try:
            worker_group.execute(name_interface)
            super().on_start(worker_group, backend_config)
        except BaseException:  # Ray would keep the CPUs of a group that never connected until the driver ends
            worker_group.get_worker_group_state().placement_group_handle.shutdown()
            raise


class AddressedTorchConfig(TorchConfig):  # type: ignore[misc]
    """TorchConfig for workers of any number of hosts."""

    @property
    def backend_cls(self) -> type[OwnAddress]:
        """See OwnAddress."""
        return OwnAddress


def name_interface() -> None:
    """Names the interface of this worker's Ray address; what a person set stays, an address nobody has here changes nothing."""
    found = interface_of(str(ray.util.get_node_ip_address()))
    if found is not None:
        os.environ.setdefault(INTERFACE, found)
