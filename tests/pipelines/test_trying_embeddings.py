"""A trial places cells in several ways, lets the labels judge, and says whether a base model is worth it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cellplane.artifact.folder import ModelFolder, save_model
from cellplane.data.files import file_sha256
from cellplane.data.inputs import SOURCE_DIGITS, source_sha256
from cellplane.data.sources import AnnData, read_h5ad, write_h5ad
from cellplane.errors import ColumnError, ConfigError, DataError, VocabularyError
from cellplane.pipelines import try_embedding, trying
from cellplane.pipelines.embedding import CellEmbeddingPipeline
from cellplane.pipelines.job import MODEL_ROW
from cellplane.pipelines.try_config import TryEmbedding
from cellplane.pipelines.try_embedding import CONTROLS, OURS, ROWS, SIMPLE, verdict_of
from cellplane.pipelines.trying import TryReport, run_try
from tests.pipelines.test_plots import assert_picture

UNLABELLED = 20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, cells: AnnData, base_model: ModelFolder) -> Path:
    """Cells of which some have no label, and a base that saw them."""
    home = tmp_path_factory.mktemp("try")
    data = cells[:160].copy()
    labels = data.obs["cell_type"].astype(str).to_numpy().astype(object)
    labels[:UNLABELLED] = "NA"
    data.obs["cell_type"] = labels.astype(str)
    write_h5ad(data, home / "cells.h5ad")
    seen = source_sha256(home / "cells.h5ad", False)[:SOURCE_DIGITS]
    save_model(replace(base_model, lineage={"sources": seen}), home / "base")
    return home


def embedding(place: Path, **changes: Any) -> TryEmbedding:
    plain = {"data": str(place / "cells.h5ad"), "base_model": str(place / "base"), "halvings": 2, "out": str(place / "out")}
    return TryEmbedding.model_validate({**plain, **changes})


@pytest.fixture(scope="module")
def tried(place: Path) -> TryReport:
    """The cells tried once, with the answer of whoever won."""
    return run_try(embedding(place, auto=True))


def test_a_verdict_rests_on_halves_of_all_labelled_cells(place, tried):
    study = try_embedding.read_study(embedding(place))
    assert study.cells.n_obs == 160 - UNLABELLED
    for first, second in zip(study.halves[::2], study.halves[1::2], strict=True):
        assert sorted([*first, *second]) == list(range(160 - UNLABELLED))
    verdict = tried.verdict
    assert verdict.n == 4
    assert verdict.lead.low <= verdict.lead.mean <= verdict.lead.high
    assert verdict.lead.mean == pytest.approx(verdict.model - verdict.other)
    assert verdict.baseline in SIMPLE


def test_the_page_shows_every_way_on_every_half_and_whether_the_base_saw_the_cells(tried):
    text, markdown = (tried.page.with_suffix(end).read_text(encoding="utf-8") for end in (".html", ".md"))
    for told in (text, markdown):
        assert all(name in told for name in ROWS)
        assert "SEEN IN PRE-TRAINING" in told
        assert "jackknife" in told
        assert "paired bootstrap" not in told
    assert text.index('class="verdict"') < text.index("<table>")
    assert_picture(tried.page.parent / "pictures" / "halves.png")


def test_the_winner_places_all_cells(place, tried):
    before, answer = read_h5ad(place / "cells.h5ad"), read_h5ad(tried.answer)
    assert list(answer.obs_names) == list(before.obs_names)
    assert np.isfinite(answer.obsm["X_auto"]).all()
    assert answer.uns["auto"]["winner"] == tried.verdict.winner
    assert "160 cells placed" in tried.told


@pytest.mark.parametrize(("winner", "even"), [(OURS[0], 0.0), (OURS[1], 0.5)])
def test_the_models_places_are_those_of_the_pipeline(place, winner, even):
    found, _ = trying.TASKS["embed"].answer(embedding(place), winner)
    expected = CellEmbeddingPipeline(str(place / "base")).predict(read_h5ad(place / "cells.h5ad"), even=even)
    np.testing.assert_allclose(found.obsm["X_auto"], expected, atol=1e-5)


@pytest.mark.parametrize("winner", SIMPLE)
def test_a_simple_method_places_all_cells_too(place, winner):
    found, told = trying.TASKS["embed"].answer(embedding(place), winner)
    assert found.obsm["X_auto"].shape == (160, 50)
    assert winner in told


def test_a_second_run_places_nothing_and_the_users_file_stays_as_it_was(place, tried, monkeypatch):
    before = {path: file_sha256(path) for path in (place / "cells.h5ad", tried.answer)}
    monkeypatch.setattr(try_embedding, "_measured", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(try_embedding, "spaces_of", lambda *_: pytest.fail("placed again"))
    again = run_try(embedding(place, auto=True))
    assert again.verdict == tried.verdict
    assert "written before" in again.told
    assert {path: file_sha256(path) for path in before} == before


def test_an_interrupted_trial_goes_on_behind_the_last_half(place, tried, tmp_path, monkeypatch):
    def interrupt(text: str) -> None:
        if text.startswith("[3/4]"):
            raise KeyboardInterrupt

    config = embedding(place, out=str(tmp_path / "out"))
    with pytest.raises(KeyboardInterrupt):
        run_try(config, interrupt)
    measured, calls = try_embedding._measured, []
    monkeypatch.setattr(try_embedding, "_measured", lambda *given: (calls.append(given[3].split), measured(*given))[1])
    assert run_try(config).verdict == tried.verdict
    assert calls == [2, 3]


def test_labels_only_judge(place, tmp_path):
    """With other labels every cell lies where it lay."""
    config = embedding(place)
    places = {winner: trying.TASKS["embed"].answer(config, winner)[0].obsm["X_auto"] for winner in (*OURS, *SIMPLE)}
    data = read_h5ad(place / "cells.h5ad")
    data.obs["cell_type"] = np.roll(data.obs["cell_type"].astype(str), 1)
    write_h5ad(data, tmp_path / "other.h5ad")
    lied = embedding(place, data=str(tmp_path / "other.h5ad"))
    for winner, placed in places.items():
        assert np.array_equal(trying.TASKS["embed"].answer(lied, winner)[0].obsm["X_auto"], placed), winner


def test_with_samples_their_mixing_is_told_too(place, tmp_path):
    keys = {"labels_key": "cell_type", "batch_key": "batch"}
    report = run_try(embedding(place, keys=keys, out=str(tmp_path / "out")))
    assert "ilisi" in report.page.read_text(encoding="utf-8")


def test_whether_ours_is_evened_is_chosen_on_the_other_half():
    """Each half prefers another way: in hindsight ours would lead, chosen on the other half it does not."""
    nmi = {name: [0.5] * 4 for name in ROWS}
    nmi[OURS[0]], nmi[OURS[1]] = [0.9, 0.3, 0.9, 0.3], [0.3, 0.9, 0.3, 0.9]
    nmi[SIMPLE[0]], nmi[CONTROLS[0]] = [0.6, 0.6, 0.6, 0.6], [0.4] * 4
    verdict = verdict_of(nmi)
    assert verdict.model == pytest.approx(0.3)
    assert verdict.decision == "baseline"
    assert "Random weights reach 0.5" in verdict.text


def test_a_base_that_keeps_types_together_is_recommended():
    nmi = {name: [0.5, 0.52, 0.48, 0.5] for name in ROWS} | {OURS[1]: [0.8, 0.81, 0.79, 0.8]}
    verdict = verdict_of(nmi)
    assert verdict.text.startswith(f"Use {OURS[1]}. Over 4 halves of the cells")
    assert verdict.winner == OURS[1]
    assert "Random weights" not in verdict.text


def spoilt(place: Path, tmp_path: Path, change: Any) -> str:
    data = read_h5ad(place / "cells.h5ad")
    write_h5ad(change(data), tmp_path / "spoilt.h5ad")
    return str(tmp_path / "spoilt.h5ad")


def one_type(data: AnnData) -> AnnData:
    data.obs["cell_type"] = "B"
    return data


def other_genes(data: AnnData) -> AnnData:
    data.var_names = [f"NOBODY{gene}" for gene in range(data.n_vars)]
    return data


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"base_model": None}, ConfigError, "--base-model FOLDER .*models list.*models import.*pretrain"),
        ({"base_model": "nowhere"}, (ConfigError, DataError), "nowhere"),
        ({"keys": {"labels_key": None}}, ConfigError, "--labels-key"),
        ({"keys": {"labels_key": "cell_typ"}}, ColumnError, "did you mean 'cell_type'"),
        ({"keys": {"labels_key": "cell_type", "batch_key": "sample"}}, ColumnError, "sample"),
        ({"data": one_type}, DataError, "140|160 cells of 1 types"),
        ({"data": lambda data: data[:70].copy()}, DataError, "60 cells"),
        ({"data": other_genes}, VocabularyError, "genes"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_placed(place, tmp_path, changes, error, words):
    changes = {key: spoilt(place, tmp_path, value) if callable(value) else value for key, value in changes.items()}
    with pytest.raises(error, match=words):
        run_try(embedding(place, **changes, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_model_that_places_no_cells_is_refused(place, tmp_path, base_model):
    save_model(replace(base_model, task="impute"), tmp_path / "imputes")
    with pytest.raises(ConfigError, match="a model to impute with"):
        run_try(embedding(place, base_model=str(tmp_path / "imputes"), out=str(tmp_path / "out")))


def test_more_cells_than_asked_are_drawn_by_the_seed(place):
    studies = [try_embedding.read_study(embedding(place, max_cells=100, seed=seed)) for seed in (0, 0, 1)]
    assert [study.cells.n_obs for study in studies] == [100] * 3
    names = [list(study.cells.obs_names) for study in studies]
    assert names[0] == names[1] != names[2]
    assert all(name.startswith(MODEL_ROW) for name in OURS)
