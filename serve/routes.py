"""Which version answers: the table of aliases and shares that every ingress holds a copy of.

Plain data and pure functions, no Ray: the router changes the table in one step (see `rollout`), each ingress resolves
a request against its newest copy exactly once, and the answer names the version that was found.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from cellplane.tracking.registry import CHAMPION as CHAMPION
from cellplane.tracking.registry import NAME as NAME
from cellplane.tracking.registry import PREVIOUS as PREVIOUS

from .limits import refuse

LABEL = r"[1-9][0-9]{0,8}|[0-9a-f]{12}"  # a registry number, or the head of a plain folder's checksum
REFERENCE = re.compile(rf"^({NAME})(?:@({NAME})|:({LABEL}))?$")
CHALLENGER = "challenger"
State = Literal["starting", "ready", "failed"]


@dataclass(frozen=True)
class Version:
    """One version of a model: its folder, where it came from, and whether it may answer.

    ``label`` is the registry's number, or the first twelve digits of a plain folder's checksum; ``reason`` says why a
    version failed or has been waiting.
    """

    label: str
    path: str
    run_id: str | None = None
    model_sha256: str = ""
    state: State = "starting"
    reason: str = ""


@dataclass(frozen=True)
class Route:
    """Where one request goes, and the alias that led there (None when a version was asked for by its label)."""

    model: str
    version: Version
    alias: str | None


@dataclass(frozen=True)
class Model:
    """Versions of one name by label, the aliases that point at them, the challenger's share of NAME's requests, its shadow.

    ``challenger_share`` in [0, 1]; ``shadow`` is the label of a version that gets copies of requests whose answers
    nobody sees.
    """

    name: str
    versions: Mapping[str, Version] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    challenger_share: float = 0.0
    shadow: str | None = None

    def route(self, alias: str | None, label: str | None, request_id: str) -> Route:
        """The ready version that is meant; ServiceError 404 for one that is not there, 503 while none is ready yet."""
        if alias is None and label is None:
            alias = self._share_of(request_id)
        wanted = label if alias is None else self.aliases.get(alias)
        version = None if wanted is None else self.versions.get(wanted)
        if version is not None and version.state == "ready":
            return Route(self.name, version, alias)
        if not any(known.state == "ready" for known in self.versions.values()):
            raise refuse(503, f"model {self.name!r} is starting; try again soon")
        raise refuse(404, f"{_written(self.name, alias, label)!r} is not served here; served: {', '.join(self.references())}")

    def references(self) -> list[str]:
        """Every way to ask for it now."""
        ready = {label for label, version in self.versions.items() if version.state == "ready"}
        by_alias = [f"{self.name}@{alias}" for alias, label in self.aliases.items() if label in ready]
        return [self.name, *by_alias, *(f"{self.name}:{label}" for label in self.versions if label in ready)]

    def aliases_of(self, label: str) -> list[str]:
        """The aliases that point at a version, sorted."""
        return sorted(alias for alias, target in self.aliases.items() if target == label)

    def _share_of(self, request_id: str) -> str:
        """Champion or challenger, by the request's id: a request that is sent again goes where it went before."""
        if self.challenger_share <= 0 or CHALLENGER not in self.aliases:
            return CHAMPION
        place = int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8], "big") / 2**64
        return CHALLENGER if place < self.challenger_share else CHAMPION


@dataclass(frozen=True)
class Table:
    """Every model by name; ``epoch`` grows with each change, so that an older copy never replaces a newer one."""

    models: Mapping[str, Model] = field(default_factory=dict)
    epoch: int = 0

    def route(self, reference: str, request_id: str = "") -> Route:
        """Where a request for NAME, NAME@ALIAS or NAME:VERSION goes; 400 for no such form, 404 for one not served."""
        match = REFERENCE.fullmatch(reference)  # `$` alone would let a newline pass
        if match is None:
            raise refuse(400, "a model is asked for as NAME, NAME@ALIAS or NAME:VERSION, in lower case letters, digits, . _ -")
        name, alias, label = match.groups()
        if name not in self.models:
            served = [other for model in self.models.values() for other in model.references()]
            raise refuse(404, f"model {reference!r} is not served here; served: {', '.join(served) or 'none'}")
        return self.models[name].route(alias, label, request_id)

    def with_model(self, model: Model) -> Table:
        """The next table, with this model as it is now."""
        return replace(self, models={**self.models, model.name: model}, epoch=self.epoch + 1)

    def without(self, name: str) -> Table:
        """The next table, without this model."""
        return replace(self, models={other: model for other, model in self.models.items() if other != name}, epoch=self.epoch + 1)

    def to_json(self) -> str:
        """The table as text, for the router's own restart."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Table:
        """The table of such a text."""
        plain = json.loads(text)
        return cls({name: _model(model) for name, model in plain["models"].items()}, plain["epoch"])


def _model(plain: Mapping[str, Any]) -> Model:
    versions = {label: Version(**version) for label, version in plain["versions"].items()}
    return Model(plain["name"], versions, plain["aliases"], plain["challenger_share"], plain["shadow"])


def _written(name: str, alias: str | None, label: str | None) -> str:
    return f"{name}@{alias}" if alias else f"{name}:{label}"
