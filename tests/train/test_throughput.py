"""Operations and parameters are those of the network itself; what a run tells about its speed is what it did."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cellplane.benchmark.cells import random_cells
from cellplane.cells import single_panel_batch
from cellplane.config import load_config
from cellplane.data.shards import read_manifest
from cellplane.model import linear
from cellplane.model.cellplm import new_model
from cellplane.model.config import MaskingConfig, ModelConfig
from cellplane.model.masking import mask_genes
from cellplane.model.noise import Noise
from cellplane.train import devices, throughput
from cellplane.train.config import ModelFile
from cellplane.train.devices import Device, device_of
from cellplane.train.launch import full_model_config
from cellplane.train.throughput import CellShape, Flops, Throughput, count_parameters, flops_by_part, flops_of_cell

CPU = torch.device("cpu")
OFFICIAL_GENES = 19_374


def shipped(name: str, **changes: Any) -> ModelConfig:
    values = load_config(ModelFile, name, "model").model_dump()
    return ModelConfig(**{**values, "n_genes": OFFICIAL_GENES, **changes})


@pytest.fixture
def plain_products(monkeypatch):
    """PyTorch's counter knows its own products, not oneDNN's, which our layers take on some processors."""
    monkeypatch.setattr(linear, "ONEDNN", None)


def counted(config: ModelConfig, cells: int, sentence: int) -> tuple[float, CellShape]:
    """Operations of a step for each cell as PyTorch counts them, and the cells they were counted on."""
    nonzeros = min(40, config.n_genes)
    crow, gene, value = (torch.from_numpy(column) for column in random_cells(cells, nonzeros, config.n_genes))
    lengths = [sentence] * (cells // sentence)
    batch = single_panel_batch(crow, gene, value, torch.ones(config.n_genes, dtype=torch.bool), lengths)
    batch = replace(batch, coordinates=torch.rand(cells, 2, generator=torch.Generator().manual_seed(0)) * 500)
    if config.n_classes:
        batch = replace(batch, labels=torch.arange(cells) % config.n_classes)
    mask = mask_genes(batch, batch.cu_seqlens.diff().numpy(), MaskingConfig(drop_cell_rate=0.0, gene_mask="fixed"))
    network = new_model(config, 0)
    with FlopCounterMode(display=False) as counter:
        loss = network(batch, mask, Noise(1, 0)).loss
        assert loss is not None
        loss.total.sum().backward()
    return counter.get_total_flops() / cells, CellShape(nonzeros, sentence, float((mask.hidden_C > 0).float().mean()))


def without_genes(config: ModelConfig, cell: CellShape) -> float:
    """What PyTorch's counter can see: it does not know the sums of gene vectors."""
    return sum((part for name, part in flops_by_part(config, cell).items() if name != "genes"), Flops(0, 0)).executed


@pytest.mark.parametrize(("name", "genes", "sentence"), [("tiny", 765, 64), ("tiny", 765, 8), ("10m", 3000, 256), ("10m", 3000, 16)])
def test_operations_agree_with_pytorchs_own_count(plain_products, name, genes, sentence):
    config = shipped(name, n_genes=genes)
    found, cell = counted(config, 256, sentence)
    assert without_genes(config, cell) == pytest.approx(found, rel=0.03)


