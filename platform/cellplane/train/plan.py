"""What a pre-training run would take: memory by ZeRO stage, time and money, before anything is started.

Nothing is run. State is counted (parameters, gradients, AdamW's two moments and DeepSpeed's master copy), activations by
what the network's own operations keep (model/fused.py), time as products at the share of a device's peak that such sizes
reach, plus function values, plus the optimizer's pass over memory, plus what each micro-batch costs whatever its size.
Estimates of memory are within about a third of what was measured, of time within a factor of two (tests/train/test_plan.py).
"""

# P parameters, N devices, C cells of a micro-batch that the network sees, D width, G genes

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from cellplane.data.manifest import Manifest, read_manifest
from cellplane.data.remote import fetch_shards
from cellplane.data.sentences import StepPlan
from cellplane.model.config import ModelConfig
from cellplane.train.config import EngineConfig, PretrainConfig
from cellplane.train.devices import GIB, Device, named_device
from cellplane.train.identity import full_model_config
from cellplane.train.throughput import CellShape, Flops, count_parameters, flops_of_cell

GENES, NONZEROS, SENTENCE = 19_374, 1350.0, 2048.0  # without shards: the released vocabulary, 10x cells, the largest usual sentence
# Of time. For a processor fitted to bare steps of tiny, 10m and 85m on one Zen 5 thread; for GPUs an expectation, not measured.
PRODUCT_SHARE = {"cpu": (1.0, 200.0), "gpu": (0.55, 400.0)}  # (s, w): products of width D reach s D / (D + w) of the peak
LIKELIHOOD_VALUES = {"cpu": 30.0, "gpu": 12.0}  # function values for each gene of a scored cell, both likelihoods, forward and backward
STREAM_VALUES = {"cpu": 40.0, "gpu": 30.0}  # for each value of the width in each block: norms, activations, dropout
COUNT_VALUES = {"cpu": 400.0, "gpu": 100.0}  # for each stored count: gathering, ordering by gene, its likelihood
MICRO_BATCH_S = {"cpu": 8e-3, "gpu": 5e-3}  # calls, whatever the size
LINK_BYTES_PER_S = {"cpu": 2e9, "gpu": 100e9}  # between workers: gloo on one machine; NVLink or a fast network
ADAM_BYTES = 28  # read and written for each parameter of a step
SUM_BYTES = 12  # and of each micro-batch: its gradients are added to those before
BUCKET = 500_000_000  # values, DeepSpeed's default
LIVE = 1_000_000_000  # values that ZeRO 3 keeps gathered, DeepSpeed's default
RUNTIME_BYTES = {"cpu": int(0.6 * GIB), "gpu": int(0.8 * GIB)}  # libraries, threads, pieces in the cache; the CUDA context
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Hardware:
    """What to run on: so many devices, and what one of them costs an hour."""

    device: Device
    devices: int
    price_per_hour: float | None = None

    @property
    def kind(self) -> str:
        """cpu or gpu."""
        return "cpu" if self.device.name == "cpu" else "gpu"


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, and of its share of the host where something is offloaded."""

    state: int
    activations: int
    runtime: int
    host: int = 0

    @property
    def device(self) -> int:
        """All that the device must hold at the peak of a step."""
        return self.state + self.activations + self.runtime


@dataclass(frozen=True)
class Plan:
    """The answer; sizes in bytes, times in seconds, ``cost`` in the price's currency. ``assumed``: what was not known and taken."""

    parameters: Mapping[str, int]
    flops: Flops
    cells_per_step: int
    steps: int
    data_cells: int | None
    memory: Mapping[int, Memory]
    zero_stage: int
    step_s: float
    hardware: Hardware
    checkpoint_bytes: int
    disk_bytes: int
    assumed: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return self.step_s * self.steps

    @property
    def cost(self) -> float | None:
        """All devices for the whole time; None without a price."""
        price = self.hardware.price_per_hour
        return None if price is None else price * self.hardware.devices * self.seconds / 3600

    @property
    def fits(self) -> bool:
        """Whether a device holds the configured stage."""
        return self.memory[self.zero_stage].device <= self.hardware.device.memory_bytes

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        speed = self.cells_per_step / self.step_s
        return {
            "parameters": {**self.parameters, "all": sum(self.parameters.values())},
            "flops_per_cell": {"forward": self.flops.forward, "backward": self.flops.backward, "computed_again": self.flops.again},
            "cells_per_step": self.cells_per_step,
            "steps": self.steps,
            "cells": self.cells_per_step * self.steps,
            "epochs": None if self.data_cells is None else self.cells_per_step * self.steps / self.data_cells,
            "zero_stage": self.zero_stage,
            "memory_bytes": {f"zero_{stage}": {**asdict(found), "device": found.device} for stage, found in self.memory.items()},
            "fits": self.fits,
            "device": self.hardware.device.name,
            "devices": self.hardware.devices,
            "step_s": self.step_s,
            "cells_per_s": speed,
            "hours": self.seconds / 3600,
            "cost": self.cost,
            "checkpoint_bytes": self.checkpoint_bytes,
            "disk_bytes": self.disk_bytes,
            "assumed": list(self.assumed),
        }


