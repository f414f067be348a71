"""What happens to a request between the ingress and a version: routed once, counted, and copied to a shadow that nobody sees."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cellplane.errors import IntegrityError, ServiceError
from serve import front as front_module
from serve.codec import Cells
from serve.front import SHADOWS_AT_ONCE, Front
from serve.meters import Meters
from serve.replica import Answer
from serve.routes import Model, Table, Version
from serve.tasks import Question

CELLS = Cells(["GENE0001"], np.array([0, 1, 2]), np.zeros(2, dtype=np.int64), np.ones(2, dtype=np.float32))
SAID = {"gene_overlap": 0.5}


def table(shadow: str | None = None, share: float = 0.0) -> Table:
    versions = {label: Version(label, f"/m/{label}", state="ready") for label in ("1", "2")}
    return Table({"m": Model("m", versions, {"champion": "1", "challenger": "2"}, share, shadow)})


class Replicas:
    """Versions that answer with their own number, or as they are told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.behave: dict[str, Callable[[], Awaitable[dict[str, Any]]]] = {}

    async def __call__(self, model: str, label: str, method: str, *arguments: object) -> Any:
        self.asked.append((label, method))
        if method == "describe":
            return {"name": model, "version": label}
        if method == "load":
            return {"total": 2, "requests_total": 5, "cells_total": 10}
        columns = await self.behave[label]() if label in self.behave else {"embedding": np.ones((2, 3), dtype=np.float32)}
        return Answer(columns, {**SAID, "version": label})


@pytest.fixture
def replicas() -> Replicas:
    return Replicas()


def ask(front: Front, times: int = 1, reference: str = "m") -> list[Answer]:
    """Asks one after the other, and waits for the shadows."""

    async def all_of_them() -> list[Answer]:
        answers = [await front.predict(reference, Question("embed", CELLS), f"r{number}") for number in range(times)]
        await asyncio.gather(*front._shadows)
        return answers

    return asyncio.run(all_of_them())


def shadows(front: Front, outcome: str) -> float:
    return front.meters.value("cellplane_shadow_requests_total", {"model": "m", "version": "2", "outcome": outcome})


def test_an_answer_names_the_alias_that_led_to_it(replicas: Replicas) -> None:
    front = Front(table, replicas)
    found = [ask(front, reference=reference)[0].about for reference in ("m", "m@challenger", "m:2")]
    assert [(about["version"], about["alias"]) for about in found] == [("1", "champion"), ("2", "challenger"), ("2", None)]
    assert shadows(front, "same") == 0


def test_a_shadow_is_asked_everything_and_its_answers_are_only_compared(replicas: Replicas) -> None:
    front = Front(lambda: table(shadow="2"), replicas)
    assert {answer.about["version"] for answer in ask(front, 3)} == {"1"}
    assert shadows(front, "same") == 3

    async def other() -> dict[str, Any]:
        return {"embedding": np.zeros((2, 3), dtype=np.float32)}

    replicas.behave["2"] = other
    ask(front)
    assert shadows(front, "other") == 1


def test_a_shadow_that_fails_or_hangs_is_no_callers_trouble(replicas: Replicas) -> None:
    front = Front(lambda: table(shadow="2"), replicas)

    async def fails() -> dict[str, Any]:
        raise IntegrityError("NaN")

    replicas.behave["2"] = fails
    assert ask(front)[0].about["version"] == "1"
    assert shadows(front, "failed") == 1

    async def crowd() -> None:
        hang = asyncio.Event()

        async def hangs() -> dict[str, Any]:
            await hang.wait()
            return {"embedding": np.ones((2, 3), dtype=np.float32)}

        replicas.behave["2"] = hangs
        for number in range(SHADOWS_AT_ONCE + 3):
            await front.predict("m", Question("embed", CELLS), f"r{number}")
        assert shadows(front, "skipped") == 3
        hang.set()
        await asyncio.gather(*front._shadows)

    asyncio.run(crowd())


