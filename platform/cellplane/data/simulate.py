"""Synthetic cells whose truth is known: negative binomial counts with types, donors, niches and knock-outs.

Counts are gamma-Poisson draws, the usual model of UMI data. A negative binomial is also a Poisson number of clusters
of logarithmic size (Quenouille 1949), so only the clusters have to be drawn: a cell costs what it expresses, not what
the genome holds. Cells come in fields of a thousand with a seed each, so any number can be streamed to disk. Real
data differs: use this to test software, never to compare methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from cellplane.data.config import SimulateConfig
from cellplane.data.gene_tables import installed_tables
from cellplane.data.sources import AnnData
from cellplane.data.truth import Tissue, Truth, draw_truth, grow_tissue, n_donors
from cellplane.data.writing import write_in_parts
from cellplane.errors import ConfigError
from cellplane.seeds import keyed_seed

DRAWN_TOGETHER = 2**20  # rates drawn at once: some tens of MB
CHUNK_CELLS = 4000
FIELD_GAP_UM = 100.0


def simulate(config: SimulateConfig) -> AnnData:
    """Seeded cells in memory: X integer CSR float32 of observed counts.

    obs: cell_type, batch, donor, depth (library size factor); with knock-outs perturbation ("A", "A+B", "control");
    with positions field_of_view, niche, ligand_level (emitted) and signal (received). obsm spatial in micrometres.
    var, varm and uns["simulation"] hold the truth about genes (see `truth.Truth`), layers true_rate when asked for.
    """
    return _join(list(fields(config)))


def simulate_to(
    path: Path, config: SimulateConfig, progress: Callable[[int], None] | None = None, chunk_cells: int = CHUNK_CELLS, gzip: bool = False
) -> None:
    """Write the cells of `simulate` to an h5ad, ``chunk_cells`` at a time; the chunk changes memory, never the cells.

    ``progress`` hears the number of cells written. Raises StorageError when the disk is full; the file appears whole.
    """
    write_in_parts(path, _rechunked(fields(config), chunk_cells), progress or (lambda done: None), gzip)  # noqa: ARG005


def fields(config: SimulateConfig) -> Iterator[AnnData]:
    """The cells, one field of view (or block, without positions) after another; each depends on its number and the seed alone."""
    truth = draw_truth(config, gene_names(config))
    var, varm, notes = truth.genes(), truth.tables(), truth.notes(config)
    edges = _edges(config)
    for number in range(len(edges) - 1):
        rng = np.random.default_rng(keyed_seed(config.seed, "field", number))
        cells = _draw_cells(config, truth, number, edges, rng)
        field = AnnData(X=_draw_counts(config, truth, cells, rng), obs=_obs(truth, config, cells), var=var, varm=varm)
        field.uns["simulation"] = notes
        if cells.tissue is not None:
            field.obsm["spatial"] = cells.tissue.positions + _corner(config, edges, number)
        if config.true_rates:
            field.layers["true_rate"] = _rates(config, truth, cells, slice(None)).astype(np.float32)
        yield field


def gene_names(config: SimulateConfig) -> list[str]:
    """GENE0001, GENE0002, ... or ids of an installed gene table, those that code for proteins first.

    Raises ConfigError when a species was named whose table is not installed, or has fewer genes.
    """
    plain = [f"GENE{gene:04d}" for gene in range(1, config.n_genes + 1)]
    tables = {} if config.gene_ids == "plain" else installed_tables()
    table = tables.get("human" if config.gene_ids == "installed" else config.gene_ids)
    if table is None:
        if config.gene_ids in ("plain", "installed"):
            return plain
        raise ConfigError(
            f"no {config.gene_ids} gene table is installed; install one (cellplane data genes install), or use gene_ids=plain"
        )
    if config.n_genes > len(table.ids):
        found = f"{config.n_genes} genes were asked for, the {table.species} table has {len(table.ids)}"
        raise ConfigError(f"{found}; use fewer, or gene_ids=plain")
    return [*table.ids[table.coding], *table.ids[~table.coding]][: config.n_genes]


def _edges(config: SimulateConfig) -> list[int]:
    """First cell of every field, and the end: fields are of equal size, and with positions there is one for every donor."""
    number = -(-config.n_cells // config.field_cells)
    if config.spatial:
        number = max(number, min(n_donors(config), config.n_cells))
    return [config.n_cells * field // number for field in range(number + 1)]


def _corner(config: SimulateConfig, edges: list[int], number: int) -> NDArray[np.float32]:
    """Where on the common map a field begins, [2] micrometres: fields lie beside one another, out of each other's reach."""
    count = len(edges) - 1
    side = np.ceil(np.sqrt(-(-config.n_cells // count))) * config.spacing_um
    row, place = divmod(number, int(np.ceil(np.sqrt(count))))
    return np.array([place, row], dtype=np.float32) * np.float32(side + max(FIELD_GAP_UM, 2 * config.niche.radius_um))


@dataclass(frozen=True)
class _Cells:
    """What is decided about the n cells of a field before their counts are drawn; ``first`` is the first one's number."""

    first: int
    number: int
    types: NDArray[np.int64]
    donors: NDArray[np.int64]
    depth: NDArray[np.float64]
    perturbation: NDArray[np.int64]
    tissue: Tissue | None


def _draw_cells(config: SimulateConfig, truth: Truth, number: int, edges: list[int], rng: np.random.Generator) -> _Cells:
    first, n_cells = edges[number], edges[number + 1] - edges[number]
    tissue = grow_tissue(config, n_cells, rng) if config.spatial else None
    turn = first + np.arange(n_cells)
    types = rng.permutation(turn % config.n_types) if tissue is None else tissue.types
    donors = rng.permutation(turn % n_donors(config)) if tissue is None else np.full(n_cells, number % n_donors(config))
    depth = rng.lognormal(0.0, config.depth_sigma, n_cells)
    perturbation = np.zeros(n_cells, dtype=np.int64)
    if config.knockouts is not None:
        perturbed = rng.random(n_cells) >= config.knockouts.control_share
        perturbation = np.where(perturbed, rng.integers(1, len(truth.perturbations), size=n_cells), 0)
    return _Cells(first, number, types, donors, depth, perturbation, tissue)


def _rates(config: SimulateConfig, truth: Truth, cells: _Cells, part: slice) -> NDArray[np.float64]:
    """Expected counts before dropout of some of the cells, [n, G]."""
    rates = truth.type_rate[cells.types[part]]
    rates *= truth.donor_effect[cells.donors[part]]
    rates *= cells.depth[part, None]
    if cells.tissue is not None and truth.ligand >= 0:
        receiver = config.niche.receiver_type
        hears = 1.0 if receiver is None else (cells.types[part] == receiver).astype(np.float64)
        response = 1.0 + config.niche.strength * cells.tissue.signal[part] * hears
        rates[:, truth.programme] *= response[:, None]
        level = cells.tissue.ligand_level[part]
        rates[:, truth.ligand] *= np.where(level > 0, level, 1.0)
    for row in np.flatnonzero(cells.perturbation[part]):
        for knockout in truth.perturbations[cells.perturbation[part][row]]:
            rates[row, truth.targets[knockout]] *= truth.folds[knockout]
    return rates


def _draw_counts(config: SimulateConfig, truth: Truth, cells: _Cells, rng: np.random.Generator) -> sp.csr_matrix:
    """Observed counts of the field's cells, CSR float32 with sorted columns."""
    rows = max(1, DRAWN_TOGETHER // config.n_genes)
    starts = range(0, len(cells.types), rows)
    return sp.vstack([_negative_binomial(config, _rates(config, truth, cells, slice(s, s + rows)), rng) for s in starts], format="csr")


def _negative_binomial(config: SimulateConfig, rates: NDArray[np.float64], rng: np.random.Generator) -> sp.csr_matrix:
    """Counts of mean ``rates`` [n, G] and the configured dispersion, with dropout.

    NB(mean m, theta) = Poisson(theta log(1 + m / theta)) clusters, each of logarithmic size with p = m / (m + theta).
    """
    odds = rates / config.dispersion
    reach = np.cumsum(np.log1p(odds))
    points = np.sort(rng.random(rng.poisson(config.dispersion * reach[-1]))) * reach[-1]
    entry = np.minimum(np.searchsorted(reach, points, side="right"), reach.size - 1)
    hit = odds.ravel()[entry]
    sizes = rng.logseries(hit / (1.0 + hit))
    first = np.flatnonzero(np.diff(entry, prepend=-1))
    counts = np.add.reduceat(sizes, first) if len(first) else sizes
    kept = rng.random(len(first)) >= config.dropout_rate
    row, gene = np.divmod(entry[first][kept], rates.shape[1])
    starts = np.searchsorted(row, np.arange(rates.shape[0] + 1))
    return sp.csr_matrix((counts[kept].astype(np.float32), gene.astype(np.int32), starts), shape=rates.shape)


def _obs(truth: Truth, config: SimulateConfig, cells: _Cells) -> pd.DataFrame:
    n_cells = len(cells.types)
    columns: dict[str, object] = {
        "cell_type": _category(cells.types, [f"type_{t}" for t in range(config.n_types)]),
        "batch": _category(cells.donors % config.n_batches, [f"batch_{b}" for b in range(config.n_batches)]),
        "donor": _category(cells.donors, [f"donor_{d}" for d in range(n_donors(config))]),
        "depth": cells.depth.astype(np.float32),
    }
    if config.knockouts is not None:
        columns["perturbation"] = _category(cells.perturbation, truth.perturbation_names())
    if cells.tissue is not None:
        columns["field_of_view"] = np.full(n_cells, cells.number, dtype=np.int32)
        columns["niche"] = _category(cells.tissue.niche, [f"niche_{n}" for n in range(config.n_types)])
        columns["ligand_level"] = cells.tissue.ligand_level.astype(np.float32)
        columns["signal"] = cells.tissue.signal.astype(np.float32)
    return pd.DataFrame(columns, index=pd.Index([f"cell_{cell:06d}" for cell in range(cells.first, cells.first + n_cells)]))


def _category(codes: NDArray[np.int64], names: Sequence[str]) -> object:
    return pd.Categorical.from_codes(codes.astype(np.int32), dtype=pd.CategoricalDtype(list(names)))


def _join(parts: Sequence[AnnData]) -> AnnData:
    """The parts as one; what they say about genes is the first's."""
    first = parts[0]
    return AnnData(
        X=sp.vstack([part.X for part in parts], format="csr"),
        obs=pd.concat([part.obs for part in parts]),
        var=first.var,
        varm=dict(first.varm),
        uns=dict(first.uns),
        obsm={key: np.concatenate([part.obsm[key] for part in parts]) for key in first.obsm},
        layers={key: np.concatenate([part.layers[key] for part in parts]) for key in first.layers},
    )


def _rechunked(parts: Iterable[AnnData], chunk_cells: int) -> Iterator[AnnData]:
    """The same cells, ``chunk_cells`` at a time."""
    waiting: list[AnnData] = []
    for part in parts:
        waiting.append(part)
        if sum(held.n_obs for held in waiting) < chunk_cells:
            continue
        joined = _join(waiting)
        whole = joined.n_obs - joined.n_obs % chunk_cells
        for start in range(0, whole, chunk_cells):
            yield _rows(joined, slice(start, start + chunk_cells))
        waiting = [_rows(joined, slice(whole, None))] if whole < joined.n_obs else []
    if waiting:
        yield _join(waiting)


def _rows(cells: AnnData, part: slice) -> AnnData:
    """Some of the cells; unlike a view of AnnData, with every category there is."""
    return AnnData(
        X=cells.X[part],
        obs=cells.obs.iloc[part],
        var=cells.var,
        varm=dict(cells.varm),
        uns=dict(cells.uns),
        obsm={key: array[part] for key, array in cells.obsm.items()},
        layers={key: array[part] for key, array in cells.layers.items()},
    )
