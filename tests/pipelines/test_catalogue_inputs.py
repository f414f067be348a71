"""Every number of the catalogue of bad inputs (RELIABILITY.md, C1 to C54) through fit and predict of all five pipelines.

`catalogue` says what becomes of each input, `broken` makes it, `all_calls` asks. No call changes its input or leaves a file.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cellplane.artifact.folder import save_model
from cellplane.data.sources import read_h5ad, write_h5ad
from cellplane.errors import ConfigError, DataError, FileFormatError, VocabularyError
from cellplane.pipelines.base import NotFittedError
from cellplane.pipelines.embedding import CellEmbeddingPipeline
from cellplane.pipelines.prediction import predict_new
from tests.data import test_bad_inputs as damaged
from tests.pipelines import broken
from tests.pipelines.all_calls import LEARNERS, Calls
from tests.pipelines.broken import digest, named_genes, small_cells
from tests.pipelines.catalogue import EMPTY, FILES, ROWS, SAME, Outcome, flagged, table, warned

PAGE = Path(__file__).resolve().parents[2] / "docs" / "bad-input.md"

CASES = [pytest.param(row, call, id=f"{row.number or 'C+'} {row.what}, {call}") for row in ROWS for call in row.calls]


@pytest.fixture(scope="module")
def asked() -> Callable[[str | None], Calls]:
    """The pipelines whose recipes name a layer, or none; fitted once each."""
    torch.set_num_threads(1)
    known: dict[str | None, Calls] = {}
    return lambda layer: known.setdefault(layer, Calls(layer))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder which is the current one, home and the place of temporary files; nothing may be in it afterwards."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CELLPLANE_HOME", str(folder / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert [path for path in folder.rglob("*") if path.is_file()] == []


@pytest.mark.filterwarnings("ignore:Observation names are not unique")  # anndata's word on C8
@pytest.mark.parametrize(("row", "call"), CASES)
def test_an_input_of_the_catalogue_meets_what_the_page_says(place, tmp_path, caplog, asked, row, call):
    calls = asked(row.layer)
    good = calls.clean if row.outcome(call) == SAME else {}
    cells = row.make(small_cells(1 if "beside" in call else 0))
    if row.on_disk:
        write_h5ad(cells, tmp_path / "cells.h5ad")
        cells = read_h5ad(tmp_path / "cells.h5ad", backed=True)
    before = digest(cells)
    caplog.clear()
    outcome = row.outcome(call)
    if outcome.error is not None:
        with pytest.raises(outcome.error, match=f"(?s){outcome.said}"):
            calls(call, cells)
    else:
        _check(outcome, call, calls(call, cells), good, caplog.messages)
    assert digest(cells) == before
    if outcome.word == flagged("").word:
        assert set(calls.flags(call.split()[0], cells)) == {outcome.said}
    if row.on_disk:
        cells.file.close()


def _check(outcome: Outcome, call: str, found: list[np.ndarray[Any, Any]], good: Mapping[str, Any], messages: list[str]) -> None:
    """What was found is what the outcome promises."""
    if outcome == SAME:
        for mine, theirs in zip(found, good[call], strict=True):
            np.testing.assert_array_equal(mine, theirs)
    for numbers in found:
        assert "denoise predict" in call or np.isfinite(numbers).all()
        assert np.isfinite(numbers).any() == (numbers.size > 0)
    assert (len(found[0]) == 0) == (outcome == EMPTY)
    if outcome.word == warned("").word:
        assert any(_matches(outcome.said, text) for text in messages), messages


def _matches(pattern: str, text: str) -> bool:
    return re.search(pattern, text, re.DOTALL) is not None


def test_every_number_has_a_row_or_is_a_matter_of_files():
    numbers = {row.number for row in ROWS if row.number}
    assert numbers | set(FILES) == {f"C{number}" for number in range(1, 55)}
    assert not numbers & set(FILES)


@pytest.mark.parametrize("number", FILES)
def test_what_is_wrong_with_a_file_is_refused_where_it_is_read(number):
    found = [row for row in damaged.ROWS if f"C{row.number}" == number]
    assert any(row.error is not None and issubclass(row.error, DataError) for row in found)


@pytest.mark.parametrize("task", ["impute", "perturb"])
@pytest.mark.parametrize("share", [0.5, 0.99])
def test_a_damaged_file_leaves_no_half_written_answer(tmp_path, asked, task, share):
    model = save_model(asked(None).fitted(task).folder_, tmp_path / "model")
    files = [tmp_path / "good.h5ad", tmp_path / "bad.h5ad"]
    for file in files:
        write_h5ad(small_cells(), file)
    files[1].write_bytes(files[1].read_bytes()[: int(share * files[1].stat().st_size)])
    with pytest.raises(FileFormatError, match=r"bad\.h5ad"):
        predict_new(task, str(model), (files, tmp_path / "out"))
    assert [path.name for path in sorted((tmp_path / "out").rglob("*"))] == ["good.h5ad"]
    assert read_h5ad(tmp_path / "out" / "good.h5ad").uns["cellplm"]


@pytest.mark.parametrize("task", LEARNERS)
def test_a_refused_fit_leaves_a_pipeline_that_has_learned_nothing(asked, task):
    calls = asked(None)
    pipeline = LEARNERS[task](calls.base, calls.recipe(task))
    cells = broken.with_value(np.nan)(small_cells())
    with pytest.raises(DataError, match="NaN"):
        pipeline.fit(cells, *([small_cells(1)] if task == "impute" else []))
    if task != "denoise":  # which may answer with its base model
        with pytest.raises(NotFittedError):
            pipeline.predict(small_cells())


@pytest.mark.parametrize("task", LEARNERS)
@pytest.mark.parametrize("names", [broken.strangers(5), broken.ensembl("ENSMUSG"), broken.symbols])
def test_genes_can_be_added_to_a_base_model_but_not_put_in_the_place_of_all(asked, task, names):
    cells = named_genes(names)(small_cells())
    with pytest.raises(VocabularyError, match="of 40 genes"):
        asked(None).fit(task, cells, cells.copy(), {"new_genes": "add", "genes": None} if task == "impute" else {"new_genes": "add"})


def test_a_low_overlap_is_told_with_the_answer(asked):
    cells = named_genes(broken.strangers(12))(small_cells())
    CellEmbeddingPipeline(asked(None).base).predict(cells, key_added="cellplm")
    assert cells.uns["cellplm"]["overlap"] == 12 / 40
    assert cells.uns["cellplm"]["n_shared"] == 12


def test_cells_of_unlearned_batches_are_counted_with_the_answer(asked):
    pipeline, cells = asked(None).fitted("denoise"), small_cells()
    cells.obs["batch"] = ["new", *cells.obs["batch"][1:]]
    pipeline.predict(cells, key_added="cellplm")
    assert cells.uns["cellplm"]["cells_of_unlearned_batches"] == 1
    pipeline.predict(fine := small_cells(), key_added="cellplm")
    assert "cells_of_unlearned_batches" not in fine.uns["cellplm"]


def test_a_perturbation_nobody_knows_is_an_error_or_a_flagged_fallback(asked):
    pipeline = asked(None).fitted("perturb")
    with pytest.raises(VocabularyError, match=r"NOSUCH is no gene the model knows.*targets.*fallback"):
        pipeline.predict(small_cells(), ["NOSUCH"])
    found = pipeline.predict(small_cells(), ["NOSUCH", "ENSG00000000005"], {"fallback": "mean_of_training"})
    assert found.obs["fallback"].tolist() == [True, False]
    assert np.isfinite(found.X).all()


@pytest.mark.parametrize("names", [[], [None], ["ENSG00000000005", 7], [""]])
def test_what_is_no_name_of_a_perturbation_is_told_so(asked, names):
    with pytest.raises(ConfigError, match=r"perturbations are names.*leave them out to ask for all learned ones"):
        asked(None).fitted("perturb").predict(small_cells(), names)


def test_one_name_may_stand_alone(asked):
    assert asked(None).fitted("perturb").predict(small_cells(), "ENSG00000000005").obs["perturbation"].tolist() == ["ENSG00000000005"]


def test_genes_that_the_controls_did_not_measure_are_marked_in_a_predicted_population(asked):
    found = asked(None).fitted("perturb").predict(named_genes(broken.strangers(12))(small_cells()))
    assert found.var["measured"].sum() == 12


def test_the_page_says_what_happens():
    written = PAGE.read_text(encoding="utf-8").split("<!-- rows -->\n")[1].split("\n<!-- end of rows -->")[0]
    assert written == table(), f"write this between the marks of {PAGE.name}:\n{table()}"
