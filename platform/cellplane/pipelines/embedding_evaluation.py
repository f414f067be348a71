"""The full protocol of embedding: bases that never saw the cells, beside principal components, raw counts and random weights.

Nothing is trained and no resolution is chosen with labels (`clustering`). Every base is asked as it would be used (sentences
of one sample), and in sentences that mix the samples: attention can carry a sample into the embedding. How well samples mix
stands beside the agreement with the labels, for noise mixes best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from cellplane.artifact.folder import ModelFolder
from cellplane.data.confounding import confounded
from cellplane.data.sources import AnnData, column, find_counts
from cellplane.inference import Predictor, query_keys, read_cells
from cellplane.pipelines import plots
from cellplane.pipelines.annotation_baselines import variable_genes
from cellplane.pipelines.annotation_protocol import random_weights, study_of
from cellplane.pipelines.baselines import COMPONENTS, log_cp10k
from cellplane.pipelines.clustering import clustering_scores, mixing_scores
from cellplane.pipelines.evening import evened
from cellplane.pipelines.job import MODEL_ROW
from cellplane.pipelines.protocol import Entry, Evaluation, Found, Method, Picture, Place
from cellplane.pipelines.protocol_config import EmbeddingProtocol, EvaluatedData
from cellplane.pipelines.protocol_run import Finished, Ledgers, Say, base_notes, check_protocol, finish, open_data, out_of, quiet

MIXED, RANDOM, EVENED, CENTRED = "mixed sentences", "random weights", "evened", "samples centred"

EVEN = 0.5  # the root of each direction's spread

Embedded = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Space:
    """A way to place cells: its row, the settings that decide it, and the places [n, Z] for a seed."""

    method: Method
    settings: Mapping[str, Any]
    embed: Callable[[int], Embedded]


def run_embedding_protocol(config: EmbeddingProtocol, say: Say = quiet) -> Finished:
    """Every data set, seed and space that the ledger does not know yet, and the report of all; errors as of annotation's."""
    check_protocol(config)
    out = out_of(config, config.task)
    ledgers = Ledgers(out)
    entries: list[Entry] = []
    pictures: list[Picture] = []
    notes: list[str] = []
    for name, asked in config.data.items():
        opened = open_data(name, asked, config.bases_for(name), config.tracking_uri)
        study = study_of(name, asked, opened.cells, opened.bases, config.fewest_cells)
        batches = None if asked.keys.batch_key is None else column(study.cells, asked.keys.batch_key)
        spaces = list(spaces_of(study.cells, asked, opened.bases))
        for seed in config.seeds:
            for space in spaces:
                ledger, place = ledgers.of(opened.identity, config.fewest_cells, space.settings), Place(name, "all cells", 0, seed)
                known = ledger.find(place, space.method.name) is not None
                entry = ledger.measured(place, space.method, lambda: _scored(space, seed, (study.types, batches)))  # noqa: B023  (called at once)
                entries.append(entry)
                if not known:
                    say(f"{name} seed {seed}: {space.method.name}  NMI {entry.metrics['nmi']:.3f}  {entry.seconds:.0f} s")
        pictures += _drawn(spaces, name, (study.types, batches), out / "pictures")
        notes += [
            f"{name}: {study.cells.n_obs} cells of {len(set(study.types))} types, all of them in every row; seeds are those of Leiden"
        ]
        if batches is not None and (warned := confounded(study.types, batches)) is not None:
            notes.append(f"{name}: {warned}")
        notes += base_notes(name, [asked.path], opened.bases)
    evaluation = Evaluation(config.task, "nmi", tuple(entries), tuple(pictures), tuple(notes), splits_differ=False)
    return finish(evaluation, config, "Zero-shot embedding, beside principal components and random weights")