def plan_run(config: PretrainConfig, device: str | None = None, devices: int | None = None, price_per_hour: float | None = None) -> Plan:
    """The plan of a configuration, on its own workers unless told otherwise.

    Data are those of `config.shards`, else assumed and said so. Raises ConfigError for an unknown device, DataError for
    shards that are not there.
    """
    manifest = read_manifest(fetch_shards(config.shards)) if config.shards else None
    model, cell, assumed = _network(config, manifest)
    if device is None:
        device = "h100" if config.workers.use_gpu else "cpu"
        assumed = (*assumed, f"device {device}")
    hardware = Hardware(named_device(device), devices or config.workers.count, price_per_hour)
    parameters = count_parameters(model)
    total = sum(parameters.values())
    flops = flops_of_cell(model, cell)
    cells = _cells_per_step(config, manifest)
    engine = config.engine
    stage = engine.zero_stage if engine.name == "deepspeed" else 0
    low = 2 if engine.bf16 else 4
    work = activation_bytes(model, cell, cell.seen * min(cells, config.plan.cells_per_micro_batch), low)
    at = {at: state_bytes(total, at, engine, hardware.devices) for at in STAGES}
    memory = {name: Memory(state, work, RUNTIME_BYTES[hardware.kind], host) for name, (state, host) in at.items()}
    checkpoint = 3 * 4 * total  # weights and two moments, float32, however they were sharded
    kept = config.checkpoint.keep + 1 + (config.checkpoint.keep_best and config.validation.share > 0)  # and the one being written
    return Plan(
        parameters=parameters,
        flops=flops,
        cells_per_step=cells,
        steps=config.optimizer.steps,
        data_cells=None if manifest is None else manifest.cells,
        memory=memory,
        zero_stage=stage,
        step_s=step_seconds(config, model, cell, cells, hardware),
        hardware=hardware,
        checkpoint_bytes=checkpoint,
        disk_bytes=kept * checkpoint + 4 * total,
        assumed=assumed,
    )


def _network(config: PretrainConfig, manifest: Manifest | None) -> tuple[ModelConfig, CellShape, tuple[str, ...]]:
    """The network with its sizes and an average cell, and what had to be assumed for them."""
    if manifest is not None:
        return full_model_config(config), CellShape.of(manifest, config.masking), ()
    masking, sentence = config.masking, min(SENTENCE, config.plan.cells_per_micro_batch)
    seen = 1 - masking.drop_cell_rate
    genes = config.model.n_genes or GENES
    cell = CellShape(NONZEROS, seen * sentence, masking.cell_mask_rate, seen)
    stated = (f"{genes} genes", f"{NONZEROS:.0f} non-zero counts a cell", f"sentences of {sentence:.0f} cells", "no batches")
    return replace(config.model, n_genes=genes), cell, stated


def _cells_per_step(config: PretrainConfig, manifest: Manifest | None) -> int:
    """Planned cells of a step: of real sentences, which rarely fill a micro-batch to its edge, the average."""
    full = config.plan.cells_per_micro_batch * config.plan.micro_batches_per_step
    if manifest is None:
        return full
    sizes = np.array([row.cells for row in manifest.sentences], dtype=np.int64)
    return round(manifest.cells / StepPlan(sizes, config.plan).steps_of_epoch(0))


