"""Clusters follow the cells and their seed, never the labels; samples mix where they lie on one another and not where they are apart."""

from __future__ import annotations

import random

import numpy as np
import pytest

from cellplane.errors import DataError
from cellplane.pipelines.clustering import closeness, clustering_scores, leiden, leiden_of_size, mixing_scores, neighbour_graph

RNG = np.random.default_rng(0)
CENTRES = np.repeat(np.eye(4, 8) * 12, 60, axis=0)
ISLANDS = (CENTRES + RNG.normal(0, 1, CENTRES.shape)).astype(np.float32)  # four types far apart
TYPES = np.repeat(["a", "b", "c", "d"], 60)


def test_types_that_lie_apart_are_found_whatever_they_are_called():
    scores = clustering_scores(ISLANDS, TYPES)
    assert scores["nmi_fixed"] == scores["ari_fixed"] == 1
    assert scores["nmi"] > 0.7
    assert clustering_scores(ISLANDS, np.roll(TYPES, 60)) == scores


def test_one_seed_gives_one_answer_and_leaves_the_global_generator_alone():
    graph = neighbour_graph(RNG.normal(size=(200, 5)))
    random.seed(7)
    first, state = leiden(graph, 1.0, seed=3), random.getstate()
    random.seed(7)
    assert random.getstate() == state
    assert (leiden(graph, 1.0, seed=3) == first).all()


def test_an_asked_number_of_clusters_is_met():
    graph = neighbour_graph(RNG.normal(size=(300, 5)))
    assert [leiden_of_size(graph, size).max() + 1 for size in (2, 5, 9)] == [2, 5, 9]


def test_a_graph_joins_near_cells_and_no_cell_to_itself():
    graph = neighbour_graph(ISLANDS, 5)
    kinds = {(TYPES[edge.source], TYPES[edge.target]) for edge in graph.es}
    assert all(one == other for one, other in kinds)
    assert 0 < min(graph.es["weight"]) < max(graph.es["weight"]) <= 1
    assert not any(graph.is_loop())


def test_weights_fall_with_distance_whatever_the_density():
    distance = np.sort(RNG.gamma(2, size=(20, 14)), axis=1)
    weight = closeness(distance)
    assert (weight[:, 0] == 1).all()
    assert (np.diff(weight, axis=1) < 0).all()
    assert weight.sum(axis=1) == pytest.approx(np.log2(15), abs=1e-3)
    assert closeness(distance * 1000) == pytest.approx(weight, abs=1e-4)
    assert (closeness(np.ones((3, 14))) == 1).all(), "cells at one place"


def test_mixed_samples_score_high_and_separate_ones_low():
    batch = np.tile(["one", "two"], 120)
    mixed = mixing_scores(ISLANDS, batch, TYPES)
    apart = mixing_scores(ISLANDS + 30 * (batch == "one")[:, None], batch, TYPES)
    assert mixed["ilisi"] > 0.85
    assert mixed["kbet"] > 0.85
    assert apart["ilisi"] < 0.1, "30 neighbours, of whom 29 are there: one is of the other sample"
    assert apart["kbet"] == 0


def test_a_type_of_one_sample_is_no_lack_of_mixing():
    batch = np.where(TYPES == "a", "one", np.tile(["one", "two"], 120))
    shown = TYPES != "a"
    assert mixing_scores(ISLANDS, batch, TYPES) == mixing_scores(ISLANDS[shown], batch[shown], TYPES[shown])
    assert mixing_scores(ISLANDS, np.full(240, "one"), TYPES) == {}


def test_what_cannot_be_clustered_is_refused():
    with pytest.raises(DataError, match="finite"):
        neighbour_graph(np.full((10, 2), np.nan))
    with pytest.raises(DataError, match="3 cells"):
        neighbour_graph(np.zeros((2, 2)))
