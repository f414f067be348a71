"""Training and embedding on a GPU: every kernel checked against its fallback, then timed against what the machine allows.

`python -m cellplane.benchmark.gpu` prints JSON lines and a table; it needs torch, triton, numpy and one CUDA device, and
ends with 4 where there is none, with 1 where a check fails. Ceilings (copy bandwidth, matrix products in bfloat16) are
measured first, on random data. A kernel's floor is the larger of its operations over the one and its bytes over the
other; rows gathered again and again are counted once, since the tables fit into the second-level cache.
"""

# C cells, G genes, K bottleneck width, D width

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellplane.benchmark.cells import random_cells
from cellplane.cells import CellBatch, single_panel_batch
from cellplane.model import gpu
from cellplane.model.attention import flowformer
from cellplane.model.cellplm import CellPLM, new_model
from cellplane.model.config import MaskingConfig, ModelConfig
from cellplane.model.decoder import counts_of
from cellplane.model.gpu import dense_gene_sum, fused_reconstruction
from cellplane.model.kernels import Counts, chunked_reconstruction, gene_sum
from cellplane.model.masking import Mask, mask_genes
from cellplane.model.noise import Noise
from cellplane.model.segments import flowformer_segments
from cellplane.model.triton_kernels import VERSION, Scaled, Stored

NO_DEVICE, FAILED = 4, 1
GENES = 19_374  # of the released vocabulary
CHECK_CELLS, CHECK_GENES = 256, 2_000
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # norm of the difference over the norm
FLUSH_BYTES = 256 << 20  # written between two timings, so that none finds its input in the cache
DEVICE, HALF = "cuda", torch.bfloat16
Record = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What is measured: cells of a micro-batch, counts a cell, cells of a sentence (0: all in one), how often."""

    cells: int = 2000
    nonzeros: int = 2000
    sentence: int = 0
    repeats: int = 20
    seed: int = 0


@dataclass(frozen=True)
class Ceilings:
    """What this machine does at best: bytes and bfloat16 operations a second."""

    bytes_per_s: float
    flops_per_s: float


def main(arguments: list[str] | None = None) -> int:
    """Runs everything; 0 when every check passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in vars(Options()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = Options(**vars(parser.parse_args(arguments)))
    if not gpu.available(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        sys.stderr.write("no CUDA device with triton here: this benchmark measures GPUs only\n")
        return NO_DEVICE
    records = []
    for record in measured(options):
        sys.stdout.write(json.dumps(record) + "\n")
        sys.stdout.flush()
        records.append(record)
    sys.stdout.write(table(records))
    return FAILED if any(record.get("passed") is False for record in records) else 0


def measured(options: Options) -> Iterator[Record]:
    """Every record: the machine, the checks, the kernels, the model."""
    properties = torch.cuda.get_device_properties(0)
    ceilings = machine_ceilings(options)
    yield {"kind": "machine", "device": properties.name, "torch": torch.__version__, "triton": VERSION, **vars(ceilings)}
    yield from checks(options)
    network = new_model(ModelConfig(n_genes=GENES, n_batches=256, n_datasets=32, precision="bfloat16"), options.seed).to(DEVICE)
    batch, mask = cells(options, GENES)
    for record in (*loss_kernels(network, batch, mask, options), *other_kernels(network, batch, options)):
        floor_ms = 1e3 * max(record["flops"] / ceilings.flops_per_s, record["bytes"] / ceilings.bytes_per_s)
        yield {"kind": "kernel", **record, "floor_ms": floor_ms, "of_roofline": floor_ms / record["ms"]}
    for record in model_times(network, batch, mask, options):
        mfu = record["flops"] / (record["ms"] / 1e3) / ceilings.flops_per_s
        yield {"kind": "model", **record, "cells_per_s": batch.n_cells / (record["ms"] / 1e3), "mfu": mfu}


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Median time on the device, after two warm-ups, each repeat with a cold cache."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)
    times: list[float] = []
    for repeat in range(repeats + 2):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        work()
        end.record()
        end.synchronize()
        if repeat >= 2:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def machine_ceilings(options: Options) -> Ceilings:
    """A copy of 1 GiB (read and written) and an 8,192 cubed product of random bfloat16 matrices."""
    source, side = torch.rand(1 << 28, device=DEVICE), 8192
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=DEVICE).bfloat16() for _ in range(2))
    copy_ms = milliseconds(lambda: target.copy_(source), options.repeats)
    product_ms = milliseconds(lambda: a @ b, options.repeats)
    return Ceilings(2e3 * source.numel() * 4 / copy_ms, 2e3 * side**3 / product_ms)


