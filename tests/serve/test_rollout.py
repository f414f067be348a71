"""The order of events in a roll-out, with a stage that only writes down what it is asked, and the table that requests are resolved by."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from cellplane.errors import ConfigError, IntegrityError, ServiceError
from serve.rollout import Rollouts
from serve.routes import Model, Table, Version


class Diary:
    """A stage that starts anything at once, except what it was told to break."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.broken: dict[str, str] = {}
        self.gate = threading.Event()
        self.gate.set()

    def start(self, model: str, version: Version) -> None:
        self.events.append(f"start {version.label}")
        assert self.gate.wait(10)
        if self.broken.get(version.label) == "start":
            raise IntegrityError(f"{version.path} has a damaged weights.safetensors")

    def check(self, model: str, version: Version) -> Version:
        self.events.append(f"check {version.label}")
        if self.broken.get(version.label) == "check":
            raise IntegrityError(f"version {version.label} gives other answers than when it was saved")
        return replace(version, model_sha256=f"sha of {version.label}")

    def stop(self, model: str, version: Version) -> None:
        self.events.append(f"stop {version.label}")


@pytest.fixture
def diary() -> Diary:
    return Diary()


@pytest.fixture
def published() -> list[Table]:
    return []


@pytest.fixture
def rollouts(diary: Diary, published: list[Table]) -> Rollouts:
    return Rollouts(diary, published.append)


def version(label: str) -> Version:
    return Version(label, path=f"/models/{label}")


def answered_by(rollouts: Rollouts, reference: str = "m", request_id: str = "r") -> str:
    return rollouts.table.route(reference, request_id).version.label


def test_a_version_is_started_and_checked_before_it_gets_traffic_and_the_one_before_is_kept(rollouts: Rollouts, diary: Diary) -> None:
    for label in ("1", "2"):
        rollouts.put("m", version(label))
    assert diary.events == ["start 1", "check 1", "start 2", "check 2"]
    assert (answered_by(rollouts), answered_by(rollouts, "m@previous"), answered_by(rollouts, "m:1")) == ("2", "1", "1")
    rollouts.put("m", version("3"))
    assert diary.events[-1] == "stop 1"
    assert set(rollouts.table.models["m"].versions) == {"2", "3"}


def test_no_table_ever_points_at_a_version_that_is_not_ready(rollouts: Rollouts, diary: Diary, published: list[Table]) -> None:
    diary.broken = {"2": "check", "4": "start"}
    for label in ("1", "2", "3", "4"):
        try:
            rollouts.put("m", version(label))
        except IntegrityError:
            continue
    for table in published:
        model = table.models["m"]
        assert all(model.versions[label].state == "ready" for label in model.aliases.values())
    epochs = [table.epoch for table in published]
    assert epochs == sorted(set(epochs))


@pytest.mark.parametrize(("where", "words"), [("start", "damaged"), ("check", "other answers")])
def test_a_broken_version_gets_no_traffic_and_says_why(rollouts: Rollouts, diary: Diary, where: str, words: str) -> None:
    rollouts.put("m", version("1"))
    diary.broken = {"2": where}
    with pytest.raises(IntegrityError, match=words):
        rollouts.put("m", version("2"))
    assert answered_by(rollouts) == "1"
    assert diary.events[-1] == "stop 2"
    told = rollouts.table.models["m"].versions["2"]
    assert (told.state, words in told.reason, "/models" in told.reason) == ("failed", True, False)
    with pytest.raises(ServiceError, match="m:1") as refused:
        rollouts.table.route("m:2")
    assert refused.value.status == 404
    diary.broken = {}
    rollouts.put("m", version("2"))
    assert answered_by(rollouts) == "2"


def test_rollback_moves_pointers_and_starts_nothing(rollouts: Rollouts, diary: Diary) -> None:
    rollouts.put("m", version("1"))
    with pytest.raises(ConfigError, match="no previous"):
        rollouts.rollback("m")
    rollouts.put("m", version("2"))
    before = list(diary.events)
    assert rollouts.rollback("m") == "1"
    assert (answered_by(rollouts), answered_by(rollouts, "m@previous")) == ("1", "2")
    assert rollouts.rollback("m") == "2"
    assert diary.events == before


