"""The truth a simulation draws its cells from: what each gene does in each type, donor, neighbourhood and knock-out.

Everything here is drawn once, from the seed alone, and stored with the cells, so that a test can ask afterwards whether
a model found it. `simulate` turns it into counts, field by field.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from cellplane.config import to_yaml
from cellplane.data.config import KnockoutConfig, NicheConfig, SimulateConfig
from cellplane.seeds import keyed_seed

# T types, B batches, D donors, G genes, K knocked-out genes
COUNTS_PER_GENE = 1.5  # a mid-depth panel: about half the entries are zero after dropout
BASE_SHARE = 1 / 30  # of the mean expression, added to every gene: none is silent
LIGAND_COUNTS, LIGAND_LEAK = 8.0, 0.01  # of an average sender; share of it in other types
LIGAND_SIGMA = 0.5  # spread of the senders' log ligand levels
PROGRAMME_COUNTS = 1.0  # of each programme gene in an average cell without signal
NICHE_PURITY = 0.6  # share of a niche's cells that are surely of its own type
JITTER = 0.3  # of the spacing: how far a cell may lie from its place in the lattice


@dataclass(frozen=True)
class Truth:
    """What is fixed before any cell is drawn.

    ``type_rate`` [T, G] are counts of an average cell, ``donor_effect`` [D, G] factors of batch and donor together,
    ``marker_of`` [G] the type a gene marks (-1 none). ``ligand`` is a gene position (-1: nothing planted) and
    ``programme`` the genes that answer it. ``targets`` [K, n] are the genes a knock-out changes, itself first, by
    ``folds`` [K, n]; ``perturbations`` lists combinations of knock-outs, the empty one (control) first.
    """

    gene_ids: list[str]
    type_rate: NDArray[np.float64]
    donor_effect: NDArray[np.float64]
    marker_of: NDArray[np.int64]
    ligand: int
    programme: NDArray[np.int64]
    targets: NDArray[np.int64]
    folds: NDArray[np.float64]
    perturbations: tuple[tuple[int, ...], ...]

    def perturbation_names(self) -> list[str]:
        """control, GENE, GENE+GENE: one for each combination."""
        return ["+".join(self.gene_ids[self.targets[k, 0]] for k in combination) or "control" for combination in self.perturbations]

    def genes(self) -> pd.DataFrame:
        """The gene table: marker_of (a type's name, or empty), is_ligand, is_programme, is_knocked_out."""
        positions = np.arange(len(self.gene_ids))
        columns = {
            "marker_of": [f"type_{t}" if t >= 0 else "" for t in self.marker_of],
            "is_ligand": positions == self.ligand,
            "is_programme": np.isin(positions, self.programme),
            "is_knocked_out": np.isin(positions, self.targets[:, 0]),
        }
        return pd.DataFrame(columns, index=pd.Index(self.gene_ids))

    def tables(self) -> dict[str, NDArray[np.float32]]:
        """Per-gene truth for varm: type_rate [G, T], donor_effect [G, D] and, with knock-outs, knockout_fold [G, K]."""
        tables = {"type_rate": self.type_rate.T, "donor_effect": self.donor_effect.T}
        if len(self.targets):
            folds = np.ones((len(self.gene_ids), len(self.targets)))
            folds[self.targets, np.arange(len(self.targets))[:, None]] = self.folds
            tables["knockout_fold"] = folds
        return {name: table.astype(np.float32) for name, table in tables.items()}

    def notes(self, config: SimulateConfig) -> dict[str, object]:
        """What `uns` says: the configuration and the names of what was planted."""
        return {
            "config": to_yaml(config),
            "expected_counts": "type_rate x donor_effect x depth x what neighbours and knock-outs do; then dropout loses its share",
            "ligand": self.gene_ids[self.ligand] if self.ligand >= 0 else "",
            "programme": [self.gene_ids[gene] for gene in self.programme],
            "strength": config.niche.strength,
            "radius_um": config.niche.radius_um,
            "knockouts": [self.gene_ids[gene] for gene in self.targets[:, 0]],
        }


def draw_truth(config: SimulateConfig, gene_ids: list[str]) -> Truth:
    """The truth of a configuration over these genes, from its seed alone."""
    rng = np.random.default_rng(keyed_seed(config.seed, "truth"))
    n_genes, donors = config.n_genes, n_donors(config)
    base = rng.gamma(config.gene_shape, 1 / config.gene_shape, n_genes) + BASE_SHARE
    order = rng.permutation(n_genes)
    marker_of = _markers(config, order)
    rate = base * np.where(marker_of == np.arange(config.n_types)[:, None], config.marker_fold, 1.0)
    rate *= COUNTS_PER_GENE if config.mean_counts is None else config.mean_counts / rate.sum(axis=1).mean()
    batch = rng.lognormal(0.0, config.batch_sigma, (config.n_batches, n_genes))
    donor = rng.lognormal(0.0, config.donor_sigma, (donors, n_genes)) * batch[np.arange(donors) % config.n_batches]
    ligand, programme = _plant(config.niche if config.spatial else None, rate, order[::-1])
    marker_of[[gene for gene in (ligand, *programme) if gene >= 0]] = -1
    targets, folds, combinations = _knock_out(config.knockouts, rate, {ligand, *programme}, rng)
    return Truth(gene_ids, rate, donor, marker_of, ligand, programme, targets, folds, combinations)


def n_donors(config: SimulateConfig) -> int:
    """Number of donors: one a batch unless the configuration says more. Donor d belongs to batch d mod n_batches."""
    return config.n_batches if config.n_donors is None else config.n_donors


def _markers(config: SimulateConfig, order: NDArray[np.int64]) -> NDArray[np.int64]:
    per_type = max(1, min(int(config.marker_share * config.n_genes), config.n_genes // config.n_types))
    marked = min(per_type * config.n_types, config.n_genes)
    marker_of = np.full(config.n_genes, -1)
    marker_of[order[:marked]] = np.arange(marked) // per_type
    return marker_of


def _plant(niche: NicheConfig | None, rate: NDArray[np.float64], order: NDArray[np.int64]) -> tuple[int, NDArray[np.int64]]:
    """Choose ligand and programme, and give them rates [T, G] that can be measured; (-1, none) where there is no room."""
    room = rate.shape[1] // 4
    if niche is None or room < 2:
        return -1, np.zeros(0, dtype=np.int64)
    ligand, programme = int(order[0]), np.sort(order[1 : 1 + min(niche.n_genes, room - 1)])
    rate[:, programme] = PROGRAMME_COUNTS
    rate[:, ligand] = LIGAND_COUNTS * LIGAND_LEAK
    rate[niche.sender_type, ligand] = LIGAND_COUNTS
    return ligand, programme


def _knock_out(
    config: KnockoutConfig | None, rate: NDArray[np.float64], planted: set[int], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float64], tuple[tuple[int, ...], ...]]:
    """Targets and folds [K, n] of each knock-out, its own gene first, and the combinations cells may carry."""
    n_genes = rate.shape[1]
    if config is None:
        return np.zeros((0, 1), dtype=np.int64), np.zeros((0, 1)), ((),)
    free = np.array([gene for gene in np.argsort(-rate.mean(axis=0), kind="stable") if gene not in planted])
    knocked = rng.permutation(free[: max(config.n_genes, n_genes // 2)])[: config.n_genes]  # of the better expressed half
    wanted = min(config.n_targets, n_genes // 4)
    others = [rng.permutation(np.setdiff1d(free, [gene]))[:wanted] for gene in knocked]
    targets = np.column_stack([knocked, np.stack(others)])
    folds = rng.lognormal(0.0, config.effect_sigma, targets.shape)
    folds[:, 0] = 1.0 - config.efficiency
    pairs = list(itertools.combinations(range(len(knocked)), 2))
    chosen = [pairs[index] for index in sorted(rng.permutation(len(pairs))[: config.n_pairs])]
    return targets, folds, ((), *((k,) for k in range(len(knocked))), *chosen)


@dataclass(frozen=True)
class Tissue:
    """One field of view: ``positions`` [n, 2] micrometres, ``niche`` and ``types`` [n], what each cell emits and receives [n]."""

    positions: NDArray[np.float32]
    niche: NDArray[np.int64]
    types: NDArray[np.int64]
    ligand_level: NDArray[np.float64]
    signal: NDArray[np.float64]


def grow_tissue(config: SimulateConfig, n_cells: int, rng: np.random.Generator) -> Tissue:
    """Cells on a loose lattice in niches that prefer one type each; every cell hears the senders within the radius."""
    side = int(np.ceil(np.sqrt(n_cells)))
    sites = np.sort(rng.permutation(side * side)[:n_cells])
    places = np.column_stack([sites % side, sites // side]) + 0.5 + rng.uniform(-JITTER, JITTER, (n_cells, 2))
    positions = (places * config.spacing_um).astype(np.float32)
    centres = rng.uniform(0.0, side * config.spacing_um, (config.n_types, 2))
    niche = np.asarray(cKDTree(centres).query(positions)[1])
    types = np.where(rng.random(n_cells) < NICHE_PURITY, niche, rng.integers(config.n_types, size=n_cells))
    level = rng.lognormal(-(LIGAND_SIGMA**2) / 2, LIGAND_SIGMA, n_cells) * (types == config.niche.sender_type)
    return Tissue(positions, niche, types, level, received(positions, level, config.niche.radius_um))


def received(positions: NDArray[np.float32], level: NDArray[np.float64], radius_um: float) -> NDArray[np.float64]:
    """Sum of the other cells' ``level`` [n] within ``radius_um`` of each cell, [n]; ``positions`` [n, 2] micrometres."""
    pairs = cKDTree(positions).query_pairs(radius_um, output_type="ndarray")
    here, there = np.concatenate([pairs, pairs[:, ::-1]]).T
    return np.bincount(here, weights=level[there], minlength=len(level)).astype(np.float64)
