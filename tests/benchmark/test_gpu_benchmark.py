"""The benchmark of a GPU says so where there is none; `tests/model/interpreted.py` runs all of it on pretended ones."""

from __future__ import annotations

import pytest
import torch

from cellplane.benchmark import gpu
from cellplane.model.cellplm import new_model
from cellplane.model.config import ModelConfig


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_device_it_says_so_and_ends_with_4(capsys):
    assert gpu.main([]) == gpu.NO_DEVICE == 4
    assert "no CUDA device" in capsys.readouterr().err


def test_operations_follow_the_weights_of_the_network():
    """Each weight of a dense layer is one multiplication and one addition a cell; attention and gene sum come on top."""
    config = ModelConfig(n_genes=50, width=16, n_blocks=2, n_heads=2, latent_width=8, n_clusters=3, cluster_width=8, decoder_width=8)
    network = new_model(config, 0)
    kept = [p for name, p in network.named_parameters() if p.dim() == 2 and not name.startswith("latent.prior") and "genes_GD" not in name]
    attention, genes = config.n_blocks * 2 * 16 * (16 // 2), 7 * 16
    assert gpu.forward_flops(config, 7, decode=True) == 2 * (sum(p.numel() for p in kept) + attention + genes)


def test_the_table_names_every_record():
    shown = gpu.table(
        [
            {"kind": "machine", "device": "H100", "bytes_per_s": 3e12, "flops_per_s": 8e14},
            {"kind": "check", "name": "gene sum", "dtype": "torch.float32", "error": 1e-7, "passed": False},
            {"kind": "kernel", "name": "sums", "ms": 1.0, "flops": 2e9, "bytes": 3e6, "floor_ms": 0.25, "of_roofline": 0.25},
            {"kind": "model", "name": "embedding", "ms": 2.0, "cells_per_s": 1e6, "mfu": 0.32},
        ]
    )
    for expected in ("H100: 3.00 TB/s, 800 TFLOP/s", "WRONG", "25%", "1,000,000 cells/s, MFU 32.0%"):
        assert expected in shown
