"""Beside other cell models: operations as counted by hand, inputs as their authors make them, figures as promised."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cellplane.benchmark import peers
from cellplane.benchmark.environments import installed
from cellplane.benchmark.peers import PEERS, PeersBenchmark, encoder_flops, geneformer_flops, our_flops, scgpt_flops, scvi_flops
from cellplane.benchmark.peers_side import SPECIAL, Counts, ScGPT, rank_tokens
from cellplane.benchmark.sides import LoadMeter, Side
from cellplane.errors import BenchmarkError

SMALL = {"vocabulary": 50, "tokens": 6, "layers": 2, "width": 4, "heads": 2, "feed_forward": 8}
OURS = ("ours float32", "ours bfloat16")


def test_operations_of_an_encoder_are_those_counted_by_hand():
    a_token = 4 * (4 * 4) + 4 * 8 + 8 * 4  # multiplications: query, key, value, output, and the two feed-forward maps
    attention = 3 * 3 * 4 + 3 * 3 * 4  # scores of 3 tokens, and their weighted values
    assert encoder_flops(SMALL, tokens=3) == 2 * 2 * (3 * a_token + attention) == 1824


def test_a_cell_fills_no_more_tokens_than_there_are():
    assert geneformer_flops(SMALL, 6) == geneformer_flops(SMALL, 600) == encoder_flops(SMALL, 6)
    assert geneformer_flops(SMALL, 5) < geneformer_flops(SMALL, 6)
    assert scgpt_flops(SMALL, 5) == scgpt_flops(SMALL, 600)
    assert scgpt_flops(SMALL, 4) < scgpt_flops(SMALL, 5)


def test_operations_of_scvi_are_those_counted_by_hand():
    assert scvi_flops({"genes": 100, "hidden": 5, "latent": 2}, 7) == 2 * (100 * 5 + 5 * 2 + 5 * 2)


def test_operations_of_scgpt_are_those_its_network_does():
    network, counter = ScGPT(SMALL).train(), FlopCounterMode(display=False)  # train: not through the fast path, which is not counted
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        network(some_counts(cells=3, genes=5))
    assert counter.get_total_flops() == 3 * scgpt_flops(SMALL, 5)


def test_a_token_for_each_gene_costs_hundreds_of_times_a_token_for_each_cell():
    """The reason for what is measured; the released shapes at 2,000 counts a cell, in GFLOP."""
    costs = {name: peer.flops(peer.shape, 2000) / 1e9 for name, peer in PEERS.items()}
    assert costs == pytest.approx({"geneformer-6L": 37.16, "geneformer-12L": 198.97, "scgpt": 81.31, "scvi": 0.00496}, rel=1e-3)
    assert 0.075 < our_flops(2000) / 1e9 < 0.09
    assert costs["scgpt"] > 500 * our_flops(2000) / 1e9


def some_counts(cells: int, genes: int) -> Counts:
    """Different genes and values in every cell; the value of gene g is 10 g + 1."""
    generator = torch.Generator().manual_seed(0)
    gene = torch.rand(cells, 40, generator=generator).topk(genes, dim=1).indices.sort(dim=1).values
    return Counts(gene, 10.0 * gene + 1)


def test_tokens_are_genes_by_falling_count_relative_to_their_median():
    counts = Counts(torch.tensor([[0, 1, 2, 3]]), torch.tensor([[8.0, 6.0, 1.0, 3.0]]))
    gene_median = torch.tensor([8.0, 2.0, 1.0, 1.5])  # relative: 1, 3, 1, 2
    assert rank_tokens(counts, gene_median, tokens=2).tolist() == [[1 + SPECIAL, 3 + SPECIAL]]


def test_scgpt_chooses_different_genes_of_a_cell_with_their_own_values():
    counts = some_counts(cells=4, genes=20)
    chosen = ScGPT(SMALL).chosen(counts)
    assert chosen.gene_CN.shape == (4, 5)
    torch.testing.assert_close(chosen.value_CN, 10.0 * chosen.gene_CN + 1)
    for genes, all_genes in zip(chosen.gene_CN.tolist(), counts.gene_CN.tolist(), strict=True):
        assert len(set(genes)) == 5
        assert set(genes) <= set(all_genes)


def test_scgpt_takes_all_genes_where_they_fit():
    counts = some_counts(cells=2, genes=5)
    assert ScGPT(SMALL).chosen(counts) is counts


@pytest.fixture(scope="module")
def worker() -> Iterator[Side]:
    """The worker in our own environment, which has torch but not the other packages."""
    with Side("peer", peers.PEER) as side:
        yield side


def test_the_worker_refuses_a_peer_it_does_not_know(worker):
    with pytest.raises(BenchmarkError, match="peer: setup: ValueError: there is no peer 'uce'; known are geneformer, scgpt, scvi"):
        worker.ask("setup", {"kind": "uce", "threads": 1, "shape": {}})


def test_the_worker_says_what_must_come_before_embedding():
    with Side("peer", peers.PEER) as side, pytest.raises(BenchmarkError, match=r"embed: RuntimeError: .* setup and cells come first"):
        side.ask("embed", {"batch": 1})


@pytest.mark.parametrize(("kind", "package"), [("geneformer", "transformers"), ("scvi", "scvi")])
def test_the_worker_names_the_package_it_lacks(worker, kind, package):
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed here")
    with pytest.raises(BenchmarkError, match=f"setup: ModuleNotFoundError: No module named '{package}'"):
        worker.ask("setup", {"kind": kind, "threads": 1, "shape": SMALL | {"genes": 40}})


def test_the_worker_embeds_the_same_cells_alike_in_batches_of_any_size(worker, tmp_path):
    answer = worker.ask("setup", {"kind": "scgpt", "threads": 1, "shape": SMALL})
    assert answer == {"parameters": sum(parameter.numel() for parameter in ScGPT(SMALL).parameters())}
    worker.ask("cells", {"cells": 7, "nonzeros": 5, "genes": 40})
    for batch in (1, 3, 7):
        assert worker.ask("embed", {"batch": batch, "save": str(tmp_path / f"{batch}.npy")})["cells"] == 7
    one, three, seven = (torch.from_numpy(np.load(tmp_path / f"{batch}.npy")) for batch in (1, 3, 7))
    torch.testing.assert_close(one, seven)
    torch.testing.assert_close(three, seven)
    torch.testing.assert_close(seven.norm(dim=1), torch.ones(7))
    assert worker.ask("embed", {"batch": 2, "first": 3})["cells"] == 3


class FakeSide:
    """Answers as a worker would: ours a second in float32 and half of that in bfloat16 a round; a peer two seconds a cell."""

    opened: list[FakeSide] = []

    def __init__(self, name: str, module: str, python: object = None, threads: int = 2) -> None:
        self.name, self.ours, self.pid, self.cells = name, module == peers.OURS, os.getpid(), 0
        self.asked: list[tuple[str, dict[str, Any]]] = []
        FakeSide.opened.append(self)

    def ask(self, command: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        arguments = dict(given or {})
        self.asked.append((command, arguments))
        if command == "setup":
            return {"parameters": 3_000_000}
        if command == "cells":
            self.cells = arguments["cells"]
            return {}
        if self.ours:
            return {"wall_s": {"float32": 1.0, "bfloat16": 0.5}[self.name], "cpu_s": 2.0}
        seconds = (arguments.get("first") or self.cells) * (2.0 + abs(arguments["batch"] - 4) / 8)  # batches of 4 suit it
        return {"wall_s": seconds, "cpu_s": 2 * seconds}

    def __enter__(self) -> FakeSide:
        return self

    def __exit__(self, *of: object) -> None:
        self.ended = True


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """Runs the whole comparison on pretended sides under a foreign load."""

    def run(load: float):
        FakeSide.opened = []
        monkeypatch.setattr(peers, "Side", FakeSide)
        monkeypatch.setattr(LoadMeter, "foreign", lambda self: load)
        return {figure.name: figure for figure in PeersBenchmark(cells=100, rounds=2, python=tmp_path).run()}

    return run


def test_every_peer_has_its_speed_and_ours_beside_it_in_both_precisions(measure):
    figures = measure(0.0)
    assert list(figures) == [*OURS, *(row for name in PEERS for row in (f"peer {name}", *(f"{ours} / peer {name}" for ours in OURS)))]
    assert all(figure.gate == "" and figure.holds is None and json.loads(figure.line()) for figure in figures.values())
    assert figures["ours bfloat16"].value == pytest.approx(200)
    peer = figures["peer geneformer-12L"]
    assert (peer.value, peer.unit) == (pytest.approx(0.5), "cells/s")
    expected = {"cells_per_s": 0.5, "cpu_ms_a_cell": 4000.0, "spread": 0.0, "parameters": 3_000_000, "cells": 16, "batch": 4}
    assert peer.details == pytest.approx(expected | {"mflop_a_cell": 198_967}, rel=1e-3)
    assert "16 cells, batches of 4 (fastest of 1, 2, 4)" in peer.note


def test_ratios_are_of_the_time_a_cell_though_sides_run_on_different_numbers_of_them(measure):
    figures = measure(0.0)
    assert figures["ours float32 / peer scgpt"].value == pytest.approx(200)
    assert figures["ours bfloat16 / peer scgpt"].value == pytest.approx(400)
    assert "0.5 -> 100 cells/s; 2 rounds, 0 noisy ones left out" in figures["ours float32 / peer scgpt"].note
    assert figures["ours float32 / peer scgpt"].note.endswith("; 1,049 x by operations")
    assert figures["ours float32 / peer scvi"].note.endswith("; 0.064 x by operations")


def test_no_ratio_is_given_where_other_processes_ran_all_the_time(measure):
    figures = measure(0.5)
    ratios = [figure for name, figure in figures.items() if " / " in name]
    assert len(ratios) == 2 * len(PEERS)
    assert all(figure.value is None and "no ratio" in figure.note for figure in ratios)
    assert "other processes ran in every round" in figures["peer scvi"].note


def test_all_sides_get_the_same_number_of_counts_and_end_when_the_comparison_does(measure):
    measure(0.0)
    given = [arguments["nonzeros"] for side in FakeSide.opened for command, arguments in side.asked if command == "cells"]
    assert given == [2000] * (len(OURS) + len(PEERS))
    assert all(side.ended for side in FakeSide.opened)


def test_the_real_models_are_measured():
    python = installed("peers")
    if python is None:
        pytest.skip("needs the environment of the peers: python -m jobs.benchmark peers makes it under $CELLPLANE_HOME/cache")
    figures = {figure.name: figure for figure in PeersBenchmark(cells=4, nonzeros=40, rounds=1, python=python).run()}
    assert len(figures) == len(OURS) + 3 * len(PEERS)
    assert all(figures[f"peer {name}"].value > 0 for name in PEERS)
    millions = {name: figures[f"peer {name}"].details["parameters"] / 1e6 for name in PEERS}
    assert millions == pytest.approx({"geneformer-6L": 10.2, "geneformer-12L": 39.3, "scgpt": 50.3, "scvi": 12.5}, rel=0.01)
