"""The data plane beside other loaders and converters: same machine, same cells, same run; cells per CPU-second.

A CPU-second is counted over all threads of the process that works, because on a training machine the cores that a loader
takes are missing elsewhere. Everything lies in a temporary folder and is gone afterwards.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellplane.benchmark.environments import environment
from cellplane.benchmark.model import conditions
from cellplane.benchmark.report import Figure, asked_parts, at_least, at_most
from cellplane.benchmark.sides import Rounds, Side, alternate
from cellplane.errors import BenchmarkError

OURS, PEERS = "cellplane.benchmark.data_ours", "cellplane.benchmark.data_peers"
CONVERTER, WATCHED = "cellplane.benchmark.data_convert", "cellplane.benchmark.data_ray"
NODES, CORES = 16, 32  # of the cluster a projection is for
LIBRARIES = {"annbatch": "annbatch", "scDataset": "loaders", "SCDL": "loaders"}  # and the environment of each
BLOCK = 2000  # cells, as many as a sentence of a simulated sample has
GB = 1e9
CONVERTED = 3  # times: the first one pays for memory that the machine has not used yet
FASTER_READING = {"annbatch": 5.0, "scDataset": 20.0, "SCDL": 20.0}
FASTER_CONVERSION = {"annbatch": 4.0, "SCDL": 4.0}
CONVERSIONS = (  # our mode, gzip, cells per CPU-second asked for
    ("bare", False, 75_000.0),
    ("full", False, 40_000.0),
    ("full", True, 20_000.0),
)


@dataclass(frozen=True)
class DataBenchmark:
    """What to measure: simulated cells and their sizes, quiet rounds, the parts."""

    cells: int = 100_000
    nonzeros: int = 1350
    threads: int = 1
    rounds: int = 5
    genes: int = 20_000
    only: tuple[str, ...] = ()
    libraries: tuple[str, ...] = tuple(LIBRARIES)

    def run(self) -> Iterator[Figure]:
        """Every figure as soon as it is known. Raises BenchmarkError when our side fails; a peer's failure is a note."""
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="cellplane-benchmark-"))
            ours, converter = (stack.enter_context(Side("ours", module, None, self.threads)) for module in (OURS, CONVERTER))
            files = Files(self, Path(folder), ours, converter)
            for part in asked_parts(PARTS, self.only, ON_REQUEST):
                yield from part(self, files)

    def complete(self, answer: dict[str, Any], side: str) -> dict[str, Any]:
        """The same answer; BenchmarkError when a side did not read every cell."""
        found, expected = (answer["cells"], answer["entries"]), (self.cells, self.cells * self.nonzeros)
        if found != expected:
            raise BenchmarkError(f"{side} read {found} cells and entries, there are {expected}: its figures would mean nothing")
        return answer


@dataclass
class Files:
    """The simulated cells in every form, each made when it is first asked for."""

    plan: DataBenchmark
    folder: Path
    ours: Side
    converter: Side

    def h5ad(self, gzip: bool = False) -> str:
        """As h5ad, plain or gzip as anndata writes it."""
        path = self.folder / ("gzip.h5ad" if gzip else "plain.h5ad")
        if not path.exists():
            sizes = dict(cells=self.plan.cells, genes=self.plan.genes, nonzeros=self.plan.nonzeros)
            self.converter.ask("make", dict(path=str(path), gzip=gzip, **sizes))
        return str(path)

    def shards(self) -> str:
        """As our shards."""
        out = self.folder / "shards"
        if not out.exists():
            self.converter.ask("convert", dict(source=self.h5ad(), out=str(out), mode="full"))
        return str(out)

    def of(self, library: str, side: Side) -> str:
        """In the form a library reads."""
        if library == "scDataset":
            return self.h5ad()
        out = self.folder / f"{library}.data"
        if not out.exists():
            side.ask("convert", dict(library=library, source=self.h5ad(), out=str(out)))
        return str(out)


def reading(plan: DataBenchmark, files: Files) -> Iterator[Figure]:
    """Shuffled blocks to torch CSR: in a Ray Train worker beside bare Arrow, then in turn with other loaders."""
    folder = files.shards()
    found = plan.complete(files.ours.ask("train_worker", dict(folder=folder, rounds=plan.rounds)), "ours")
    speed = {name: plan.cells / found[f"{name}_cpu_s"] for name in ("ours", "ahead", "bare", "bare_int32")}
    note = f"{plan.cells / found['ours_wall_s']:.3g} cells/s of wall time, inside a Ray Train worker"
    yield at_least("reading", speed["ours"], 1e6, "cells/CPU-s").because(note, speed)
    yield at_least("reading, share of bare Arrow", speed["ours"] / speed["bare"], 0.9, "").because(f"bare: {speed['bare']:.3g} cells/CPU-s")
    yield Figure("reading ahead by a thread", speed["ahead"], "cells/CPU-s", note="as in training: three sets of buffers go round")
    yield Figure(
        "bare Arrow with int32 genes", speed["bare_int32"], "cells/CPU-s", note="what narrower genes in a batch could give at most"
    )
    files.ours.ask("open_shards", dict(folder=folder))
    for library in plan.libraries:
        yield from _beside(plan, files, library, (f"reading, faster than {library}", FASTER_READING[library], _read))


def _read(plan: DataBenchmark, files: Files, side: Side, library: str) -> Rounds:
    source = files.of(library, side)
    asked = dict(library=library, source=source, block=BLOCK)
    plan.complete(side.ask("read", asked), library)
    runs = {
        "ours": (files.ours, lambda ours: ours.ask("read", dict(folder=files.shards()))),
        library: (side, lambda theirs: theirs.ask("read", asked)),
    }
    return alternate(runs, plan.rounds, patience=2)