def cells(options: Options, n_genes: int) -> tuple[CellBatch, Mask]:
    """Random cells and a released mask, on the device."""
    crow, gene, value = (torch.from_numpy(x) for x in random_cells(options.cells, min(options.nonzeros, n_genes), n_genes, options.seed))
    side = options.sentence or options.cells
    sizes = [min(side, options.cells - start) for start in range(0, options.cells, side)]
    batch = single_panel_batch(crow, gene, value, torch.ones(n_genes, dtype=torch.bool), sizes)
    mask = mask_genes(batch, np.array(sizes, dtype=np.int64), MaskingConfig(drop_cell_rate=0.0))
    return batch.to(DEVICE), mask.to(torch.device(DEVICE))


def checks(options: Options) -> Iterator[Record]:
    """Relative errors of values and gradients of each device function against its fallback on the same device."""
    small = replace(options, cells=CHECK_CELLS, nonzeros=CHECK_GENES // 10, sentence=100)
    batch, mask = cells(small, CHECK_GENES)
    counts, weight = counts_of(batch, mask), torch.log1p(batch.value)
    for dtype, tolerance in TOLERANCES.items():
        shapes = ((CHECK_CELLS, 128), (CHECK_GENES, 128), (CHECK_GENES,), (CHECK_GENES,))
        u, w, bias, dispersion = (torch.randn(shape, device=DEVICE) for shape in shapes)
        leaves = ((u / 4).to(dtype), w / 4, bias, dispersion)
        yield _check("reconstruction", (fused_reconstruction, chunked_reconstruction), leaves, tolerance, counts)
        genes = (torch.randn(CHECK_GENES, 256, device=DEVICE).to(dtype),)
        yield _check("gene sum", (dense_gene_sum, gene_sum), genes, tolerance, batch.gene, batch.crow, weight)
        qkv = tuple(torch.randn(CHECK_CELLS, 8, 128, device=DEVICE).to(dtype) for _ in range(3))
        yield _check("attention", (flowformer_segments, flowformer), qkv, tolerance, batch.cu_seqlens)


def _check(name: str, functions: tuple[Callable[..., Any], ...], given: tuple[Tensor, ...], tolerance: float, *others: Any) -> Record:
    results = []
    for function in functions:
        leaves = [x.detach().clone().requires_grad_() for x in given]
        out = function(*leaves, *others)
        values = out if isinstance(out, tuple) else (out,)
        torch.autograd.backward([value.float().mean() for value in values])
        results.append([*(value.detach() for value in values), *(leaf.grad for leaf in leaves)])
    errors = [float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)) for a, b in zip(*results, strict=True)]
    passed = all(error <= tolerance for error in errors)  # false for NaN
    return {"kind": "check", "name": name, "dtype": str(given[0].dtype), "error": max(errors), "tolerance": tolerance, "passed": passed}


