"""Embedding speed beside Geneformer, scGPT and scVI: same cells, same machine, random weights, float32, in turn.

The CellPLM paper says that it embeds 48,082 cells in 0.85 s where scGPT takes 129 s and Geneformer 428 s on one A100:
one token a cell instead of one a gene. That is a claim about work, so it is measured here rather than quoted, with the
operations of each network beside it. From counts to embeddings on every side: Geneformer's sorting, scGPT's choice of
genes and scVI's dense matrix are part of it. Gene language models run on fewer cells; all figures are per cell.

Each runs as its users would run it. Where a ratio is larger than that of the operations, the rest is how well a side uses
the processor: ours multiplies through oneDNN (`model.linear`), the others through what PyTorch chooses.
"""

# C cells, T tokens, D model width

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellplane.benchmark.environments import environment
from cellplane.benchmark.model import GENES, OURS, PRECISIONS, conditions
from cellplane.benchmark.report import Figure
from cellplane.benchmark.sides import Rounds, Side, alternate

log = logging.getLogger(__name__)

PEER = "cellplane.benchmark.peers_side"
Answer = dict[str, Any]


def encoder_flops(shape: Mapping[str, int], tokens: int) -> int:
    """Operations of a transformer encoder: four D x D maps and two D x F a token, and every token looking at every other."""
    width, feed_forward = shape["width"], shape["feed_forward"]
    a_token = 2 * (4 * width * width + 2 * width * feed_forward)
    attention = 2 * (2 * tokens * tokens * width)  # scores and weighted values
    return shape["layers"] * (tokens * a_token + attention)


def geneformer_flops(shape: Mapping[str, int], nonzeros: int) -> int:
    """Operations of one cell; its genes are its tokens."""
    return encoder_flops(shape, min(nonzeros, shape["tokens"]))


def scgpt_flops(shape: Mapping[str, int], nonzeros: int) -> int:
    """Operations of one cell: the encoder and two layers on each value, the cls token's included."""
    tokens, width = min(nonzeros + 1, shape["tokens"]), shape["width"]
    return encoder_flops(shape, tokens) + tokens * 2 * (width + width * width)


def scvi_flops(shape: Mapping[str, int], nonzeros: int) -> int:  # noqa: ARG001  (same call for every peer)
    """Operations of one cell: all genes, whether counted or not, to the hidden layer, and that to mean and variance."""
    return 2 * (shape["genes"] * shape["hidden"] + 2 * shape["hidden"] * shape["latent"])


@dataclass(frozen=True)
class Peer:
    """A model to compare with: what `peers_side` builds, in which shape, and how it is run."""

    kind: str
    shape: Mapping[str, int]
    flops: Callable[[Mapping[str, int], int], int]
    batches: tuple[int, ...]
    """Sizes among which the fastest is found before the rounds."""
    cells: int | None = None
    """Of a round; None: as many as ours."""


# Shapes of the released models: ctheodoris/Geneformer V1 (6 and 12 layers), scGPT whole-human, scvi-tools' defaults.
GENEFORMER = {"vocabulary": 25_426, "tokens": 2048}
GENEFORMER_6L = GENEFORMER | {"layers": 6, "width": 256, "heads": 4, "feed_forward": 512}
GENEFORMER_12L = GENEFORMER | {"layers": 12, "width": 512, "heads": 8, "feed_forward": 1024}
SCGPT = {"vocabulary": 60_697, "tokens": 1200, "layers": 12, "width": 512, "heads": 8, "feed_forward": 512}
SCVI = {"genes": GENES, "hidden": 128, "latent": 10}
PEERS: dict[str, Peer] = {
    "geneformer-6L": Peer("geneformer", GENEFORMER_6L, geneformer_flops, (1, 2, 4, 8), cells=32),
    "geneformer-12L": Peer("geneformer", GENEFORMER_12L, geneformer_flops, (1, 2, 4), cells=16),
    "scgpt": Peer("scgpt", SCGPT, scgpt_flops, (1, 2, 4, 8), cells=32),
    "scvi": Peer("scvi", SCVI, scvi_flops, (128, 512, 2048)),
}


def our_flops(nonzeros: int) -> int:
    """Operations of one cell in the 85M network."""
    from cellplane.benchmark.gpu import forward_flops
    from cellplane.config import load_config
    from cellplane.model.config import ModelConfig
    from cellplane.train.config import ModelFile

    values = load_config(ModelFile, "85m", "model").model_dump()
    return forward_flops(ModelConfig(**values | {"n_genes": GENES}), nonzeros, decode=False)


