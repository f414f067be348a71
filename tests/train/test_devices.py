"""GPUs are found by the names their driver gives them; what is not listed is measured."""

from __future__ import annotations

import pytest
import torch

from cellplane.errors import ConfigError
from cellplane.train import devices
from cellplane.train.devices import GIB, GPUS, Device, device_of, named_device


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100 pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-sxm4-40gb"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10G", "a10g"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "rtx 4090"),
        ("Tesla V100-SXM2-32GB", "v100"),
    ],
)
def test_a_gpu_is_known_by_the_name_its_driver_gives_it(monkeypatch, name, listed):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert device_of(torch.device("cuda", 0)) is GPUS[listed]


def test_a_gpu_that_is_not_listed_is_measured(monkeypatch):
    asked: list[str] = []
    measured = Device("cuda:0", {"float32": 1.0}, measured=True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Z9")
    monkeypatch.setattr(devices, "_measured", lambda device, threads: asked.append(device) or measured)
    assert device_of(torch.device("cuda", 0)) is measured
    assert asked == ["cuda:0"]


def test_a_gpu_without_half_precision_is_no_faster_in_it():
    assert GPUS["v100"].flops["bfloat16"] == GPUS["v100"].flops["float32"]
    assert GPUS["h100"].flops["bfloat16"] > 10 * GPUS["h100"].flops["float32"]


def test_every_listed_gpu_is_described_in_full():
    for name, gpu in GPUS.items():
        assert gpu.name == name
        assert set(gpu.flops) == {"float32", "bfloat16"}
        assert 1e12 < gpu.flops["float32"] <= gpu.flops["bfloat16"] < 1e16
        assert 1e11 < gpu.bytes_per_s < 1e13
        assert 16 * GIB <= gpu.memory_bytes <= 200 * GIB


def test_names_are_taken_in_any_case_and_unknown_ones_are_answered_with_the_list():
    assert named_device(" H100 ") is GPUS["h100"]
    assert named_device("cpu").measured
    with pytest.raises(ConfigError, match=r"'h1000' is not known; choose one of cpu, a100, .*v100"):
        named_device("h1000")
