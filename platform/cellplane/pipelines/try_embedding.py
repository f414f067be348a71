"""Trying zero-shot embedding: cells are placed by a base model, by principal components and by random weights; labels only judge.

All cells are dealt in two halves, again and again. Every half is placed and clustered by itself: how far its communities agree
with the labels differs from half to half as much as it would between samples of all the cells (`verdict.halves_lead`).
"""

# n cells, Z latent

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cellplane.artifact.folder import ModelFolder
from cellplane.data.sources import AnnData, column, read_h5ad
from cellplane.errors import ConfigError, DataError
from cellplane.inference import TASKS, query_keys, read_cells, write_flags
from cellplane.pipelines.clustering import clustering_scores, mixing_scores
from cellplane.pipelines.drawing import new_axes
from cellplane.pipelines.embedding_evaluation import EVEN, EVENED, RANDOM, Space, spaces_of
from cellplane.pipelines.evening import evened
from cellplane.pipelines.job import MODEL_ROW
from cellplane.pipelines.plots import save_axes
from cellplane.pipelines.protocol import Entry, Found, Method, Picture, Place
from cellplane.pipelines.protocol_config import EvaluatedData
from cellplane.pipelines.protocol_run import base_notes
from cellplane.pipelines.splits import FEWEST_CELLS, scorable
from cellplane.pipelines.try_config import TryEmbedding
from cellplane.pipelines.try_parts import Answer, Bench, Task, Tried, base_of, evaluation_of, still_to_go
from cellplane.pipelines.try_pictures import draw_units
from cellplane.pipelines.verdict import Measure, Verdict, halves_lead

BASE = "the base"
OURS = (MODEL_ROW, f"{MODEL_ROW}, {EVENED}")
CONTROLS = (f"{RANDOM} of {BASE}", f"{RANDOM} of {BASE}, {EVENED}")
SIMPLE = ("PCA50", f"PCA50, {EVENED}", "PCA50 of all genes")
ROWS = {**dict.fromkeys(OURS, "model"), **dict.fromkeys(SIMPLE, "baseline"), **dict.fromkeys(CONTROLS, "control")}
MEASURE = Measure("NMI of Leiden communities and labels", "halves of the cells")
FEWEST = 60  # labelled cells that can be halved: twice 15 neighbours in each half
HOW = (
    "The interval comes from dealing the cells in two halves again and again (delete-half jackknife, 95 %): it is that of the lead "
    "told from all cells, and does not get narrower by more halves. It does not cover what other samples would change."
)
ADDED = "X_auto"


@dataclass(frozen=True)
class Study:
    """Labelled cells, their types [n] and samples [n] (None: not told), the base, and the halves: an even and an odd one make all."""

    cells: AnnData
    types: NDArray[np.object_]
    batches: NDArray[np.object_] | None
    base: ModelFolder
    halves: tuple[NDArray[np.int64], ...]
    notes: tuple[str, ...]


def measure_embedding(config: TryEmbedding, bench: Bench) -> Tried:
    """Places, clusters, compares; every half is measured once and remembered."""
    study = read_study(config)
    found: list[Entry] = []
    for number, rows in enumerate(study.halves, 1):
        to_go = still_to_go([entry.seconds for entry in found], len(study.halves))
        bench.say(f"[{number}/{len(study.halves)}] {len(rows)} cells placed in {len(ROWS)} ways and clustered{to_go}")
        place = Place(Path(config.data).stem, "halves of the cells", number - 1, config.seed)
        work = lambda rows=rows, place=place: _measured(config, study, rows, place)  # noqa: E731
        found.append(bench.ledger.measured(place, Method("all", "control"), work, 1.0))
    nmi = {name: [float(entry.details["scores"][name]["nmi"]) for entry in found] for name in ROWS}
    verdict = verdict_of(nmi)
    entries = [
        Entry(entry.place, Method(name, kind), entry.details["scores"][name], 0.0, 1.0)  # type: ignore[arg-type]
        for entry in found
        for name, kind in ROWS.items()
    ]
    by_half = {name: {f"half {half + 1}": value for half, value in enumerate(values)} for name, values in nmi.items()}
    axes = draw_units(new_axes((11, 5.5)), by_half, ("half of the cells", "NMI with the labels (0 to 1)"))
    path = save_axes(axes, bench.pictures / "halves.png")
    picture = Picture("Every half of the cells", path, "Methods are compared on the same half: easy halves are easy for all.")
    evaluation = evaluation_of("nmi", entries, "embed", study.notes, [picture])
    return Tried(verdict, replace(evaluation, model=verdict.ours), HOW)


