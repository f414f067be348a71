"""Requests made up from our own OpenAPI document, right ones and wrong ones: no 5xx, no status or form that is not described."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.serve.wire import application

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis, which is not installed")
import hypothesis  # noqa: E402  (comes with schemathesis)
from hypothesis import HealthCheck, Phase  # noqa: E402
from schemathesis.checks import positive_data_acceptance  # noqa: E402

MODES = {mode.value: mode for mode in schemathesis.GenerationMode}
PLAIN = dict(deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def document(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> schemathesis.BaseSchema:
    hypothesis.configuration.set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))
    return schemathesis.openapi.from_asgi("/openapi.json", application(model_path))


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("examples", [6, pytest.param(100, marks=[pytest.mark.chaos, pytest.mark.full])], ids=["short", "full"])
def test_made_up_requests_are_answered_as_described(document: schemathesis.BaseSchema, mode: str, examples: int) -> None:
    """Right ones may be refused: that genes are the model's and lists fit one another is more than a schema can say."""
    unfit = [positive_data_acceptance]
    statuses: Counter[int] = Counter()
    for result in document.get_all_operations():
        operation = result.ok()
        if mode == "negative" and not (operation.path_parameters or operation.query or operation.body):
            continue  # nothing about it can be wrong

        @hypothesis.seed(0)
        @hypothesis.settings(max_examples=examples, **PLAIN)
        @hypothesis.given(case=operation.as_strategy(generation_mode=MODES[mode]))
        def ask(case: schemathesis.Case) -> None:
            if mode == "positive" and "model" in (case.path_parameters or {}):
                case.path_parameters["model"] = "tiny"
            answer = case.call()
            statuses[answer.status_code] += 1
            case.validate_response(answer, excluded_checks=unfit)

        ask()
    assert max(statuses) < 500
    assert (200 in statuses) == (mode == "positive"), statuses
    assert {400, 422} <= set(statuses)
