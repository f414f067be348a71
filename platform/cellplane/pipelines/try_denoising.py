"""Trying denoising: a tenth of all counts is taken out and foretold, by the model and by tuned simple methods.

Count splitting (PROTOCOLS 8): every count is split by coin flips, so zeros are scored too and filling them is not rewarded.
"""

# C cells, G genes

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellplane.data.sentences import CellTable
from cellplane.data.sources import AnnData, gene_columns, read_h5ad
from cellplane.errors import DataError
from cellplane.inference import Predictor, rates_of
from cellplane.pipelines.config import DenoisingConfig
from cellplane.pipelines.denoising import Cells, DenoisingPipeline, answers
from cellplane.pipelines.denoising_baselines import BASELINES, Ask, cell_nats, split_counts, tuned_baselines
from cellplane.pipelines.drawing import draw_gaps, new_axes
from cellplane.pipelines.job import MODEL_ROW
from cellplane.pipelines.plots import save_axes
from cellplane.pipelines.protocol import Entry, Found, Method, Picture, Place
from cellplane.pipelines.try_config import TryDenoising
from cellplane.pipelines.try_parts import Bench, Task, Tried, base_of, evaluation_of
from cellplane.pipelines.verdict import Measure, Verdict, mean_lead

MEASURE = Measure("error in foretelling taken-out counts, nats per entry", "cells with counts taken out", lower_is_better=True, digits=5)
FILLS_ZEROS = "nonzero_mean"  # wins another protocol without denoising anything
NOTES = (
    "A tenth of all counts was taken out at random, zeros included, before anything was learned. The two parts are independent only "
    "where counts are Poisson; real counts vary a little more, which favours nobody.",
)


def measure_denoising(config: TryDenoising, bench: Bench) -> Tried:
    """Every method is measured once and remembered."""
    cells = _cells(config)
    if not (cells.table.totals() > 0).any():
        raise DataError(f"{config.data}: no cell has counts")
    kept, rest = split_counts(cells.table, config.seed)
    methods: Mapping[str, Ask] = {MODEL_ROW: lambda thinned: _model(config, cells, thinned), **simple_methods(config.seed)}
    place = Place(Path(config.data).stem, "count splitting", 0, config.seed)
    found: dict[str, Entry] = {}
    for number, (name, ask) in enumerate(methods.items(), 1):
        bench.say(f"[{number}/{len(methods)}] {name}{', which takes longest' if name == MODEL_ROW else ''}")
        method = Method(name, "model" if name == MODEL_ROW else "baseline")
        found[name] = bench.ledger.measured(place, method, lambda ask=ask: _measured(ask, kept, rest))  # type: ignore[misc]
    best = min((name for name in found if name != MODEL_ROW), key=lambda name: found[name].metrics["nats"])
    nats = {name: np.array(found[name].details["by_cell"]) for name in (MODEL_ROW, best)}
    leads = nats[best] - nats[MODEL_ROW]
    scores = [float(np.nanmean(nats[name])) for name in (MODEL_ROW, best)]
    verdict = Verdict(MEASURE, int(np.isfinite(leads).sum()), scores[0], best, scores[1], mean_lead(leads, config.seed))
    axes = draw_gaps(new_axes((8, 5)), leads, f"nats per entry by which {MODEL_ROW} is better than {best}")
    picture = Picture("Lead by cell", save_axes(axes, bench.pictures / "cells.png"), "Right of 0 the model foretells a cell better.")
    return Tried(verdict, evaluation_of("nats", list(found.values()), "denoise", NOTES, [picture]))


def simple_methods(seed: int) -> dict[str, Ask]:
    """What needs no network and gives every cell a profile."""
    methods: dict[str, Ask] = {**BASELINES, **tuned_baselines(seed)}
    return {name: ask for name, ask in methods.items() if name != FILLS_ZEROS}


def _recipe(config: TryDenoising) -> DenoisingConfig:
    return config.recipe.model_copy(update={"seed": config.seed})


def _cells(config: TryDenoising) -> Cells:
    return Cells.of(read_h5ad(Path(config.data)), base_of(config), _recipe(config))


def _model(config: TryDenoising, cells: Cells, thinned: CellTable) -> Any:
    pipeline = DenoisingPipeline(base_of(config), _recipe(config)).fit_cells(replace(cells, table=thinned))
    assert pipeline.folder_ is not None
    return answers(Predictor(pipeline.folder_), thinned)


def _measured(ask: Ask, kept: CellTable, rest: CellTable) -> Found:
    nats, values = cell_nats(ask(kept), kept, rest)
    by_cell = np.where(values > 0, nats / np.maximum(values, 1), np.nan)
    return Found({"nats": float(np.nanmean(by_cell))}, {"by_cell": [round(float(value), 7) for value in by_cell]})


def answer_denoising(config: TryDenoising, winner: str) -> tuple[AnnData | None, str]:
    """The file with layers["auto_denoised"], rates per 10,000; NaN for genes without a place."""
    data = read_h5ad(Path(config.data))
    if winner == MODEL_ROW:
        rates = DenoisingPipeline(base_of(config), _recipe(config)).fit(data).predict(data)
    else:
        rates = _simple_rates(config, data, simple_methods(config.seed)[winner])
    data.layers["auto_denoised"] = rates
    return data, f"{data.n_obs} cells denoised by {winner}"


def _simple_rates(config: TryDenoising, data: AnnData, ask: Ask) -> NDArray[np.float32]:
    cells = Cells.of(data, None, _recipe(config))
    columns = gene_columns(data, config.recipe.keys, cells.vocabulary)
    rates = np.empty((data.n_obs, len(columns)), dtype=np.float32)
    for rows, shares in ask(cells.table):
        rates[rows] = rates_of(shares, columns)
    return rates


DENOISE = Task(TryDenoising, measure_denoising, answer_denoising)
