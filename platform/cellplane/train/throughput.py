"""How much work a cell is, and how much of what the hardware could do a run does: cells a second, MFU, memory.

Operations are those of the matrix products alone (a multiplication and an addition are two), the usual count for
utilisation (Chowdhery et al., PaLM, 2022, appendix B); what is computed again to save memory is counted apart, because
it teaches the network nothing. Of one cell, forward, with nnz stored counts, L cells in its sentence and N = neighbours
and itself:

    embedder        2 nnz D (gene vectors) + 2 D^2
    each block      16 D^2 (query, key, value, output 2 D^2 each, feed-forward 8 D^2) + attention
      flowformer    4 D min(L, K): q (k^T v), through [L, L] or through [K, K], whichever is smaller; K = D / heads
      softmax       4 D L
      local         4 D N
    latent          gmvae 2 D M + 2 (D + M) I + 4 I Z + 4 M Z; vae 4 D Z; ae 2 D Z
    decoder         2 Z W + 2 W B, and 2 B G for cells that hide something: only they are recovered
    head            2 Z classes, or 2 Z hidden + 2 hidden classes

Backward is twice that, but for the gene vectors: counts need no gradient, so once. Computed again: the embedder's layer,
attention, the latent space and the decoder before its last layer; with `recompute` every block.
"""

# D width, H heads, K head width, M clusters, I cluster_width, Z latent_width, W decoder_width, B decoder_bottleneck, G genes

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from cellplane.data.manifest import Manifest
from cellplane.model.cellplm import CellPLM
from cellplane.model.config import MaskingConfig, ModelConfig
from cellplane.tracking.system import SystemMeter
from cellplane.train.config import PretrainConfig
from cellplane.train.devices import Device, device_of

SAMPLED_S = 5.0  # between two looks at memory and processors: they change slowly, and every value is journalled


@dataclass(frozen=True)
class CellShape:
    """An average cell as the network sees it.

    ``nonzeros`` stored counts; ``sentence`` cells that attend to one another, after dropping; ``scored`` is the share of
    cells that hide something. ``seen`` is the share of a data set's cells that a step keeps: the rest is dropped unread
    by the network.
    """

    nonzeros: float
    sentence: float
    scored: float = 1.0
    seen: float = 1.0

    @classmethod
    def of(cls, manifest: Manifest, masking: MaskingConfig) -> CellShape:
        """The average over the cells of a folder of shards."""
        sizes = np.array([row.cells for row in manifest.sentences], dtype=np.float64)
        seen = 1 - masking.drop_cell_rate
        return cls(manifest.nnz / manifest.cells, seen * float((sizes**2).sum() / sizes.sum()), masking.cell_mask_rate, seen)


@dataclass(frozen=True)
class Flops:
    """Operations of a cell: what ``forward`` and ``backward`` need, and what is computed ``again`` to save memory."""

    forward: float
    backward: float
    again: float = 0.0

    @property
    def trained(self) -> float:
        """What training needs, however it is computed: the numerator of MFU."""
        return self.forward + self.backward

    @property
    def executed(self) -> float:
        """What is really computed."""
        return self.trained + self.again

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward, self.again + other.again)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.forward * times, self.backward * times, self.again * times)


def flops_of_cell(config: ModelConfig, cell: CellShape) -> Flops:
    """Operations of a training step for one cell that the network sees, all parts together."""
    return sum(flops_by_part(config, cell).values(), Flops(0, 0))


def flops_by_part(config: ModelConfig, cell: CellShape) -> dict[str, Flops]:
    """The same by part of the network; the formulas stand on top of this file."""
    width = config.width
    parts = {
        "genes": Flops(2 * cell.nonzeros * width, 2 * cell.nonzeros * width),
        "embedder": _products(2 * width**2, again=1),
        "blocks": (_products(16 * width**2) + _attention(config, cell)) * config.n_blocks,
        "local": (_products(16 * width**2) + _local_attention(config)) * config.local_blocks,
        "latent": _products(LATENT_PRODUCTS[config.latent](config), again=1),
        "decoder": _decoder(config, cell),
        "head": _products(_head(config)),
    }
    if config.recompute:
        for name in ("blocks", "local"):
            parts[name] = replace(parts[name], again=parts[name].again + parts[name].forward)
    return parts


