"""What predicting whole files costs beside the network, and whether its memory grows with their cells.

Predicting loads a model, reads a file, aligns its genes, deals its cells to sentences, asks the network and writes a file,
all of which a user waits for and the gate counts. The bare network is loaded and answers packs of the same size that lie
ready, with the same weights, type of numbers and threads, in the same process. Cells are made for measuring; everything
lies in a temporary folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellplane.benchmark.model import conditions
from cellplane.benchmark.report import Figure, asked_parts, at_least, at_most
from cellplane.benchmark.sides import Rounds, Side, alternate
from cellplane.config import find_config, read_yaml

OURS = "cellplane.benchmark.predict_ours"
GENES = 19_374  # of the released 85M checkpoint
MODELS = ("10m", "85m")
KEPT, GROWTH = 0.9, 1.25  # at least; at most, the largest file beside the smallest
BARE_PACKS = 12
FEW, MANY = 10_000, 1_000_000
FLAT = dict(genes=2_000, nonzeros=100)  # a million cells are 1.2 GB
MIB = 1 << 20


@dataclass(frozen=True)
class PredictBenchmark:
    """What to measure: cells of a file, their non-zero counts, threads, quiet rounds, the parts and the models (none: all)."""

    cells: int = 100_000
    nonzeros: int = 1350
    threads: int = 2
    rounds: int = 3
    only: tuple[str, ...] = ()
    models: tuple[str, ...] = ()

    def run(self) -> Iterator[Figure]:
        """Every figure as soon as it is known. Raises BenchmarkError when a process fails."""
        for part in asked_parts(PARTS, self.only):
            yield from part(self)


def speed(plan: PredictBenchmark) -> Iterator[Figure]:
    """Cells a second of a whole file, read and written, beside those of the network alone."""
    for model in plan.models or MODELS:
        with tempfile.TemporaryDirectory(prefix="cp-") as name, Side(model, OURS, None, plan.threads) as side:
            source, weights, out = (str(Path(name) / part) for part in ("in.h5ad", "model", "out.h5ad"))
            side.ask("threads", dict(number=plan.threads))
            side.ask("make", dict(path=source, cells=plan.cells, genes=GENES, nonzeros=plan.nonzeros))
            side.ask("model", dict(path=weights, config=read_yaml(find_config(model, "model")), genes=GENES))
            side.ask("ready", dict(model=weights, path=source))
            whole = _asked("predict", dict(model=weights, path=source, out=out, cells=plan.cells))
            runs = {"bare": (side, _asked("bare", dict(packs=BARE_PACKS))), "whole": (side, whole)}
            runs["bare"][1](side)  # memory that is touched for the first time
            rounds = alternate(runs, plan.rounds)
        yield from _compared(f"predict, {model}, {plan.cells} cells", rounds)


def _compared(name: str, rounds: Rounds) -> Iterator[Figure]:
    """The gate, by the clock and with the model's loading; then without it, and by the processor, which other processes disturb less."""
    quiet = conditions(rounds)
    alone, answered = (1 / rounds.median(side, "s_per_cell") for side in ("bare", "whole"))
    whole = None if (slower := rounds.ratio("bare", "whole", "s_per_cell")) is None else 1 / slower
    details = {**quiet["details"], "bare": alone, "whole": answered}
    yield at_least(name, whole, KEPT, "of the bare network's cells/s").because(
        f"{alone:.4g} -> {answered:.4g} cells/s; {quiet['note']}", details
    )
    steady = rounds.median("bare", "s_per_cell") / rounds.median("whole", "without_loading")
    cpu = rounds.median("bare", "cpu_s_per_cell") / rounds.median("whole", "cpu_s_per_cell")
    yield Figure(f"{name}, model loaded", steady if rounds.foreign else None, "of the bare network's cells/s")
    yield Figure(f"{name}, processor", cpu, "of the bare network's cells/CPU-s")


def _asked(command: str, arguments: dict[str, Any]) -> Callable[[Side], dict[str, Any]]:
    return lambda side: side.ask(command, arguments)


def memory(plan: PredictBenchmark) -> Iterator[Figure]:
    """Peak memory of a process that answers many cells beside one that answers few."""
    peaks = {}
    with tempfile.TemporaryDirectory(prefix="cp-") as name:
        weights = str(Path(name) / "model")
        for cells in (FEW, MANY):
            source, out = (str(Path(name) / f"{part}.h5ad") for part in ("in", "out"))
            with Side("maker", OURS, None, plan.threads) as maker:
                maker.ask("make", dict(path=source, cells=cells, **FLAT))
                maker.ask("model", dict(path=weights, config=read_yaml(find_config("tiny", "model")), genes=FLAT["genes"]))
            with Side("predictor", OURS, None, plan.threads) as side:
                side.ask("threads", dict(number=plan.threads))
                peaks[cells] = side.ask("predict", dict(model=weights, path=source, out=out, cells=cells))
    few, many = (float(peaks[cells]["peak_bytes"]) for cells in (FEW, MANY))
    figure = at_most(f"peak memory, {MANY} cells beside {FEW}", many / few, GROWTH, "times")
    speeds = {f"cells_per_s_{cells}": 1 / float(found["s_per_cell"]) for cells, found in peaks.items()}
    yield figure.because(f"{few / MIB:.0f} -> {many / MIB:.0f} MiB", {"few_bytes": few, "many_bytes": many, **speeds})


PARTS = {"speed": speed, "memory": memory}