def test_cell_types_are_compared_by_name(replicas: Replicas) -> None:
    front = Front(lambda: table(shadow="2"), replicas)

    async def types(names: list[str]) -> dict[str, Any]:
        return {"cell_type": np.array(names, dtype=object), "confidence": np.random.default_rng().random(2)}

    replicas.behave = {"1": lambda: types(["T", "unknown"]), "2": lambda: types(["T", "unknown"])}
    ask(front)
    replicas.behave["2"] = lambda: types(["T", "B"])
    ask(front)
    assert (shadows(front, "same"), shadows(front, "other")) == (1, 1)
    one = {"model": "m", "version": "1"}
    assert front.meters.value("cellplane_unknown_cells_total", one) == 2
    assert front.meters.value("cellplane_annotated_cells_total", one) == front.meters.value("cellplane_cells_total", one) > 0
    assert front.meters.value("cellplane_confidence_sum", one) > 0


def test_a_share_of_callers_is_answered_by_the_challenger(replicas: Replicas) -> None:
    front = Front(lambda: table(share=0.5), replicas)
    versions = [answer.about["version"] for answer in ask(front, 200)]
    assert 60 < versions.count("2") < 140


def test_refusals_are_counted_by_status(replicas: Replicas) -> None:
    front = Front(table, replicas)

    async def busy() -> dict[str, Any]:
        raise ServiceError("busy", 503)

    replicas.behave["1"] = busy
    with pytest.raises(ServiceError):
        ask(front)
    assert 'cellplane_requests_total{model="m",status="503",task="embed",version="1"} 1' in front.meters.text()


def test_every_version_is_listed_with_its_part_and_a_failed_one_with_its_reason(replicas: Replicas) -> None:
    whole = table(shadow="2", share=0.25)
    model = whole.models["m"]
    failed = Version("3", "", state="failed", reason="its golden answers differ")
    front = Front(lambda: whole.with_model(replace(model, versions={**model.versions, "3": failed})), replicas)
    one, two, three = front.versions()
    assert (one["share"], two["share"], two["shadow"]) == (0.75, 0.25, True)
    assert (three["state"], three["reason"], three["aliases"]) == ("failed", "its golden answers differ", [])
    assert [row["version"] for row in asyncio.run(front.models())] == ["1", "2"]
    assert 'cellplane_forward_requests_total{model="m",version="1"} 5' in asyncio.run(front.metrics())
    assert front.only() == "m"


def test_a_model_that_still_loads_keeps_nobody_from_asking_the_others(replicas: Replicas) -> None:
    loading = Model("new", {"1": Version("1", "/m/1", state="starting")}, {"champion": "1"}, 0.0, None)
    front = Front(lambda: table().with_model(loading), replicas)
    asyncio.run(front.ready())
    assert replicas.asked == [("1", "load")], "the champion that there is, and not its challenger"


def test_a_copy_that_hangs_is_not_ready_and_stops_no_scrape(replicas: Replicas, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_module, "READY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(front_module, "LOAD_TIMEOUT_S", 0.05)

    async def hangs(model: str, label: str, method: str, *arguments: object) -> Any:
        await asyncio.sleep(30)

    front = Front(table, hangs)
    with pytest.raises(ServiceError, match="try again") as caught:
        asyncio.run(front.ready())
    assert caught.value.status == 503
    assert "cellplane_forward_total{" not in asyncio.run(front.metrics())


def test_without_a_model_nothing_is_ready(replicas: Replicas) -> None:
    front = Front(Table, replicas)
    with pytest.raises(ServiceError, match="no model") as refused:
        asyncio.run(front.ready())
    assert refused.value.status == 503
    asyncio.run(Front(table, replicas).ready())


def test_meters_write_what_scrapers_read() -> None:
    meters = Meters()
    meters.add("cellplane_cells_total", {"model": 'a"b\\c\nd'}, 3)
    meters.add("cellplane_cells_total", {"model": 'a"b\\c\nd'}, 4)
    for seconds in (0.004, 0.02, 100.0):
        meters.time({"model": "m"}, seconds)
    lines = meters.text().splitlines()
    assert r'cellplane_cells_total{model="a\"b\\c\nd"} 7' in lines
    assert 'cellplane_request_seconds_bucket{model="m",le="0.005"} 1' in lines
    assert 'cellplane_request_seconds_bucket{model="m",le="0.025"} 2' in lines
    assert 'cellplane_request_seconds_bucket{model="m",le="+Inf"} 3' in lines
    assert 'cellplane_request_seconds_count{model="m"} 3' in lines
    assert len([line for line in lines if line.startswith("# TYPE")]) == len(
        {line.split()[2] for line in lines if line.startswith("# TYPE")}
    )