@dataclass(frozen=True)
class PeersBenchmark:
    """What to measure: sizes, rounds, and the Python with transformers and scvi-tools (None: its environment is made)."""

    cells: int = 2000
    nonzeros: int = 2000
    threads: int = 2
    rounds: int = 5
    python: Path | None = None

    def run(self) -> Iterator[Figure]:
        """Every figure as soon as it is known. Raises BenchmarkError when a side fails."""
        python = self.python or environment("peers")
        with ExitStack() as open_sides:
            ours = {f"ours {precision}": open_sides.enter_context(Side(precision, OURS, None, self.threads)) for precision in PRECISIONS}
            yield from self.alone(ours)
            for name, peer in PEERS.items():
                log.info("measuring %s", name)
                with Side(name, PEER, python, self.threads) as side:
                    yield from self.beside(name, peer, side, ours)

    def alone(self, ours: Mapping[str, Side]) -> Iterator[Figure]:
        """Sets our sides up and measures what they do."""
        size: dict[str, int] = {}
        for precision, (name, side) in zip(PRECISIONS, ours.items(), strict=True):
            size[name] = side.ask("setup", dict(threads=self.threads, precision=precision, model="85m", genes=GENES))["parameters"]
            side.ask("cells", dict(cells=self.cells, nonzeros=self.nonzeros))
            side.ask("embed")
        rounds = alternate({name: (side, self.our_turn) for name, side in ours.items()}, self.rounds)
        for name in ours:
            details = costs(rounds, name) | {"mflop_a_cell": our_flops(self.nonzeros) / 1e6, "parameters": size[name]}
            yield speed(name, rounds, details, f"{self.cells} cells at once")

    def beside(self, name: str, peer: Peer, side: Side, ours: Mapping[str, Side]) -> Iterator[Figure]:
        """One peer's speed, and how many times ours it is in each precision."""
        count = min(peer.cells or self.cells, self.cells)
        size = side.ask("setup", dict(kind=peer.kind, threads=self.threads, shape=dict(peer.shape)))["parameters"]
        side.ask("cells", dict(cells=count, nonzeros=self.nonzeros, genes=GENES))
        batch = fastest_batch(side, peer.batches, count)

        def _their_turn(side: Side) -> Answer:
            return a_cell(side.ask("embed", dict(batch=batch)), count)

        runs = {name: (side, _their_turn)} | {key: (one, self.our_turn) for key, one in ours.items()}
        rounds = alternate(runs, self.rounds)
        details = costs(rounds, name) | {"mflop_a_cell": peer.flops(peer.shape, self.nonzeros) / 1e6, "parameters": size}
        how = f"{count} cells, batches of {batch} (fastest of {', '.join(map(str, peer.batches))})"
        yield speed(f"peer {name}", rounds, details | {"cells": count, "batch": batch}, how)
        for key in ours:
            figure = ratio(f"{key} / peer {name}", rounds, key, name)
            operations = peer.flops(peer.shape, self.nonzeros) / our_flops(self.nonzeros)
            yield figure.because(f"{figure.note}; {_shown(operations)} x by operations", figure.details | {"operations": operations})

    def our_turn(self, side: Side) -> Answer:
        """The middle one of three: ours takes a second where a peer takes twenty, and one disturbance must not decide."""
        answers = [side.ask("embed") for _ in range(3)]
        return a_cell(sorted(answers, key=lambda answer: float(answer["wall_s"]))[1], self.cells)


def fastest_batch(side: Side, batches: tuple[int, ...], count: int) -> int:
    """The batch size with which the side embeds cells fastest, each tried on as many as the largest holds."""
    cells = min(max(batches), count)
    side.ask("embed", dict(batch=batches[0], first=min(batches[0], cells)))  # what happens only the first time
    walls = {batch: float(side.ask("embed", dict(batch=batch, first=cells))["wall_s"]) for batch in batches}
    return min(walls, key=walls.__getitem__)


def a_cell(answer: Answer, cells: int) -> Answer:
    """An answer with its times a cell."""
    return answer | {"s_a_cell": answer["wall_s"] / cells, "cpu_s_a_cell": answer["cpu_s"] / cells}


def costs(rounds: Rounds, side: str) -> dict[str, float]:
    """Medians of one side's rounds."""
    return {
        "cells_per_s": 1 / rounds.median(side, "s_a_cell"),
        "cpu_ms_a_cell": rounds.median(side, "cpu_s_a_cell") * 1e3,
        "spread": rounds.spread(side, "s_a_cell"),
    }


def speed(name: str, rounds: Rounds, details: Mapping[str, Any], how: str) -> Figure:
    """Cells per second, with what a cell costs."""
    used = details["mflop_a_cell"] / details["cpu_ms_a_cell"]
    cost = f"{details['mflop_a_cell']:,.0f} MFLOP and {details['cpu_ms_a_cell']:,.2f} CPU ms a cell ({used:.0f} GFLOP/s a core)"
    quiet = "" if rounds.foreign else "; other processes ran in every round"
    note = f"{cost}, {details['parameters'] / 1e6:.1f} M parameters; {how}{quiet}"
    return Figure(name, details["cells_per_s"], "cells/s", note=note, details=dict(details))


def ratio(name: str, rounds: Rounds, ours: str, peer: str) -> Figure:
    """How many times faster ours is; no value where no round was quiet."""
    under = conditions(rounds)
    theirs, mine = (1 / rounds.median(side, "s_a_cell") for side in (peer, ours))
    note = f"{_shown(theirs)} -> {_shown(mine)} cells/s; {under['note']}"
    details = under["details"] | {"peer_cells_per_s": theirs, "ours_cells_per_s": mine}
    return Figure(name, rounds.ratio(ours, peer, "s_a_cell"), "x", note=note, details=details)


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
