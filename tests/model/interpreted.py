"""Every Triton kernel, run by Triton's interpreter: started by test_triton.py in a process of its own.

The interpreter has to be chosen before triton is imported anywhere, and would spoil the process for a real GPU.
"""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cellplane.benchmark import gpu as bench
from cellplane.model import gpu, triton_kernels
from cellplane.model.config import ModelConfig
from cellplane.model.decoder import counts_of
from cellplane.model.gpu import Tiles, by_gene, fused_reconstruction, packed_bits
from cellplane.model.kernels import chunked_reconstruction
from tests.model.triton_cases import CASES, Case, both, cells, errors, exact, parameters

triton = triton_kernels.triton
tl = triton_kernels.tl
SMALL = Tiles(cells=16, genes=16, entries=8, splits=2)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(gpu, "TILES", {2: SMALL, 4: SMALL})


@pytest.mark.parametrize("name", CASES)
def test_likelihoods_and_all_gradients_equal_the_chunked_and_the_exact_ones(name):
    found, expected = both(CASES[name])
    theirs, ours = errors(found, expected), errors(found, exact(CASES[name]))
    assert max(ours.values()) < 2e-6, ours
    assert max(theirs.values()) < 1e-5, theirs


def test_half_width_products_stay_within_their_rounding():
    found, expected = both(CASES["no multiple of any tile"], dtype=torch.float16)  # the interpreter multiplies bfloat16 as integers
    assert max(errors(found, expected).values()) < 2e-3, errors(found, expected)


@pytest.mark.parametrize("tiles", [Tiles(32, 16, 16, splits=1), Tiles(16, 32, 8, splits=5)])
def test_the_size_of_a_tile_changes_nothing(monkeypatch, tiles):
    monkeypatch.setattr(gpu, "TILES", {4: tiles})
    found, expected = both(CASES["two panels"])
    for ours, theirs in zip(found.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_cells_that_hide_nothing_are_not_scored():
    batch, mask = cells(CASES["two panels"])
    full, hidden = fused_reconstruction(*parameters(CASES["two panels"]), counts_of(batch, mask))
    assert full[3] == 0
    assert hidden[3] == 0
    assert bool((full[mask.hidden_C > 0] > 0).any())


def test_the_same_input_gives_the_same_bits():
    one, other = both(CASES["two panels"])[0], both(CASES["two panels"])[0]
    for ours, again in zip((*one.likelihoods, *one.gradients), (*other.likelihoods, *other.gradients), strict=True):
        assert torch.equal(ours, again)


def test_bits_are_packed_as_masks_pack_them():
    _, mask = cells(CASES["no multiple of any tile"])
    assert torch.equal(packed_bits(mask.hidden_CG), mask.bits)


def test_entries_are_ordered_by_gene_and_then_by_cell():
    batch, _ = cells(CASES["two panels"])
    order = by_gene(batch.crow, batch.gene, batch.n_genes)
    assert torch.equal(batch.gene[order.entry.long()], batch.gene.sort(stable=True).values)
    assert torch.equal(order.start, torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(batch.gene, minlength=40).cumsum(0)]))
    assert torch.equal(order.cell.long(), batch.cell_of_entry())


def special(name: str, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """One of the kernels' own special functions, elementwise."""
    out = torch.empty_like(z)
    probes[name][(1,)](x, z, out, N=len(z))
    return out


@triton.jit
def gain_probe(x, z, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, triton_kernels._lgamma_gain(tl.load(x + i), tl.load(z + i)))


@triton.jit
def loss_probe(x, z, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, triton_kernels._digamma_loss(tl.load(x + i), tl.load(z + i)))


@triton.jit
def log1p_probe(x, z, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, triton_kernels._log1p(tl.load(x + i) / tl.load(z + i)))


probes = {"gain": gain_probe, "loss": loss_probe, "log1p": log1p_probe}


@pytest.mark.parametrize("x", [0.0, 0.5, 1.0, 7.0, 254.0, 70_000.0, 4e9])
def test_special_functions_are_as_exact_as_float32_allows(x):
    z = torch.logspace(-4, 4, 64)
    counts = torch.full_like(z, x)
    wide, many = z.double(), counts.double()
    expected = torch.lgamma(wide + many) - torch.lgamma(wide)
    torch.testing.assert_close(special("gain", counts, z).double(), expected, rtol=2e-6, atol=2e-6)
    expected = torch.digamma(wide) - torch.digamma(wide + many)
    torch.testing.assert_close(special("loss", counts, z).double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(special("log1p", counts, z).double(), torch.log1p(many / wide), rtol=5e-7, atol=0)


def test_no_cells_at_all_make_no_trouble():
    batch, mask = cells(Case(1, 20, 4))
    empty = batch.take(torch.zeros(0, dtype=torch.int64))
    nothing = type(mask)(mask.bits[:0], mask.entry[:0], mask.hidden_C[:0], mask.n_genes)
    given = tuple(tensor.requires_grad_() for tensor in parameters(Case(0, 20, 4)))
    full, hidden = fused_reconstruction(*given, counts_of(empty, nothing))
    (full.sum() + hidden.sum()).backward()
    assert full.shape == (0,)
    assert not any(bool(tensor.grad.any()) for tensor in given)
    assert chunked_reconstruction(*given, counts_of(empty, nothing))[0].shape == (0,)


def test_the_benchmark_of_a_gpu_runs_to_its_end(monkeypatch, capsys):
    """On a few cells, with made-up times: its checks pass and every line of its table is there."""
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    for name, value in {"GENES": 40, "CHECK_GENES": 40, "CHECK_CELLS": 12, "FLUSH_BYTES": 8}.items():
        monkeypatch.setattr(bench, name, value)
    small = ModelConfig(
        n_genes=40, width=16, n_blocks=1, n_heads=2, latent_width=8, cluster_width=8, decoder_width=8, decoder_bottleneck=16
    )
    monkeypatch.setattr(bench, "ModelConfig", lambda **given: replace(small, precision=given["precision"]))
    monkeypatch.setattr(bench, "TOLERANCES", {torch.float32: 1e-4})  # the interpreter knows no bfloat16
    monkeypatch.setattr(bench, "HALF", torch.float32)
    monkeypatch.setattr(bench, "machine_ceilings", lambda options: bench.Ceilings(1e12, 1e15))
    monkeypatch.setattr(bench, "milliseconds", lambda work, repeats: (work(), 1.0)[1])
    monkeypatch.setattr(gpu, "available", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="a pretended GPU"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    assert bench.main(["--cells", "20", "--nonzeros", "10", "--sentence", "8"]) == 0
    shown = capsys.readouterr().out
    records = [json.loads(line) for line in shown.splitlines() if line.startswith("{")]
    assert [sum(record["kind"] == kind for record in records) for kind in ("machine", "check", "kernel", "model")] == [1, 3, 17, 2]
    assert all(record["passed"] for record in records if record["kind"] == "check")
    assert "WRONG" not in shown
    assert "cells/s, MFU" in shown
