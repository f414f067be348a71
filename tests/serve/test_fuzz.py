"""Ten thousand spoiled requests: none ends in a 5xx, none hangs, none takes the interpreter along. `fuzzing` makes them.

The short run is part of every suite; the long one belongs to `make chaos-full`.
"""

from __future__ import annotations

import pytest

from tests.serve.fuzzing import KINDS, judged, spoiled
from tests.serve.specialists import Specialist, imputer, perturber
from tests.serve.wire import Answered, run_beside

__all__ = ["imputer", "perturber"]

SLOWEST_S = 5.0
GROWN_MIB = 300  # no body of at most 200 kB may cost more, whatever it declares


def answer(status: int, body: bytes) -> Answered:
    return Answered(status, {}, body, 1)


def test_the_judge_knows_a_fault_when_it_sees_one() -> None:
    assert not judged(answer(200, b"anything"))
    assert not judged(answer(422, b'{"error": "row 1", "code": "invalid_cells"}'))
    assert not judged(answer(400, b'{"error": "row 1"}'))
    for status, body in (
        (500, b'{"error": "oh", "code": "internal"}'),
        (422, b"Traceback"),
        (418, b'{"error": "tea"}'),
        (400, b'{"detail": []}'),
    ):
        assert judged(answer(status, body))


def test_requests_are_the_same_for_the_same_seed_and_of_every_kind() -> None:
    first = [spoiled(0, index) for index in range(200)]
    assert first == [spoiled(0, index) for index in range(200)]
    assert first != [spoiled(1, index) for index in range(200)]
    assert {kind for kind, _ in first} == set(KINDS)


LONG = [pytest.mark.chaos, pytest.mark.full]


@pytest.mark.parametrize(
    ("model", "n_requests", "seed"),
    [
        ("model_path", 500, 0),
        pytest.param("model_path", 10_000, 1, marks=LONG),
        pytest.param("imputer", 3000, 2, marks=LONG),
        pytest.param("perturber", 3000, 3, marks=LONG),
    ],
)
def test_spoiled_requests_are_answered_or_refused_never_worse(
    request: pytest.FixtureRequest, model: str, n_requests: int, seed: int
) -> None:
    folder = request.getfixturevalue(model)
    path = folder.path if isinstance(folder, Specialist) else folder
    found = run_beside("tests.serve.fuzzing", str(path), str(n_requests), str(seed), timeout_s=900)
    assert not found["faults"], found["faults"]
    assert found["slowest_s"] < SLOWEST_S, f"request {found['slowest_index']} of seed {seed}"
    assert found["grown_mib"] < GROWN_MIB
    assert sum(found["statuses"].values()) == n_requests
    through = sum(count for what, count in found["statuses"].items() if what.endswith(" 200"))
    assert n_requests / 100 < through < n_requests / 2, "some must get through every layer, most must not"
