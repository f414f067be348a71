"""What the ingress does with a request once it is read: find its version, ask it, count, and ask the shadow too.

The version is found once, in the newest table; the answer names it and the alias that led there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cellplane.artifact.judgement import UNKNOWN
from cellplane.errors import CellplaneError, ServiceError

from .limits import status_of
from .meters import Meters
from .replica import Answer
from .routes import CHAMPION, Route, Table
from .tasks import Question

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 5.0  # a probe must not hang on a busy model
LOAD_TIMEOUT_S = 2.0  # nor a scrape on a version whose copies are gone
SHADOWS_AT_ONCE = 4  # copies in flight; more are skipped, so that a slow shadow never slows the champion
SAME = 1e-3  # answers of a shadow that differ by less count as the same


class Ask(Protocol):
    """Calls a method of the replica that holds a version, near or far."""

    async def __call__(self, model: str, label: str, method: str, *arguments: object) -> Any:
        """The method's answer; its errors as they were raised."""


class Front:
    """The models of a table, asked through ``ask``."""

    def __init__(self, table: Callable[[], Table], ask: Ask, meters: Meters | None = None) -> None:
        self.table, self.meters, self._ask = table, meters or Meters(), ask
        self._shadows: set[asyncio.Task[None]] = set()

    async def ready(self) -> None:
        """ServiceError 503 unless every champion answers, soon; a model that is still loading keeps nobody from asking the others."""
        named = [(name, model.aliases.get(CHAMPION, ""), model) for name, model in self.table().models.items()]
        champions = [(name, label) for name, label, model in named if label in model.versions and model.versions[label].state == "ready"]
        if not champions:
            raise ServiceError("no model is served yet; try again soon", 503)
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await asyncio.gather(*(self._ask(name, label, "load") for name, label in champions))
        except (TimeoutError, CellplaneError) as error:
            raise ServiceError("the model does not answer yet; try again soon", 503) from error

    async def models(self) -> list[dict[str, Any]]:
        """Every version that answers, champions first."""
        table = self.table()
        references = [
            (name, label)
            for name, model in table.models.items()
            for label, version in sorted(model.versions.items(), key=lambda item: "champion" not in model.aliases_of(item[0]))
            if version.state == "ready"
        ]
        return await asyncio.gather(*(self._described(table, name, label) for name, label in references))

    def versions(self) -> list[dict[str, Any]]:
        """Every version there is or was tried: its state, why it failed, its aliases and its share of the requests."""
        found = []
        for name, model in self.table().models.items():
            shares = {"champion": 1 - model.challenger_share, "challenger": model.challenger_share}
            for label, version in model.versions.items():
                aliases = model.aliases_of(label)
                share = sum(shares.get(alias, 0.0) for alias in aliases)
                found.append(
                    {"name": name, "version": label, "state": version.state, "reason": version.reason or None, "aliases": aliases}
                    | {"share": share, "shadow": label == model.shadow}
                )
        return found

    def only(self) -> str:
        """The model's name where only one is served; ServiceError 422 naming them where there are several."""
        names = list(self.table().models)
        if len(names) != 1:
            raise ServiceError(f"name the model, {', '.join(names) or 'none'} is served", 422 if names else 503)
        return names[0]

    async def metrics(self) -> str:
        """Counts of this ingress for Prometheus, and how many requests each version put into a forward (one replica of it is asked)."""
        ready = [(name, label) for name, model in self.table().models.items() for label, v in model.versions.items() if v.state == "ready"]
        asked = (asyncio.wait_for(self._ask(name, label, "load"), LOAD_TIMEOUT_S) for name, label in ready)
        loads = await asyncio.gather(*asked, return_exceptions=True)
        for (name, label), load in zip(ready, loads, strict=True):
            if isinstance(load, dict):
                for what, count in load.items():
                    self.meters.put(f"cellplane_forward_{what}", {"model": name, "version": label}, count)
        return self.meters.text()

    async def describe(self, reference: str, request_id: str = "") -> dict[str, Any]:
        """One version."""
        table = self.table()
        route = table.route(reference, request_id)
        return {**await self._described(table, route.model, route.version.label), "alias": route.alias}

    async def card(self, reference: str) -> str:
        """The model card, Markdown."""
        route = self.table().route(reference)
        return str(await self._ask(route.model, route.version.label, "card"))

    async def genes(self, reference: str) -> dict[str, Any]:
        """The model's genes."""
        route = self.table().route(reference)
        genes: dict[str, Any] = await self._ask(route.model, route.version.label, "genes")
        return genes

    async def predict(self, reference: str, question: Question, request_id: str = "") -> Answer:
        """The answer to one request, with the alias that led to its version."""
        table = self.table()
        route = table.route(reference, request_id)
        labels = {"model": route.model, "version": route.version.label, "task": question.task}
        began = time.perf_counter()
        try:
            answer: Answer = await self._ask(route.model, route.version.label, "predict", question)
        except CellplaneError as error:
            self.meters.add("cellplane_requests_total", {**labels, "status": str(status_of(error))})
            raise
        self.meters.time(labels, time.perf_counter() - began)
        self._count(labels, answer, question.cells.n_cells)
        self._cast_shadow(table, route, question, answer)
        return replace(answer, about={**answer.about, "alias": route.alias})

    async def _described(self, table: Table, name: str, label: str) -> dict[str, Any]:
        aliases = table.models[name].aliases_of(label)
        described: dict[str, Any] = await self._ask(name, label, "describe")
        return {**described, "alias": next(iter(aliases), None), "aliases": aliases}

    def _count(self, labels: Mapping[str, str], answer: Answer, n_cells: int) -> None:
        where = {"model": labels["model"], "version": labels["version"]}
        self.meters.add("cellplane_requests_total", {**labels, "status": "200"})
        self.meters.add("cellplane_cells_total", where, n_cells)
        self.meters.add("cellplane_gene_overlap_sum", where, float(answer.about["gene_overlap"]))
        if "cell_type" in answer.columns:
            self.meters.add("cellplane_annotated_cells_total", where, n_cells)
            self.meters.add("cellplane_unknown_cells_total", where, int((answer.columns["cell_type"] == UNKNOWN).sum()))
            self.meters.add("cellplane_confidence_sum", where, float(np.nansum(answer.columns["confidence"])))

    def _cast_shadow(self, table: Table, route: Route, question: Question, answer: Answer) -> None:
        shadow = table.models[route.model].shadow
        if shadow is None or shadow == route.version.label:
            return
        if len(self._shadows) >= SHADOWS_AT_ONCE:
            self._note_shadow(route.model, shadow, "skipped")
            return
        copy = asyncio.get_running_loop().create_task(self._ask_shadow(route.model, shadow, question, answer))
        self._shadows.add(copy)
        copy.add_done_callback(self._shadows.discard)

    async def _ask_shadow(self, model: str, shadow: str, question: Question, answer: Answer) -> None:
        try:
            other: Answer = await self._ask(model, shadow, "predict", question)
            same = await asyncio.to_thread(_agree, answer, other)
        except Exception as error:  # nobody waits for a shadow: its trouble is counted, and told in the log
            log.warning("the shadow %s:%s failed: %s", model, shadow, type(error).__name__)
            self._note_shadow(model, shadow, "failed")
            return
        self._note_shadow(model, shadow, "same" if same else "other")

    def _note_shadow(self, model: str, shadow: str, outcome: str) -> None:
        self.meters.add("cellplane_shadow_requests_total", {"model": model, "version": shadow, "outcome": outcome})


def _agree(answer: Answer, other: Answer) -> bool:
    """Whether two versions name the same cell types, or give the same numbers where there are none."""
    if "cell_type" in answer.columns:
        return bool((answer.columns["cell_type"] == other.columns.get("cell_type")).all())
    return all(name in other.columns and _alike(values, other.columns[name]) for name, values in answer.columns.items())


def _alike(values: NDArray[Any], others: NDArray[Any]) -> bool:
    if values.shape != others.shape:
        return False
    return bool((values == others).all()) if values.dtype == object else np.allclose(values, others, rtol=SAME, atol=SAME)
