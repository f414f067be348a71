"""CellPLM as released beside ours: embedding, training step, memory, packing. Same machine, same weights, same cells.

The 85M configuration, 2,000 cells of 2,000 non-zero counts each, unless told otherwise. Every ratio comes from rounds in
which the two sides ran in turn and nothing else did (see `sides`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cellplane.benchmark.environments import environment
from cellplane.benchmark.report import Figure, asked_parts, at_least, at_most
from cellplane.benchmark.sides import Rounds, Side, alternate

GENES = 19_374  # of the released 85M checkpoint
GIB = 1 << 30
ORIGINAL, OURS = "cellplane.benchmark.original", "cellplane.benchmark.ours"
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class ModelBenchmark:
    """What to measure: sizes, rounds, and the released package's Python (None: its environment is made)."""

    cells: int = 2000
    nonzeros: int = 2000
    threads: int = 2
    rounds: int = 5
    genes: int = GENES
    original_python: Path | None = None
    only: tuple[str, ...] = ()

    def run(self) -> Iterator[Figure]:
        """Every figure as soon as it is known. Raises BenchmarkError when a side fails."""
        python = self.original_python or environment("original")
        with tempfile.TemporaryDirectory(prefix="cellplane-benchmark-") as folder:
            for part in asked_parts(PARTS, self.only):
                yield from part(self, python, Path(folder))

    def original(self, python: Path, folder: Path) -> Side:
        """The released package with the cells, its checkpoint written to ``folder``."""
        side = Side("original", ORIGINAL, python, self.threads)
        side.ask("setup", dict(genes=self.genes, threads=self.threads, folder=str(folder)))
        side.ask("cells", dict(cells=self.cells, nonzeros=self.nonzeros))
        return side

    def ours(self, precision: str, source: dict[str, Any], cells: int | None = None, sentence: int | None = None) -> Side:
        """Our model with the cells."""
        side = Side(f"ours {precision}", OURS, None, self.threads)
        side.ask("setup", dict(threads=self.threads, precision=precision, **source))
        side.ask("cells", dict(cells=cells or self.cells, nonzeros=min(self.nonzeros, self.genes), sentence=sentence))
        return side


def embedding(plan: ModelBenchmark, python: Path, folder: Path) -> Iterator[Figure]:
    """Cells per second from counts to latent, and whether it is the same latent."""
    with plan.original(python, folder) as original:
        limits = {"float32": 2.2, "bfloat16": 6.0}
        original.ask("embed", dict(save=str(folder / "original.npz")))
        for precision in PRECISIONS:
            with plan.ours(precision, {"folder": str(folder)}) as ours:
                ours.ask("embed", dict(save=str(folder / f"{precision}.npz")))
                ours.ask("posterior", dict(hidden=str(folder / "original.npz"), save=str(folder / "posterior.npz")))
                runs = {"original": (original, _embed), "ours": (ours, _embed)}
                rounds = alternate(runs, plan.rounds)
            yield _speed(f"embedding {precision}", rounds, plan.cells, limits[precision])
            yield _agreement(precision, folder)


def training(plan: ModelBenchmark, python: Path, folder: Path) -> Iterator[Figure]:
    """Cells per second of an optimizer step, masks included."""
    with plan.original(python, folder) as original:
        limits = {"float32": 3.0, "bfloat16": 6.0}
        original.ask("step")
        for precision in PRECISIONS:
            with plan.ours(precision, {"folder": str(folder)}) as ours:
                ours.ask("step")
                runs = {"original": (original, _step), "ours": (ours, _step)}
                rounds = alternate(runs, plan.rounds)
            yield _speed(f"training step {precision}", rounds, plan.cells, limits[precision])


def memory(plan: ModelBenchmark, python: Path, folder: Path) -> Iterator[Figure]:
    """Peak memory of a step, in a process that does nothing else; and a context ten times as long."""
    with plan.original(python, folder) as original:
        theirs = _above(original)
    yield Figure("memory of a step, original", theirs["above_gib"], "GiB above weights and state", details=theirs)
    for precision in PRECISIONS:
        with plan.ours(precision, {"folder": str(folder)}) as ours:
            found = _above(ours)
        name = f"memory of a step, {precision}"
        yield at_most(name, found["above_gib"], theirs["above_gib"] / 12, "GiB above weights and state").because(details=found)
        yield at_most(f"{name}, peak", found["peak_gib"], 2.0, "GiB")


def contexts(plan: ModelBenchmark, python: Path, folder: Path) -> Iterator[Figure]:  # noqa: ARG001  (same call for every part)
    """Steps over one context of 1,000 ... 20,000 cells: time a cell and memory."""
    first: float | None = None
    for cells in (1000, 2000, 5000, 10_000, 20_000):
        with plan.ours("float32", {"model": "85m", "genes": plan.genes}, cells=cells) as ours:
            ours.ask("step")
            answers = [ours.ask("step") for _ in range(2)]
        fastest = min(float(answer["wall_s"]) for answer in answers) / cells
        first = first or fastest
        peak = max(int(answer["peak_bytes"]) for answer in answers) / GIB
        note = f"{fastest * 1e3:.2f} ms a cell, {fastest / first:.2f} of 1,000 cells'"
        details = {"ms_a_cell": fastest * 1e3, "cells": cells}
        yield at_most(f"context of {cells} cells, peak", peak, 8.0, "GiB").because(note, details)


