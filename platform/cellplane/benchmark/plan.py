"""The control plane of a large pre-training, simulated: the manifest of a whole atlas and the step plan of many workers.

No cell is made: manifest and plan know only sizes. Times are seconds of processor, so that a busy machine changes little;
memory is what the objects hold. Every worker of a run does by itself what is measured here for one.
"""

from __future__ import annotations

import gc
import hashlib
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cellplane.benchmark.report import Figure, asked_parts, at_most
from cellplane.data.manifest import MANIFEST, DatasetEntry, Manifest, SentenceRow, ShardEntry, pack_panel, read_manifest, write_manifest
from cellplane.data.sentences import PlanConfig, StepPlan, deal

GENES, NONZEROS = 19_374, 1_350  # of the released vocabulary; of a 10x cell
DATASETS, SAMPLES_OF_EACH = 200, 50
SHARD_BYTES = 256 << 20  # configs/data/default.yaml
STEP_S = 0.0376  # of 64 H100, as `cellplane plan` expects (docs/scale.md); nobody has measured it
STEPS = 100_000
MIB = 1 << 20

ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class PlanBenchmark:
    """How large: cells in so many shards, sentences of ``sentence`` cells on average, workers with a micro-batch each."""

    cells: int = 102_400_000
    shards: int = 1_600
    sentence: int = 1_024
    workers: int = 64
    steps: int = STEPS
    only: tuple[str, ...] = ()

    def run(self) -> Iterator[Figure]:
        """Every figure as soon as it is known."""
        for part in asked_parts(PARTS, self.only):
            yield from part(self)

    @property
    def config(self) -> PlanConfig:
        """A micro-batch for each worker."""
        return PlanConfig(cells_per_micro_batch=4096, micro_batches_per_step=self.workers)

    def sizes(self) -> NDArray[np.int64]:
        """Cells of every sentence: even between a few and twice the mean, their sum as asked."""
        count = max(self.cells // self.sentence, self.shards)
        drawn = np.random.default_rng(0).uniform(0.05, 1.95, count)
        ends = np.floor(np.cumsum(drawn) * (self.cells / drawn.sum()) + 0.5).astype(np.int64)
        sizes: NDArray[np.int64] = np.maximum(np.diff(ends, prepend=0), 1)
        return sizes

    def manifest(self) -> Manifest:
        """What a conversion of so many cells would leave."""
        sizes = self.sizes()
        shard = np.arange(len(sizes)) * self.shards // len(sizes)
        dataset = shard * DATASETS // self.shards
        first = np.cumsum(sizes) - sizes
        place = np.arange(len(sizes)) - np.searchsorted(shard, shard)
        columns = (shard, place, sizes, sizes * NONZEROS, dataset * SAMPLES_OF_EACH + place % SAMPLES_OF_EACH, dataset, first)
        cells = np.bincount(shard, weights=sizes, minlength=self.shards).astype(np.int64)
        panel = pack_panel(np.ones(GENES, dtype=bool))
        return Manifest(
            vocabulary_file="vocabulary.txt",
            vocabulary_sha256=_sha256("vocabulary"),
            vocabulary_fingerprint=_sha256("genes"),
            n_genes=GENES,
            max_cells=2048,
            config_fingerprint=_sha256("config"),
            datasets=tuple(_dataset(number, int(cells.sum()) // DATASETS, panel) for number in range(DATASETS)),
            shards=tuple(_shard(number, int(cells[number]), number * DATASETS // self.shards) for number in range(self.shards)),
            sentences=tuple(SentenceRow(*row) for row in zip(*(column.tolist() for column in columns), strict=True)),
            batch_names=tuple(f"sample-{number}" for number in range(DATASETS * SAMPLES_OF_EACH)),
            label_names=(),
        )


def manifest(plan: PlanBenchmark) -> Iterator[Figure]:
    """Written once by a conversion, read by every worker at its start."""
    made = plan.manifest()
    told = f"{plan.cells:,} cells, {plan.shards:,} shards, {len(made.sentences):,} sentences"
    with tempfile.TemporaryDirectory(prefix="cp-plan-") as folder:
        _, spent, _ = _measured(lambda: write_manifest(Path(folder), made))
        yield Figure("manifest, written", spent, "s").because(told)
        yield Figure("manifest, on the disk", (Path(folder) / MANIFEST).stat().st_size / MIB, "MiB")
        read, spent, held = _measured(lambda: read_manifest(Path(folder)))
        yield at_most("manifest, read and its checksum compared", spent, 10.0, "s")
        yield at_most("manifest, held by a worker", held / MIB, 256.0, "MiB")
        yield Figure("manifest, comes back the same", float(read == made), "", "== 1", read == made)


def steps(plan: PlanBenchmark) -> Iterator[Figure]:
    """What a worker does to know its next micro-batch, and that all workers together see every sentence once."""
    sizes = plan.sizes()
    made = StepPlan(sizes, plan.config)
    _, spent, held = _measured(lambda: made.at(0))
    count = made.steps_of_epoch(0)
    yield at_most("plan, the first step of an epoch", spent, 5.0, "s").because(f"{len(sizes):,} sentences in {count:,} steps")
    yield at_most("plan, held by a worker", held / MIB, 256.0, "MiB")
    asked, spent, _ = _measured(lambda: [deal(made.at(step), 0, plan.workers) for step in range(count)])
    each = spent / count
    yield at_most("plan, another step", each * 1e3, 1e3 * STEP_S / 10, "ms").because(f"a step is expected to take {STEP_S * 1e3:.3g} ms")
    seen = Counter(
        s
        for step in range(count)
        for rank in range(plan.workers)
        for m in deal(made.at(step), rank, plan.workers)
        if m
        for s in m.sentences
    )
    whole = len(seen) == len(sizes) and set(seen.values()) == {1}
    yield Figure(f"plan, every sentence once over {plan.workers} workers", float(whole), "", "== 1", whole)
    full = sum(len(own) for own in asked)
    idle = sum(micro_batch is None for own in asked for micro_batch in own)
    filled = float(np.mean([sum(int(sizes[s]) for s in m.sentences) for own in asked for m in own if m]))
    told = f"{idle} of {full} turns of rank 0 are empty"
    yield Figure("plan, cells of a micro-batch", filled / plan.config.cells_per_micro_batch, "of what fits").because(told)


def resume(plan: PlanBenchmark) -> Iterator[Figure]:
    """What a worker that starts again near the end needs before its first step: every epoch before is counted."""
    made = StepPlan(plan.sizes(), plan.config)
    (epoch, _), spent, _ = _measured(lambda: made.epoch_of(plan.steps - 1))
    yield at_most("plan, resumed", spent, 60.0, "s").because(f"step {plan.steps:,} lies in epoch {epoch}")


def verify(plan: PlanBenchmark) -> Iterator[Figure]:
    """What the first start on a node costs: one process of it hashes every shard, once a day."""
    block = np.random.default_rng(0).bytes(64 * MIB)
    _, spent, _ = _measured(lambda: hashlib.sha256(block).hexdigest())
    rate = len(block) / spent
    yield Figure("sha256, one thread", rate / 1e9, "GB/s")
    yield Figure("shards, checked by a node", plan.shards * SHARD_BYTES / rate / 60, "min").because("if the storage gives as much")


def _measured(work: Callable[[], ValueT]) -> tuple[ValueT, float, int]:
    """(the result, processor seconds, bytes that this process holds more than before)."""
    gc.collect()
    before, began = _rss(), time.process_time()
    result = work()
    spent = time.process_time() - began
    gc.collect()
    return result, spent, max(_rss() - before, 0)


def _rss() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _dataset(number: int, cells: int, panel: str) -> DatasetEntry:
    name = f"dataset-{number}"
    return DatasetEntry(name, f"{name}.h5ad", 1 << 30, _sha256(name), cells, panel, "X", False, 0.0, {"measured": GENES})


def _shard(number: int, cells: int, dataset: int) -> ShardEntry:
    name = f"shard-{number:05d}.arrow"
    return ShardEntry(name, SHARD_BYTES, _sha256(name), cells, cells * NONZEROS, dataset)


PARTS = {"manifest": manifest, "steps": steps, "resume": resume, "verify": verify}
