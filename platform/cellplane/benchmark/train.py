"""What training costs beside the network: the loop, checkpoints, and several workers instead of one.

Every ratio comes from rounds in which both sides ran in turn and nothing else did (see `sides`). Cells are made for
measuring; everything lies in a temporary folder and is gone afterwards.
"""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cellplane.benchmark.model import conditions
from cellplane.benchmark.report import Figure, asked_parts, at_most
from cellplane.benchmark.sides import Rounds, Side, alternate
from cellplane.config import find_config, load_config, read_yaml
from cellplane.train.config import PretrainConfig

OURS = "cellplane.benchmark.train_ours"
EPOCH = 4  # steps: as many as lie ready for bare steps
GIB = 1 << 30
LOOP_ADDS, CHECKPOINT_ADDS = 0.10, 0.03  # at most


@dataclass(frozen=True)
class Case:
    """A model and a step: ``cells`` in ``micro_batches``, sentences of ``sentence``; ``steps`` are measured at a time."""

    model: str
    genes: int
    cells: int
    micro_batches: int
    sentence: int
    steps: int
    engine: str = "torch"

    def config(self, folder: Path, zero_stage: int = 0) -> dict[str, Any]:
        """As a pre-training configuration."""
        return {
            "shards": str(folder / "shards"),
            "model": read_yaml(find_config(self.model, "model")),
            "plan": {"cells_per_micro_batch": self.cells // self.micro_batches, "micro_batches_per_step": self.micro_batches},
            "optimizer": {"steps": 1_000_000},  # the loop goes on from round to round
            "engine": {"name": self.engine, "zero_stage": zero_stage},
        }


GENES = 19_374  # of the released 85M checkpoint
TINY = Case("tiny", 765, 384, 2, 64, steps=48)  # the demo's step
CASES = (TINY, replace(TINY, engine="deepspeed"), Case("10m", GENES, 1024, 2, 512, steps=8), Case("85m", GENES, 2048, 1, 2048, steps=4))
SHARED = (Case("85m", GENES, 2048, 2, 1024, steps=4, engine="deepspeed"), Case("85m", GENES, 256, 2, 128, steps=8, engine="deepspeed"))
KEPT = (("demo", TINY), ("cellplm_85m", Case("85m", GENES, 2048, 1, 2048, steps=4)))


@dataclass(frozen=True)
class TrainBenchmark:
    """What to measure: threads of a worker, quiet rounds, the parts, and the models (none: all)."""

    nonzeros: int = 1350
    threads: int = 2
    rounds: int = 5
    only: tuple[str, ...] = ()
    models: tuple[str, ...] = ()

    def run(self) -> Iterator[Figure]:
        """Every figure as soon as it is known. Raises BenchmarkError when a process fails."""
        for part in asked_parts(PARTS, self.only):
            yield from part(self)

    def wants(self, case: Case) -> bool:
        """Whether this model was asked for."""
        return not self.models or case.model in self.models

    def side(self, case: Case, folder: Path) -> Side:
        """A process with the case's shards and loop."""
        side = Side(case.model, OURS, None, self.threads)
        self.make(case, folder, side)
        side.ask("setup", dict(config=case.config(folder), home=str(folder), threads=self.threads, ranks=(0, 1, _free_port())))
        return side

    def make(self, case: Case, folder: Path, side: Side) -> None:
        """The case's shards."""
        sizes = dict(cells=EPOCH * case.cells, nonzeros=min(self.nonzeros, case.genes // 3), genes=case.genes, sentence=case.sentence)
        side.ask("make", dict(folder=str(folder), **sizes))


def loop(plan: TrainBenchmark) -> Iterator[Figure]:
    """What the loop adds to a bare step: reading, dropping, masking, clipping, checking, journalling."""
    for case in filter(plan.wants, CASES):
        with _folder() as folder, plan.side(replace(case, engine="torch"), folder) as side, ExitStack() as stack:
            looped = side
            if case.engine != "torch":
                looped = stack.enter_context(Side(case.engine, OURS, None, plan.threads))
                where = dict(home=str(folder / "other"), threads=plan.threads, ranks=(0, 1, _free_port()))
                looped.ask("setup", dict(config=case.config(folder), **where))
            runs = {"bare": (side, _steps("bare", case.steps)), "loop": (looped, _steps("loop", case.steps))}
            for process, run in runs.values():
                run(process)  # memory that is touched for the first time
            rounds = alternate(runs, plan.rounds)
        yield _added(f"loop, {case.model}, {case.engine}, {case.cells} cells a step", rounds, case)


def _steps(command: str, steps: int, every: int = 0) -> Callable[[Side], dict[str, Any]]:
    asked = dict(steps=steps) | (dict(every=every) if every else {})
    return lambda side: side.ask(command, asked)


def _added(name: str, rounds: Rounds, case: Case) -> Figure:
    """The gate is the loop's own, with the plain engine; what DeepSpeed's adds is told beside it."""
    bare, looped = (rounds.median(side, "wall_s") for side in ("bare", "loop"))
    ratio, quiet = rounds.ratio("bare", "loop"), conditions(rounds)
    added = None if ratio is None else ratio - 1
    figure = at_most(name, added, LOOP_ADDS, "of the bare step") if case.engine == "torch" else Figure(name, added, "of the bare step")
    note = f"{bare * 1e3:.4g} -> {looped * 1e3:.4g} ms a step; {quiet['note']}"
    return figure.because(
        note, {**quiet["details"], "bare_s": bare, "loop_s": looped, **_processors(rounds), "cells_per_s": case.cells / looped}
    )


def _processors(rounds: Rounds) -> dict[str, float]:
    """What a step takes of them on either side: steadier than the clock, and without what other threads hide."""
    return {f"{side}_cpu_s": rounds.median(side, "cpu_s") for side in ("bare", "loop")}


def checkpoints(plan: TrainBenchmark) -> Iterator[Figure]:
    """What keeping adds at the intervals of the shipped configurations: two checkpoints more in the same steps."""
    for name, case in KEPT:
        if not plan.wants(case):
            continue
        interval = load_config(PretrainConfig, name, "pretrain").checkpoint.every_steps
        every = min(interval, case.steps)
        steps = 3 * every
        with _folder() as folder, plan.side(case, folder) as side:
            _steps("loop", case.steps, case.steps)(side)  # memory that is touched for the first time
            runs = {"never": (side, _steps("loop", steps)), "kept": (side, _steps("loop", steps, every))}
            rounds = alternate(runs, plan.rounds)
        yield _cost(f"checkpoints, {name}, every {interval} steps", rounds, interval, case)


def _cost(name: str, rounds: Rounds, interval: int, case: Case) -> Figure:
    seconds = (rounds.median("kept", "all_s") - rounds.median("never", "all_s")) / 2
    step = rounds.median("never", "wall_s")
    share = None if rounds.ratio("never", "kept", "all_s") is None else seconds / (interval * step)
    quiet = conditions(rounds)
    note = f"{seconds:.3g} s each, steps of {case.cells} cells take {step * 1e3:.4g} ms; {quiet['note']}"
    return at_most(name, share, CHECKPOINT_ADDS, "of the time").because(note, {**quiet["details"], "checkpoint_s": seconds, "step_s": step})


def workers(plan: TrainBenchmark) -> Iterator[Figure]:
    """Two workers of one thread beside one of two threads, ZeRO 1: the same step, shared out."""
    for case in filter(plan.wants, SHARED):
        with _folder() as folder, ExitStack() as stack, ThreadPoolExecutor(2) as pool:
            one, *two = (stack.enter_context(Side(name, OURS, None, threads)) for name, threads in GROUPS)
            plan.make(case, folder, one)
            _set_up(pool, case, folder, [one])
            _set_up(pool, case, folder, two)
            runs = {"one": (one, _steps("loop", case.steps)), "two": (two[0], _together(pool, case.steps, two))}
            for process, run in runs.values():
                run(process)
            rounds = alternate(runs, plan.rounds, beside=two[1:])
            peaks = {f"{side.name}, peak_gib": side.ask("memory")["peak_bytes"] / GIB for side in (one, *two)}
        quiet, times = conditions(rounds), [rounds.median(name, "wall_s") for name in ("one", "two")]
        note = f"{times[0]:.3g} s with one, {times[1]:.3g} s with two; {quiet['note']}; 0.9 x is hoped for"
        name = f"two workers of one thread, {case.model}, {case.cells} cells a step"
        yield Figure(name, rounds.ratio("two", "one"), "x one worker of two threads").because(note, {**quiet["details"], **peaks})


GROUPS = (("one worker", 2), ("worker 0", 1), ("worker 1", 1))  # processes and their threads


def _set_up(pool: ThreadPoolExecutor, case: Case, folder: Path, group: list[Side]) -> None:
    """One process group of these sides; they wait for one another."""
    port, threads = _free_port(), 2 // len(group)
    home = str(folder / f"group-{len(group)}")
    asked = [
        dict(config=case.config(folder, zero_stage=1), home=home, threads=threads, ranks=(rank, len(group), port))
        for rank in range(len(group))
    ]
    list(pool.map(lambda side, setup: side.ask("setup", setup), group, asked))


def _together(pool: ThreadPoolExecutor, steps: int, group: list[Side]) -> Callable[[Side], dict[str, Any]]:
    """Asks all of a group at once; the answer is the first one's."""

    def run(_: Side) -> dict[str, Any]:
        answers = list(pool.map(_steps("loop", steps), group))
        return answers[0]

    return run


PARTS: dict[str, Callable[[TrainBenchmark], Iterator[Figure]]] = {"loop": loop, "checkpoints": checkpoints, "workers": workers}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cellplane-benchmark-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
