"""How much a denoiser trusts the counts of similar cells: chosen by counts that it foretells and that nobody has seen.

Counts of the validation cells, which did not train the network, are split: nine tenths are shown, among the training cells
as reference, one tenth is foretold (PROTOCOLS 8). Test cells have no part in this.
"""

# G genes

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from cellplane.artifact.folder import ModelFolder
from cellplane.artifact.smoothing import Smoothing
from cellplane.data.sentences import CellTable
from cellplane.inference import BatchedStore, Predictor
from cellplane.pipelines.config import DenoisingConfig
from cellplane.pipelines.denoising_baselines import Answers, matrix, split_counts, splitting_score
from cellplane.pipelines.unknown import fit_space
from cellplane.seeds import keyed_seed

log = logging.getLogger(__name__)

MOST_JUDGED = 2000  # held-out cells that a setting is judged on: tables of all their genes are held, 155 MB at 19,374


@dataclass(frozen=True)
class Setting:
    """One way to smooth."""

    neighbours: int
    steps: int
    share: float


def smoothed(folder: ModelFolder, table: CellTable, held_out: NDArray[np.int64], config: DenoisingConfig) -> ModelFolder:
    """The model with its smoothing; ``held_out`` are the rows of ``table`` that did not train it.

    The model itself where neighbours do not help, or where cells have too little in common to be near to one another.
    """
    if max(config.smoothing.share) == 0:
        return folder
    held_out = np.sort(np.random.default_rng(keyed_seed(config.seed, "smoothing judged")).permutation(held_out)[:MOST_JUDGED])
    kept, rest = split_counts(table.rows(held_out), keyed_seed(config.seed, "smoothing"))
    best, nats = chosen(folder, (in_place(table, held_out, kept), kept, rest), config)
    log.info("smoothing: %s, %.5f nats an entry of counts taken out of the validation cells", best, nats)
    if best is None or best.share == 0:
        return folder
    found = smoothing_of(table, config, best)
    if found is None:
        return folder
    told = {"smoothing": f"{best.share:g} of {best.neighbours} neighbours, {best.steps} steps"}
    return replace(folder, attachments={**folder.attachments, **found.attachments()}, lineage={**folder.lineage, **told})


def chosen(folder: ModelFolder, cells: tuple[CellTable, CellTable, CellTable], config: DenoisingConfig) -> tuple[Setting | None, float]:
    """The setting that foretells best, and its nats an entry; ``cells``: the reference, and what cells show and keep back."""
    reference, kept, rest = cells
    network, store = _network_shares(folder, kept), BatchedStore.for_model(kept, folder)
    tried: dict[Setting, float] = {}
    first = smoothing_of(reference, config, Setting(1, 1, 1.0))
    if first is None:
        return None, splitting_score(_pieces(network), kept, rest)
    for neighbours in config.smoothing.neighbours:
        walks = replace(first, neighbours=neighbours)
        for steps in config.smoothing.steps:
            near = np.zeros_like(network)
            for sentence in range(len(store.sizes)):
                batch = store.read([sentence])
                near[batch.row.numpy()] = walks.mixed(batch, network[batch.row.numpy()], steps)
            for share in config.smoothing.share:
                setting = Setting(neighbours, steps, share)
                tried[setting] = splitting_score(_pieces((1 - share) * network + share * near), kept, rest)
    best = min(tried, key=lambda setting: tried[setting])
    return best, tried[best]


def smoothing_of(table: CellTable, config: DenoisingConfig, setting: Setting) -> Smoothing | None:
    """These cells as reference; None where cells or genes are too few."""
    rows = np.sort(
        np.random.default_rng(keyed_seed(config.seed, "smoothing cells")).permutation(table.n_cells)[: config.smoothing.kept_cells]
    )
    part = table.rows(rows)
    space = fit_space(part, config.seed, config.smoothing.components)
    if space is None:
        return None
    space = replace(space, axes=np.ascontiguousarray(space.axes))  # as it is read again: sums in another order differ
    return Smoothing(space, part.crow, part.gene, part.value, part.panel, setting.neighbours, setting.steps, setting.share)


def _network_shares(folder: ModelFolder, table: CellTable) -> NDArray[np.float32]:
    """What the network alone says of these cells, [n, G]."""
    store = BatchedStore.for_model(table, folder)
    out = np.zeros((table.n_cells, len(table.panel)), dtype=np.float32)
    for rows, shares in Predictor(folder).rates(store):
        out[rows] = shares
    return out


def _pieces(shares: NDArray[np.float32]) -> Answers:
    def parts() -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        for start in range(0, len(shares), 256):
            rows = np.arange(start, min(start + 256, len(shares)))
            yield rows, shares[rows]

    return parts()


def in_place(table: CellTable, rows: NDArray[np.int64], cells: CellTable) -> CellTable:
    """The table with other counts in some rows."""
    both = sparse.vstack([matrix(table), matrix(cells)], format="csr")
    order = np.arange(table.n_cells)
    order[rows] = table.n_cells + np.arange(len(rows))
    counts = both[order]
    return replace(table, crow=counts.indptr.astype(np.int64), gene=counts.indices.astype(np.int64), value=counts.data.astype(np.float32))
