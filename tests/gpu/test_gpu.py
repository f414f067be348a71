"""On a real GPU: the kernels equal the fallback, twice the same bits, and shard bytes are decoded as the reader decodes them.

`make gpu` runs them; elsewhere they are skipped. Times are measured by `python -m cellplane.benchmark.gpu`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from cellplane.cells import CellBatch
from cellplane.data.config import ConvertConfig, DataKeys, SimulateConfig
from cellplane.data.convert import convert_with, write_part
from cellplane.data.loader import ShardStore
from cellplane.data.sentences import MicroBatch
from cellplane.data.simulate import simulate
from cellplane.data.sources import write_h5ad
from cellplane.data.transfer import ShardTransfer
from cellplane.model.attention import flowformer
from cellplane.model.decoder import counts_of
from cellplane.model.gpu import available, dense_gene_sum, fused_reconstruction
from cellplane.model.segments import flowformer_segments
from tests.model.triton_cases import CASES, Case, both, cells, errors, exact, parameters, result
from tests.tiny import N_GENES, random_batch

CUDA = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not (torch.cuda.is_available() and available(CUDA)), reason="no CUDA device with triton")]
BIG = Case(300, 2_000, 128, panels=2)  # many tiles, splits and programs
ALL = {**CASES, "many tiles": BIG}


@contextmanager
def waiting_refused() -> Iterator[None]:
    """Any operation that makes the host wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ALL)
def test_likelihoods_and_all_gradients_equal_the_exact_ones(name):
    found, expected = both(ALL[name], "cuda")
    assert max(errors(found, exact(ALL[name])).values()) < 1e-5, errors(found, exact(ALL[name]))
    assert max(errors(found, expected).values()) < 2e-5, errors(found, expected)


@pytest.mark.parametrize("name", ["no multiple of any tile", "two panels", "clamped, with huge counts", "many tiles"])
def test_bfloat16_stays_within_its_rounding(name):
    found, _ = both(ALL[name], "cuda", torch.bfloat16)
    assert max(errors(found, exact(ALL[name])).values()) < 2e-2, errors(found, exact(ALL[name]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_input_gives_the_same_bits(dtype):
    one, other = (both(BIG, "cuda", dtype)[0] for _ in range(2))
    for ours, again in zip((*one.likelihoods, *one.gradients), (*other.likelihoods, *other.gradients), strict=True):
        assert torch.equal(ours, again)


def test_the_loss_never_makes_the_host_wait():
    batch, mask = cells(BIG)
    batch, mask = batch.to(CUDA), mask.to(CUDA)
    counts, given = counts_of(batch, mask), tuple(tensor.to(CUDA) for tensor in parameters(BIG))
    scored_C = mask.hidden_C > 0
    result(lambda *leaves: fused_reconstruction(*leaves, counts), given, scored_C)  # compiles the kernels
    with waiting_refused():
        result(lambda *leaves: fused_reconstruction(*leaves, counts), given, scored_C)


def test_dense_gene_sums_equal_those_of_the_processor_and_do_not_wait():
    batch = random_batch([40, 30])
    table, weight = torch.randn(N_GENES, 16), torch.log1p(batch.value)
    there = [tensor.to(CUDA) for tensor in (table, batch.gene, batch.crow, weight)]
    with waiting_refused():
        found = dense_gene_sum(*there)
    torch.testing.assert_close(found.cpu(), dense_gene_sum(table, batch.gene, batch.crow, weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [[300], [20] * 30, [1, 0, 150, 33]], ids=str)
def test_attention_in_segments_equals_the_loop_and_does_not_wait(lengths):
    leaves = [torch.randn(sum(lengths), 8, 128, device=CUDA).requires_grad_() for _ in range(3)]
    edges = torch.tensor([0, *lengths], device=CUDA).cumsum(0)
    with waiting_refused():
        found = flowformer_segments(*leaves, edges)
        found.sum().backward()
    torch.testing.assert_close(found, flowformer(*leaves, edges), rtol=1e-3, atol=1e-4)


@pytest.fixture
def store(tmp_path: Path) -> ShardStore:
    source = simulate(SimulateConfig(n_cells=200, n_genes=60, spatial=True))
    source.X = source.X * 40  # some beyond a byte
    write_h5ad(source, tmp_path / "a.h5ad")
    keys = DataKeys(batch_key="batch", labels_key="cell_type", spatial_key="spatial")
    config = ConvertConfig(inputs=(str(tmp_path / "a.h5ad"),), out=str(tmp_path / "shards"), keys=keys, max_cells=20, shard_bytes=5000)
    convert_with(config, lambda tasks: map(write_part, tasks), lambda _: None)
    return ShardStore(tmp_path / "shards")


def test_shard_bytes_are_decoded_on_the_device_as_the_reader_decodes_them(store):
    planned = [MicroBatch((index, (index + 1) % len(store.sizes)), (index, 1), index) for index in range(len(store.sizes))] * 5
    for micro_batch, found in zip(planned, ShardTransfer(store, CUDA).stream(planned), strict=True):
        expected = micro_batch.read(store)
        for column in fields(CellBatch):
            if (theirs := getattr(expected, column.name)) is not None:
                torch.testing.assert_close(getattr(found, column.name).cpu(), theirs, rtol=0, atol=0, equal_nan=True, msg=column.name)


def test_a_step_can_be_captured_as_a_graph_and_replayed_on_other_cells():
    batch, mask = cells(BIG)
    batch, mask = batch.to(CUDA), mask.to(CUDA)
    counts, given = counts_of(batch, mask), [tensor.to(CUDA).requires_grad_() for tensor in parameters(BIG)]

    def step() -> torch.Tensor:
        full, hidden = fused_reconstruction(*given, counts)
        torch.autograd.backward([full.sum(), hidden.sum()])
        return full

    for _ in range(2):
        step()
        for leaf in given:
            leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        full = step()
    with torch.no_grad():
        given[0].mul_(0.5)
    graph.replay()
    expected, _ = fused_reconstruction(*given, counts)
    assert torch.equal(full, expected)
