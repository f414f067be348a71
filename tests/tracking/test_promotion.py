"""A promotion passes the gate or says why not, is written down, and can be taken back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cellplane.errors import ConfigError
from cellplane.tracking.promotion import judge, promote, rollback
from cellplane.tracking.registry import aliases_of, history_of, list_models, register, set_alias, tag_version
from cellplane.tracking.runs import connect

NAME = "cellplm-annotate-toy"
Make = Callable[..., int]


@pytest.fixture
def registered(tracker: str, model_folder: Callable[[str], Path], logged_run: Callable[[str, Path], str]) -> Make:
    """Registers a model whose run has these held-out scores by method."""

    def make(content: str, **scores: float) -> int:
        folder = model_folder(content)
        run_id = logged_run(tracker, folder)
        for method, value in scores.items():
            connect(tracker).log_metric(run_id, f"test/{method}/macro_f1", value)
        return register(folder, run_id, NAME, tracker)

    return make


def test_a_better_version_is_promoted_and_the_history_says_by_whom_and_why(tracker: str, registered: Make) -> None:
    one, two = registered("a", cellplm=0.80, pca_knn=0.75), registered("b", cellplm=0.795, pca_knn=0.75)
    promote(NAME, one, tracker)
    verdict = promote(NAME, two, tracker)
    assert (verdict.metric, verdict.value, verdict.champion, verdict.baseline) == ("macro_f1", 0.795, 0.80, 0.75)
    assert aliases_of(NAME, tracker) == {"champion": two, "previous": one}
    first, second = history_of(NAME, tracker)
    assert (first["from"], second["from"], second["version"], second["forced"]) == (None, one, two, False)
    assert second["gate"]["champion"] == 0.80
    assert second["by"]
    assert second["time_ms"] >= first["time_ms"]


@pytest.mark.parametrize(
    ("scores", "words"), [({"cellplm": 0.70, "pca_knn": 0.6}, "the champion has"), ({"cellplm": 0.80, "pca_knn": 0.9}, "baseline")]
)
def test_a_worse_version_is_not_promoted_unless_it_must_be(tracker: str, registered: Make, scores: dict[str, float], words: str) -> None:
    one, two = registered("a", cellplm=0.80, pca_knn=0.75), registered("b", **scores)
    promote(NAME, one, tracker)
    with pytest.raises(ConfigError, match=words):
        promote(NAME, two, tracker)
    assert aliases_of(NAME, tracker) == {"champion": one}
    promote(NAME, two, tracker, force=True)
    assert aliases_of(NAME, tracker)["champion"] == two
    assert history_of(NAME, tracker)[-1]["forced"] is True


def test_where_every_method_is_near_the_majority_the_gate_says_that_none_is_of_use(tracker: str, registered: Make) -> None:
    useless = {"cellplm": 0.12, "pca_knn": 0.11, "logistic_regression": 0.09, "majority": 0.05}
    verdict = promote(NAME, registered("a", **useless), tracker)
    assert verdict.refusal is None
    assert verdict.warning is not None
    assert "no method does much better" in verdict.warning
    assert "macro_f1 0.120 of cellplm, the best, against 0.050" in verdict.warning
    assert history_of(NAME, tracker)[-1]["gate"]["warning"] == verdict.warning
    assert promote(NAME, registered("b", **{**useless, "cellplm": 0.4}), tracker).warning is None
    assert judge(NAME, registered("c", **{**useless, "pca_knn": 0.4}), tracker).warning is None  # the cells can be told apart


def test_a_version_without_scores_passes_and_that_is_written_down(tracker: str, registered: Make) -> None:
    one = registered("a")
    assert judge(NAME, one, tracker).metric is None
    promote(NAME, one, tracker)
    assert history_of(NAME, tracker)[0]["gate"]["value"] is None


def test_rollback_swaps_champion_and_previous_both_ways(tracker: str, registered: Make) -> None:
    one, two = registered("a"), registered("b")
    promote(NAME, one, tracker)
    with pytest.raises(ConfigError, match="no previous"):
        rollback(NAME, tracker)
    promote(NAME, two, tracker)
    assert rollback(NAME, tracker) == one
    assert aliases_of(NAME, tracker) == {"champion": one, "previous": two}
    assert rollback(NAME, tracker) == two
    assert [entry["what"] for entry in history_of(NAME, tracker)] == ["promote", "promote", "rollback", "rollback"]


def test_a_version_can_carry_why_it_does_not_serve(tracker: str, registered: Make) -> None:
    one = registered("a")
    set_alias(NAME, "challenger", one, tracker)
    tag_version(NAME, one, "serving", "failed: its golden answers differ", tracker)
    assert list_models(tracker)[0].tags["cellplane.serving"].startswith("failed")