def spaces_of(cells: AnnData, asked: EvaluatedData, bases: Mapping[str, ModelFolder]) -> Iterator[Space]:
    """Every space that the cells are placed in: bases first; the first base is the row that differences are told of."""
    samples = None if asked.keys.batch_key is None else column(cells, asked.keys.batch_key)
    mixes = samples is not None and len(set(samples)) > 1
    samples = samples if mixes else None
    for number, (name, base) in enumerate(bases.items()):
        row = MODEL_ROW if number == 0 else f"{MODEL_ROW} {name}"
        placed = _by(base, cells, asked, Method(row, "model"))
        yield from _also_evened(placed, samples)
        if mixes:
            yield _by(base, cells, asked, Method(f"{row}, {MIXED}", "model"), mixed=True)
        yield from _also_evened(_untrained(base, cells, asked, Method(f"{RANDOM} of {name}", "control")), None)
    counts = find_counts(cells, asked.keys).matrix
    usual = Space(Method("PCA50", "baseline"), {"components": COMPONENTS}, lambda seed: components(_variable(counts), seed))
    yield from _also_evened(usual, samples)
    every = Method("PCA50 of all genes", "baseline")
    yield Space(every, {"components": COMPONENTS, "genes": "all"}, lambda seed: components(log_cp10k(counts), seed))
    yield Space(Method("log counts of variable genes", "baseline"), {}, lambda _: _variable(counts))


def _also_evened(space: Space, samples: NDArray[np.object_] | None) -> Iterator[Space]:
    """A space as it is, evened among the cells and, where there are samples, with each sample centred too; see `evening`."""
    yield space
    name, kind = space.method.name, space.method.kind
    yield Space(Method(f"{name}, {EVENED}", kind), {**space.settings, "even": EVEN}, lambda seed: evened(space.embed(seed), EVEN))
    if samples is not None:
        centred = {**space.settings, "even": EVEN, "centred": True}
        yield Space(Method(f"{name}, {EVENED}, {CENTRED}", kind), centred, lambda seed: evened(space.embed(seed), EVEN, samples))


def _by(base: ModelFolder, cells: AnnData, asked: EvaluatedData, method: Method, mixed: bool = False) -> Space:
    place = cache(partial(_latent, base, cells, asked, mixed))  # no seed changes it
    return Space(method, {"base": base.model_sha256, "mixed": mixed}, lambda _: place())


def _untrained(base: ModelFolder, cells: AnnData, asked: EvaluatedData, method: Method) -> Space:
    """A network of the base's size and genes that learned nothing."""
    decisive = {"base": base.config.as_dict(), "genes": base.vocabulary.fingerprint, "max_cells": base.max_cells}
    return Space(method, decisive, lambda seed: _latent(random_weights(base, seed), cells, asked))


def _latent(base: ModelFolder, cells: AnnData, asked: EvaluatedData, mixed: bool = False) -> Embedded:
    keys = query_keys(cells, asked.keys)
    keys = keys.model_copy(update={"batch_key": None}) if mixed else keys
    return Predictor(base).embed(read_cells(cells, base.vocabulary, keys, base.max_cells).store)


def components(scaled: Any, seed: int) -> Embedded:
    """50 principal components of log counts, [n, 50]: of the 2,000 most variable genes the customary embedding."""
    size = min(COMPONENTS, min(scaled.shape) - 1)
    with threadpool_limits(limits=1):
        found: Embedded = PCA(size, svd_solver="arpack", random_state=seed).fit_transform(scaled)
    return found


def _variable(counts: Any) -> Embedded:
    scaled = log_cp10k(counts)
    dense: Embedded = scaled[:, variable_genes(scaled)].toarray()
    return dense


def _scored(space: Space, seed: int, known: tuple[NDArray[np.object_], NDArray[np.object_] | None]) -> Found:
    types, batches = known
    placed = space.embed(seed)
    mixing = {} if batches is None else mixing_scores(placed, batches, types)
    scores = {**clustering_scores(placed, types, seed), **mixing}
    clusters = scores.pop("clusters")
    return Found(scores, {"clusters": clusters, "dimensions": placed.shape[1]})


def _drawn(
    spaces: Sequence[Space], name: str, known: tuple[NDArray[np.object_], NDArray[np.object_] | None], folder: Path
) -> list[Picture]:
    """A UMAP of the first base (else of the components) by type and by sample, and of the components beside it."""
    types, batches = known
    shown = {space.method.name: space for space in spaces if space.method.name in (MODEL_ROW, "PCA50")}
    pictures = []
    for row, space in shown.items():
        labels = {"type": types} | ({} if batches is None or len(set(batches)) < 2 else {"sample": batches})
        placed = space.embed(0)
        for label, values in labels.items():
            title = f"{name}: {row} by {label}"
            path = plots.umap_plot(placed, values, folder / f"{name}-{row}-{label}.png", title)
            pictures.append(
                Picture(title, path, "Distances between islands mean little; whether a type is one island, and samples share it, does.")
            )
    return pictures