SMALL = {"n_genes": 60, "width": 64, "n_heads": 2, "n_blocks": 2, "latent_width": 24, "decoder_width": 32, "decoder_bottleneck": 16}
VARIANTS = {
    "vae": {"latent": "vae"},
    "softmax": {"attention": "softmax"},
    "local": {"local_blocks": 1, "local_neighbours": 5},
    "gaussian": {"decoder": "gaussian"},
    "annotator": {"latent": "ae", "decoder": "none", "n_classes": 7},
    "hidden head": {"latent": "ae", "decoder": "none", "n_classes": 7, "head_width": 20},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_operations_of_every_kind_of_part_agree_too(plain_products, name):
    config = ModelConfig(**{**SMALL, **VARIANTS[name]})
    found, cell = counted(config, 96, 48)
    if name == "softmax":  # whose fused form on a processor PyTorch's counter does not know: forward, twice that, and again
        found += config.n_blocks * 4 * (4 * config.width * 48)
    if name == "gaussian":  # scores every cell, and computes its last layer again in the backward pass
        cell = replace(cell, scored=1.0)
        found -= 2 * config.decoder_bottleneck * config.n_genes
    assert without_genes(config, cell) == pytest.approx(found, rel=0.03)


def test_recomputing_blocks_is_counted_apart_from_what_training_needs(plain_products):
    config = ModelConfig(**SMALL)
    again = replace(config, recompute=True)
    found, cell = counted(again, 96, 48)
    assert without_genes(again, cell) == pytest.approx(found, rel=0.03)
    assert flops_of_cell(again, cell).trained == flops_of_cell(config, cell).trained
    assert flops_of_cell(again, cell).executed > flops_of_cell(config, cell).executed


def test_the_official_network_costs_what_the_readme_says():
    """78 MFLOP a cell to embed 2,000 counts (README, measured with another counter)."""
    parts = flops_by_part(shipped("85m"), CellShape(2000, 2000))
    embedding = sum(parts[name].forward for name in ("genes", "embedder", "blocks", "latent"))
    assert embedding == pytest.approx(78e6, rel=0.06)


@pytest.mark.parametrize("name", ["tiny", "10m", "85m"])
def test_parameters_are_those_of_the_real_network(name):
    config = shipped(name, n_batches=3, n_datasets=2)
    assert sum(count_parameters(config).values()) == new_model(config, 0).n_parameters()


@pytest.mark.parametrize(("name", "parameters"), [("10m", 9_765_485), ("300m", 304_151_757)])
def test_parameters_are_those_the_shipped_files_state(name, parameters):
    assert sum(count_parameters(shipped(name)).values()) == parameters


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_parameters_of_every_kind_of_part_are_exact(changes):
    config = ModelConfig(**{**SMALL, **changes, "positions": "continuous", "hidden_fraction": True, "n_platforms": 3})
    found = count_parameters(config)
    assert sum(found.values()) == new_model(config, 0).n_parameters()
    assert found["embedder"] > 60 * 64


def test_an_average_cell_is_the_average_over_cells_not_over_sentences(shards):
    manifest = read_manifest(shards)
    cell = CellShape.of(manifest, MaskingConfig(drop_cell_rate=0.25, cell_mask_rate=0.5))
    assert cell.nonzeros == manifest.nnz / manifest.cells
    sizes = [row.cells for row in manifest.sentences for _ in range(row.cells)]
    assert cell.sentence == pytest.approx(0.75 * sum(sizes) / len(sizes))
    assert (cell.scored, cell.seen) == (0.5, 0.75)


PEAK = Device("made up", {"float32": 1000.0, "bfloat16": 4000.0})


@pytest.mark.parametrize(("precision", "world_size", "mfu"), [("float32", 1, 0.5), ("bfloat16", 1, 0.125), ("float32", 2, 0.25)])
def test_utilisation_is_what_was_done_over_what_all_devices_could_do(precision, world_size, mfu):
    speed = Throughput(10.0, PEAK, CPU, precision, world_size).metrics(100, 2.0)
    assert speed["train/cells_per_s"] == 50
    assert speed["train/mfu"] == pytest.approx(mfu)


def test_the_machine_is_looked_at_now_and_then_and_not_at_every_step(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(throughput.time, "monotonic", lambda: now[0])
    meter, sampled = Throughput(10.0, PEAK, CPU), []
    for _ in range(8):
        now[0] += throughput.SAMPLED_S / 4
        sampled.append("system/rss_bytes" in meter.metrics(1, 1.0))
    assert sampled == [True, False, False, False, True, False, False, False]


def test_a_run_counts_only_the_cells_that_its_network_sees(run_config, shards):
    config = run_config("a")
    model, manifest = full_model_config(config), read_manifest(shards)
    whole = Throughput.of(config, model, manifest, CPU, 2)
    assert whole.flops == pytest.approx(0.7 * flops_of_cell(model, CellShape.of(manifest, config.masking)).trained)
    assert whole.peak == 2 * device_of(CPU).flops["float32"]
    halved = Throughput.of(run_config("a", {"engine": {"bf16": True}}), model, manifest, CPU, 2)
    assert halved.peak == 2 * device_of(CPU).flops["bfloat16"]


def test_asking_after_a_step_takes_no_time_worth_mentioning():
    meter = Throughput(10.0, PEAK, CPU)
    meter.metrics(1, 1.0)
    began = time.perf_counter()
    for _ in range(1000):
        meter.metrics(1, 1.0)
    assert time.perf_counter() - began < 0.1


def test_a_processor_is_measured_once():
    first = device_of(CPU)
    assert first.measured
    assert first is device_of(CPU)
    assert min(first.flops.values()) > 1e9
    assert first.bytes_per_s > 1e9
    assert first.memory_bytes > devices.GIB


def test_more_threads_are_another_processor():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = device_of(CPU)
        torch.set_num_threads(2)
        assert device_of(CPU) is not one
    finally:
        torch.set_num_threads(threads)