def test_a_promotion_taken_back_while_its_version_starts_changes_nothing(rollouts: Rollouts, diary: Diary) -> None:
    rollouts.put("m", version("1"))
    rollouts.put("m", version("2"), wanted=lambda: False)
    assert answered_by(rollouts) == "1"
    assert diary.events[-1] == "stop 2"


def test_rollback_does_not_wait_for_a_version_that_is_starting(rollouts: Rollouts, diary: Diary) -> None:
    rollouts.put("m", version("1"))
    rollouts.put("m", version("2"))
    diary.gate.clear()
    slow = threading.Thread(target=rollouts.put, args=("m", version("3"), "challenger"))
    slow.start()
    assert rollouts.rollback("m") == "1"
    diary.gate.set()
    slow.join()
    assert (answered_by(rollouts), answered_by(rollouts, "m@challenger")) == ("1", "3")


def test_a_share_of_requests_goes_to_the_challenger_and_a_repeated_one_goes_where_it_went(rollouts: Rollouts) -> None:
    rollouts.put("m", version("1"))
    with pytest.raises(ConfigError, match="no challenger"):
        rollouts.split("m", 0.2)
    rollouts.put("m", version("2"), "challenger")
    ids = [f"request-{index}" for index in range(2000)]
    assert {answered_by(rollouts, "m", request_id) for request_id in ids} == {"1"}
    rollouts.split("m", 0.2)
    seen = [answered_by(rollouts, "m", request_id) for request_id in ids]
    assert 300 < seen.count("2") < 500
    assert seen == [answered_by(rollouts, "m", request_id) for request_id in ids]
    assert answered_by(rollouts, "m@champion") == "1"
    rollouts.put("m", version("2"))
    assert {answered_by(rollouts, "m", request_id) for request_id in ids} == {"2"}
    with pytest.raises(ConfigError, match="0 to 1"):
        rollouts.split("m", 1.5)


def test_a_shadow_is_kept_running_until_it_is_let_go(rollouts: Rollouts, diary: Diary) -> None:
    rollouts.put("m", version("1"))
    rollouts.put("m", version("2"), "challenger")
    rollouts.split("m", 0, shadow="2")
    rollouts.drop("m", "challenger")
    assert "stop 2" not in diary.events
    rollouts.split("m", 0)
    rollouts.drop("m", "challenger")
    assert diary.events[-1] == "stop 2"


def test_several_models_live_side_by_side_and_one_can_go(rollouts: Rollouts, diary: Diary) -> None:
    rollouts.put("m", version("1"))
    rollouts.put("n", version("7"))
    rollouts.remove("m")
    assert diary.events[-1] == "stop 1"
    assert answered_by(rollouts, "n") == "7"
    with pytest.raises(ServiceError, match=r"not served here; served: n, n@champion, n:7") as refused:
        rollouts.table.route("m")
    assert refused.value.status == 404


def test_a_table_survives_being_written_and_read(rollouts: Rollouts) -> None:
    rollouts.put("m", version("1"))
    rollouts.put("m", version("0a1b2c3d4e5f"), "challenger")
    rollouts.split("m", 0.5, "1")
    assert Table.from_json(rollouts.table.to_json()) == rollouts.table


def test_a_model_that_only_starts_asks_to_come_back() -> None:
    table = Table({"m": Model("m", {"1": version("1")})})
    with pytest.raises(ServiceError, match="starting") as refused:
        table.route("m")
    assert refused.value.status == 503


@pytest.mark.parametrize("reference", ["", "M", "m@", "m:0", "m:-1", "m:latest", "m@x@y", "../m", "m" * 65])
def test_what_is_no_reference_is_refused(reference: str) -> None:
    with pytest.raises(ServiceError, match="NAME") as refused:
        Table().route(reference)
    assert refused.value.status == 400
