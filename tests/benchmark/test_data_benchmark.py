"""Loaders and converters side by side: every side reads every cell, and figures are those that were asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cellplane.benchmark import data, data_convert, data_ours, data_peers
from cellplane.benchmark.data import LIBRARIES, DataBenchmark, Files
from cellplane.benchmark.environments import installed
from cellplane.benchmark.sides import LoadMeter, Side
from cellplane.data.loader import ShardStore
from cellplane.data.sentences import PlanConfig, StepPlan
from cellplane.data.sources import read_h5ad
from cellplane.errors import BenchmarkError
from jobs import benchmark

SMALL = DataBenchmark(cells=2300, nonzeros=12, genes=60, rounds=1, libraries=())


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with the simulated cells as h5ad and as shards."""
    folder = tmp_path_factory.mktemp("made")
    data_convert.make(str(folder / "plain.h5ad"), SMALL.cells, SMALL.genes, SMALL.nonzeros, gzip=False)
    data_convert.convert(str(folder / "plain.h5ad"), str(folder / "shards"), "full")
    return folder


def test_simulated_cells_have_the_counts_and_samples_that_are_asked_for(made):
    cells = read_h5ad(made / "plain.h5ad")
    assert cells.shape == (SMALL.cells, SMALL.genes)
    assert (np.diff(cells.X.indptr) == SMALL.nonzeros).all()
    assert cells.obs["batch"].nunique() == 1
    assert not np.array_equal(cells.X[0].indices, cells.X[2000].indices)


@pytest.mark.parametrize("mode", data_convert.MODES)
def test_a_conversion_holds_every_cell_whatever_the_mode(made, tmp_path, mode):
    answer = data_convert.convert(str(made / "plain.h5ad"), str(tmp_path / "out"), mode)
    assert {"wall_s", "cpu_s", "peak_bytes"} <= answer.keys()
    manifest = ShardStore(tmp_path / "out").manifest
    assert (manifest.cells, manifest.nnz) == (SMALL.cells, SMALL.cells * SMALL.nonzeros)


@pytest.mark.parametrize("ahead", [0, 1])
def test_an_epoch_of_the_loader_reads_everything(made, ahead):
    data_ours.open_shards(str(made / "shards"))
    assert SMALL.complete(data_ours.read(str(made / "shards"), ahead), "ours")["cells"] == SMALL.cells


@pytest.mark.parametrize("genes_as", ["int64", "int32"])
def test_bare_arrow_copies_the_same_entries_in_the_types_of_a_batch(made, genes_as):
    folder = str(made / "shards")
    data_ours.open_shards(folder)
    data_ours.bare_arrow(folder, genes_as)
    _, files, place = data_ours._bare[folder, genes_as]
    store = ShardStore(made / "shards")
    plan = StepPlan(store.sizes, PlanConfig(micro_batches_per_step=1))
    batch = store.read([plan.at(plan.steps_of_epoch(0) - 1)[0].sentences[-1]])
    entries = batch.gene.numel()
    assert place["gene"].dtype == getattr(torch, genes_as)
    assert torch.equal(place["gene"][:entries].long(), batch.gene)
    assert torch.equal(place["x"][:entries], batch.value)
    assert torch.equal(place["crow"][: len(batch.crow)], batch.crow)
    assert torch.equal(place["cell"][: batch.n_cells], batch.row)
    data_ours.bare_arrow(folder, genes_as)
    assert data_ours._bare[folder, genes_as][1] is files  # a new mapping would be slower, and flatter the loader


def test_loader_and_bare_arrow_are_measured_in_turn(made):
    found = data_ours.in_turn(str(made / "shards"), rounds=1)
    assert {f"{name}_{key}" for name in ("ours", "ahead", "bare", "bare_int32") for key in ("cpu_s", "wall_s")} <= found.keys()
    SMALL.complete(found, "ours")


def test_a_side_that_did_not_read_everything_has_no_figures():
    with pytest.raises(BenchmarkError, match=r"annbatch read \(2299, 27600\) cells and entries, there are \(2300, 27600\)"):
        SMALL.complete({"cells": 2299, "entries": 27600}, "annbatch")


