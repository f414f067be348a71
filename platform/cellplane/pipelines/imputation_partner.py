"""What is mixed into a network's imputation: the average of the nearest reference cells, or a ridge regression in the reference.

Both are the baselines that the network has to beat. Where one of them foretells hidden observed genes better together with
the network than the network alone, it has its share in the answer; which one and how much is chosen in fit.
"""

# n query cells, m reference cells, O observed genes, H genes asked for

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from cellplane.pipelines.imputation_baselines import Table, neighbours_average, ridge
from cellplane.pipelines.imputation_cells import MixedCells, Rows, dense, limited, scaled_log
from cellplane.pipelines.imputation_config import ImputationConfig


def partners_of(config: ImputationConfig) -> tuple[float, ...]:
    """The partners that are tried, by the ridge's penalty; 0 = the neighbours' average. Nothing for a network alone."""
    return (*((0.0,) if config.neighbours else ()), *config.ridges)


def partner_rates(cells: MixedCells, observed: NDArray[np.bool_], total: float, genes: Rows, config: ImputationConfig) -> Table:
    """What the config's partner expects of some genes [n, H]: rates in units of a cell's shown counts.

    It reads log counts of the ``observed`` genes [G], scaled to ``total`` in query and reference alike.
    """
    shown = np.flatnonzero(observed)
    theirs = limited(cells.reference, observed).totals()
    query = scaled_log(dense(cells.query, shown), limited(cells.query, observed).totals(), total)
    reference = scaled_log(dense(cells.reference, shown), theirs, total)
    values = scaled_log(dense(cells.reference, genes), theirs, total)
    with threadpool_limits(limits=1):
        predict, setting = (ridge, config.ridge) if config.ridge else (neighbours_average, float(config.neighbours))
        logs = np.maximum(predict(query, reference, values, setting), 0)
    rates: Table = np.expm1(logs) / total
    return rates


def best_partner(correlation: Mapping[tuple[float, float], float]) -> tuple[float, float]:
    """(ridge, share) of the highest mean correlation over hidden observed genes; the first of equals."""
    return max(correlation, key=lambda pair: correlation[pair])
