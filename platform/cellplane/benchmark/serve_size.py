"""What an answer costs by size: a small and a large network, few cells and many, Arrow beside JSON, the bare model beside the wire.

The large model is the 85m configuration with the released checkpoint's genes and random weights, which cost what trained
ones cost. It is served from the same stack, a copy of one thread for each core; the bare model computes the same cells with
as many threads in one process, in turn, and never at the same time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cellplane.artifact.folder import load_model
from cellplane.benchmark.report import Figure, at_least
from cellplane.benchmark.serve_load import Order
from cellplane.benchmark.serve_stack import KEYS, NAME, Endpoint, Loading, command, load, loading, percentile
from cellplane.benchmark.sides import Side
from cellplane.client import ARROW_TYPE, JSON_TYPE, WireCells
from cellplane.config import find_config, read_yaml
from cellplane.data.sources import AnnData, read_h5ad, write_h5ad

LARGE, LARGE_GENES, NONZEROS = "large", 19_374, 1350
CALLERS, CELLS_EACH, PACKED = 16, 64, 0.7
PACK = 4 * CELLS_EACH  # small packs: while one is computed, others are read and written
SIZES = (1, 64, 1000)
ROUNDS = 5
OURS = "cellplane.benchmark.predict_ours"
MIB = 1 << 20


def sizes(endpoint: Endpoint) -> Iterator[Figure]:
    """Both models one after the other."""
    yield from _answered(endpoint, NAME, endpoint.home / "v1", 2_000)
    with _large(endpoint) as side:
        yield from _packed(endpoint, side)
        yield from _answered(endpoint, LARGE, endpoint.home / LARGE, LARGE_GENES)


def _large(endpoint: Endpoint) -> Side:
    """The large model, served; and the process that has it bare."""
    folder, cells, threads = endpoint.home / LARGE, _cells_file(endpoint, LARGE_GENES, CALLERS * CELLS_EACH), os.cpu_count() or 1
    side = Side(LARGE, OURS, None, threads)
    side.ask("threads", dict(number=threads))
    side.ask("model", dict(path=str(folder), config=read_yaml(find_config("85m", "model")), genes=LARGE_GENES))
    side.ask("ready", dict(model=str(folder), path=str(cells)))
    settings = ("num_cpus=1", f"replicas={threads}", f"max_cells_per_forward={PACK}")
    command(endpoint.home, "serve", str(folder), "--name", LARGE, *(word for setting in settings for word in ("-o", setting)))
    return side


def _packed(endpoint: Endpoint, side: Side) -> Iterator[Figure]:
    """Callers at once, each with cells of its own, beside one packed forward over all their cells."""
    cells = read_h5ad(_cells_file(endpoint, LARGE_GENES, CALLERS * CELLS_EACH))
    parts = [cells[first : first + CELLS_EACH].copy() for first in range(0, cells.n_obs, CELLS_EACH)]
    bodies = [_body(endpoint, LARGE, part, f"packed-{number}") for number, part in enumerate(parts)]
    order = Order(callers=CALLERS, requests=CALLERS * 6, path=_path(LARGE))
    speeds: dict[str, list[float]] = {"bare": [], "served": []}
    load(endpoint, bodies, order)
    side.ask("bare", dict(packs=1))
    for _ in range(ROUNDS):
        speeds["bare"].append(1 / side.ask("bare", dict(packs=3))["s_per_cell"])
        with loading(endpoint, bodies, order) as callers:
            pass
        speeds["served"].append(_cells_per_s(callers))
    bare, served = max(speeds["bare"]), max(speeds["served"])  # the least disturbed round of each: both share the cores with everything
    told = ", ".join(f"{ours:.0f} beside {theirs:.0f}" for ours, theirs in zip(speeds["served"], speeds["bare"], strict=True))
    yield at_least("85m, cells/s served beside the bare packed model", served / bare, PACKED, "x").because(
        f"{CALLERS} callers of {CELLS_EACH} cells, {NONZEROS} non-zero counts each; best of {ROUNDS} rounds, {told} cells/s", speeds
    )


def _path(name: str) -> str:
    """The large model annotates, which is what its bare process does too."""
    return f"/v1/models/{name}/{'embed' if name == NAME else 'annotate'}"


def _cells_per_s(callers: Loading) -> float:
    """Of the middle of the load, when every caller was at work; the callers' own processor time, on the same cores, is taken off."""
    ends = np.sort([answer.at + answer.seconds for answer in callers.answers if answer.status == 200])
    steady = ends[CALLERS:-CALLERS]
    asking = callers.cpu_s * len(steady) / len(callers.answers) / (os.cpu_count() or 1)
    return float(CELLS_EACH * (len(steady) - 1) / (steady[-1] - steady[0] - asking))


