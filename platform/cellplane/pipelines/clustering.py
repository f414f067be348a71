"""Communities of cells in an embedding, and how well its samples mix.

Clusters are Leiden communities (Traag, Waltman and van Eck, Scientific Reports 9, 2019) of the customary graph of 15 nearest
neighbours. No label chooses anything here: the resolution is 1, or whatever gives an asked number of clusters.
Mixing is told by two published measures over a cell's neighbours of its own type, because samples may differ in what types
they hold: iLISI (Korsunsky et al., Nature Methods 16, 2019) and the acceptance rate of kBET (Buettner et al., ibid.).
"""

# n cells, B samples

from __future__ import annotations

import random

import igraph
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse, stats
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.neighbors import NearestNeighbors

from cellplane.errors import DataError

NEIGHBOURS = 15  # scanpy's customary graph
MIXING_NEIGHBOURS = 30  # the perplexity of the published iLISI
REJECTED = 0.05  # kBET's error rate
BISECTIONS = 16  # halvings of the resolution's range: 0.1 % of it
LEAST_WEIGHT = 1e-6  # no neighbour is none
LOWEST, HIGHEST = 1e-3, 100.0  # resolutions between which every useful number of clusters lies


def neighbour_graph(embedding: ArrayLike, neighbours: int = NEIGHBOURS) -> igraph.Graph:
    """The cells, joined to their nearest with the weights that UMAP gives, as scanpy does; ``neighbours`` counts the cell itself.

    DataError for an embedding that is not finite, or of fewer than 3 cells.
    """
    points = _finite(embedding)
    size = max(min(neighbours, len(points)) - 1, 1)
    near = NearestNeighbors(n_neighbors=size).fit(points)
    distance, index = near.kneighbors()
    weight = closeness(distance)
    one_way = sparse.csr_matrix((weight.ravel(), index.ravel(), np.arange(0, index.size + 1, size)), shape=(len(points), len(points)))
    joined = sparse.triu(one_way + one_way.T - one_way.multiply(one_way.T), k=1).tocoo()
    graph = igraph.Graph(n=len(points), edges=list(zip(joined.row.tolist(), joined.col.tolist(), strict=True)))
    graph.es["weight"] = joined.data.tolist()
    return graph


def closeness(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights in (0, 1] of distances [n, k] in ascending order: 1 for the nearest, falling at a rate of the cell's own.

    The rate makes a cell's weights add up to log2(k + 1) (McInnes, Healy and Melville, UMAP, 2018): dense and sparse places alike.
    """
    beyond, wanted = distance - distance[:, :1], np.log2(distance.shape[1] + 1)
    low, high = np.full(len(distance), -30.0), np.full(len(distance), 30.0)  # of the logarithm of the scale
    for _ in range(BISECTIONS * 2):
        middle = (low + high) / 2
        total = np.exp(-beyond / np.exp(middle)[:, None]).sum(axis=1)
        low, high = np.where(total < wanted, middle, low), np.where(total < wanted, high, middle)
    weight: NDArray[np.float64] = np.maximum(np.exp(-beyond / np.exp((low + high) / 2)[:, None]), LEAST_WEIGHT)
    return weight


def leiden(graph: igraph.Graph, resolution: float = 1.0, seed: int = 0) -> NDArray[np.int64]:
    """The community of every cell, [n], by modularity at this resolution; the same seed gives the same communities."""
    igraph.set_random_number_generator(random.Random(seed))
    try:
        found = graph.community_leiden("modularity", weights="weight", resolution=resolution, n_iterations=-1)
    finally:
        igraph.set_random_number_generator(random)
    return np.array(found.membership, dtype=np.int64)


def leiden_of_size(graph: igraph.Graph, clusters: int, seed: int = 0) -> NDArray[np.int64]:
    """Communities at the resolution that gives this many clusters, or the nearest number that one was found for."""
    low, high, best = np.log(LOWEST), np.log(HIGHEST), leiden(graph, 1.0, seed)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        found = leiden(graph, float(np.exp(middle)), seed)
        best = min(best, found, key=lambda one: abs(one.max() + 1 - clusters))
        if (size := found.max() + 1) == clusters:
            break
        low, high = (middle, high) if size < clusters else (low, middle)
    return best


def clustering_scores(embedding: ArrayLike, truth: ArrayLike, seed: int = 0) -> dict[str, float]:
    """NMI and ARI with the labels [n] of clusters at resolution 1 (nmi, ari, clusters) and of as many as there are labels (_fixed)."""
    graph, known = neighbour_graph(embedding), np.asarray(truth).astype(str)
    own, fixed = leiden(graph, 1.0, seed), leiden_of_size(graph, len(set(known)), seed)
    return {
        "nmi": float(normalized_mutual_info_score(known, own)),
        "ari": float(adjusted_rand_score(known, own)),
        "nmi_fixed": float(normalized_mutual_info_score(known, fixed)),
        "ari_fixed": float(adjusted_rand_score(known, fixed)),
        "clusters": float(own.max() + 1),
    }


def mixing_scores(embedding: ArrayLike, batches: ArrayLike, types: ArrayLike) -> dict[str, float]:
    """How well samples [n] mix among the cells of one type: ilisi and kbet, both from 0 (apart) to 1 (mixed); empty for one sample.

    Types found in a single sample, or too small for a neighbourhood, tell nothing and are left out.
    """
    points, batch, kind = _finite(embedding), np.asarray(batches).astype(str), np.asarray(types).astype(str)
    found: list[NDArray[np.float64]] = []
    for name in sorted(set(kind)):
        cells = np.flatnonzero(kind == name)
        if len(set(batch[cells])) > 1 and len(cells) > 3:
            found.append(_mixed(points[cells], batch[cells]))
    if not found:
        return {}
    means = np.concatenate(found, axis=1).mean(axis=1)
    return {"ilisi": float(means[0]), "kbet": float(means[1])}


def _mixed(points: NDArray[np.float32], batch: NDArray[np.str_]) -> NDArray[np.float64]:
    """iLISI scaled to [0, 1], and whether kBET accepts the neighbourhood, of every cell of a type: [2, n]."""
    names, index = np.unique(batch, return_inverse=True)
    size = min(MIXING_NEIGHBOURS, len(points) - 1)
    near = NearestNeighbors(n_neighbors=size).fit(points).kneighbors(return_distance=False)
    counts = np.stack([(index[near] == number).sum(axis=1) for number in range(len(names))], axis=1)
    lisi = 1 / ((counts / size) ** 2).sum(axis=1)
    expected = size * np.bincount(index) / len(index)
    p_value = stats.chi2.sf(((counts - expected) ** 2 / expected).sum(axis=1), len(names) - 1)
    return np.stack([(lisi - 1) / (len(names) - 1), p_value >= REJECTED])


def _finite(embedding: ArrayLike) -> NDArray[np.float32]:
    points = np.asarray(embedding, dtype=np.float32)
    if points.ndim != 2 or len(points) < 3 or not np.isfinite(points).all():
        raise DataError(
            f"an embedding to cluster needs finite numbers of shape [cells, dimensions], 3 cells at least; found {points.shape}"
        )
    return points