def read_study(config: TryEmbedding) -> Study:
    """The cells that have a label, and their halves; errors before anything is placed."""
    base = base_of(config)
    if "embed" not in TASKS[base.task]:
        raise ConfigError(f"{config.base_model} is a model to {base.task} with, which places no cells; name a pre-trained one")
    data, key = read_h5ad(Path(config.data)), str(config.keys.labels_key)
    types = column(data, key)
    keep = np.flatnonzero(scorable(types))
    names = sorted(set(types[keep]))
    if len(names) < 2 or len(keep) < FEWEST:
        raise DataError(
            f"{config.data}: {len(keep)} cells of {len(names)} types in obs[{key!r}] that have {FEWEST_CELLS} cells or more; judging "
            f"places needs two types and {FEWEST} cells. The labels only judge: rough ones will do, named with --labels-key"
        )
    notes = [f"{len(keep)} of {data.n_obs} cells are judged: those of {len(names)} types with {FEWEST_CELLS} cells or more."]
    rng = np.random.default_rng(config.seed)
    if len(keep) > config.max_cells:
        keep = np.sort(rng.permutation(keep)[: config.max_cells])
        notes.append(f"Of them {config.max_cells} were drawn by the seed (max_cells).")
    notes += [TOLD, *base_notes(Path(config.data).stem, [config.data], {str(config.base_model): base})]
    cells, batch = data[keep].copy(), config.keys.batch_key
    dealt = [np.array_split(rng.permutation(len(keep)), 2) for _ in range(config.halvings)]
    halves = tuple(np.sort(half) for pair in dealt for half in pair)
    return Study(cells, types[keep], None if batch is None else column(cells, batch), base, halves, tuple(notes))


TOLD = (
    f"Evened: turned to the main directions of the cells, each with the root of its spread. Whether {MODEL_ROW} is evened is chosen on the "
    "other half of the same cells; the simple method is the one that turned out best. Random weights are a network like the base that "
    "learned nothing. Communities are those of Leiden at resolution 1, and for nmi_fixed as many as there are labels."
)


def _measured(config: TryEmbedding, study: Study, rows: NDArray[np.int64], place: Place) -> Found:
    """Scores of every way to place the cells of one half."""
    cells, types = study.cells[rows].copy(), study.types[rows]
    seed, scores = config.seed + place.split, {}
    spaces = {space.method.name: space for space in _spaces(config, cells, study.base)}
    for name in (name for name in ROWS if not name.endswith(EVENED)):
        placed = spaces[name].embed(seed)
        for row, points in ((name, placed), (f"{name}, {EVENED}", evened(placed, EVEN))):
            if row in ROWS:
                mixing = {} if study.batches is None else mixing_scores(points, study.batches[rows], types)
                scores[row] = {key: value for key, value in clustering_scores(points, types, seed).items() if key != "clusters"} | mixing
    return Found({}, {"scores": scores})


def _spaces(config: TryEmbedding, cells: AnnData, base: ModelFolder) -> Iterator[Space]:
    return spaces_of(cells, EvaluatedData(path=config.data, keys=config.keys, guard=0.0), {BASE: base})


def verdict_of(nmi: Mapping[str, Sequence[float]]) -> Verdict:
    """From the NMI of every row on every half, {row: [half]}; halves 0 and 1, 2 and 3, ... make up all cells.

    Whether ours is evened is chosen on the other half. The simple method is the one that turned out best: hindsight that favours
    it, not us.
    """
    means = {name: float(np.mean(values)) for name, values in nmi.items()}
    best = max(SIMPLE, key=means.__getitem__)
    halves = range(len(nmi[best]))
    mine = [nmi[max(OURS, key=lambda name: nmi[name][half ^ 1])][half] for half in halves]
    lead = halves_lead([mine[half] - nmi[best][half] for half in halves])
    control, ours = max(means[name] for name in CONTROLS), float(np.mean(mine))
    learned = f"Random weights reach {control:.3f}: what the base learned does not show in your cell types." if control >= ours else ""
    return Verdict(MEASURE, len(halves), ours, best, means[best], lead, ours=max(OURS, key=means.__getitem__), remark=learned)


def answer_embedding(config: TryEmbedding, winner: str) -> tuple[Answer, str]:
    """All cells of the file with their places in obsm["X_auto"]; obs["auto_flag"] names those that show the model nothing."""
    data, base = read_h5ad(Path(config.data)), base_of(config)
    space = next(space for space in _spaces(config, data, base) if space.method.name == winner)
    placed = np.asarray(space.embed(config.seed), dtype=np.float32)
    if winner in OURS:
        write_flags(data, read_cells(data, base.vocabulary, query_keys(data, config.keys), base.max_cells).store.table, "auto")
    data.obsm[ADDED] = placed
    return data, f"{data.n_obs} cells placed by {winner} in obsm[{ADDED!r}], {placed.shape[1]} numbers each"


EMBED = Task(TryEmbedding, measure_embedding, answer_embedding)