def loss_kernels(network: CellPLM, batch: CellBatch, mask: Mask, options: Options) -> Iterator[Record]:
    """Each kernel of the fused likelihoods by itself, with the operations and the fewest bytes it needs."""
    decoder: Any = network.decoder
    u = torch.relu(torch.randn(batch.n_cells, network.config.decoder_bottleneck, device=DEVICE) / 4).to(HALF)
    counts = counts_of(batch, mask)
    scoring = gpu.scored_cells(counts)
    layer = (decoder.mean.weight.detach(), decoder.mean.bias.detach(), decoder.log_dispersion_G.detach())
    launch = gpu.Launch(gpu.problem_of(u, *layer, counts, scoring))
    mean, totals = launch.entry_means()
    scale = totals / launch.sums().clamp(min=1e-10)
    scaled = Scaled(scale, torch.ones_like(scale), torch.ones_like(scale))
    stored = Stored(mean, torch.zeros_like(mean), torch.zeros_like(mean))
    scored, (n_genes, width) = int(scoring.scored), decoder.mean.weight.shape
    entries = int(counts.crow.diff()[counts.hidden_C > 0].sum())
    product, table_bytes, dense = 2 * scored * n_genes * width, 2 * n_genes * width, scored * (n_genes // 8 + 2 * width)
    of_entries = 2 * entries * width
    work: dict[str, tuple[Callable[[], object], int, int]] = {
        "sums": (launch.sums, product, table_bytes + dense),
        "zeros": (lambda: launch.zeros(scale), product, table_bytes + dense),
        "dense_u": (lambda: launch.dense_u(scaled), 2 * product, table_bytes + dense + 4 * scored * width * launch.splits),
        "by_gene": (lambda: launch.by_gene(scaled, stored), 2 * product + of_entries, 3 * table_bytes + dense + 40 * entries),
        "entry_means": (launch.entry_means, of_entries, table_bytes + 17 * entries),
        "entry_terms": (lambda: launch.entry_terms(scale, mean), 0, 17 * entries),
        "entry_slopes": (lambda: launch.entry_slopes(scaled, stored), of_entries, table_bytes + 25 * entries),
    }
    for name, (function, flops, moved) in work.items():
        yield {"name": name, "ms": milliseconds(function, options.repeats), "flops": flops, "bytes": moved}
    yield from _whole_loss(network, u, counts, product, options)


def _whole_loss(network: CellPLM, u: Tensor, counts: Counts, product: int, options: Options) -> Iterator[Record]:
    decoder: Any = network.decoder
    parameters = [x.detach().requires_grad_() for x in (u, decoder.mean.weight, decoder.mean.bias, decoder.log_dispersion_G)]

    def _step(function: Callable[..., tuple[Tensor, Tensor]]) -> None:
        full, hidden = function(*parameters, counts)
        torch.autograd.backward([full.sum(), hidden.sum()])

    moved = 4 * 2 * parameters[1].numel() + 25 * len(counts.gene)
    for name, function in (("fused loss, both ways", fused_reconstruction), ("fallback loss, both ways", chunked_reconstruction)):
        yield {"name": name, "ms": milliseconds(lambda f=function: _step(f), options.repeats), "flops": 6 * product, "bytes": moved}  # type: ignore[misc]


def other_kernels(network: CellPLM, batch: CellBatch, options: Options) -> Iterator[Record]:
    """The gene sum and the attention, forward, and forward and backward."""
    table_GD = network.embedder.genes_GD.detach().to(HALF).requires_grad_()
    weight, (n_genes, width) = torch.log1p(batch.value), table_GD.shape
    dense, moved = 2 * batch.n_cells * n_genes * width, 2 * n_genes * width + 2 * batch.n_cells * n_genes + 12 * len(batch.gene)
    qkv = [torch.randn(batch.n_cells, network.config.n_heads, width // network.config.n_heads, device=DEVICE).to(HALF) for _ in range(3)]
    leaves = [x.requires_grad_() for x in qkv]
    flow = 4 * batch.n_cells * width * qkv[0].shape[-1]
    attention_bytes = 2 * 4 * batch.n_cells * width

    def _with_backward(function: Callable[..., Tensor], *given: Tensor) -> Callable[[], None]:
        return lambda: torch.autograd.backward(function(*given).float().sum())

    rows: list[tuple[str, Callable[[], object], int, int]] = []
    for name, sums in (("dense gene sum", dense_gene_sum), ("gathered gene sum", gene_sum)):
        given = (batch.gene, batch.crow, weight)
        rows.append((f"{name}, forward", lambda f=sums, g=given: f(table_GD.detach(), *g), dense, moved))  # type: ignore[misc]
        rows.append((f"{name}, both ways", _with_backward(sums, table_GD, *given), 2 * dense, 3 * moved))
    for name, attend in (("attention in segments", flowformer_segments), ("attention by sentences", flowformer)):
        plain = [x.detach() for x in qkv]
        rows.append((f"{name}, forward", lambda f=attend, p=plain: f(*p, batch.cu_seqlens), flow, attention_bytes))  # type: ignore[misc]
        rows.append((f"{name}, both ways", _with_backward(attend, *leaves, batch.cu_seqlens), 3 * flow, 3 * attention_bytes))
    for name, function, flops, bytes_moved in rows:
        yield {"name": name, "ms": milliseconds(function, options.repeats), "flops": flops, "bytes": bytes_moved}


def forward_flops(config: ModelConfig, nonzeros: int, decode: bool) -> int:
    """Operations of one cell's forward pass; the gene sum by its stored counts, not by what a dense product wastes."""
    d, z = config.width, config.latent_width
    blocks = config.n_blocks * (8 * d * d + 2 * d * (d // config.n_heads))
    latent = d * config.n_clusters + (d + config.n_clusters) * config.cluster_width + 2 * config.cluster_width * z
    decoder = z * config.decoder_width + config.decoder_width * config.decoder_bottleneck + config.decoder_bottleneck * config.n_genes
    return 2 * (nonzeros * d + d * d + blocks + latent + (decoder if decode else 0))


def model_times(network: CellPLM, batch: CellBatch, mask: Mask, options: Options) -> Iterator[Record]:
    """The network as it is: an embedding without gradient, and a whole training step with fused AdamW."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-4, weight_decay=1e-8, fused=True)  # as released
    embed = torch.inference_mode()(lambda: network(batch).latent)

    def _step() -> None:
        optimizer.zero_grad(set_to_none=True)
        network(batch, mask, Noise(options.seed)).loss.total.mean().backward()
        optimizer.step()

    for name, function, decode, passes in (("embedding", embed, False, 1), ("training step", _step, True, 3)):
        torch.cuda.reset_peak_memory_stats()
        ms = milliseconds(function, options.repeats)
        flops = passes * batch.n_cells * forward_flops(network.config, options.nonzeros, decode)
        yield {"name": name, "ms": ms, "flops": flops, "peak_bytes": torch.cuda.max_memory_allocated() - FLUSH_BYTES}


def table(records: list[Record]) -> str:
    """The records for a person."""
    lines = ["", f"{'what':34}{'ms':>10}{'GFLOP':>10}{'MB':>10}{'floor ms':>10}{'of it':>8}"]
    for record in records:
        match record["kind"]:
            case "machine":
                limits = f"{record['bytes_per_s'] / 1e12:.2f} TB/s, {record['flops_per_s'] / 1e12:.0f} TFLOP/s bfloat16"
                lines.insert(0, f"\n{record['device']}: {limits}")
            case "check":
                verdict = "ok" if record["passed"] else "WRONG"
                lines.append(f"{record['name'] + ' ' + record['dtype'].removeprefix('torch.'):34}{verdict:>10} error {record['error']:.1e}")
            case "kernel":
                numbers = f"{record['ms']:10.3f}{record['flops'] / 1e9:10.1f}{record['bytes'] / 1e6:10.1f}"
                lines.append(f"{record['name']:34}{numbers}{record['floor_ms']:10.3f}{record['of_roofline']:8.0%}")
            case "model":
                lines.append(f"{record['name']:34}{record['ms']:10.3f}  {record['cells_per_s']:,.0f} cells/s, MFU {record['mfu']:.1%}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
