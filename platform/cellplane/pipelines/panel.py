"""Making a model's reference panel from training cells: averages of clusters by default, real cells only when asked for."""

# n cells, N cells of the panel, G genes

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD

from cellplane.artifact.folder import ModelFolder
from cellplane.artifact.panel import Panel
from cellplane.data.config import DataKeys
from cellplane.data.sentences import CellTable
from cellplane.data.sources import AnnData, cell_table
from cellplane.errors import ConfigError, DataError
from cellplane.inference import TASKS, query_keys
from cellplane.pipelines.config import PanelConfig

log = logging.getLogger(__name__)

TITLE = "## Reference panel"
COMPONENTS = 20  # in which cells are clustered
CELLS_CLUSTERED = 20_000  # at most; a panel of hundreds needs no more
MEMBERS = 5  # a cluster of fewer would be nearly one person's cell, and is left out


def with_panel(folder: ModelFolder, data: AnnData, keys: DataKeys, config: PanelConfig) -> ModelFolder:
    """The model with a panel made from the cells of ``data``, and a card that says so; without, where ``config`` wants none.

    ConfigError for a model that reads no company, or more cells than half a sentence; DataError without counts.
    """
    if config.cells == 0:
        return folder
    if "embed" not in TASKS[folder.task]:
        raise ConfigError(f"a {folder.task} model brings its own company; a panel is for models that annotate or embed")
    if config.cells > folder.max_cells // 2:
        raise ConfigError(f"a panel of {config.cells} cells is more than half a sentence of {folder.max_cells}; take fewer")
    table, _ = cell_table(data, folder.vocabulary, query_keys(data, keys.model_copy(update={"labels_key": None})))
    known = table.rows(np.flatnonzero(table.totals() > 0))
    if known.n_cells == 0:
        raise DataError("no cell has counts in genes the model knows: there is nothing to make a panel of")
    panel = MAKERS[config.origin](known, config)
    log.info("the model carries a panel of %s", panel.told)
    found = replace(folder, attachments={**folder.attachments, **panel.attachments()})
    return replace(found, card=f"{folder.card.partition(TITLE)[0].rstrip()}\n{panel_card(found)}")


def panel_card(folder: ModelFolder) -> str:
    """What a model's card says of its panel; empty without one."""
    panel = Panel.of(folder.attachments)
    return "" if panel is None else f"\n{TITLE}\n\n{panel.told}, for cells that are read alone (`context: panel`).\n"


def _centroids(table: CellTable, config: PanelConfig) -> Panel:
    """Counts drawn at the depth of each cluster from the mean profile of its cells."""
    rng = np.random.default_rng(config.seed)
    counts = _matrix(table)[np.sort(rng.permutation(table.n_cells)[:CELLS_CLUSTERED])]
    if counts.shape[0] < MEMBERS:
        raise DataError(f"{counts.shape[0]} cells are too few to average: a panel of centroids needs {MEMBERS}")
    cluster = clusters(counts, min(config.cells, counts.shape[0] // MEMBERS), config.seed)
    drawn = []
    for index in np.flatnonzero(np.bincount(cluster) >= MEMBERS):
        own = counts[np.flatnonzero(cluster == index)]
        profile, depth = np.asarray(own.sum(0)).ravel(), float(np.median(np.asarray(own.sum(1)).ravel()))
        drawn.append(sp.csr_matrix(rng.poisson(profile / profile.sum() * depth).astype(np.float32)))
    return _panel(sp.vstack(drawn, format="csr"), table, "centroids")


def clusters(counts: sp.csr_matrix, wanted: int, seed: int) -> NDArray[np.int64]:
    """A cluster of every cell [n], by k-means on leading components of log counts."""
    totals = np.asarray(counts.sum(1)).ravel()
    logs = sp.diags(float(np.median(totals)) / totals) @ counts
    logs.data = np.log1p(logs.data)
    width = min(COMPONENTS, min(logs.shape) - 1)
    if width < 1:
        return np.zeros(counts.shape[0], dtype=np.int64)
    space = TruncatedSVD(width, random_state=seed).fit_transform(logs)
    found: NDArray[np.int64] = KMeans(min(wanted, len(space)), n_init=1, random_state=seed).fit_predict(space).astype(np.int64)
    return found


def _cells(table: CellTable, config: PanelConfig) -> Panel:
    """Some of the cells, by the seed."""
    rows = np.random.default_rng(config.seed).permutation(table.n_cells)[: config.cells]
    return _panel(_matrix(table)[np.sort(rows)], table, "cells")


def _matrix(table: CellTable) -> sp.csr_matrix:
    return sp.csr_matrix((table.value, table.gene, table.crow), shape=(table.n_cells, len(table.panel)))


def _panel(counts: sp.csr_matrix, table: CellTable, origin: Literal["centroids", "cells"]) -> Panel:
    return Panel(counts.indptr.astype(np.int64), counts.indices.astype(np.int64), counts.data.astype(np.float32), table.panel, origin)


MAKERS = {"centroids": _centroids, "cells": _cells}