def _answered(endpoint: Endpoint, name: str, folder: Path, genes: int) -> Iterator[Figure]:
    """One caller: seconds by cells in a request, and Arrow beside JSON."""
    model = "tiny" if name == NAME else "85m"
    for cells in SIZES:
        part = read_h5ad(_cells_file(endpoint, genes, cells))
        order = Order(callers=1, requests=30 if cells < 1000 else 15, path=_path(name))
        answers = load(endpoint, [_body(endpoint, name, part, f"{name}-{cells}")], order)
        good = [answer for answer in answers if answer.status == 200][1:]
        yield Figure(f"{model}, {cells} cells in a request, median", percentile(good, 50), "s").because(
            f"99th percentile {percentile(good, 99):.3f} s of {len(good)}"
        )
    part = read_h5ad(_cells_file(endpoint, genes, CELLS_EACH))
    bodies = {"Arrow": _body(endpoint, name, part, f"{name}-arrow"), "JSON": _json_body(endpoint, folder, part)}
    seconds = {}
    for kind, body in bodies.items():
        order = Order(callers=1, requests=12, path=_path(name), content_type=JSON_TYPE if kind == "JSON" else ARROW_TYPE)
        seconds[kind] = percentile(load(endpoint, [body], order)[1:], 50)
    said = "; ".join(f"{kind} {seconds[kind]:.3f} s, {bodies[kind].stat().st_size / MIB:.2f} MiB" for kind in bodies)
    yield Figure(f"{model}, {CELLS_EACH} cells of {genes} genes: dense JSON beside Arrow", seconds["JSON"] / seconds["Arrow"], "x").because(
        said
    )


def _cells_file(endpoint: Endpoint, genes: int, cells: int) -> Path:
    """Random cells of as many genes, named as the models name them."""
    path = endpoint.home / f"cells-{genes}-{cells}.h5ad"
    if not path.exists():
        rng = np.random.default_rng(cells)
        names = [f"GENE{gene:04d}" for gene in range(1, genes + 1)] if genes < LARGE_GENES else [f"GENE{gene:05d}" for gene in range(genes)]
        counts = np.zeros((cells, genes), dtype=np.float32)
        for row in counts:
            row[rng.choice(genes, min(NONZEROS, genes // 2), replace=False)] = rng.geometric(0.5, min(NONZEROS, genes // 2))
        made = AnnData(counts)
        made.var_names, made.obs_names = names, [f"cell{number}" for number in range(cells)]
        made.obs["batch"] = "one"
        write_h5ad(made, path)
    return path


def _body(endpoint: Endpoint, name: str, cells: AnnData, called: str) -> Path:
    folder = load_model(endpoint.home / ("v1" if name == NAME else LARGE))
    wire = WireCells.of(cells, KEYS, folder.vocabulary, max(SIZES))
    path = endpoint.home / f"{called}.arrow"
    path.write_bytes(wire.body(list(range(len(wire.sentences))))[0])
    return path


def _json_body(endpoint: Endpoint, folder: Path, cells: AnnData) -> Path:
    """Every count of every gene, the zeros too."""
    path = endpoint.home / f"{folder.name}.json"
    path.write_text(json.dumps({"gene_ids": list(cells.var_names), "counts": np.asarray(cells.X).tolist()}), encoding="utf-8")
    return path
