"""The second opinion answers over the genes that atlas and file share, and its markers are the atlas's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from cellplane.data.config import DataKeys
from cellplane.data.sources import AnnData, cell_table
from cellplane.errors import ConfigError, DataError
from cellplane.genes import GeneVocabulary
from cellplane.pipelines import annotation_baselines
from cellplane.pipelines.second_opinion import Atlas, counts_of

REGRESSION = ("logistic regression", "raw genes C=0.3")


@pytest.fixture(scope="module")
def vocabulary(cells: AnnData) -> GeneVocabulary:
    return GeneVocabulary.from_ids(list(cells.var_names))


@pytest.fixture(scope="module")
def atlas(training: AnnData, vocabulary: GeneVocabulary) -> Atlas:
    table, _ = cell_table(training, vocabulary, DataKeys())
    return Atlas(table, training.obs["cell_type"].astype(str).to_numpy().astype(object), tuple(training.var_names))


def test_counts_are_those_of_the_table(atlas, training):
    np.testing.assert_array_equal(counts_of(atlas.table).toarray(), training.X.toarray())


@pytest.mark.parametrize("genes", [150, 60])
def test_it_names_cells_of_a_file_with_all_genes_or_some(atlas, query, vocabulary, genes):
    part, _ = cell_table(query[:, ::-1][:, :genes].copy(), vocabulary, DataKeys())
    answers = atlas.answers(REGRESSION, part, 0)
    assert np.mean(answers == query.obs["cell_type"].astype(str).to_numpy()) > 0.85


def test_genes_that_only_the_atlas_measured_say_nothing(atlas, query, vocabulary):
    few, _ = cell_table(query[:, :80].copy(), vocabulary, DataKeys())
    counts = atlas.counts.toarray()
    counts[:, 80:] = 7
    spoilt = training_like(counts, atlas)
    np.testing.assert_array_equal(atlas.answers(REGRESSION, few, 0), spoilt.answers(REGRESSION, few, 0))


def training_like(counts: np.ndarray, atlas: Atlas) -> Atlas:
    """The atlas with other counts."""
    data = AnnData(X=counts, var=pd.DataFrame(index=list(atlas.genes)))
    table, _ = cell_table(data, GeneVocabulary.from_ids(list(atlas.genes)), DataKeys())
    return Atlas(table, atlas.labels, atlas.genes)


def test_the_choice_is_the_best_of_all_by_inner_folds(atlas, monkeypatch):
    monkeypatch.setattr(annotation_baselines, "TREES", 5)
    monkeypatch.setattr(annotation_baselines, "STRENGTHS", (0.3,))
    choice, score = atlas.choose(0)
    scores = annotation_baselines.inner_scores(atlas.counts, atlas.labels, 0, 3)
    assert scores[choice] == score == max(scores.values())
    assert score > 0.8


def test_markers_are_unique_and_belong_to_one_type(atlas):
    markers = atlas.markers(2)
    assert len(markers) == len(set(markers)) == 2 * len(atlas.types)
    means = np.stack([atlas.counts[atlas.labels == name].mean(axis=0).A1 for name in atlas.types])
    assert np.array_equal(means[:, markers].argmax(0), np.repeat(np.arange(len(atlas.types)), 2))


def test_a_choice_of_another_version_is_said(atlas):
    with pytest.raises(ConfigError, match="chosen by another version"):
        atlas.answers(("logistic regression", "raw genes C=123"), atlas.table, 0)


def test_without_shared_genes_there_is_no_answer(atlas):
    nothing = replace(atlas.table, panel=np.zeros_like(atlas.table.panel))
    with pytest.raises(DataError, match="share no gene"):
        atlas.answers(REGRESSION, nothing, 0)


def test_thinning_draws_the_same_cells_again(atlas):
    first, again = atlas.thinned(60, 1), atlas.thinned(60, 1)
    np.testing.assert_array_equal(first.counts.toarray(), again.counts.toarray())
    assert first.table.n_cells < atlas.table.n_cells
    assert atlas.thinned(10_000, 1) is atlas