def state_bytes(parameters: int, stage: int, engine: EngineConfig, devices: int) -> tuple[int, int]:
    """(on the device, on its share of the host) of what outlasts a micro-batch, for P parameters on N devices.

    Weights and gradients take 4 P each (2 P in bfloat16), AdamW's moments 8 P; from stage 1 on DeepSpeed also keeps
    float32 masters, 4 P, and shares moments and masters out. Stage 2 shares gradients out (and sends them through a
    bucket), stage 3 weights too, but gathers up to a thousand million of them for a micro-batch: all, below that.
    """
    low = 2 if engine.bf16 and stage > 0 else 4
    weights, gradients = low * parameters, low * parameters
    if engine.name == "torch" or stage == 0:
        return weights + gradients + 8 * parameters, 0
    optimizer = 12 * parameters // devices
    if stage >= 2:
        gradients = gradients // devices + low * min(BUCKET, parameters)
    if stage == 3:
        weights = weights // devices + low * min(LIVE, parameters)
    host = optimizer if engine.offload != "none" else 0
    moved = low * parameters // devices if engine.offload == "parameters" and stage == 3 else 0
    return weights + gradients + optimizer - host - moved, host + moved


def activation_bytes(config: ModelConfig, cell: CellShape, cells: float, low: int) -> int:
    """What ``cells`` cells of a micro-batch take at the peak of a step, beside state.

    Kept for the backward pass, in values of the width D a cell: of each block two rows of the residual stream (float32)
    and six in the dtype of products (query, key, value, attention, twice the width before the GELU); with `recompute` one
    row. Of a local block, which PyTorch differentiates itself, about sixteen. While a block is differentiated about
    twelve rows more. The batch: 13 bytes a stored count and what is hidden (a bit a gene), three times, since the next one
    is prepared meanwhile, and for the gene table's gradient 28 more. The last layer's gradient is found with its value.
    """
    product = 2 if low == 2 or config.precision == "bfloat16" else 4
    block = 4 * 2 + product * 6
    rows = config.n_blocks * block + config.local_blocks * 16 * product
    if config.recompute:
        rows = (config.n_blocks + config.local_blocks) * 4
    working = 4 * 2 + product * 10 + 4 * 3  # of a block's derivatives; and the embedder's and the decoder's ends
    counts = cell.nonzeros * (3 * 13 + 28) + 3 * config.n_genes / 8
    last = 4 * config.n_genes * (config.decoder_bottleneck + 3) if config.decoder != "none" else 0
    return int(cells * (config.width * (rows + working) + counts) + last)


def step_seconds(config: PretrainConfig, model: ModelConfig, cell: CellShape, cells: int, hardware: Hardware) -> float:
    """Of one step of ``cells`` planned cells shared out over the devices: the busiest one's micro-batches, then all together."""
    device, kind = hardware.device, hardware.kind
    precision = "bfloat16" if config.engine.bf16 else model.precision
    values = LIKELIHOOD_VALUES[kind] * cell.scored * model.n_genes if model.decoder != "none" else 0.0
    values += STREAM_VALUES[kind] * model.width * (model.n_blocks + model.local_blocks + 1) + COUNT_VALUES[kind] * cell.nonzeros
    most, half = PRODUCT_SHARE[kind]
    reached = device.flops[precision] * most * model.width / (model.width + half)
    of_cell = flops_of_cell(model, cell).executed / reached + values / device.values_per_s
    parameters = sum(count_parameters(model).values())
    micro_batches = config.plan.micro_batches_per_step
    of_micro_batch = MICRO_BATCH_S[kind] + SUM_BYTES * parameters / device.bytes_per_s + of_cell * cell.seen * cells / micro_batches
    computed = -(-micro_batches // hardware.devices) * of_micro_batch
    return computed + ADAM_BYTES * parameters / device.bytes_per_s + _exchanged_s(parameters, config, hardware)


def _exchanged_s(parameters: int, config: PretrainConfig, hardware: Hardware) -> float:
    """Every gradient is sent and received once, less the own share; nothing overlaps with computing."""
    low, others = (2 if config.engine.bf16 else 4), (hardware.devices - 1) / hardware.devices
    return 2 * low * parameters * others / LINK_BYTES_PER_S[hardware.kind]
