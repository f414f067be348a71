"""How a version gets its traffic: loaded beside the old one, tried, and only then pointed at; a broken one never is.

    put      start beside -> check through its own handle -> move the alias -> keep `previous` -> retire the rest
    failure  stop the newcomer, keep every pointer where it was, tell why

What starts, checks and stops versions is a `Stage`, so that the order of events is tested without a cluster.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

from cellplane.errors import CellplaneError, ConfigError

from .routes import CHALLENGER, CHAMPION, PREVIOUS, Model, Table, Version

log = logging.getLogger(__name__)


class Stage(Protocol):
    """Where versions run."""

    def start(self, model: str, version: Version) -> None:
        """Load a version beside the others and wait until it is up; raises CellplaneError with the reason."""

    def check(self, model: str, version: Version) -> Version:
        """Try it as a caller would, golden answers included, and say what it is; raises CellplaneError with the reason."""

    def stop(self, model: str, version: Version) -> None:
        """Take it down once requests in flight are answered."""


class Rollouts:
    """Owns the table. Every change of it is one step, published before the call returns; roll-outs of one model queue up."""

    def __init__(self, stage: Stage, publish: Callable[[Table], None], table: Table | None = None) -> None:
        self.stage, self._publish = stage, publish
        self.table = table or Table()
        self._lock = threading.RLock()
        self._turns: dict[str, threading.Lock] = {}

    def put(self, model: str, version: Version, alias: str = CHAMPION, wanted: Callable[[], bool] = lambda: True) -> None:
        """Let ``alias`` of ``model`` be this version, starting it when it does not run; what answered before goes on until then.

        ``wanted`` is asked again before the alias moves: a promotion that was taken back meanwhile changes nothing.
        Raises what the stage raised; then nothing has changed but the version's state and reason.
        """
        with self._lock:
            turn = self._turns.setdefault(model, threading.Lock())
        with turn:
            try:
                if not self._is_ready(model, version.label):
                    self._start(model, version)
                if wanted():
                    self.point(model, {alias: version.label})
            finally:
                self._retire(model)

    def point(self, model: str, aliases: Mapping[str, str]) -> None:
        """Move aliases to versions that are ready, in one step; a champion that moves leaves `previous` behind it.

        ConfigError for a version that is not ready.
        """
        with self._lock:
            known = self._model(model)
            for label in aliases.values():
                if not self._is_ready(model, label):
                    raise ConfigError(f"version {label} of {model!r} is not ready, so nothing may point at it")
            moved = {**known.aliases, **aliases}
            before = known.aliases.get(CHAMPION)
            if PREVIOUS not in aliases and before is not None and before != moved[CHAMPION]:
                moved[PREVIOUS] = before
            if CHALLENGER not in aliases and moved.get(CHALLENGER) == moved.get(CHAMPION):
                moved.pop(CHALLENGER, None)
            if moved == known.aliases:
                return
            self._change(replace(known, aliases=moved, challenger_share=known.challenger_share if CHALLENGER in moved else 0.0))
        log.info("model %s: %s", model, ", ".join(f"{alias} is version {label}" for alias, label in sorted(moved.items())))

    def rollback(self, model: str) -> str:
        """Swap champion and previous, both of which run; the label that answers now. ConfigError without a previous one."""
        with self._lock:
            aliases = self._known(model).aliases
            if PREVIOUS not in aliases:
                raise ConfigError(f"model {model!r} has no previous version to go back to")
            self.point(model, {CHAMPION: aliases[PREVIOUS], PREVIOUS: aliases[CHAMPION]})
            return aliases[PREVIOUS]

    def split(self, model: str, challenger_share: float, shadow: str | None = None) -> None:
        """Send a share of NAME's requests to the challenger, and copies of all others to ``shadow``, a label that is ready.

        ConfigError when either does not run.
        """
        with self._lock:
            known = self._known(model)
            if not 0 <= challenger_share <= 1:
                raise ConfigError(f"the challenger's share is {challenger_share}; expected 0 to 1")
            if challenger_share > 0 and CHALLENGER not in known.aliases:
                raise ConfigError(f"model {model!r} has no challenger; give a version that alias first")
            if shadow is not None and not self._is_ready(model, shadow):
                raise ConfigError(f"version {shadow} of {model!r} is not ready, so it cannot be a shadow")
            self._change(replace(known, challenger_share=challenger_share, shadow=shadow))

    def drop(self, model: str, alias: str) -> None:
        """Forget an alias and take down what nothing points at any more."""
        with self._lock:
            known = self._known(model)
            left = {name: label for name, label in known.aliases.items() if name != alias}
            self._change(replace(known, aliases=left, challenger_share=0.0 if alias == CHALLENGER else known.challenger_share))
        self.tidy(model)

    def tidy(self, model: str) -> None:
        """Take down what nothing points at; a roll-out in progress, whose newcomer nothing points at yet, does so at its own end."""
        with self._lock:
            turn = self._turns.setdefault(model, threading.Lock())
        if turn.acquire(blocking=False):
            try:
                if model in self.table.models:
                    self._retire(model)
            finally:
                turn.release()

    def remove(self, model: str) -> None:
        """Take a model down altogether."""
        with self._lock:
            known = self._known(model)
            self._set(self.table.without(model))
        for version in known.versions.values():
            if version.state != "failed":
                self.stage.stop(model, version)

    def refuse(self, model: str, label: str, reason: str) -> None:
        """Note that a version cannot even be started, and why."""
        if not self._is_ready(model, label):
            self._note(model, Version(label, path="", state="failed", reason=reason))

    def _start(self, model: str, version: Version) -> None:
        self._note(model, replace(version, state="starting", reason=""))
        try:
            self.stage.start(model, version)
            checked = self.stage.check(model, version)
        except CellplaneError as error:
            reason = str(error).replace(version.path, "its folder")  # callers are told, and paths are none of their business
            self._note(model, replace(version, state="failed", reason=reason))
            log.error("version %s of model %s is not used: %s", version.label, model, error)
            self.stage.stop(model, version)
            raise
        self._note(model, replace(checked, state="ready", reason=""))

    def _retire(self, model: str) -> None:
        """Stop ready versions that no alias and no shadow points at."""
        with self._lock:
            known = self._known(model)
            needed = {*known.aliases.values(), known.shadow}
            idle = [version for label, version in known.versions.items() if label not in needed and version.state == "ready"]
            if not idle:
                return
            gone = {version.label for version in idle}
            self._change(replace(known, versions={label: kept for label, kept in known.versions.items() if label not in gone}))
        for version in idle:
            self.stage.stop(model, version)

    def _is_ready(self, model: str, label: str) -> bool:
        version = self._model(model).versions.get(label)
        return version is not None and version.state == "ready"

    def _note(self, model: str, version: Version) -> None:
        with self._lock:
            known = self._model(model)
            self._change(replace(known, versions={**known.versions, version.label: version}))

    def _model(self, model: str) -> Model:
        return self.table.models.get(model) or Model(model)

    def _known(self, model: str) -> Model:
        if model not in self.table.models:
            raise ConfigError(f"model {model!r} is not served; served: {', '.join(self.table.models) or 'none'}")
        return self.table.models[model]

    def _change(self, model: Model) -> None:
        self._set(self.table.with_model(model))

    def _set(self, table: Table) -> None:
        self.table = table
        self._publish(table)