def conversion(plan: DataBenchmark, files: Files) -> Iterator[Figure]:
    """An h5ad to what is trained from, by mode; the full one in turn with other converters."""
    for mode, gzip, limit in CONVERSIONS:
        source, out = files.h5ad(gzip), files.folder / "again"
        answers = [_fresh_conversion(plan, source, out, mode) for _ in range(CONVERTED)]
        best = min(answers, key=lambda answer: float(answer["cpu_s"]))
        name = f"conversion, {mode}, {'gzip' if gzip else 'uncompressed'}"
        details = {"wall_s": best["wall_s"], "before_gb": best["before_bytes"] / GB}
        yield at_least(name, plan.cells / best["cpu_s"], limit, "cells/CPU-s").because(f"the best of {CONVERTED}", details)
        peak = max(float(answer["peak_bytes"]) for answer in answers) / GB
        yield at_most(f"{name}, peak of the process", peak, 0.5, "GB").because(details=details)
    for library in (library for library in plan.libraries if library in FASTER_CONVERSION):
        yield from _beside(plan, files, library, (f"conversion, full, faster than {library}", FASTER_CONVERSION[library], _conversions))


def _fresh_conversion(plan: DataBenchmark, source: str, out: Path, mode: str) -> dict[str, Any]:
    """In a process that did nothing before, so that its peak of memory is the conversion's."""
    with Side("ours", CONVERTER, None, plan.threads) as ours:
        return _convert(ours, source, out, {"mode": mode})


def _conversions(plan: DataBenchmark, files: Files, side: Side, library: str) -> Rounds:
    source, out = files.h5ad(), files.folder / "again"
    runs = {
        "ours": (files.converter, lambda ours: _convert(ours, source, out, {"mode": "full"})),
        library: (side, lambda theirs: _convert(theirs, source, out, {"library": library})),
    }
    return alternate(runs, min(plan.rounds, 2), patience=2)


def _convert(side: Side, source: str, out: Path, asked: dict[str, str]) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    answer = side.ask("convert", dict(source=source, out=str(out), **asked))
    shutil.rmtree(out, ignore_errors=True)
    return answer


Compared = tuple[str, float, Callable[[DataBenchmark, Files, Side, str], Rounds]]


def _beside(plan: DataBenchmark, files: Files, library: str, compared: Compared) -> Iterator[Figure]:
    """One ratio of CPU-seconds; without a value, and why, when the library cannot be installed or fails."""
    name, limit, rounds_of = compared
    try:
        with ExitStack() as stack:
            side = stack.enter_context(Side(library, PEERS, environment(LIBRARIES[library]), plan.threads))
            rounds = rounds_of(plan, files, side, library)
    except BenchmarkError as error:
        yield at_least(name, None, limit).because(str(error))
        return
    speeds = {side: plan.cells / rounds.median(side, "cpu_s") for side in ("ours", library)}
    quiet = conditions(rounds)
    peaks = {f"{side}_peak_gb": max(float(answer["peak_bytes"]) for answer in rounds.answers[side]) / GB for side in ("ours", library)}
    note = f"{speeds[library]:.3g} -> {speeds['ours']:.3g} cells/CPU-s; {quiet['note']}"
    yield at_least(name, rounds.ratio("ours", library, "cpu_s"), limit).because(note, {**quiet["details"], **speeds, **peaks})


def large(plan: DataBenchmark, files: Files) -> Iterator[Figure]:
    """A conversion on Ray as large as the disk allows (`--cells 5000000`): does it get slower, or larger? And what 16 nodes would take.

    The file is there under two names, to halve the disk it needs.
    """
    source = Path(files.h5ad())
    other = source.with_name("other.h5ad")
    os.link(source, other)
    with Side("ours", WATCHED, None, 1) as ours:
        found = ours.ask("convert_watched", dict(sources=[str(source), str(other)], out=str(files.folder / "large")))
    shares = [(0.0, 0.0), *map(tuple, found["shares"])]
    thirds = [next(second for second, share in shares if share >= part) for part in (1 / 3, 2 / 3, 1.0)]
    per_cpu = found["cells"] / found["cpu_s"]
    note = f"{found['cells']} cells in {found['wall_s']:.0f} s; thirds end after {', '.join(f'{second:.0f}' for second in thirds)} s"
    yield Figure("large conversion", found["cells"] / found["wall_s"], "cells/s", note=note)
    yield Figure("large conversion, CPU", per_cpu, "cells/CPU-s", note=f"{found['cpu_s']:.0f} CPU-s of driver and workers")
    slower = (thirds[2] - thirds[1]) / max(thirds[1] - thirds[0], 1e-9)
    yield Figure("last third beside the middle one", slower, "x the time")
    peaks = [size / GB for _, size in found["peaks"]]
    half = len(peaks) // 2
    halves = f"{max(peaks[:half], default=0.0):.2f}, then {max(peaks[half:], default=0.0):.2f} in the second half"
    yield at_most("memory of a worker at most", max(peaks, default=0.0), 0.5, "GB").because(halves)
    yield Figure("memory of the driver at most", found["driver_bytes"] / GB, "GB")
    pace = per_cpu * NODES * CORES
    traffic = [pace * plan.nonzeros * size / 1e9 for size in (8, 3)]  # bytes an entry of an h5ad and of a shard take
    note = f"if cores convert as here, and storage gives {traffic[0]:.0f} GB/s and takes {traffic[1]:.0f}"
    yield Figure(f"100 M cells on {NODES} nodes of {CORES} cores", 100e6 / pace, "s", note=note)


PARTS: dict[str, Callable[[DataBenchmark, Files], Iterator[Figure]]] = {"read": reading, "convert": conversion, "large": large}
ON_REQUEST = ("large",)  # needs ten times the memory's size on disk