def _products(forward: float, again: float = 0.0) -> Flops:
    """Of products with gradients by both factors."""
    return Flops(forward, 2 * forward, again * forward)


def _attention(config: ModelConfig, cell: CellShape) -> Flops:
    if config.attention == "softmax":
        return _products(4 * config.width * cell.sentence, again=1)
    return _products(4 * config.width * min(cell.sentence, config.width / config.n_heads), again=1)


def _local_attention(config: ModelConfig) -> Flops:
    return _products(4 * config.width * (config.local_neighbours + 1), again=0.5)  # the logits alone are computed again


LATENT_PRODUCTS: dict[str, Callable[[ModelConfig], float]] = {
    "gmvae": lambda c: (
        2 * c.width * c.n_clusters
        + 2 * (c.width + c.n_clusters) * c.cluster_width
        + 4 * c.cluster_width * c.latent_width
        + 4 * c.n_clusters * c.latent_width
    ),
    "vae": lambda c: 4 * c.width * c.latent_width,
    "ae": lambda c: 2 * c.width * c.latent_width,
}


def _decoder(config: ModelConfig, cell: CellShape) -> Flops:
    if config.decoder == "none":
        return Flops(0, 0)
    trunk = 2 * config.latent_width * config.decoder_width + 2 * config.decoder_width * config.decoder_bottleneck
    return _products(trunk, again=1) + _products(2 * config.decoder_bottleneck * config.n_genes * cell.scored)


def _head(config: ModelConfig) -> float:
    if not config.n_classes:
        return 0.0
    inner = config.head_width
    return 2 * (config.latent_width * inner + inner * config.n_classes if inner else config.latent_width * config.n_classes)


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Trainable parameters by part, exactly: counted on the network itself, made without its memory."""
    with torch.device("meta"):
        network = CellPLM(config)
    return {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in network.named_children()}


class Throughput:
    """Tells a training loop how fast it is; one for each run, on rank 0."""

    def __init__(self, flops: float, device: Device, where: torch.device, precision: str = "float32", world_size: int = 1) -> None:
        """``flops`` of one cell of a step; the run has ``world_size`` devices like this one, and looks at the memory of ``where``."""
        self.flops, self.where = flops, where
        self.peak = device.flops[precision] * world_size
        self._system, self._sampled = SystemMeter(), float("-inf")

    @classmethod
    def of(cls, config: PretrainConfig, model: ModelConfig, manifest: Manifest, where: torch.device, world_size: int) -> Throughput:
        """For a pre-training run: ``model`` with all its sizes, the ``manifest`` of its shards, computed on ``where``."""
        cell = CellShape.of(manifest, config.masking)
        precision = "bfloat16" if config.engine.bf16 else model.precision
        return cls(flops_of_cell(model, cell).trained * cell.seen, device_of(where), where, precision, world_size)

    def metrics(self, cells: int, seconds: float) -> dict[str, float]:
        """Of a step of ``cells`` planned cells (dropped ones and all ranks' included): speed, and at times what the machine does.

        `train/cells_per_s`; `train/mfu` in [0, 1], the share of the devices' peak that products with a purpose took; and at
        most every few seconds `system/...` (see `SystemMeter`), with `system/gpu_peak_bytes` on a GPU.
        """
        speed = cells / max(seconds, 1e-9)
        found = {"train/cells_per_s": speed, "train/mfu": speed * self.flops / self.peak}
        if time.monotonic() - self._sampled < SAMPLED_S:
            return found
        self._sampled = time.monotonic()
        return {**found, **self._system.sample(), **_gpu_memory(self.where)}


def _gpu_memory(where: torch.device) -> Mapping[str, float]:
    if where.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(where)
    return {"system/gpu_peak_bytes": float(torch.cuda.max_memory_allocated(where)), "system/gpu_used_share": 1 - free / total}
