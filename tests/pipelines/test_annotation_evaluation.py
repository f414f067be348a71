"""Fits give all their rows or are fitted again, cells of all splits are drawn together, and the notes say what a table leaves out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cellplane.data.config import SimulateConfig
from cellplane.data.simulate import simulate
from cellplane.pipelines.annotation_evaluation import _fitted, _notes, _pictures, _Turn, _turns, pooled
from cellplane.pipelines.annotation_protocol import TUNED, Arm, Study, Trial, splits_of, study_of
from cellplane.pipelines.protocol import Entry, Found, Ledger, Method, Place
from cellplane.pipelines.protocol_config import AnnotationProtocol, EvaluatedData

OURS, OWN, TREES = Method("cellplm", "model"), Method("cellplm, own context", "model"), Method(TUNED, "baseline")


@pytest.fixture(scope="module")
def study() -> Study:
    tissue = simulate(SimulateConfig(n_cells=150, n_genes=30, n_types=2, n_batches=1, spatial=True))
    tissue.obs["cell_type"] = tissue.obs["cell_type"].astype(str)
    tissue.obs.iloc[:4, tissue.obs.columns.get_loc("cell_type")] = "rare"
    keys = {"labels_key": "cell_type", "spatial_key": "spatial"}
    return study_of("tissue", EvaluatedData.model_validate({"path": "none", "keys": keys, "guard": 20.0}), tissue, {}, 10)


@pytest.fixture
def turn(study) -> _Turn:
    """A split on which an arm answers without learning; `asked` counts how often it was."""
    asked = []

    def work(trial: Trial) -> dict[str, Found]:
        asked.append(trial.seed)
        return {method.name: Found({"macro_f1": 0.5, "accuracy": 0.5}) for method in (OURS, OWN)}

    split = next(splits_of(study, 0, 0))
    found = _Turn(Trial(study, split, 0), Arm((OURS, OWN), {}, work, (0,)), Place("tissue", "random", 0, 0))
    work.asked = asked
    return found


def test_one_fit_gives_all_rows_of_its_arm(turn, tmp_path):
    ledger = Ledger(tmp_path / "entries.jsonl", "a")
    assert [entry.method for entry in _fitted(turn, ledger)] == [OURS, OWN]
    assert turn.arm.work.asked == [0]
    assert all(entry.test_share == turn.trial.split.test_share for entry in ledger.entries())


def test_a_row_that_a_kill_has_lost_is_fitted_again_and_the_known_one_stays(turn, tmp_path):
    ledger = Ledger(tmp_path / "entries.jsonl", "a")
    ledger.measured(turn.place, OURS, lambda: Found({"macro_f1": 0.9, "accuracy": 0.9}))
    first, second = _fitted(turn, ledger)
    assert (first.metrics["macro_f1"], second.metrics["macro_f1"]) == (0.9, 0.5)
    assert turn.arm.work.asked == [0]


def test_seed_by_seed_every_arm_has_its_turn_on_every_split(study):
    config = AnnotationProtocol(data={"tissue": study.asked}, seeds=(0, 1), control_seeds=(1,), controls=("one cell",), local_blocks=0)
    turns = list(_turns(config, study))
    assert [turn.place.seed for turn in turns] == sorted(turn.place.seed for turn in turns)
    assert len({(turn.place, turn.arm.methods) for turn in turns}) == len(turns) == 2 * 10 * 3 + 10


def test_the_notes_count_what_is_left_out_and_what_was_chosen(study):
    place = Place("tissue", "random", 0, 0)
    families = ("random forest", "random forest", "logistic regression")
    chosen = [Entry(replace(place, split=number), TREES, {}, details={"family": family}) for number, family in enumerate(families)]
    text = "\n".join(_notes(study, [*chosen, Entry(place, OURS, {}, seconds=30.0), Entry(place, OURS, {}, seconds=10.0)]))
    assert "146 cells of 2 types; 4 cells of rare or unnamed types left out" in text
    assert "a guard band of 20 units (unit unknown) leaves" in text
    assert "times of 3: logistic regression 1, random forest 2" in text
    assert "20 s (at most 30)" in text


def test_cells_of_all_splits_are_drawn_together(tmp_path):
    places = [Place("cells", "random", split, 0) for split in (0, 1)]
    truths = {places[0]: np.array(["a", "b"], dtype=object), places[1]: np.array(["a"], dtype=object)}
    answers = (["a", "a"], ["a"])
    entries = [
        Entry(place, method, {}, details={"answers": said, **({"confidence": [0.9] * len(said)} if method == OURS else {})})
        for place, said in zip(places, answers, strict=True)
        for method in (OURS, TREES)
    ]
    truth, said, confidence = pooled([entry for entry in entries if entry.method == OURS], truths)
    assert (truth.tolist(), said.tolist(), confidence.tolist()) == (["a", "b", "a"], ["a", "a", "a"], [0.9] * 3)
    assert pooled([entry for entry in entries if entry.method == TREES], truths)[2].size == 0
    pictures = _pictures(entries, truths, (tmp_path, "cells, random"))
    assert [picture.path.name for picture in pictures] == [f"cells-random-{name}.png" for name in ("confusion", "f1", "reliability")]
    assert all(picture.path.stat().st_size > 1000 and picture.caption for picture in pictures)