def packing(plan: ModelBenchmark, python: Path, folder: Path) -> Iterator[Figure]:  # noqa: ARG001  (same call for every part)
    """200 requests in one forward against one forward each."""
    cases = (
        ("85m", 20, "float32", 1.5),
        ("85m", 20, "bfloat16", 1.8),
        ("85m", 1, "float32", 8.0),
        ("85m", 1, "bfloat16", 8.0),
        ("tiny", 20, "float32", 5.0),
    )
    for model, size, precision, limit in cases:
        with plan.ours(precision, {"model": model, "genes": plan.genes}, cells=200 * size, sentence=size) as ours:
            ours.ask("embed"), ours.ask("separate")
            runs = {"packed": (ours, _embed), "separate": (ours, lambda side: side.ask("separate"))}
            rounds = alternate(runs, plan.rounds)
        yield at_least(f"200 x {size} cells packed, {model} {precision}", rounds.ratio("packed", "separate"), limit).because(
            **conditions(rounds)
        )


PARTS: dict[str, Callable[[ModelBenchmark, Path, Path], Iterator[Figure]]] = {
    "embedding": embedding,
    "training": training,
    "memory": memory,
    "contexts": contexts,
    "packing": packing,
}


def _embed(side: Side) -> dict[str, Any]:
    return side.ask("embed")


def _step(side: Side) -> dict[str, Any]:
    return side.ask("step")


def _above(side: Side) -> dict[str, float]:
    """The highest of three steps after the first, which creates the optimizer's state."""
    side.ask("step")
    answers = [side.ask("step") for _ in range(3)]
    peak = max(int(answer["peak_bytes"]) for answer in answers)
    runtime, state = int(answers[0]["runtime_bytes"]), int(answers[0]["state_bytes"])
    sizes = {"peak_gib": peak, "runtime_gib": runtime, "state_gib": state, "above_gib": peak - runtime - state}
    return {name: value / GIB for name, value in sizes.items()}


def _speed(name: str, rounds: Rounds, cells: int, limit: float) -> Figure:
    details = {
        f"{side}_{key}": value
        for side in ("original", "ours")
        for key, value in (
            ("cells_per_s", cells / rounds.median(side, "wall_s")),
            ("cpu_ms_a_cell", rounds.median(side, "cpu_s") / cells * 1e3),
            ("spread", rounds.spread(side, "wall_s")),
        )
    }
    quiet = conditions(rounds)
    theirs, ours = details["original_cells_per_s"], details["ours_cells_per_s"]
    quiet["note"] = f"{theirs:.0f} -> {ours:.0f} cells/s; {quiet['note']}"
    return at_least(name, rounds.ratio("ours", "original"), limit).because(quiet["note"], quiet["details"] | details)


def conditions(rounds: Rounds) -> dict[str, Any]:
    """A ratio's note and details: how many rounds were quiet, and how much ran beside them."""
    if not rounds.foreign:
        return {"note": f"no ratio: other processes ran in all {rounds.discarded} rounds", "details": {}}
    note = f"{len(rounds.foreign)} rounds, {rounds.discarded} noisy ones left out"
    return {"note": note, "details": {"foreign_load": max(rounds.foreign)}}


def _agreement(precision: str, folder: Path) -> Figure:
    """fp32: largest relative difference of hidden states and of the latent from the released cluster sample; bf16: cosines."""
    original, ours = np.load(folder / "original.npz"), np.load(folder / f"{precision}.npz")
    if precision == "float32":
        posterior = np.load(folder / "posterior.npz")["latent"]
        worst = max(_difference(ours["hidden"], original["hidden"]), _difference(posterior, original["latent"]))
        return at_most("embedding float32, difference", worst, 1e-4, "relative")
    exact = np.load(folder / "float32.npz")
    cosine = {key: _cosines(ours[key], exact[key]) for key in ("hidden", "latent")}
    details = {"hidden_smallest": float(cosine["hidden"].min()), "latent_median": float(np.median(cosine["latent"]))}
    return at_least("embedding bfloat16, smallest cosine of a cell", float(cosine["latent"].min()), 0.999, "").because(details=details)


def _difference(ours: Any, theirs: Any) -> float:
    """Largest |difference| / (|theirs| + the typical size of a value): a relative error that zeros do not blow up."""
    return float((np.abs(ours - theirs) / (np.abs(theirs) + np.abs(theirs).mean())).max())


def _cosines(a: Any, b: Any) -> Any:
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