@pytest.fixture
def quiet(monkeypatch) -> None:
    """No round is noisy, and what Ray would measure is measured here."""
    monkeypatch.setattr(LoadMeter, "foreign", lambda self: 0.0)
    ask = Side.ask

    def without_ray(side: Side, command: str, arguments=None):
        return data_ours.in_turn(**arguments) if command == "train_worker" else ask(side, command, arguments)

    monkeypatch.setattr(Side, "ask", without_ray)


def test_every_figure_comes_with_its_gate_and_nothing_is_left_behind(quiet, monkeypatch, tmp_path):
    monkeypatch.setattr(data.tempfile, "tempdir", str(tmp_path))
    figures = {figure.name: figure for figure in SMALL.run()}
    assert all(figure.value is not None for figure in figures.values())
    assert figures["reading"].gate == ">= 1e+06"
    assert figures["reading, share of bare Arrow"].gate == ">= 0.9"
    limits = {name: figure.gate for name, figure in figures.items() if name.startswith("conversion") and "peak" not in name}
    assert limits == {
        "conversion, bare, uncompressed": ">= 75000",
        "conversion, full, uncompressed": ">= 40000",
        "conversion, full, gzip": ">= 20000",
    }
    assert all(figure.gate == "<= 0.5" for name, figure in figures.items() if "peak" in name)
    assert not list(tmp_path.iterdir())


def test_a_library_that_cannot_be_installed_is_a_figure_without_value(quiet, monkeypatch):
    def refused(name: str) -> Path:
        raise BenchmarkError(f"{name}: no matching distribution found")

    monkeypatch.setattr(data, "environment", refused)
    plan = DataBenchmark(cells=30, nonzeros=12, genes=60, rounds=1, only=("read",), libraries=("annbatch",))
    (figure,) = [figure for figure in plan.run() if "annbatch" in figure.name]
    assert (figure.value, figure.holds, figure.gate) == (None, None, ">= 5")
    assert figure.note == "annbatch: no matching distribution found"


@pytest.mark.cluster
def test_a_large_conversion_is_watched_while_it_runs():
    plan = DataBenchmark(cells=2300, nonzeros=12, genes=60, only=("large",))
    figures = {figure.name: figure for figure in plan.run()}
    assert figures["large conversion"].note.startswith("4600 cells in")
    assert 0 < figures["large conversion, CPU"].value < 1e6
    assert figures["memory of a worker at most"].gate == "<= 0.5"
    assert 0.01 < figures["memory of the driver at most"].value < 4


def test_what_takes_much_disk_is_measured_on_request_only(quiet, monkeypatch):
    monkeypatch.setattr(data, "PARTS", {"large": lambda *_: iter([data.Figure("large", 1.0, "")])})
    assert list(DataBenchmark(cells=30, nonzeros=12, genes=60).run()) == []
    assert len(list(DataBenchmark(cells=30, nonzeros=12, genes=60, only=("large",)).run())) == 1


@pytest.fixture(params=LIBRARIES)
def library(request) -> Iterator[tuple[str, Side]]:
    """Each other library as a side, where its environment was made already."""
    python = installed(LIBRARIES[request.param])
    if python is None:
        pytest.skip(f"needs the environment of {request.param}: run `python -m jobs.benchmark data` once")
    with Side(request.param, data.PEERS, python, threads=1) as side:
        yield request.param, side


def test_other_libraries_read_every_cell_too(library, made):
    name, side = library
    plan = DataBenchmark(cells=SMALL.cells, nonzeros=SMALL.nonzeros)
    with Side("ours", data.OURS) as ours:
        source = Files(plan, made, ours, ours).of(name, side)
    plan.complete(side.ask("read", {"library": name, "source": source, "block": 500}), name)


def test_every_library_has_its_limits_and_its_reader():
    assert set(LIBRARIES) == set(data.FASTER_READING) == set(data_peers.READERS)
    assert set(data.FASTER_CONVERSION) == set(data_peers.CONVERTERS)


def test_the_job_measures_what_is_asked_with_the_defaults_of_its_kind(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(DataBenchmark, "run", lambda self: asked.append(self) or iter(()))
    monkeypatch.setattr(sys, "argv", ["benchmark", "data", "--only", "read", "--cells", "1000"])
    assert benchmark.main() == 0
    assert asked == [DataBenchmark(cells=1000, only=("read",))]
    monkeypatch.setattr(sys, "argv", ["benchmark", "data", "--only", "embedding"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "data has no part 'embedding'; it has: read, convert" in capsys.readouterr().err
